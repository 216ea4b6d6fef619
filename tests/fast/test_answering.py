"""Answers as HTTP: how many writes, which status, what keeps a connection, what a leaving client means."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tokenmill.core import ResourceError, TokenmillError, Usage
from tokenmill.server import answering
from tokenmill.server.answering import EventStream
from tokenmill.server.gateway import Answer
from tokenmill.wire import Begin, Finish, OpenAIWriter, Piece, TextPiece, Totals

USAGE = Usage(num_prompt_tokens=1, num_cached_tokens=0, num_output_tokens=2)


class FakeAnswer:
    """Gives pieces, with pauses (seconds) and an error between them."""

    def __init__(self, *script: Piece | float | TokenmillError) -> None:
        self.caller = SimpleNamespace(api="openai", request_id="req_1")
        self.deployment = "mock"
        self.num_cancels = 0
        self._script = script

    async def pieces(self) -> AsyncIterator[Piece]:
        for each in self._script:
            if isinstance(each, float):
                await asyncio.sleep(each)
            elif isinstance(each, TokenmillError):
                raise each
            else:
                yield each

    def cancel(self) -> None:
        self.num_cancels += 1


def stream(answer: FakeAnswer, *, leaves: bool = False) -> list[MutableMapping[str, Any]]:
    """What a stream of it sends."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        if not leaves:
            await asyncio.sleep(60.0)
        return {"type": "http.disconnect"}

    writer = OpenAIWriter(chat=True, include_usage=True)
    asyncio.run(EventStream(cast(Answer, answer), writer)({}, receive, send))
    return sent


BEGIN, END = Begin("req_1", "mock", 1), (Finish("length", 0), Totals(USAGE))


def test_a_piece_is_one_write_and_the_whole_end_is_one() -> None:
    sent = stream(FakeAnswer(BEGIN, TextPiece("a", 0), TextPiece("b", 0), *END))
    assert [message["type"][14:] for message in sent] == ["start", "body", "body", "body"]
    assert sent[0]["status"] == 200 and (b"x-tokenmill-deployment", b"mock") in sent[0]["headers"]
    assert [message["more_body"] for message in sent[1:]] == [True, True, False]
    assert b'"role"' in sent[1]["body"] and b'"a"' in sent[1]["body"]
    end = sent[3]["body"]
    assert end.index(b'"length"') < end.index(b'"usage"') < end.index(b"[DONE]")


def test_an_error_before_the_first_token_is_raised_and_nothing_is_sent() -> None:
    with pytest.raises(ResourceError):
        stream(FakeAnswer(BEGIN, ResourceError("it is full")))


def test_an_error_after_it_is_the_last_event() -> None:
    sent = stream(FakeAnswer(BEGIN, TextPiece("a", 0), ResourceError("it is full")))
    assert b"it is full" in sent[-1]["body"] and b"[DONE]" not in sent[-1]["body"]
    assert sent[-1]["more_body"] is False


def test_a_long_silence_is_filled_so_that_proxies_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "_FIRST_S", 0.02)
    monkeypatch.setattr(answering, "_PING_S", 0.02)
    sent = stream(FakeAnswer(0.1, BEGIN, TextPiece("a", 0), *END))
    bodies = [message["body"] for message in sent[1:]]
    assert sent[0]["status"] == 200 and bodies[:2] == [b": keep-alive\n\n"] * 2
    assert b"keep-alive" not in b"".join(bodies[-2:])


def test_a_client_that_leaves_cancels_the_call() -> None:
    answer = FakeAnswer(BEGIN, 0.02, TextPiece("a", 0), *END)
    stream(answer, leaves=True)
    assert answer.num_cancels == 1
