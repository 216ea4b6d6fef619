"""Workloads as lengths and arrivals: three kinds of file, and bad lines by name."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tokenmill.core import NotFoundError, UsageError
from tokenmill.costs.traffic import read_traffic

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def lines(*records: Any) -> str:
    return "\n".join(json.dumps(record) for record in records) + "\n\n"


def test_a_trace_of_azure(tmp_path: Path) -> None:
    found = read_traffic(write(tmp_path, "t.csv", AZURE))
    assert [call[:2] for call in found.calls] == [(374, 44), (396, 109)]
    assert found.counted and found.rate == pytest.approx(0.25) and found.peak_rate == pytest.approx(0.25)
    assert found.input.mean == 385 and found.input.p99 == 396
    assert found.arrival_cv2 is None


def test_a_trace_of_mooncake_counts_milliseconds(tmp_path: Path) -> None:
    text = lines(
        {"timestamp": 0, "input_length": 10, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 2000, "input_length": 20, "output_length": 7, "hash_ids": [1, 3]},
        {"timestamp": 4000, "input_length": 20, "output_length": 7, "hash_ids": [1]},
    )
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()))
    found = read_traffic(path)
    assert found.rate == pytest.approx(0.5) and found.arrival_cv2 == 0
    assert found.calls[1].blocks == (1, 3)


def test_the_fullest_minute(tmp_path: Path) -> None:
    rows = [f"{at},1,1" for at in [0, *range(100, 160), 300]]
    found = read_traffic(write(tmp_path, "t.csv", "timestamp,input_tokens,output_tokens\n" + "\n".join(rows)))
    assert found.peak_rate == pytest.approx(1.0) and found.rate == pytest.approx(61 / 300)


def test_chats_without_counts_are_guessed_and_it_is_said(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 21}]}
    found = read_traffic(write(tmp_path, "log.jsonl", lines(chat)))
    assert found.calls[0][:2] == (10, 6) and not found.counted
    assert found.rate is None and found.times == ()


def test_a_log_of_calls_has_its_usage(tmp_path: Path) -> None:
    call = {
        "timestamp": 7,
        "request": {"messages": [{"role": "user", "content": "hello"}]},
        "response": {"usage": {"prompt_tokens": 9, "completion_tokens": 3}},
    }
    other = {
        "request": {"messages": [{"role": "user", "content": "x" * 8}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": "y" * 12}}]},
    }
    found = read_traffic(write(tmp_path, "log.jsonl", lines(call, other)))
    assert [each[:3] for each in found.calls] == [(9, 3, 7.0), (2, 3, None)]
    assert not found.counted


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("t.csv", AZURE + "2023-11-16 18:15:52,x,3\n", "t.csv:4: ContextTokens is 'x'"),
        ("t.csv", AZURE + "2023-11-16 18:15:52,3\n", "t.csv:4: not as many fields"),
        ("t.csv", AZURE + "soon,3,3\n", "t.csv:4: 'soon' is no time"),
        ("t.csv", "a,b\n1,2\n", "t.csv:1: no columns"),
        ("t.csv", "input_length,output_length\n", "no requests"),
        ("t.jsonl", '{"input_length": 1, "output_length": 1}\n{"input', "t.jsonl:2: no JSON"),
        ("t.jsonl", "[1]", "t.jsonl:1: no JSON object"),
        ("t.jsonl", '{"input_length": -1, "output_length": 1}', "t.jsonl:1: input_length is '-1'"),
        ("t.jsonl", '{"input_length": 1, "output_length": 1.5}', "t.jsonl:1: output_length"),
        ("t.jsonl", '{"input_length": true, "output_length": 1}', "t.jsonl:1: input_length"),
        ("t.jsonl", '{"input_length": 1, "output_length": 1, "hash_ids": "a"}', "t.jsonl:1: hash_ids"),
        ("t.jsonl", '{"prompt": "x"}', "t.jsonl:1: neither lengths nor messages"),
        ("t.jsonl", '{"input_length": 1' + 400 * "0" + ', "output_length": 1}', "t.jsonl:1: input_length"),
        ("t.csv", AZURE + 200_000 * "1" + ",1,1\n", "t.csv:4: no CSV"),
        ("t.jsonl.gz", "not packed", "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_traffic(write(tmp_path, name, text))
    assert why in caught.value.message


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(AZURE.encode()))
    packed[10:14] = b"\xff\xff\xff\xff"
    (tmp_path / "t.csv.gz").write_bytes(packed)
    with pytest.raises(UsageError, match="cannot be read"):
        read_traffic(tmp_path / "t.csv.gz")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        read_traffic(tmp_path / "none.csv")
