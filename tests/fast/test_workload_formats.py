"""Every format of logs gives the same rows; what a line does not say is not made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fast.workload_tools import SYSTEM, asked, request, response, write_lines
from tokenmill.workload import Log, Origin, WorkloadCall, read_log, write_call

NUMBERS = range(1, 4)


def plain(log: Log) -> list[tuple[Any, str]]:
    assert not log.faults, log.faults
    return [(row.request["messages"], row.answer) for row in log.rows]


WANTED = [(asked(number), str(2 * number)) for number in NUMBERS]


def chat(number: int) -> dict[str, Any]:
    return {"messages": [*asked(number), {"role": "assistant", "content": str(2 * number)}]}


def capture(number: int) -> str:
    call = WorkloadCall(
        id=f"req_{number}",
        created=float(number),
        project="p",
        end_user="u_1" if number < 3 else "",
        feature="sums",
        request=request(number),
        response=response(number),
        deployment="d",
        origin=Origin(model="smollm2-135m"),
        terms=("Apache-2.0",),
    )
    return write_call(call).decode().rstrip("\n")


def litellm(number: int) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{number}",
        "call_type": "acompletion",
        "status": "success",
        "model": "gpt-5-mini",
        "messages": asked(number),
        "response": response(number),
        "model_parameters": {"temperature": 0, "stream": False},
        "startTime": 1_790_000_000.5,
        "prompt_tokens": 20,
        "completion_tokens": 3,
        "end_user": "someone",
        "request_tags": ["sums"],
    }


def spend_log(number: int) -> dict[str, Any]:
    sent = {"body": request(number)}
    texts = {
        "messages": "{}",
        "response": json.dumps(response(number)),
        "proxy_server_request": json.dumps(sent),
    }
    return {
        "request_id": f"r{number}",
        "call_type": "acompletion",
        "startTime": "2026-11-01T10:00:00Z",
        "spend": 0.1,
        **texts,
    }


def eval_item(number: int) -> dict[str, Any]:
    return {
        "object": "eval.run.output_item",
        "id": f"outputitem_{number}",
        "created_at": 1_790_000_000,
        "status": "pass",
        "datasource_item": {"input": "?", "ideal": str(2 * number)},
        "results": [{"name": "match", "passed": True}],
        "sample": {
            "input": asked(number),
            "output": [{"role": "assistant", "content": str(2 * number)}],
            "model": "gpt-5-mini",
            "usage": {"prompt_tokens": 20, "completion_tokens": 3, "cached_tokens": 0},
        },
    }


def sharegpt(number: int) -> dict[str, Any]:
    said = [("system", "Be brief."), ("human", asked(number)[1]["content"]), ("gpt", str(2 * number))]
    return {"id": f"c{number}", "conversations": [{"from": who, "value": text} for who, text in said]}


LINES: dict[str, Any] = {
    "openai-chat": chat,
    "capture": capture,
    "exchange": lambda n: {"request": request(n), "response": response(n)},
    "flywheel": lambda n: {
        "timestamp": 1_790_000_000 + n,
        "workload_id": "sums",
        "client_id": "app",
        "request": request(n),
        "response": response(n),
    },
    "litellm": litellm,
    "openai-eval": eval_item,
    "sharegpt": sharegpt,
    "pairs": lambda n: {"system": "Be brief.", "prompt": asked(n)[1]["content"], "completion": str(2 * n)},
}


@pytest.mark.parametrize("name", LINES)
def test_each_format_is_known_by_itself_and_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    log = read_log(write_lines(tmp_path / "log.jsonl", map(LINES[name], NUMBERS)))
    assert log.format == name
    assert plain(log) == WANTED
    assert [row.number for row in log.rows] == [1, 2, 3]
    assert len({row.id for row in log.rows}) == 3


@pytest.mark.parametrize("name", LINES)
def test_each_format_is_read_as_a_json_list_and_out_of_gzip(name: str, tmp_path: Path) -> None:
    import bz2
    import gzip

    values = [json.loads(each) if isinstance(each, str) else each for each in map(LINES[name], NUMBERS)]
    path = tmp_path / "log.json.gz"
    path.write_bytes(gzip.compress(json.dumps(values, indent=2).encode()))
    assert plain(read_log(path)) == WANTED
    path = tmp_path / "log.jsonl.bz2"
    path.write_bytes(bz2.compress("\n".join(map(json.dumps, values)).encode()))
    assert plain(read_log(path)) == WANTED


def test_what_the_line_says_beside_the_call_is_kept(tmp_path: Path) -> None:
    [first, *_] = read_log(write_lines(tmp_path / "a.jsonl", map(LINES["capture"], NUMBERS))).rows
    assert (first.origin, first.terms, first.slice) == ("smollm2-135m", ("Apache-2.0",), "sums")
    assert (first.created, first.conversation) == (1.0, "u_1")
    assert (first.num_input_tokens, first.num_cached_tokens, first.num_output_tokens) == (20, 8, 3)
    assert "model" not in first.request and first.request["temperature"] == 0
    [first, *_] = read_log(write_lines(tmp_path / "b.jsonl", map(spend_log, NUMBERS))).rows
    assert first.request["messages"] == asked(1)
    assert first.created == 1793527200.0
    [first, *_] = read_log(write_lines(tmp_path / "c.jsonl", map(eval_item, NUMBERS))).rows
    assert (first.reference, first.num_input_tokens) == ("2", 20)
    [first, *_] = read_log(write_lines(tmp_path / "d.jsonl", map(litellm, NUMBERS))).rows
    assert (first.slice, first.conversation, first.created) == ("sums", "someone", 1_790_000_000.5)
    [first, *_] = read_log(write_lines(tmp_path / "e.jsonl", map(chat, NUMBERS))).rows
    assert (first.origin, first.terms, first.created, first.num_input_tokens) == ("", (), None, None)


def batch_input(number: int) -> dict[str, Any]:
    return {
        "custom_id": f"t{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": request(number),
    }


def batch_output(number: int) -> dict[str, Any]:
    answer = {"status_code": 200, "request_id": "r", "body": response(number)}
    return {"id": f"batch_req_{number}", "custom_id": f"t{number}", "response": answer, "error": None}


def test_inputs_and_outputs_of_a_batch_are_joined_whatever_their_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "input.jsonl", map(batch_input, NUMBERS))
    write_lines(tmp_path / "output.jsonl", map(batch_output, reversed(NUMBERS)))
    log = read_log(tmp_path)
    assert (log.format, plain(log)) == ("openai-batch", WANTED)
    assert log.rows[0].num_output_tokens == 3


def test_halves_of_a_batch_that_stay_alone_are_faults(tmp_path: Path) -> None:
    failed = {"custom_id": "t3", "response": None, "error": {"code": "x", "message": "too slow"}}
    write_lines(tmp_path / "input.jsonl", map(batch_input, NUMBERS))
    write_lines(tmp_path / "output.jsonl", [batch_output(1), batch_output(7), failed])
    log = read_log(tmp_path)
    assert [row.answer for row in log.rows] == ["2"]
    said = [str(fault) for fault in log.faults]
    assert said[0].startswith("input.jsonl:2: there is no answer for t2")
    assert said[1].startswith("input.jsonl:3: there is no answer for t3")
    assert said[2].startswith("output.jsonl:2: there is no request for t7")
    assert said[3] == "output.jsonl:3: the call failed (too slow)"


def test_events_of_a_recorder_are_joined_and_its_head_and_end_are_no_faults(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [{"spec": {"eval_name": "sums"}}]
    for number in NUMBERS:
        shared = {"run_id": "r", "sample_id": f"s.{number}", "created_at": "2026-11-01 10:00:00+00:00"}
        data = {"prompt": asked(number), "sampled": [str(2 * number)]}
        events.append({**shared, "event_id": 2 * number, "type": "sampling", "data": data})
        data = {"correct": True, "expected": str(2 * number), "picked": "x"}
        events.append({**shared, "event_id": 2 * number + 1, "type": "match", "data": data})
    events.append({"final_report": {"accuracy": 1.0}})
    log = read_log(write_lines(tmp_path / "run.jsonl", events))
    assert plain(log) == WANTED
    assert [row.reference for row in log.rows] == ["2", "4", "6"]


def test_samples_of_evals_have_their_ideal_as_answer(tmp_path: Path) -> None:
    samples = [{"input": asked(n), "ideal": [str(2 * n), f"{2 * n}."]} for n in NUMBERS]
    log = read_log(write_lines(tmp_path / "samples.jsonl", samples))
    assert (log.format, plain(log)) == ("openai-eval", WANTED)


def test_each_answer_of_a_conversation_is_a_call(tmp_path: Path) -> None:
    said = [("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "So long")]
    line = {"id": "c", "conversations": [{"from": who, "value": text} for who, text in said]}
    first, second = read_log(write_lines(tmp_path / "log.jsonl", [line])).rows
    assert (first.answer, second.answer) == ("Hello", "So long")
    assert first.conversation == second.conversation == "c"
    assert [each["content"] for each in second.request["messages"]] == ["Hi", "Hello", "Bye"]


def test_tool_calls_are_canonical_whatever_their_ids_and_spaces(tmp_path: Path) -> None:
    def line(id: str, arguments: str) -> dict[str, Any]:
        call = {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {
            "messages": [SYSTEM, {"role": "user", "content": id}, message],
            "tools": [{"type": "function"}],
        }

    lines = [line("a", '{"y": 1, "x": "é"}'), line("b", '{"x":"\\u00e9","y":1}'), line("c", "no json")]
    first, second, third = read_log(write_lines(tmp_path / "log.jsonl", lines)).rows
    assert first.answer == second.answer == '[{"arguments":{"x":"é","y":1},"name":"f"}]'
    assert third.answer == '[{"arguments":"no json","name":"f"}]'
    assert first.request["tools"] == [{"type": "function"}]


def test_columns_of_csv_are_found_or_named(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('text,category,when\n"two\nlines, ""quoted""",a,1790000001\nhi,b,1790000002\n')
    log = read_log(path)
    assert [(row.number, row.answer) for row in log.rows] == [(2, "a"), (4, "b")]
    assert log.rows[0].request["messages"][0]["content"] == 'two\nlines, "quoted"'
    log = read_log(path, columns={"prompt": "category", "answer": "text", "created": "when"})
    assert [(row.answer, row.created) for row in log.rows][1] == ("hi", 1_790_000_002.0)


def test_parts_of_a_content_are_joined_and_pictures_are_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    answer = {"role": "assistant", "content": "c"}
    lines = [{"messages": [{"role": "user", "content": each}, answer]} for each in (parts, picture)]
    log = read_log(write_lines(tmp_path / "log.jsonl", lines))
    assert log.rows[0].request["messages"][0]["content"] == "ab"
    [fault] = log.faults
    assert fault.number == 2 and "image_url" in fault.reason
