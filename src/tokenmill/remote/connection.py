"""One HTTP/1.1 connection of a client: bytes are parsed and stamped in the callback in which they arrive.

llhttp (through httptools) parses, asyncio connects and does TLS. What this keeps is bounded: the head and
whatever else is no body, and body that nobody has taken yet, by not reading on. Compression, proxies,
redirects and HTTP/2 are not covered.
"""

import asyncio
import time
from typing import Final, NamedTuple

import httptools

from tokenmill.core import EndpointError

__all__ = ["Arrived", "Connection", "Passing"]

_MAX_QUIET_BYTES: Final = 64 << 10
_MAX_QUEUED_BYTES: Final = 1 << 20


class Passing(EndpointError):
    """A failure that may pass if it is tried again, after `wait_s` seconds if the endpoint says so.

    `is_stale` if it was the end of a connection that had been idle, before any answer.
    """

    def __init__(self, message: str, *, hint: str = "", wait_s: float = 0.0, is_stale: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.wait_s = wait_s
        self.is_stale = is_stale


class Arrived(NamedTuple):
    """A piece of a body and when its bytes came, in seconds of the monotonic clock."""

    at_s: float
    data: bytes


class Connection(asyncio.Protocol):
    """A connection, used for one request at a time."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.is_reused = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: EndpointError | Exception | None = None
        self._reset()
        self._is_complete = True

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.headers = {}
        self._queue: list[Arrived] = []
        self._num_queued = self._num_quiet = 0
        self._at_s = 0.0
        self._is_paused = self._has_head = self._is_complete = self._has_byte = False

    # What the user of a connection calls.

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        transport = self._transport
        return self._error is None and transport is not None and not transport.is_closing()

    @property
    def can_stay(self) -> bool:
        """Whether the answer is complete and the endpoint keeps the connection."""
        return self._is_complete and self.is_open and self._keeps_alive

    @property
    def status(self) -> int:
        """The status of the answer."""
        return int(self._parser.get_status_code())

    def send(self, request: bytes) -> None:
        """Send a whole request."""
        assert self._transport is not None and self._is_complete
        self._reset()
        self._keeps_alive = True
        self._transport.write(request)

    async def head(self) -> float:
        """Wait for status and headers; when their first byte came. Raises what went wrong."""
        while not self._has_head:
            await self._wait()
        return self._first_s

    async def next(self) -> list[Arrived]:
        """What has arrived of the body since the last call; empty at its end. Raises what went wrong."""
        while not self._queue:
            if self._is_complete:
                return []
            await self._wait()
        queue, self._queue, self._num_queued = self._queue, [], 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return queue

    def fail(self, error: Exception) -> None:
        """End it: whoever waits gets this error, if there is none yet."""
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self._at_s = time.monotonic()
        if self._is_complete:
            self.fail(EndpointError("the endpoint sent more than it was asked for"))
            return
        if not self._has_byte:
            self._has_byte, self._first_s = True, self._at_s
        self._num_quiet += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            words = str(error) or type(error).__name__
            self.fail(EndpointError(f"the answer is no HTTP ({words})", hint="does it speak HTTP/1.1 there?"))
            return
        if self._num_quiet > _MAX_QUIET_BYTES:
            self.fail(EndpointError(f"the answer has over {_MAX_QUIET_BYTES} bytes of headers"))
        elif self._num_queued > _MAX_QUEUED_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        ends_here = self._has_head and not self._has_length and self._error is None
        if not self._is_complete and ends_here and exc is None:
            self._is_complete, self._keeps_alive = True, False
        where = "during the answer" if self._has_byte else "before an answer"
        reason = f" ({exc})" if exc is not None and str(exc) else ""
        message = f"the endpoint closed the connection {where}{reason}"
        is_stale = self.is_reused and not self._has_byte
        self.fail(Passing(message, hint="look at the endpoint's log, or try again", is_stale=is_stale))

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        """Part of httptools."""
        if not self._has_head:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Part of httptools."""
        if self.status < 200:
            self.headers = {}
            return
        self._has_head = True
        self._has_length = "content-length" in self.headers or "transfer-encoding" in self.headers
        self._num_quiet = 0

    def on_body(self, body: bytes) -> None:
        """Part of httptools."""
        self._queue.append(Arrived(self._at_s, body))
        self._num_queued += len(body)
        self._num_quiet = 0

    def on_message_complete(self) -> None:
        """Part of httptools."""
        if self._has_head:
            self._is_complete = True
            self._keeps_alive = bool(self._parser.should_keep_alive())
