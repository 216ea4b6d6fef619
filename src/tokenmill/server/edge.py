"""What every request passes before a route sees it: names, sizes, encodings and keys, on the raw ASGI path.

Default deny: a path that is in no list, or is not written plainly, needs a key with the scope `admin`, with a
route or without, so that a new route is closed until somebody says otherwise. What a header says of the path
decides nothing.

On loopback without keys, inference and metrics need none, but the Host must be a name of this machine and an
Origin, if there is one, too: a page of the web cannot reach the server through somebody's browser.

Bounds of heads, of time and of connections are those of `protocol.py`.
"""

import ipaddress
import logging
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from tokenmill.core import ResourceError, TokenmillError, UsageError
from tokenmill.server.caller import ANONYMOUS, NOBODY, Caller
from tokenmill.store import Key, Scope
from tokenmill.wire import Api, write_error

__all__ = [
    "Asgi",
    "Edge",
    "EdgeConfig",
    "Receive",
    "Scope_",
    "Send",
    "api_of",
    "check_exposure",
    "is_loopback",
    "needed_scope",
]

Scope_: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi: TypeAlias = Callable[[Scope_, Receive, Send], Awaitable[None]]
_FindKey: TypeAlias = Callable[[str], Awaitable[Key | None]]

_LOG: Final = logging.getLogger(__name__)
_PUBLIC: Final = frozenset(
    {"/health", "/health/live", "/health/ready", "/health/drained"}
    | {"/", "/dashboard/style.css", "/dashboard/app.js"}  # without figures: those need a key
)
_METRICS: Final = frozenset({"/metrics"})
_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_FEATURE: Final = b"x-tokenmill-feature"
_JSON: Final = (b"content-type", b"application/json")
_NO_SNIFFING: Final = (b"x-content-type-options", b"nosniff")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?")
_ORIGIN: Final = re.compile(rf"https?://{_HOST.pattern}")
_ODD: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\\%\ufffd]|//|/\.{1,2}(/|$)")
"""What no path of ours has: another reader could take it for another path."""
_KEPT_BYTES: Final = 64 << 10
"""A refused request's body of at most so many bytes is read past; for a longer one the connection ends."""


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """`keyless` opens inference and metrics to everybody who reaches the server. `hosts` are names that a
    Host header may have; empty: any, which needs keys. Bodies have at most `max_body_bytes`, uploads of files
    `max_file_bytes`.
    """

    keyless: bool = True
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    max_body_bytes: int = 8 << 20
    max_file_bytes: int = 200 << 20

    def __post_init__(self) -> None:
        if self.keyless and not self.hosts:
            raise UsageError("a server without keys has no list of hosts", hint="name them, or ask for keys")


