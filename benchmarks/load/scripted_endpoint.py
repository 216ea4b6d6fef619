"""An OpenAI-compatible endpoint whose latencies are known: what a load generator shows can be checked.

    python -m benchmarks.load.scripted_endpoint --port 8100 --ttft-ms 50 --itl-ms 5

It streams `max_tokens` words; the first after `ttft_ms`, a tenth longer for each request up to the tenth, and
then again; the others `itl_ms` apart, at times fixed by the first, so that delays do not add up. A stall
answers nothing between two moments after the first request. It counts one token a word, in usage too.
`GET /v1/ttfts` gives its own TTFTs since the last time: its lateness is not the client's.
"""

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Script", "ScriptedEndpoint", "main"]

_HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\n{}\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Script:
    """Latencies in milliseconds; `stall_s` is from and to, in seconds after the first request.

    Each `error_every`th request is answered with status 503; 0 is none.
    """

    ttft_ms: float = 50.0
    itl_ms: float = 5.0
    stall_s: tuple[float, float] = (0.0, 0.0)
    error_every: int = 0

    def ttft_s(self, number: int) -> float:
        """Of the request with this number."""
        return self.ttft_ms / 1e3 * (1 + number % 10 / 10)


@dataclass
class ScriptedEndpoint:
    """The server, and what it did: when it wrote the first word of each request after having read it, in
    s.
    """

    script: Script
    num_requests: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    _first_s: float | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def served(self, port: int = 0) -> AsyncIterator[str]:
        """Serve on the loopback interface while the block runs; yields the base URL."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, backlog=1024)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            if self._connections:
                await asyncio.wait(self._connections)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    await self._take(reader, writer)
        finally:
            self._connections.remove(task)
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lengths = [line for line in head.lower().split("\r\n") if line.startswith("content-length:")]
        body = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b""
        await self._answer(head.split()[1], body, writer)

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path.endswith("/ttfts"):
            _write_json(writer, {"ttfts_s": self.ttfts_s})
            self.ttfts_s.clear()
            return
        if not path.endswith("completions"):
            _write_json(writer, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})
            return
        number = self.num_requests
        self.num_requests += 1
        if self.script.error_every and (number + 1) % self.script.error_every == 0:
            text = b'{"error": {"message": "overloaded", "type": "server_error"}}'
            head = f"HTTP/1.1 503 X\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            writer.write(head.encode() + text)
            return
        await self._stream(number, json.loads(body), writer)

    async def _stream(self, number: int, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        self._first_s = begin_s if self._first_s is None else self._first_s
        num_output = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        writer.write(_HEAD.format("text/event-stream", "Transfer-Encoding: chunked").encode())
        at_s = begin_s + self.script.ttft_s(number)
        for place in range(num_output):
            await asyncio.sleep(self._after_stall(at_s) - loop.time())
            writer.write(_event(_delta("word" if place == 0 else " word", None)))
            if place == 0:
                self.ttfts_s.append(loop.time() - begin_s)
            at_s += self.script.itl_ms / 1e3
        num_input = sum(len(str(message.get("content", "")).split()) for message in asked.get("messages", []))
        usage = {"prompt_tokens": num_input, "completion_tokens": num_output}
        writer.write(_event(_delta("", "length")))
        total = {**usage, "total_tokens": num_input + num_output}
        writer.write(_event({**_chunk([]), "usage": total}) + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()

    def _after_stall(self, at_s: float) -> float:
        assert self._first_s is not None
        begin_s, end_s = (self._first_s + bound for bound in self.script.stall_s)
        return end_s if begin_s <= at_s < end_s else at_s


def _delta(text: str, finish: str | None) -> dict[str, Any]:
    return _chunk([{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


def _chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "scripted",
        "choices": choices,
    }


def _event(value: dict[str, Any]) -> bytes:
    return _framed(b"data: " + json.dumps(value).encode() + b"\n\n")


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _write_json(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    text = json.dumps(value).encode()
    writer.write(_HEAD.format("application/json", f"Content-Length: {len(text)}").encode() + text)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--itl-ms", type=float, default=5.0)
    args = parser.parse_args()

    async def serve() -> None:
        script = Script(ttft_ms=args.ttft_ms, itl_ms=args.itl_ms)
        async with ScriptedEndpoint(script).served(args.port) as url:
            print(url, flush=True)
            await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
