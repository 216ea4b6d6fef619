"""HTTP/1.1 on one connection, for clients that mean harm: what is read, how long, and how long is written.

uvicorn's protocol over llhttp reads the requests. Added here: a deadline for a whole request and one for a
reader that takes nothing, bounds of heads and of connections, refusal of what two readers of HTTP could read
in two ways (most of it by llhttp: two lengths, bare line feeds, folded headers, bad chunks), errors in the
shape of the APIs, and a close that lets the client read why. What is written in one turn of the event loop is
one call of the system. Bounds of bodies, names and keys are those of `edge.py`.
"""

import asyncio
import ipaddress
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import httptools
from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tokenmill.core import TokenmillError, UsageError
from tokenmill.wire import Api, write_error

__all__ = ["Connections", "HttpLimits", "HttpProtocol", "protocol_factory"]

_LOOK_S: Final = 0.5
"""How often connections are looked at; what would be overdue at the next look but one goes at this one."""
_MARGIN_S: Final = 2 * _LOOK_S
_AT_ONCE: Final = 64
"""So many connections are looked at in one turn of the loop, for others wait meanwhile."""
_MIN_BYTES_PER_S: Final = 64 << 10
_LINGER_S: Final = 3.0
_FLUSH_BYTES: Final = 64 << 10
_UNSENT_BYTES: Final = 32 << 10
"""Of an answer that is not taken, so much is kept before whoever writes it waits."""
_MAX_PIPELINED: Final = 16
_SINGLE: Final = frozenset(
    {b"host", b"authorization", b"x-api-key", b"origin", b"content-type", b"content-encoding"}
    | {b"content-length", b"transfer-encoding", b"x-tokenmill-feature", b"expect", b"upgrade"}
)
"""Headers that a request has once at most, for they decide something here."""


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Bounds of connections. Durations in seconds.

    A request has `receive_s` to arrive, head and body, and a second more for each 64 KiB of it; a client that
    takes nothing of an answer is cut after `write_s`. A head has at most `max_headers` headers and
    `max_head_bytes` bytes. There are `max_connections` at once, and `max_per_host` of one address (a /64 in
    IPv6), but for the addresses in `trusted`: this machine, on which a proxy may stand for everybody.
    """

    receive_s: float = 30.0
    write_s: float = 30.0
    max_headers: int = 64
    max_head_bytes: int = 32 << 10
    max_connections: int = 16384
    max_per_host: int = 512
    trusted: tuple[str, ...] = ("127.0.0.1", "::1")

    def __post_init__(self) -> None:
        for name in ("receive_s", "write_s"):
            if not _MARGIN_S < getattr(self, name) <= 3600.0:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="use more than 1, up to 3600")
        for name in ("max_headers", "max_head_bytes", "max_connections", "max_per_host"):
            if not 1 <= getattr(self, name) <= 1 << 24:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="use a value from 1 to 2^24")


class Connections:
    """All connections of a server: counted, and looked at twice a second while there are some."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self._open: set[HttpProtocol] = set()
        self._of_host: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, each: "HttpProtocol") -> bool:
        """Count a connection in; False if there are too many. `leave` it in both cases."""
        self._open.add(each)
        self._of_host[each.host] += 1
        if self._timer is None:
            self._timer = each.loop.call_later(_LOOK_S, self._look, each.loop, [])
        of_host = 0 if each.host in self.limits.trusted else self._of_host[each.host]
        return len(self._open) <= self.limits.max_connections and of_host <= self.limits.max_per_host

    def leave(self, each: "HttpProtocol") -> None:
        """Count it out."""
        self._open.discard(each)
        self._of_host[each.host] -= 1
        if not self._of_host[each.host]:
            del self._of_host[each.host]
        if not self._open and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, loop: asyncio.AbstractEventLoop, rest: "list[HttpProtocol]") -> None:
        """Look at the next ones of `rest`, which is all of them at first."""
        rest = rest or list(self._open)
        now_s = loop.time()
        for each in rest[:_AT_ONCE]:
            if each in self._open and each.is_overdue(now_s):
                each.cut()
        delay_s = _LOOK_S / max(1.0, len(self._open) / _AT_ONCE)
        self._timer = loop.call_later(delay_s, self._look, loop, rest[_AT_ONCE:]) if self._open else None