class Edge:
    """The ASGI application in front of all others. `find_key` gives the key of a secret, if it is valid."""

    def __init__(self, app: Asgi, config: EdgeConfig, find_key: _FindKey) -> None:
        self._app = app
        self._config = config
        self._find_key = find_key

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """Answer what is refused, pass on what is not; other protocols than HTTP are closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = _headers(scope)
        request_id = f"req_{secrets.token_hex(12)}"
        api = api_of(scope["path"], headers)
        reply = _Named(send, request_id, api)
        try:
            caller = await self._caller(scope, headers, request_id, api)
            limit = self._config.max_file_bytes if _is_upload(scope["path"]) else self._config.max_body_bytes
            scope["tokenmill.caller"] = caller
            await self._app(scope, _Bounded(receive, headers, limit), reply)
        except _Refused as refused:
            is_kept = refused.status != 413 and _is_short(headers)
            await _answer(reply, refused, api, request_id, is_kept)
        except Exception as failure:
            # Not its message, which may hold what a user wrote.
            frames = "".join(traceback.format_tb(failure.__traceback__))
            _LOG.error("request %s failed: %s\n%s", request_id, type(failure).__name__, frames)
            if reply.has_begun:
                return  # uvicorn ends the connection, so that the answer is seen to be cut
            error = TokenmillError("the server failed", hint=f"its log says why, at {request_id}")
            await _answer(reply, _Refused(500, error), api, request_id, False)

    async def _caller(
        self, scope: Scope_, headers: Mapping[bytes, bytes], request_id: str, api: Api
    ) -> Caller:
        """Who calls. Raises _Refused for who may not."""
        self._check_names(headers)
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            raise _Refused(415, UsageError("the body is compressed", hint="send it as it is"))
        needed = needed_scope(scope["path"])
        key = await self._key(headers)
        if needed is not None and (key is None or needed not in key.scopes):
            if key is None or key is ANONYMOUS:
                hint = "give one as `Authorization: Bearer KEY` or `x-api-key: KEY`"
                raise _Refused(401, UsageError(f"this needs a key with the scope {needed}", hint=hint))
            hint = "ask for a key that has it"
            raise _Refused(403, UsageError(f"the key {key.id} has not the scope {needed}", hint=hint))
        feature = headers.get(_FEATURE, b"").decode("latin-1")
        if feature and not _ID.fullmatch(feature):
            raise _Refused(
                400, UsageError("x-tokenmill-feature is no plain name", hint="use A-Z a-z 0-9 _.:-")
            )
        return Caller(key=key or NOBODY, request_id=request_id, api=api, feature=feature)

    def _check_names(self, headers: Mapping[bytes, bytes]) -> None:
        """Refuse a Host or an Origin that is not ours."""
        if not self._config.hosts:
            return
        host = headers.get(b"host", b"").decode("latin-1")
        if not _HOST.fullmatch(host) or _host_name(host) not in self._config.hosts:
            hint = "call it by a name of this machine, or add the name to `hosts`"
            raise _Refused(421, UsageError(f"this server is not {host[:80]!r}", hint=hint))
        origin = headers.get(b"origin", b"").decode("latin-1")
        is_other = bool(origin) and (
            not _ORIGIN.fullmatch(origin) or _host_name(origin.partition("//")[2]) not in self._config.hosts
        )
        is_other |= headers.get(b"sec-fetch-site") == b"cross-site" and (
            headers.get(b"sec-fetch-mode") != b"navigate"
        )
        if is_other:
            raise _Refused(403, UsageError("a page of another origin may not ask", hint="ask from this one"))

    async def _key(self, headers: Mapping[bytes, bytes]) -> Key | None:
        """The key that is shown. A wrong one is refused also where none is needed."""
        secret = _secret(headers)
        if not secret:
            return ANONYMOUS if self._config.keyless else None
        try:
            key = await self._find_key(secret)
        except TokenmillError:
            error = ResourceError("keys cannot be checked at the moment", hint="try again in a second")
            raise _Refused(503, error) from None
        if key is None or not key.is_valid(time.time()):
            if self._config.keyless and not secret.startswith("tm_"):
                return ANONYMOUS  # clients send some key always
            raise _Refused(
                401, UsageError("the key is not known, or no longer valid", hint="ask for a new one")
            )
        return key


class _Refused(Exception):
    """Answered with this status."""

    def __init__(self, status: int, error: TokenmillError) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error


class _Named:
    """Puts the request's id on its answer, and knows whether that has begun."""

    def __init__(self, send: Send, request_id: str, api: Api) -> None:
        self._send = send
        name = b"request-id" if api == "anthropic" else b"x-request-id"
        self._header = (name, request_id.encode())
        self.has_begun = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            message["headers"] = [*message.get("headers", ()), self._header, _NO_SNIFFING]
        await self._send(message)


class _Bounded:
    """Receives a body and refuses it as soon as it is too long, whatever its Content-Length says."""

    def __init__(self, receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._num_bytes = 0
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            self._refuse()

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._limit:
                self._refuse()
        return message

    def _refuse(self) -> None:
        raise _Refused(413, UsageError(f"the body has over {self._limit} bytes", hint="send less at once"))


def needed_scope(path: str) -> Scope | None:
    """The scope that a path needs; None for what is open to everybody."""
    if path in _PUBLIC:
        return None
    if _ODD.search(path):
        return "admin"
    if path in _METRICS or path.startswith(("/dashboard/", "/health/")):
        return "metrics"
    if path.startswith("/v1/") or path == "/openapi.json":
        return "inference"
    return "admin"


def api_of(path: str, headers: Mapping[bytes, bytes]) -> Api:
    """Whose shapes a request expects."""
    if path.startswith("/v1/messages") or b"anthropic-version" in headers:
        return "anthropic"
    return "openai"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on this address, or on that of `localhost`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback


def check_exposure(host: str, config: EdgeConfig) -> None:
    """Raise UsageError if everybody who reaches `host`, the address that is listened on, could ask."""
    if config.keyless and not is_loopback(host):
        raise UsageError(
            f"{host} is reached from other machines, and no key is asked for",
            hint="make a key (tokenmill keys create) and leave keyless out, or listen on 127.0.0.1",
        )


def _is_upload(path: str) -> bool:
    return path == "/v1/files" or path == "/v1/messages/batches"


def _headers(scope: Scope_) -> dict[bytes, bytes]:
    """The headers; of one that is there twice the first."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found.setdefault(name, value)
    return found


def _secret(headers: Mapping[bytes, bytes]) -> str:
    """The key in a request's headers, empty if there is none."""
    kind, _, value = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if kind.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()


def _host_name(host: str) -> str:
    """A Host header without its port; an address in its usual form."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().removesuffix(".")


def _is_short(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the request's body is worth reading past, to keep the connection."""
    length = headers.get(b"content-length", b"0")
    is_known = b"transfer-encoding" not in headers and length.isdigit() and len(length) < 9
    return is_known and int(length) <= _KEPT_BYTES


async def _answer(send: _Named, refused: _Refused, api: Api, request_id: str, is_kept: bool) -> None:
    body = write_error(api, refused.error, status=refused.status, request_id=request_id)
    headers = [_JSON, (b"content-length", str(len(body)).encode())]
    if not is_kept:
        headers.append((b"connection", b"close"))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
