"""Recorded traffic: read as it is, refused with file and line, turned into prompts of exact length."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest

from tokenmill.core import NotFoundError, UsageError
from tokenmill.evals.load import PromptMaker, read_prompts, read_trace
from tokenmill.evals.load.servegen import draw_calls, read_clients
from tokenmill.evals.load.traces import Call, replayed, scaled_lengths
from tokenmill.evals.load.workload import WorkloadConfig, read_workload
from tokenmill.models.text.byte_tokenizer import ByteTokenizer

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 1500, "input_length": 700, "output_length": 6, "hash_ids": [0, 9]},
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def mooncake(path: Path) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in MOONCAKE))


def test_azure_times_count_from_the_first_call(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", AZURE + "2023-11-16 18:15:50.9951690,396,109\r\n")
    first, second = read_trace(path)
    assert (first.at_s, first.num_input_tokens, first.num_output_tokens) == (0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579, abs=1e-5)
    assert replayed([first, second], 2.0)[1] == pytest.approx(4.314579 / 2, abs=1e-5)


def test_mooncake_keeps_its_blocks(tmp_path: Path) -> None:
    packed = tmp_path / "m.jsonl.gz"
    packed.write_bytes(gzip.compress(mooncake(tmp_path / "m.jsonl").read_bytes()))
    first, second = read_trace(packed)
    assert (first.at_s, second.at_s) == (0.0, 0.5) and second.blocks == (0, 9)
    assert scaled_lengths([first], 0.1)[0] == Call(
        at_s=0.0, num_input_tokens=110, num_output_tokens=1, blocks=(0, 1, 2), block_tokens=51
    )


def test_a_table_of_lengths_has_no_times(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", "num_prefill_tokens,num_decode_tokens,num_total_tokens\n10,2,12\n")
    calls = read_trace(path)
    assert calls == (Call(at_s=None, num_input_tokens=10, num_output_tokens=2),)
    with pytest.raises(UsageError, match="no times"):
        replayed(calls)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (AZURE + "yesterday,1,1\n", 3),
        (AZURE + "2023-11-16 18:15:50,1\n", 3),
        (AZURE + "2023-11-16 18:15:50,0,1\n", 3),
        (AZURE + "2023-11-16 18:15:45,1,1\n", 3),
        ("a,b,c\n", 1),
        ('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}\n', 1),
        ('{"timestamp": 0, "input_length": 600, "output_length": 1}\n', 1),
        ('{"timestamp": 0\n', 1),
        ('{"timestamp": NaN, "input_length": 6, "output_length": 1, "hash_ids": [1]}\n', 1),
        ('{"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": [-1]}\n', 1),
        ('{"timestamp": 0, "input_length": Infinity, "output_length": 1, "hash_ids": [1]}\n', 1),
        ("num_prefill_tokens,num_decode_tokens\n1,1\ninf,1\n", 3),
        (AZURE + 200_000 * "1" + ",1,1\n", 3),
    ],
)
def test_a_bad_trace_names_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path / "bad", text)
    with pytest.raises(UsageError, match=rf"bad:{line}:"):
        read_trace(path)


def test_a_trace_that_is_empty_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_trace(write(tmp_path / "empty", ""))
    with pytest.raises(UsageError, match="no calls"):
        read_trace(write(tmp_path / "head", AZURE.split("\r\n")[0]))
    with pytest.raises(NotFoundError):
        read_trace(tmp_path / "nothing")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(AZURE.encode() + 9 * b"2023-11-16 18:15:47,1,1\n")[:-12])
    with pytest.raises(UsageError, match="damaged"):
        read_trace(tmp_path / "cut.gz")


def test_the_same_blocks_are_the_same_text_and_others_are_not(tmp_path: Path) -> None:
    first, second = read_trace(mooncake(tmp_path / "m"))
    maker = PromptMaker(seed=5)
    a, b = maker.request(0, first).text.split(), maker.request(1, second).text.split()
    assert (len(a), len(b)) == (1100, 700)
    assert a[:512] == b[:512] and a[512:700] != b[512:]
    assert PromptMaker(seed=6).request(0, first).text.split()[:512] != a[:512], "another seed, other words"
    alone = Call(at_s=None, num_input_tokens=50, num_output_tokens=1)
    assert maker.request(0, alone).text != maker.request(1, alone).text, "without blocks nothing is shared"


def test_lengths_are_exact_with_a_tokenizer_or_refused() -> None:
    """Of bytes no word is one token, so this one knows no common words."""
    with pytest.raises(UsageError, match="common words"):
        PromptMaker(ByteTokenizer())


def servegen(folder: Path, number: int, rate: float, family: str, shape: float) -> None:
    write(folder / f"chunk-{number}-trace.csv", f"0,0,0,,0,0\n600,{rate},1,{family},{shape},1.0\n")
    histograms = {"input_tokens": "{100: 0.5, 300: 0.5}", "output_tokens": "{20: 1.0}"}
    write(folder / f"chunk-{number}-dataset.json", json.dumps({"0": histograms}))


def test_servegen_clients_keep_their_rate_their_lengths_and_their_bursts(tmp_path: Path) -> None:
    servegen(tmp_path, 2, 3.0, "Gamma", 0.2)
    servegen(tmp_path, 10, 1.0, "Weibull", 1.0)
    clients = read_clients(tmp_path)
    assert [client.name for client in clients] == ["chunk-2", "chunk-10"]
    calls = draw_calls(clients, start_s=600, num_calls=8000, seed=1)
    times = [call.at_s or 0.0 for call in calls]
    assert times == sorted(times) and 8000 / times[-1] == pytest.approx(4.0, rel=0.06)
    assert {call.num_output_tokens for call in calls} == {20}
    assert sum(call.num_input_tokens for call in calls) / 8000 == pytest.approx(200, rel=0.03)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean
    assert spread > 1.4, "three quarters come from a client with bursts; Poisson has 1"
    with pytest.raises(UsageError, match="no client calls"):
        draw_calls(clients, start_s=0, num_calls=10, seed=1)


def test_bad_statistics_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_clients(tmp_path)
    servegen(tmp_path, 1, 1.0, "Normal", 1.0)
    with pytest.raises(UsageError, match=r"chunk-1-trace.csv:2"):
        read_clients(tmp_path)
    servegen(tmp_path, 1, 1.0, "Gamma", 1.0)
    write(tmp_path / "chunk-1-dataset.json", '{"0": {"input_tokens": "__import__(1)"}}')
    with pytest.raises(UsageError, match=r"chunk-1-dataset.json: no histograms"):
        read_clients(tmp_path)
    for text in ("__import__('os')", "{1: -1.0}", "{1: nan}", "[3]"):
        lengths = {"0": {"input_tokens": text, "output_tokens": "{1: 1.0}"}}
        write(tmp_path / "chunk-1-dataset.json", json.dumps(lengths))
        with pytest.raises(UsageError, match=r"chunk-1-dataset.json, window 0"):
            draw_calls(read_clients(tmp_path), start_s=600, num_calls=1, seed=0)


def test_a_workload_counts_what_does_not_fit(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "m")
    workload = read_workload(WorkloadConfig(num_requests=5, trace=path), context_length=1000)
    assert len(workload.calls) == 1 and workload.num_left_out == 1 and workload.has_times
    with pytest.raises(UsageError, match="no request fits"):
        read_workload(WorkloadConfig(num_requests=5, trace=path), context_length=100)


def test_levels_have_prompts_of_their_own_and_reruns_the_same() -> None:
    workload = read_workload(WorkloadConfig(num_requests=3, num_input=20), context_length=None)
    texts = [[r.text for r in workload.requests(level, None, ignore_eos=True)] for level in (0, 1, 0)]
    assert texts[0] == texts[2] and not set(texts[0]) & set(texts[1])
    assert len(set(texts[0])) == 3 and all(len(text.split()) == 20 for text in texts[0])


def test_prompts_of_a_users_file(tmp_path: Path) -> None:
    rows = [
        '{"prompt": "a"}',
        '{"turns": ["b", "c"]}',
        '"d"',
        '{"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]}',
        '{"turns": [{"content": "g", "prompt": "h"}]}',
    ]
    assert read_prompts(write(tmp_path / "p", "\n".join(rows))) == ("a", "b", "d", "e", "h")
    assert read_prompts(write(tmp_path / "q", '[\n{"instruction": "x"}\n]')) == ("x",)
    for bad in ('{"prompt": ""}', "{", "3", '{"messages": 3}'):
        with pytest.raises(UsageError, match=r":2: "):
            read_prompts(write(tmp_path / "bad", rows[0] + "\n" + bad))
    workload = read_workload(
        WorkloadConfig(num_requests=7, prompts=tmp_path / "p", num_output=3), context_length=None
    )
    requests = workload.requests(0, None, ignore_eos=False)
    assert [request.text for request in requests] == ["a", "b", "d", "e", "h", "a", "b"]
    assert requests[0].params.max_tokens == 3 and not requests[0].params.ignore_eos