class HttpProtocol(HttpToolsProtocol):
    """One connection. uvicorn makes it, for each that it accepts."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.url = b""
        self.host = ""
        self._all = connections
        self._limits = connections.limits
        self._asked_s: float | None = None
        """Since when a request is being received; None while none is."""
        self._num_bytes = 0
        self._num_head_bytes = 0
        self._num_dull_bytes = 0
        """Bytes in a row of which no head began and no body grew: parts of a head, of chunks' extensions."""
        self._is_head = True
        self._has_news = False
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the one that came last."""
        self._moved_s = 0.0
        self._num_unsent = 0
        self._left_s: float | None = None
        self._refusal: tuple[int, TokenmillError] | None = None
        self._is_replayed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, or refuse it."""
        super().connection_made(transport)
        self._socket = transport
        transport.set_write_buffer_limits(high=_UNSENT_BYTES)
        self._output = _Output(transport, self.loop, self._linger)
        self.transport = self._output
        self.host = _host_of(self.client)
        self._moved_s = self._asked_s = self.loop.time()
        if not self._all.enter(self):
            self._asked_s = None
            self._refuse(503, UsageError("there are too many connections", hint="use fewer, and keep them"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it out; the application is told."""
        self._all.leave(self)
        self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._left_s is not None or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._asked_s is None and not self._is_answering:
            self._asked_s, self._num_bytes = self.loop.time(), 0
        self._num_bytes += len(data)
        self._has_news = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            reason = UsageError(f"this is no HTTP request ({_reason(error)})", hint="see RFC 9112")
            self._refuse(*(self._refusal or (400, reason)))
        else:
            is_first = self._is_head and self._num_bytes == len(data)
            self._num_dull_bytes = 0 if self._has_news and not is_first else self._num_dull_bytes + len(data)
            if self._num_dull_bytes > self._limits.max_head_bytes:
                self._refuse(431, self._too_long())

    def on_message_begin(self) -> None:
        """A head begins."""
        if self._is_replayed:
            return
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._raise(400, "too many requests are sent ahead", "wait for the answers")
        super().on_message_begin()
        self._is_head = self._has_news = True
        self._num_head_bytes = 0
        if self._asked_s is None:
            self._asked_s, self._num_bytes = self.loop.time(), 0

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        if not self._is_replayed:
            self._count_head(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; those that follow a body are dropped, for everything was decided before them."""
        if self._is_replayed:
            return
        self._count_head(len(name) + len(value) + 4)
        if self._is_head:
            super().on_header(name, value)
            if len(self.headers) > self._limits.max_headers:
                self._raise(431, f"there are over {self._limits.max_headers} headers", "send fewer")

    def on_headers_complete(self) -> None:
        """The head is there: refuse what could be read in two ways, or begin."""
        if self._is_replayed:
            return
        self._is_head = False
        self._check_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._num_head_bytes = 0
        self._has_news = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there as a whole."""
        if self.parser.should_upgrade():
            return  # its body was taken for another protocol, and is still to come
        self._asked_s = None
        self._has_news = True
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not take what is written."""
        self._moved_s = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It does again."""
        self._moved_s = self.loop.time()
        super().resume_writing()

    def is_overdue(self, now_s: float) -> bool:
        """Whether its time is up, or will be before it is looked at again."""
        now_s += _MARGIN_S
        if self._left_s is not None and now_s - self._left_s > _LINGER_S:
            return True
        if self._is_late(now_s):
            return True
        unsent = self._socket.get_write_buffer_size()
        if unsent == 0 or (unsent < self._num_unsent and not self.flow.write_paused):
            self._moved_s = now_s
        self._num_unsent = unsent
        return now_s - self._moved_s > self._limits.write_s

    def cut(self) -> None:
        """End it, with a word if it was a request that did not come."""
        if self._is_late(self.loop.time() + _MARGIN_S) and self._left_s is None and self._num_bytes:
            hint = "send it faster, and no less than its Content-Length"
            error = UsageError(f"the request did not arrive in {self._limits.receive_s:g} s", hint=hint)
            self._refuse(408, error)
        else:
            # Reset, for the system would keep what nobody takes for minutes.
            if (sock := self._socket.get_extra_info("socket")) is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._socket.abort()

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _disconnect(self) -> None:
        """Tell who answers that nobody listens; uvicorn tells the last request only."""
        cycle = self._running
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()

    def _is_late(self, now_s: float) -> bool:
        if self._asked_s is None:
            return False
        if self.flow.read_paused:  # it is we who do not read
            self._asked_s = now_s
        return now_s - self._asked_s > self._limits.receive_s + self._num_bytes / _MIN_BYTES_PER_S

    def _check_head(self) -> None:
        """Raise for a head that is none of ours."""
        version, names = self.parser.get_http_version(), Counter(name for name, _ in self.headers)
        if version not in ("1.0", "1.1"):
            self._raise(505, "the version of HTTP is not known", "use HTTP/1.1")
        for name in _SINGLE & names.keys():
            if names[name] > 1:
                self._raise(400, f"the header {name.decode()} is there {names[name]} times", "send it once")
        if version == "1.1" and not names[b"host"]:
            self._raise(400, "there is no Host", "send one")
        if not self.url.startswith(b"/") or b"#" in self.url or self.parser.get_method() == b"CONNECT":
            self._raise(400, "the target is no path of this server", "send a path that begins with /")
        coding = next((value for name, value in self.headers if name == b"transfer-encoding"), b"chunked")
        if coding.lower() != b"chunked" or (version == "1.0" and names[b"transfer-encoding"]):
            self._raise(400, "the body comes in a transfer coding other than chunked", "send it as it is")

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self._limits.max_head_bytes:
            error = self._too_long()
            self._raise(431, error.message, error.hint)

    def _too_long(self) -> UsageError:
        return UsageError(f"the head has over {self._limits.max_head_bytes} bytes", hint="send less")

    def _raise(self, status: int, message: str, hint: str) -> None:
        """Stop the parser, from one of its callbacks."""
        self._refusal = (status, UsageError(message, hint=hint))
        raise ValueError(message)

    def _refuse(self, status: int, error: TokenmillError) -> None:
        """Say why, unless an answer is under way already, and close."""
        has_begun = self._running is not None and self._running.response_started
        if not (self._is_answering and has_begun):
            api: Api = "anthropic" if self.url.startswith(b"/v1/messages") else "openai"
            body = write_error(api, error, status=status)
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\nconnection: close\r\n"
                + b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
        self._disconnect()
        self._linger()

    def _linger(self) -> None:
        """End what we say, and read on for a moment: a client that still sends would not see the answer."""
        if self._left_s is None and not self._socket.is_closing():
            self._output.flush()
            if self._asked_s is None or not self._num_bytes or not self._socket.can_write_eof():
                self._socket.close()
            else:
                self._socket.write_eof()
                self._left_s = self.loop.time()
                self.flow.resume_reading()

    def _stay(self, rest: bytes) -> None:
        """Do not change to the protocol that the client offers: what follows is its request's body.

        llhttp has ended the request with its head; another parser reads on, from a head of the same length.
        """
        framing = [
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        self.parser = httptools.HttpRequestParser(self)
        self._is_replayed = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
        self._is_replayed = False
        if rest:
            self.data_received(rest)


class _Output(asyncio.Transport):
    """What is written in one turn of the loop, joined; closing lingers if the client is still sending."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, close: Callable[[], None]
    ) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._close = close
        self._held: list[bytes] = []
        self._num_held = 0
        self._is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write it soon."""
        if self._is_closed:
            return
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(bytes(data))
        self._num_held += len(data)
        if self._num_held > _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write it now."""
        held, self._held, self._num_held = self._held, [], 0
        if held and not self._transport.is_closing():
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))

    def close(self) -> None:
        """Write what is held, and end."""
        self._is_closed = True
        self._close()

    def is_closing(self) -> bool:
        """Whether it ends."""
        return self._is_closed or self._transport.is_closing()


def protocol_factory(connections: Connections) -> Callable[..., HttpProtocol]:
    """What uvicorn calls for each connection."""

    def create(
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> HttpProtocol:
        return HttpProtocol(config, server_state, app_state, _loop, connections=connections)

    return create


def _host_of(client: tuple[str, int] | None) -> str:
    """The address, or the network of addresses, that one host may have."""
    try:
        address = ipaddress.ip_address((client or ("", 0))[0])
    except ValueError:
        return ""
    if address.version == 4 or address.is_loopback:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _reason(error: httptools.HttpParserError) -> str:
    """What the parser says, without any of the request's own bytes."""
    is_own = isinstance(error, httptools.HttpParserCallbackError | httptools.HttpParserInvalidURLError)
    return "its target cannot be read" if is_own else str(error).lower()
