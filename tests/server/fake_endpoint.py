"""An endpoint on the loopback interface that answers as a test scripts it, down to the byte."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Bytes to send, pauses in seconds between them, and whether the connection is kept or aborted then."""

    script: Iterable[bytes | float]
    keep: bool = True
    abort: bool = False


def whole(body: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> Answer:
    """A complete answer; `_` in names of headers is `-`."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return Answer(script=["\r\n".join([*lines, "", ""]).encode() + body])


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    return whole(json.dumps(value).encode(), status, **headers)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def stream(pieces: Iterable[bytes | float], *, ends: bool = True, abort: bool = False) -> Answer:
    """A stream in chunks; without `ends` the connection closes where the next chunk should be."""
    script: list[bytes | float] = [STREAM_HEAD]
    script += [chunk(piece) if isinstance(piece, bytes) else piece for piece in pieces]
    return Answer(script=[*script, b"0\r\n\r\n"] if ends else script, keep=ends, abort=abort)


def chat_events(texts: Iterable[str], *, usage: bool = True, finish: str = "stop") -> list[bytes]:
    """The events of an OpenAI chat stream with these pieces of text."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def event(delta: Any, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"

    pieces = [event({"role": "assistant", "content": ""})]
    pieces += [event({"content": text}) for text in texts]
    pieces.append(event({}, finish))
    if usage:
        counts = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        pieces.append(b"data: " + json.dumps({**head, "choices": [], "usage": counts}).encode() + b"\n\n")
    return [*pieces, b"data: [DONE]\n\n"]


@dataclass
class FakeEndpoint:
    """What it was asked, and what it answers: the next of `answers`, else what `respond` says."""

    respond: Callable[[Asked], Answer] = lambda asked: stream(chat_events(["Hi"]))
    answers: list[Answer] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    num_connections: int = 0
    num_open: int = 0
    most_open: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.num_connections += 1
        number = self.num_connections
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._answer_one(number, reader, writer):
                pass
        writer.close()

    async def _answer_one(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        asked = Asked(path=first.split()[1], headers=headers, body=body, connection=number)
        self.asked.append(asked)
        answer = self.answers.pop(0) if self.answers else self.respond(asked)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            for piece in answer.script:
                if isinstance(piece, bytes):
                    writer.write(piece)
                    await writer.drain()
                else:
                    await asyncio.sleep(piece)
        finally:
            self.num_open -= 1
        if answer.abort:
            writer.transport.abort()
        return answer.keep


@contextmanager
def fake_endpoint(respond: Callable[[Asked], Answer] | None = None) -> Iterator[FakeEndpoint]:
    """It, running in a thread of its own."""
    endpoint = FakeEndpoint() if respond is None else FakeEndpoint(respond=respond)
    ready = threading.Event()
    stops: list[Callable[[], object]] = []

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(stop.set))
        async with await asyncio.start_server(endpoint.serve, "127.0.0.1", 0) as server:
            endpoint.port = server.sockets[0].getsockname()[1]
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(10.0)
    try:
        yield endpoint
    finally:
        stops[0]()
        thread.join(10.0)
        assert not thread.is_alive()
