"""Requests to one origin over kept connections: connecting, time limits, and what becomes of a connection."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tokenmill.core import EndpointError, ResourceError
from tokenmill.remote.connection import Arrived, Connection, Passing
from tokenmill.remote.endpoint import Endpoint

__all__ = ["HttpClient", "HttpResponse", "Progress"]

_HAPPY_EYEBALLS_S: Final = 0.25


@dataclass
class Progress:
    """How far a request came, kept while it runs: whether it was sent, and the status of the answer or 0.

    Whoever pays by the token pays for none that was not sent, and for none that was refused.
    """

    is_sent: bool = False
    status: int = 0


class HttpResponse:
    """The answer to one request; its body is read once."""

    def __init__(self, connection: Connection, head_s: float) -> None:
        self.status = connection.status
        self.headers = connection.headers
        self.head_s = head_s
        self._connection = connection

    async def next(self) -> list[Arrived]:
        """What has arrived of the body since the last call; empty at its end."""
        return await self._connection.next()

    async def body(self, max_bytes: int) -> bytes:
        """The whole body. Raises EndpointError for a longer one."""
        pieces: list[bytes] = []
        num_bytes = 0
        while arrived := await self._connection.next():
            pieces += [piece.data for piece in arrived]
            num_bytes += sum(len(piece.data) for piece in arrived)
            if num_bytes > max_bytes:
                raise EndpointError(f"the answer has over {max_bytes} bytes")
        return b"".join(pieces)


class HttpClient:
    """Sends requests to an endpoint. Belongs to one event loop; how many at once is the caller's affair."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if endpoint.scheme == "https" else None
        host = endpoint.origin.partition("://")[2]
        fields = {"Host": host, "Accept-Encoding": "identity", **endpoint.headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())

    async def close(self) -> None:
        """Close the connections that are idle."""
        for connection in self._idle:
            connection.fail(EndpointError("the client was closed"))
        self._idle.clear()
        await asyncio.sleep(0)

    @asynccontextmanager
    async def request(
        self, method: str, path: str, body: bytes, *, accept: str, progress: Progress | None = None
    ) -> AsyncIterator[HttpResponse]:
        """The answer to a request, whatever its status. If it is not read to its end, the connection ends.

        Raises Passing where the network failed, ResourceError when time is up, EndpointError for nonsense.
        """
        head = f"{method} {path} HTTP/1.1\r\n{self._fields}Accept: {accept}\r\nContent-Length: {len(body)}"
        message = f"{head}\r\n\r\n".encode("ascii") + body
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._endpoint.timeouts.total_s
        progress = progress or Progress()
        while True:
            connection = await self._connection()
            timer = loop.call_at(deadline, connection.fail, self._late("total", "the answer took"))
            try:
                try:
                    progress.is_sent = True
                    head_s = await self._head(connection, message)
                except Passing as error:
                    if error.is_stale:
                        continue
                    raise
                progress.status = connection.status
                yield HttpResponse(connection, head_s)
                return
            finally:
                timer.cancel()
                if connection.can_stay:
                    self._idle.append(connection)
                else:
                    connection.fail(EndpointError("the answer was not read to its end"))

    async def _head(self, connection: Connection, message: bytes) -> float:
        """Send, and wait for the head of the answer."""
        connection.send(message)
        limit_s = self._endpoint.timeouts.first_byte_s
        loop = asyncio.get_running_loop()
        timer = loop.call_later(
            limit_s, connection.fail, self._late("first_byte", "no byte of an answer for")
        )
        try:
            return await connection.head()
        finally:
            timer.cancel()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                connection.is_reused = True
                return connection
        endpoint, limit_s = self._endpoint, self._endpoint.timeouts.connect_s
        try:
            async with asyncio.timeout(limit_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection,
                    endpoint.host,
                    endpoint.port,
                    ssl=self._tls,
                    happy_eyeballs_delay=_HAPPY_EYEBALLS_S,
                )
        except TimeoutError:
            raise Passing(f"no connection within {limit_s:g} s", hint="is it up, and reachable?") from None
        except ssl.SSLCertVerificationError as error:
            hint = "name the authority's file in SSL_CERT_FILE"
            raise EndpointError(
                f"its certificate is not trusted ({error.verify_message})", hint=hint
            ) from None
        except OSError as error:
            words = error.strerror or str(error) or type(error).__name__
            raise Passing(f"no connection ({words})", hint="is it running there?") from None
        return connection

    def _late(self, name: str, what: str) -> ResourceError:
        limit_s = getattr(self._endpoint.timeouts, f"{name}_s")
        return ResourceError(f"{what} over {limit_s:g} s", hint=f"give it more time ({name}_s)")
