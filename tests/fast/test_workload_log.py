"""Wrong lines are named by number and cost nothing else; no file is too large or too odd to be read."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.fast.workload_tools import asked, request, response, write_lines
from tokenmill.core import NotFoundError, ResourceError, TokenmillError, UsageError
from tokenmill.workload import read_log, write_rejected


def good(number: int) -> str:
    return json.dumps({"request": request(number), "response": response(number)})


WRONG = {
    "{": "is no JSON",
    "[1]": "is a list, expected an object",
    '"text"': "is a text, expected an object",
    "12": "is a number, expected an object",
    '{"a": 1}': "has the fields a",
    '{"messages": []}': "looks like openai-chat",
    '{"request": {}, "response": {}}': "the request has no messages",
    '{"request": {"prompt": "x"}, "response": {}}': "raw text",
    '{"request": null, "response": null}': "the request is no object",
    '{"request": {"messages": [{"role": "wizard", "content": "x"}]}, "response": {}}': "messages[0].role",
    '{"request": {"messages": [{"role": "user"}]}, "response": {}}': "messages[0] has no content",
    '{"request": {"messages": [{"role": "system", "content": "x"}]}, "response": {}}': "nobody asks",
    "\udcff": "is no JSON",
    "[" * 100_000: "is no JSON",
    '{"request": NaN, "response": 1}': "is no JSON",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_named_and_the_others_are_read(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    text = "\n".join([good(1), good(2), "", line, good(3)])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    log = read_log(path)
    assert [row.number for row in log.rows] == [1, 2, 5]
    [fault] = log.faults
    assert fault.number == 4
    assert WRONG[line] in fault.reason


ANSWERS: list[tuple[Any, str]] = [
    ({"error": {"message": "overloaded"}}, "the response is an error (overloaded)"),
    ({"choices": []}, "no choices"),
    (None, "there is no response"),
    ([{"choices": []}], "list of events"),
    (response(1, choices=[{"message": {"role": "assistant", "content": " "}}]), "the answer is empty"),
    (response(1, choices=[{"message": {"content": None, "refusal": "no"}}]), "a refusal"),
    (response(1, choices=[{"message": {"content": "x"}, "finish_reason": "content_filter"}]), "filter"),
    (response(1, choices=[{"message": {"tool_calls": [{"id": 1}]}}]), "no function"),
    (response(1, choices=[None]), "no choices"),
]


@pytest.mark.parametrize(("given", "reason"), ANSWERS)
def test_a_call_without_an_answer_is_no_row(given: Any, reason: str, tmp_path: Path) -> None:
    line = json.dumps({"request": request(9), "response": given})
    log = read_log(write_lines(tmp_path / "log.jsonl", [good(1), line]))
    [fault] = log.faults
    assert (fault.number, len(log.rows)) == (2, 1)
    assert reason in fault.reason


def test_wrong_lines_are_kept_aside(tmp_path: Path) -> None:
    log = read_log(write_lines(tmp_path / "log.jsonl", [good(1), '{"half": ', good(2)]))
    write_rejected(tmp_path / "log.rejected.jsonl", log.faults)
    [line] = (tmp_path / "log.rejected.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert (kept["line"], kept["text"]) == (2, '{"half": ')
    assert len(read_log(tmp_path).rows) == 2, "what is kept aside is no log of a folder"


def test_a_line_beyond_the_bound_is_skipped_and_never_held(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(f"{good(1)}\n{'x' * 20_000_000}\n{good(2)}".encode(), 1))
    tracemalloc.start()
    log = read_log(path, max_line_bytes=10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row.number for row in log.rows] == [1, 3]
    assert log.faults[0].number == 2 and "longer than 10000 bytes" in log.faults[0].reason
    assert peak < 2_000_000


def test_too_many_rows_end_with_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", map(good, range(1, 6)))
    assert len(read_log(path, max_rows=5).rows) == 5
    with pytest.raises(ResourceError, match="more than 4 calls"):
        read_log(path, max_rows=4)


def test_equal_calls_are_rows_and_one_call_logged_twice_is_one(tmp_path: Path) -> None:
    chat = {"messages": [*asked(1), {"role": "assistant", "content": "2"}]}
    log = read_log(write_lines(tmp_path / "a.jsonl", [chat, chat]))
    assert len({row.id for row in log.rows}) == 2
    log = read_log(write_lines(tmp_path / "b.jsonl", [good(1), good(2), good(1)]))
    assert len(log.rows) == 2
    assert [str(fault) for fault in log.faults] == ["3: is the call of line 1 again"]


def test_ids_do_not_hang_on_the_place_in_the_file(tmp_path: Path) -> None:
    first = read_log(write_lines(tmp_path / "a.jsonl", map(good, (1, 2, 3))))
    second = read_log(write_lines(tmp_path / "b.jsonl", map(good, (3, 1))))
    by_answer = {row.answer: row.id for row in first.rows}
    assert [row.id for row in second.rows] == [by_answer["6"], by_answer["2"]]


def test_errors_name_the_file_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        read_log(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(UsageError, match="is empty"):
        read_log(empty)
    with pytest.raises(UsageError, match=r"no line makes a row; the first: a\.jsonl:1 is no JSON"):
        read_log(write_lines(tmp_path / "a.jsonl", ["{"]))
    with pytest.raises(UsageError, match="no format is known with the fields x, y"):
        read_log(write_lines(tmp_path / "b.jsonl", [{"x": 1, "y": 2}]))
    with pytest.raises(UsageError, match=r"list\.json:3: is no JSON"):
        read_log(write_lines(tmp_path / "list.json", ["[", '{"messages": []},', '{"half": ]']))
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(good(1).encode())[:-9])
    with pytest.raises(UsageError, match="is damaged"):
        read_log(tmp_path / "bad.jsonl.gz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotFoundError, match="has no logs"):
        read_log(tmp_path / "folder")


def test_csv_faults_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f'prompt,answer\n"a\nb",1\nc\n{"x" * 3000},2\n,3\nd,4\n')
    log = read_log(path, max_line_bytes=1000)
    assert [(row.number, row.answer) for row in log.rows] == [(2, "1"), (7, "4")]
    assert [fault.number for fault in log.faults] == [4, 5, 6]


def test_a_csv_file_of_another_country_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes("\ufeffFrage;Antwort\na, b;1\n".encode() + "ä;2\n".encode("latin-1") + "ü;3\n".encode())
    log = read_log(path, columns={"prompt": "Frage", "answer": "Antwort"})
    assert [(row.number, row.answer) for row in log.rows] == [(2, "1"), (4, "3")]
    assert [str(fault) for fault in log.faults] == ["3: is not UTF-8"]


def test_a_quote_that_never_ends_is_named_with_what_it_swallowed(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('prompt,answer\na,1\n"b,2\n' + f"{'c' * 1000},3\n" * 200 + "d,4\n")
    log = read_log(path)
    assert log.rows[0].number == 2 and log.rows[-1].answer == "4"
    [fault] = log.faults
    assert fault.number == 3 and "up to line" in fault.reason


def test_a_list_larger_than_the_buffer_is_read_with_its_lines(tmp_path: Path) -> None:
    entries = [
        json.dumps(json.loads(good(number)) | {"note": "é" * 3000}, ensure_ascii=False)
        for number in range(1, 801)
    ]
    path = tmp_path / "log.json"
    path.write_text("\ufeff \n[\n" + ",\n".join(entries) + "\n]\n")
    assert path.stat().st_size > 4 << 20
    log = read_log(path)
    assert [row.number for row in log.rows] == list(range(3, 803)) and not log.faults
    with pytest.raises(UsageError, match=r"log\.json:3 is longer than 1000 bytes"):
        read_log(path, max_line_bytes=1000)
    path.write_text("[\n" + ",\n".join(entries))
    with pytest.raises(UsageError, match=r"log\.json:801: .*the list does not end"):
        read_log(path)


def test_random_damage_never_ends_in_an_unknown_error(tmp_path: Path) -> None:
    from tests.fast.test_workload_formats import LINES

    rng = random.Random(8)
    path = tmp_path / "log.jsonl"
    for _ in range(300):
        made = (LINES[rng.choice([*LINES])](number) for number in range(1, 5))
        text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in made)
        data = bytearray(text.encode())
        for _ in range(rng.randrange(1, 12)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice(
                [b"", b"\xff", b"null", b"{", b'"', b"[", b"1", b"\n"]
            )
        path.write_bytes(data)
        try:
            log = read_log(path)
        except TokenmillError:
            continue
        numbers = {each.number for each in log.rows} | {each.number for each in log.faults}
        assert numbers >= {at for at, line in enumerate(bytes(data).split(b"\n"), 1) if line.strip()}


def test_any_value_in_the_place_of_any_field_is_a_row_or_a_fault(tmp_path: Path) -> None:
    from tests.fast.test_workload_formats import LINES

    odd: list[Any] = [None, True, -1, 1e300, "", "x", [], [None], {}, {"a": {}}, [[{}]], {"role": []}]
    path = tmp_path / "log.jsonl"
    for make in LINES.values():
        value = make(1)
        whole = json.loads(value) if isinstance(value, str) else value
        lines = [json.dumps(whole)] * 3
        lines += [json.dumps(each) for each in _replaced(whole, odd)]
        path.write_text("\n".join(lines))
        log = read_log(path)
        numbers = {each.number for each in log.rows} | {each.number for each in log.faults}
        assert numbers == set(range(1, len(lines) + 1))


def _replaced(value: Any, odd: list[Any]) -> list[Any]:
    """The value with each of its parts, at any depth, replaced by each of these."""
    if isinstance(value, dict):
        return [
            {**value, name: other}
            for name, inner in value.items()
            for other in [*odd, *_replaced(inner, odd)]
        ]
    if isinstance(value, list):
        return [
            [*value[:at], other, *value[at + 1 :]]
            for at, inner in enumerate(value)
            for other in [*odd, *_replaced(inner, odd)]
        ]
    return []
