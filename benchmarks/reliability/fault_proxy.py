"""An upstream of either API that fails as a case says, over real sockets, in the caller's event loop.

The prompt names the case. What is sent is known to the last byte: every text has its case's own words, so
that an answer that belongs to another call is seen. Limits of time are the client's affair.
"""

import asyncio
import contextlib
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final, Literal, TypeAlias

from tokenmill.wire import Api

__all__ = ["FAULTS", "PHASES", "PROMPT_TOKENS", "Case", "Fault", "FaultProxy", "certificate"]

Fault: TypeAlias = Literal[
    "reset",
    "half-close",
    "silence",
    "bad JSON",
    "early EOF",
    "429",
    "wrong content type",
    "duplicate chunk",
    "slow drip",
    "TLS cut",
    "no [DONE]",
    "200 + error",
    "none",
]
FAULTS: Final[tuple[Fault, ...]] = (
    "reset",
    "half-close",
    "silence",
    "bad JSON",
    "early EOF",
    "429",
    "wrong content type",
    "duplicate chunk",
    "slow drip",
    "TLS cut",
    "no [DONE]",
    "200 + error",
)
PHASES: Final = ("before the head", "before the first token", "in the text", "before the end")
PROMPT_TOKENS: Final = 7
_DRIP_S: Final = 0.03
_CUTS: Final = ("reset", "half-close", "silence", "early EOF", "TLS cut", "no [DONE]")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault at one place. `words` is what the whole answer says, a piece a word."""

    id: str
    api: Api
    fault: Fault
    phase: int
    seed: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.words)

    def events(self) -> list[bytes]:
        """The whole stream: the head, a piece a word, the end, and what says that nothing follows."""
        return _openai_events(self) if self.api == "openai" else _anthropic_events(self)

    @property
    def num_ends(self) -> int:
        """Events after the last word."""
        return 3

    def place(self, events: list[bytes]) -> int:
        """How many events come before the fault."""
        first, last = len(events) - self.num_ends - len(self.words), len(events) - self.num_ends
        if self.phase == 2:
            return Random(self.seed).randint(first + 1, last - 1)
        return {0: 0, 1: first, 3: last}[self.phase]


class FaultProxy:
    """Serves the cases that it is given; `open_plain` and `open_tls` are ports while it runs."""

    def __init__(self, cases: Iterable[Case], tls: ssl.SSLContext) -> None:
        self._cases = {case.id: case for case in cases}
        self._tls = tls
        self.port = self.tls_port = 0
        self.num_asked = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FaultProxy"]:
        """It, on two free ports of loopback."""
        async with (
            await asyncio.start_server(self._serve, "127.0.0.1", 0) as plain,
            await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls) as secure,
        ):
            self.port = plain.sockets[0].getsockname()[1]
            self.tls_port = secure.sockets[0].getsockname()[1]
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.partition("content-length:")[2].split()[0])
        body = json.loads(await reader.readexactly(length))
        self.num_asked += 1
        case = self._cases[body["messages"][-1]["content"]]
        fault = "none" if body["model"] == "healthy" else case.fault
        return await _Answering(case, fault, reader, writer).run()


class _Answering:
    """One answer with its fault."""

    def __init__(
        self, case: Case, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._case = case
        self._fault = fault
        self._reader = reader
        self._writer = writer
        self._random = Random(case.seed)
        self._is_chunked = fault != "no [DONE]" or case.phase == 3
        if fault in ("TLS cut", "half-close"):
            self._is_chunked = self._random.random() < 0.5

    async def run(self) -> bool:
        """Whether the connection can be used again."""
        case, fault = self._case, self._fault
        events = case.events()
        if fault == "none":
            return await self._send(events)
        place = case.place(events)
        if fault == "no [DONE]" and case.phase == 3:
            return await self._send(events[:-1])
        if fault in _CUTS:
            return await self._cut(events[:place], events[place])
        if fault == "bad JSON":
            return await self._send([*events[:place], b'data: {"choices": [{"del\n\n', *events[place:]])
        if fault == "duplicate chunk":
            at = {0: 0, 1: place, 2: place, 3: place}[case.phase]
            return await self._send([*events[: at + 1], *events[at:]])
        if fault == "wrong content type":
            return await self._send(events[:place] if place else [b"<html>"], kind="text/html")
        if fault == "slow drip":
            return await self._drip(events, place)
        return await self._error(events, place)

    async def _send(self, events: list[bytes], *, kind: str = "text/event-stream") -> bool:
        self._head(kind)
        for event in events:
            self._body(event)
            if self._random.random() < 0.3:
                await self._writer.drain()
                await asyncio.sleep(0)
        return await self._finish()

    async def _cut(self, events: list[bytes], rest: bytes) -> bool:
        """Send these, perhaps a part of the next one, and then do as the fault says."""
        if events or self._case.phase:
            self._head()
            for event in events:
                self._body(event)
            if self._random.random() < 0.5:
                self._body(rest[: self._random.randrange(1, len(rest) - 2)])
            await self._writer.drain()
            await asyncio.sleep(0.02)
        fault, transport = self._fault, self._writer.transport
        if fault in ("early EOF", "no [DONE]") and self._case.phase:
            return await self._finish()
        if fault in ("reset", "TLS cut"):
            transport.abort()
        elif fault == "half-close" and transport.can_write_eof():
            self._writer.write_eof()
            await self._reader.read()
        elif fault == "silence":
            await self._reader.read()
        return False

    async def _drip(self, events: list[bytes], place: int) -> bool:
        """From here on byte by byte."""
        self._head()
        for event in events[:place]:
            self._body(event)
        rest = b"".join(self._framed(event) for event in events[place:])
        for at in range(len(rest)):
            if self._writer.is_closing():
                break
            self._writer.write(rest[at : at + 1])
            await self._writer.drain()
            await asyncio.sleep(_DRIP_S)
        return False

    async def _error(self, events: list[bytes], place: int) -> bool:
        """An error with its status before the head, an event after it."""
        kind, words = ("rate_limit_error", "slow down") if self._fault == "429" else ("api_error", "oops")
        inner = {"type": kind, "message": words}
        body = json.dumps({"type": "error", "error": inner}).encode()
        if self._case.phase == 0:
            status = b"429 Too Many" if self._fault == "429" else b"200 OK"
            head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nContent-Length: "
            self._writer.write(head + str(len(body)).encode() + b"\r\n\r\n" + body)
            await self._writer.drain()
            return True
        name = b"event: error\n" if self._case.api == "anthropic" else b""
        return await self._send([*events[:place], name + b"data: " + body + b"\n\n", events[-1]])

    def _head(self, kind: str = "text/event-stream") -> None:
        framing = "Transfer-Encoding: chunked" if self._is_chunked else "Connection: close"
        self._writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n".encode())

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self._is_chunked else data

    def _body(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(self._framed(data))

    async def _finish(self) -> bool:
        if self._is_chunked:
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
        return self._is_chunked


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, made here with the `openssl` command."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return cert, key


def _data(value: Any, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(value).encode() + b"\n\n"


def _openai_events(case: Case) -> list[bytes]:
    head = {"id": case.id, "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def event(delta: Any, finish: str | None = None) -> bytes:
        return _data({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(case.words)}
    ends = [event({}, "stop"), _data({**head, "choices": [], "usage": usage}), b"data: [DONE]\n\n"]
    return [event({"role": "assistant", "content": ""}), *(event({"content": w}) for w in case.words), *ends]


def _anthropic_events(case: Case) -> list[bytes]:
    def event(kind: str, **fields: Any) -> bytes:
        return _data({"type": kind, **fields}, kind)

    usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": 1}
    message = {"id": case.id, "type": "message", "role": "assistant", "model": "m", "content": []}
    words = [
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
        for word in case.words
    ]
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    return [
        event("message_start", message={**message, "usage": usage}),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *words,
        event("content_block_stop", index=0),
        event("message_delta", delta=delta, usage={"output_tokens": len(case.words)}),
        event("message_stop"),
    ]
