"""The ASGI application: routes behind the edge, and every error in the shape of the API that was spoken."""

import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match, Route

from tokenmill.core import NotFoundError, TokenmillError
from tokenmill.router import BusyError
from tokenmill.server.answering import send_json
from tokenmill.server.anthropic_api import AnthropicApi
from tokenmill.server.caller import Caller
from tokenmill.server.edge import Asgi, Edge, EdgeConfig, Receive, Scope_, Send
from tokenmill.server.embeddings import EmbeddingsApi
from tokenmill.server.gateway import Gateway
from tokenmill.server.limits import LimitError
from tokenmill.server.openai_api import OpenAIApi
from tokenmill.server.openapi import OpenApi
from tokenmill.server.responses import ResponsesApi
from tokenmill.store import Key
from tokenmill.wire import status_of, write_error

__all__ = ["api_routes", "create_app"]

_LOG = logging.getLogger(__name__)


def create_app(
    gateway: Gateway,
    edge: EdgeConfig,
    find_key: Callable[[str], Awaitable[Key | None]],
    more: Sequence[Route] = (),
) -> Edge:
    """Everything that is served over HTTP: the APIs, and `more`. `find_key` gives the key of a secret."""
    routes = [*api_routes(gateway), *more]
    routes += OpenApi(routes, gateway.models, keyless=edge.keyless).routes
    return Edge(_Routes(routes), edge, find_key)


def api_routes(gateway: Gateway) -> list[Route]:
    """The routes that ask a model something, of both APIs."""
    started = int(time.time())
    return [
        *AnthropicApi(gateway, started).routes(),
        *ResponsesApi(gateway).routes(),
        *EmbeddingsApi(gateway).routes(),
        *OpenAIApi(gateway, started).routes(),
    ]


@dataclass(frozen=True)
class _Routes:
    """Finds the route of a path and answers its errors. Handlers give an ASGI application as the answer."""

    routes: Sequence[Route]

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        caller: Caller = scope["tokenmill.caller"]
        try:
            route = self._find(scope)
            answer: Asgi = await route.endpoint(Request(scope, receive))
            await answer(scope, receive, send)
        except ClientDisconnect:
            return
        except TokenmillError as error:
            await _send_error(send, caller, error)

    def _find(self, scope: Scope_) -> Route:
        methods: set[str] = set()
        for route in self.routes:
            match, child = route.matches(scope)
            if match == Match.FULL:
                scope.update(child)
                return route
            if match == Match.PARTIAL:
                methods |= route.methods or set()
        if methods:
            raise _MethodError(methods)
        raise NotFoundError(f"there is nothing at {scope['path'][:80]!r}", hint="see docs/serving.md")


class _MethodError(NotFoundError):
    """A path that has another method."""

    def __init__(self, methods: set[str]) -> None:
        self.allowed = ", ".join(sorted(methods))
        super().__init__("this path has another method", hint=f"use {self.allowed}")


async def _send_error(send: Send, caller: Caller, error: TokenmillError) -> None:
    status = 405 if isinstance(error, _MethodError) else status_of(error, caller.api)
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if isinstance(error, _MethodError):
        headers = ((b"allow", error.allowed.encode()),)
    elif isinstance(error, LimitError | BusyError):
        headers = ((b"retry-after", str(max(1, math.ceil(error.wait_s))).encode()),)
    elif status in (429, 503, 529):
        headers = ((b"retry-after", b"1"),)
    body = write_error(caller.api, error, status=status, request_id=caller.request_id)
    await send_json(send, status, body, headers)


async def _lifespan(receive: Receive, send: Send) -> None:
    """Whoever starts the application starts and ends what it needs; this only answers."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
