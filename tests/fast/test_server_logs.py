"""Logs hold what happened, and no content: no prompt, no key, no line breaks of somebody else's."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fast.settled_calls import CANARY, settled
from tokenmill.core import UsageError
from tokenmill.server.logs import FIELDS, JsonFormatter, log_http, log_settled, set_up_logs


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Where logs go while a test runs."""
    stream = io.StringIO()
    root = logging.getLogger()
    level = root.level
    handler = set_up_logs("debug", stream)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def read(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_settled_call_is_a_line_with_its_numbers(lines: io.StringIO) -> None:
    log_settled(settled(ttft_s=0.25, total_s=1.5))
    (line,) = read(lines)
    assert line["event"] == "settled" and line["level"] == "info" and line["logger"].startswith("tokenmill.")
    assert line["request_id"] == "req_1" and line["key_id"] == "key_1" and line["model"] == "mock"
    assert (line["num_prompt_tokens"], line["num_cached_tokens"], line["num_output_tokens"]) == (10, 4, 5)
    assert (line["ttft_ms"], line["total_ms"], line["tier"], line["finish"]) == (
        250,
        1500,
        "fast",
        "completed",
    )
    assert (line["cost_nano_usd"], line["price_nano_usd"]) == (7000, 9000)
    assert set(line) <= FIELDS | {"time", "level", "logger", "event"}


def test_nothing_of_a_client_is_in_it(lines: io.StringIO) -> None:
    log_settled(settled())
    log_http(method="POST", route="other", status=500, request_id="r", key_id="k", total_s=0.1)
    assert lines.getvalue() and CANARY not in lines.getvalue()


def test_failures_are_warnings_and_each_attempt_has_its_line(lines: io.StringIO) -> None:
    log_settled(settled(finishes=("failed", "completed")))
    assert [(line["level"], line["attempt"], line["total_ms"] is None) for line in read(lines)] == [
        ("warning", 0, True),
        ("info", 1, False),
    ]


def test_a_field_that_is_not_in_the_list_is_not_written(lines: io.StringIO) -> None:
    logging.getLogger("tokenmill.x").info("event", extra={"prompt": CANARY, "model": "m"})
    (line,) = read(lines)
    assert line["model"] == "m" and "prompt" not in line and CANARY not in lines.getvalue()


def test_an_exception_is_its_class_and_places_without_its_message(lines: io.StringIO) -> None:
    try:
        raise ValueError(CANARY)
    except ValueError:
        logging.getLogger("tokenmill.x").exception("request %s failed", "req_1")
    (line,) = read(lines)
    assert line["event"] == "request req_1 failed" and line["exception"] == "ValueError"
    assert "test_server_logs.py:" in line["at"][-1] and CANARY not in lines.getvalue()


def test_others_say_only_what_is_constant_in_theirs(lines: io.StringIO) -> None:
    logging.getLogger("asyncio").error(f"Task exception was never retrieved\nfuture: <Task {CANARY}>")
    logging.getLogger("somebody").warning("bad request %s", CANARY)
    assert [line["event"] for line in read(lines)] == [
        "Task exception was never retrieved",
        "bad request %s",
    ]
    assert CANARY not in lines.getvalue()


def test_no_character_breaks_a_line_or_moves_a_terminal(lines: io.StringIO) -> None:
    nasty = "a\nb\r\x1b[31m\x00\x7f\x85\u2028\u202e\ud800é"
    logging.getLogger("tokenmill.x").info("event", extra={"model": nasty})
    text = lines.getvalue()
    assert text.count("\n") == 1 and all(" " <= char <= "~" for char in text.removesuffix("\n"))
    assert read(lines)[0]["model"] == nasty


def test_long_values_are_cut(lines: io.StringIO) -> None:
    logging.getLogger("tokenmill.x").info("x" * 10_000, extra={"model": "m" * 10_000})
    assert len(lines.getvalue()) < 1000


def test_levels(lines: io.StringIO) -> None:
    for status in (200, 404, 500, 499):
        log_http(method="GET", route="/", status=status, request_id="r", key_id="k", total_s=0.0)
    assert [line["level"] for line in read(lines)] == ["debug", "info", "error", "info"]
    with pytest.raises(UsageError):
        set_up_logs("loud")


def test_setting_up_twice_writes_once() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    level = root.level
    set_up_logs("info", io.StringIO())
    handler = set_up_logs("info", stream)
    logging.getLogger("tokenmill.x").info("once")
    assert len([each for each in root.handlers if isinstance(each.formatter, JsonFormatter)]) == 1
    assert stream.getvalue().count("once") == 1
    root.removeHandler(handler)
    root.setLevel(level)
