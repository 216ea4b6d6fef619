"""A server from its start to its end: the socket, the signals, the drain.

SIGTERM and SIGINT end it gently: it says that it is not ready, admits no more, answers what it has within
`drain_s` seconds, settles it, and ends; a second signal ends it at once. Everything that it serves is made by
who calls, and closed here. The bounds of connections are those of `protocol.py`.
"""

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, Final, cast

import uvicorn

from tokenmill.core import UsageError
from tokenmill.server.config import HttpConfig
from tokenmill.server.edge import Asgi
from tokenmill.server.gateway import Gateway
from tokenmill.server.protocol import Connections, protocol_factory

__all__ = ["bind", "serve_until_told"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


_ACCEPTED: Final = 64
"""Connections that are accepted in one turn of the loop at most; the system holds many more."""
_UNSENT_BYTES: Final = 16 << 10
_FAREWELL_S: Final = 5
"""After the drain, for clients to take the rest of what was written to them."""
_OWN_FILES: Final = 256
"""Open files that are kept for the store, engines, upstreams."""


class _Server(uvicorn.Server):
    """uvicorn without its own idea of signals, and with more connections in the system's queue than it
    accepts at once.
    """

    def __init__(self, config: uvicorn.Config, backlog: int) -> None:
        super().__init__(config)
        self._backlog = backlog

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(self._backlog)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(config: HttpConfig) -> socket.socket:
    """The socket that the server listens on. Raises UsageError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Of an answer that nobody reads the system keeps no more than this, for every connection accepted.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        listener.bind((config.host, config.port))
        listener.listen(config.backlog)
    except OSError as error:
        listener.close()
        hint = "choose another --port (0: any that is free), or end what has it"
        raise UsageError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror})", hint=hint
        ) from None
    return listener


async def serve_until_told(
    app: Asgi,
    gateway: Gateway,
    config: HttpConfig,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] = lambda _: None,
    before_drain: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until a signal comes. `on_ready` is told the URL once it listens; `before_drain` comes first."""
    server = _Server(_uvicorn_config(app, config), config.backlog)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell() -> None:
        if told.is_set():
            server.force_exit = True
        told.set()

    for each in _SIGNALS:
        loop.add_signal_handler(each, tell)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        host, port = listener.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        waiting = asyncio.create_task(told.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if before_drain is not None:
            await before_drain()
        await gateway.drain(config.drain_s)
    finally:
        server.should_exit = True
        await serving
        for each in _SIGNALS:
            loop.remove_signal_handler(each)


def _uvicorn_config(app: Asgi, config: HttpConfig) -> uvicorn.Config:
    """How uvicorn is to serve, with as many connections as there are open files for them."""
    room = max(1, _raise_open_files() - _OWN_FILES)
    limits = replace(config.limits, max_connections=min(config.limits.max_connections, room))
    connections = Connections(limits)
    return uvicorn.Config(
        app,
        http=cast(Any, protocol_factory(connections)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks what a header says of the client's address
        date_header=True,
        backlog=_ACCEPTED,
        timeout_keep_alive=config.keep_alive_s,
        timeout_graceful_shutdown=_FAREWELL_S,
    )


def _raise_open_files() -> int:
    """Let this process open as many files as it may; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard
