"""A small HTTP client of raw asyncio streams: the load's own cost stays low, and nothing is retried."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Answered", "Connection", "connect", "post", "stream"]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer: status (0: none came), body, and seconds from the first byte sent to head and end."""

    status: int
    body: bytes
    head_s: float
    total_s: float
    retry_after: str = ""


class Connection:
    """One connection to a server on this machine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a request."""
        lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer."""
        data = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = data.decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines if line)
        return int(first.split(" ")[1]), {name.lower(): value for name, _, value in pairs}

    async def pieces(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body as it comes: chunks, or what Content-Length says."""
        if "content-length" in headers:
            yield await self.reader.readexactly(int(headers["content-length"]))
            return
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[Connection]:
    """A connection that is closed at the end of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def post(
    port: int, path: str, value: Any, headers: Mapping[str, str] | None = None, *, timeout_s: float = 60.0
) -> Answered:
    """POST a JSON value; an answer that did not come in time has the status 0."""
    begun_s = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s), connect(port) as connection:
            connection.send("POST", path, json.dumps(value).encode(), headers)
            status, found = await connection.head()
            head_s = time.perf_counter() - begun_s
            body = b"".join([piece async for piece in connection.pieces(found)])
    except (OSError, EOFError, ValueError) as error:
        seconds = time.perf_counter() - begun_s
        return Answered(status=0, body=repr(error).encode(), head_s=seconds, total_s=seconds)
    return Answered(
        status=status,
        body=body,
        head_s=head_s,
        total_s=time.perf_counter() - begun_s,
        retry_after=found.get("retry-after", ""),
    )


async def stream(
    port: int, value: Any, path: str = "/v1/completions"
) -> AsyncGenerator[tuple[float, bytes], None]:
    """The chunks of a streamed answer with the seconds at which they came. Raises ValueError if refused."""
    async with connect(port) as connection:
        connection.send("POST", path, json.dumps({**value, "stream": True}).encode())
        status, headers = await connection.head()
        if status != 200:
            raise ValueError(f"status {status}")
        async for piece in connection.pieces(headers):
            yield time.perf_counter(), piece
