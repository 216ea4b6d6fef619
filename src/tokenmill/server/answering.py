"""An `Answer` as HTTP: at once, or as a stream of events; and what a client that leaves means.

A stream's status is sent with its first piece, so that what goes wrong before is a plain error with its own
status; but after a second without one it is sent nevertheless, and a comment (OpenAI) or `ping` (Anthropic)
every 15 s keeps proxies from closing the connection.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol

from tokenmill.core import TokenmillError
from tokenmill.server.edge import Receive, Scope_, Send
from tokenmill.server.gateway import Answer
from tokenmill.wire import Api, Begin, Finish, Piece, Reply, Totals, encode_sse, write_stream_error

__all__ = ["EventStream", "JsonAnswer", "PieceWriter", "send_json"]

_FIRST_S: Final = 1.0
_PING_S: Final = 15.0
_PINGS: Final[dict[Api, bytes]] = {
    "openai": b": keep-alive\n\n",
    "anthropic": encode_sse(b'{"type":"ping"}', "ping"),
}
_STREAM_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class PieceWriter(Protocol):
    """Writes pieces as events (`wire.OpenAIWriter`, `wire.AnthropicWriter`)."""

    def write(self, piece: Piece) -> bytes:
        """The events of a piece."""
        ...

    def end(self) -> bytes:
        """What says that nothing follows."""
        ...


async def send_json(
    send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """A whole answer."""
    length = (b"content-length", str(len(body)).encode())
    all_headers = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


class JsonAnswer:
    """Answers at once. A client that leaves meanwhile cancels the call."""

    def __init__(self, answer: Answer, write: Callable[[Reply], bytes]) -> None:
        self._answer = answer
        self._write = write

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """Send it."""
        leaving = asyncio.create_task(_cancel_when_gone(self._answer, receive))
        try:
            reply = await self._answer.reply()
        finally:
            leaving.cancel()
        await send_json(send, 200, self._write(reply), _headers_of(self._answer))


class EventStream:
    """Answers event by event: what one step of the engine gave is one write, and so is all of the end."""

    def __init__(
        self,
        answer: Answer,
        writer: PieceWriter,
        *,
        fail: Callable[[TokenmillError], bytes] | None = None,
    ) -> None:
        """`fail` writes an error as the stream's last event, where it is another one than usual."""
        self._answer = answer
        self._writer = writer
        self._fail = fail
        self._has_begun = False
        self._has_sent = False

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """Send the stream. An error before its first piece is raised, one after it is an event."""
        api = self._answer.caller.api
        helpers = [
            asyncio.create_task(_cancel_when_gone(self._answer, receive)),
            asyncio.create_task(self._keep_alive(send, api)),
        ]
        try:
            async with contextlib.aclosing(self._answer.pieces()) as pieces:
                last = await self._send_pieces(pieces, send) + self._writer.end()
        except TokenmillError as error:
            if not self._has_begun:
                raise
            name = self._answer.caller.request_id
            last = self._fail(error) if self._fail else write_stream_error(api, error, request_id=name)
        finally:
            for helper in helpers:
                helper.cancel()
        await self._send(send, last, is_last=True)

    async def _send_pieces(self, pieces: AsyncIterator[Piece], send: Send) -> bytes:
        """Send them but for the last ones, which are returned: what only says that it ends."""
        held = b""
        async for piece in pieces:
            held += self._writer.write(piece)
            # Nothing is sent until the call is sure to be answered, nor ends one by one.
            if held and not isinstance(piece, Begin | Finish | Totals):
                await self._send(send, held)
                held = b""
        return held

    async def _send(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        self._has_sent = True
        if not self._has_begun:
            self._has_begun = True
            headers = [*_STREAM_HEADERS, *_headers_of(self._answer)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def _keep_alive(self, send: Send, api: Api) -> None:
        """What keeps proxies from giving up while nothing comes."""
        await asyncio.sleep(_FIRST_S)
        if not self._has_begun:
            await self._send(send, _PINGS["openai"])
        while True:
            self._has_sent = False
            await asyncio.sleep(_PING_S)
            if not self._has_sent:
                await self._send(send, _PINGS[api])


def _headers_of(answer: Answer) -> tuple[tuple[bytes, bytes], ...]:
    name = answer.deployment
    return ((b"x-tokenmill-deployment", name.encode()),) if name else ()


async def _cancel_when_gone(answer: Answer, receive: Receive) -> None:
    """Wait for the client to leave, then give the call up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel()
