"""One engine process from its start to its end: started, listened to, watched, killed, reaped.

The front end believes a process only as long as it behaves. It is killed when it says nothing at all for
`silence_s` (stopped, or swapped out for good), when it beats but does not step although there is work, when
it sends what is no message, or when it does not open its model within `start_s`. Time is counted in ticks of
this event loop, so a front end that was itself stopped does not blame the engine.

What becomes of its requests is not decided here (see `async_engine.py`).
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from tokenmill.core import UsageError
from tokenmill.engine.serving.messages import (
    Beat,
    Draining,
    EngineSpec,
    FrameReader,
    FromEngine,
    Ready,
    Start,
    decode_from_engine,
    encode,
)

__all__ = ["EngineProcess", "SupervisorConfig"]

_MODULE = "tokenmill.engine.serving.process"
_TAIL_BYTES = 4096
_SHOWN_CHARS = 600
_LEAVE_S = 1.0
"""For a process whose socket is closed to end by itself, and for its last words to arrive."""


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """Bounds of an engine process, in seconds.

    It beats every `beat_s`. A step hangs after ten times what the engine expects of it, but not before
    `hang_s`, and at the latest after `stall_s`: that holds until it has made a step, and for a step much
    larger than any before. After its end another is started in `backoff_s`, twice as long for each that
    ended before it made a step, at most `max_backoff_s`; after `max_failures` of these there is no other.
    The engine ends a request that takes too long; if it has not within `grace_s`, the front end does.
    """

    beat_s: float = 0.25
    silence_s: float = 5.0
    stall_s: float = 30.0
    hang_s: float = 4.0
    start_s: float = 300.0
    backoff_s: float = 0.1
    max_backoff_s: float = 10.0
    max_failures: int = 5
    grace_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beat_s", "stall_s", "hang_s", "start_s", "backoff_s", "max_backoff_s", "grace_s"):
            if not 0.0 < getattr(self, name) <= 86400.0:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="use seconds above 0, up to a day")
        if not 4 * self.beat_s <= self.silence_s <= 86400.0:
            raise UsageError(f"silence_s is {self.silence_s}", hint="use at least four times beat_s")
        if not 1 <= self.max_failures <= 1000:
            raise UsageError(f"max_failures is {self.max_failures}", hint="use a value from 1 to 1000")


class EngineProcess(asyncio.Protocol):
    """One process, for one `run`. `on_message` gets what it says but its beats.

    `on_message` may raise ValueError for a message that makes no sense; the process is then killed.
    """

    def __init__(self, config: SupervisorConfig, on_message: Callable[[FromEngine], None]) -> None:
        loop = asyncio.get_running_loop()
        self.beat = Beat()
        self.is_ready = False
        self.is_draining = False
        self._config = config
        self._on_message = on_message
        self._reader = FrameReader()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._output = _Output(loop.create_future())
        self._output_pipe: asyncio.ReadTransport | None = None
        self._socket: socket.socket | None = None
        self._transport: asyncio.Transport | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._why = ""
        self._silent_s = 0.0
        self._stalled_s = 0.0
        self._opening_s = 0.0

    @property
    def pid(self) -> int:
        """The process id; 0 before its start."""
        return 0 if self._child is None else self._child.pid

    async def run(self, spec: EngineSpec, has_work: Callable[[], bool]) -> str:
        """Start it, and wait until it is over; returns why, with its last words.

        It is reaped then, and all is closed. Raises OSError if no process can be made.
        """
        try:
            await self._start(spec)
            await self._watch(has_work)
        finally:
            await self._close()
        return self._obituary()

    def send(self, frame: bytes) -> None:
        """Send a frame; it is dropped if the process is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def hang_up(self) -> None:
        """Close the socket, upon which the process ends, and `run` returns."""
        self._why = self._why or "was told to end"
        if self._transport is not None:
            self._transport.abort()

    def kill(self, why: str) -> None:
        """End it at once; the first reason counts."""
        self._why = self._why or why
        if self._child is not None:
            self._child.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """The process says something. Nothing that comes after its condemnation counts."""
        self._silent_s = 0.0
        try:
            for frame in self._reader.feed(data):
                if not self._why:
                    self._take(decode_from_engine(frame))
        except ValueError as error:
            self.kill(f"sent what is no message ({str(error)[:200]})")

    def connection_lost(self, exc: Exception | None) -> None:
        """The process has closed its end, most often by dying."""
        if not self._closed.done():
            self._closed.set_result(None)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Beat):
            if (message.num_steps, message.num_pauses) != (self.beat.num_steps, self.beat.num_pauses):
                self._stalled_s = 0.0
            self.beat = message
            return
        if isinstance(message, Ready):
            self.is_ready = True
        elif isinstance(message, Draining):
            self.is_draining = True
        self._on_message(message)

    def _tick(self, tick_s: float, has_work: bool) -> str:
        """Count a tick; the reason to kill it, if there is one."""
        if not self.is_ready:
            self._opening_s += tick_s
            is_late = self._opening_s > self._config.start_s
            return f"did not open the model within {self._config.start_s:g} s" if is_late else ""
        self._silent_s += tick_s
        self._stalled_s = self._stalled_s + tick_s if has_work else 0.0
        if self._silent_s > self._config.silence_s:
            return f"said nothing for {self._config.silence_s:g} s"
        config = self._config
        patience_s = min(config.stall_s, max(config.hang_s, self.beat.patience_s))
        if self._stalled_s > patience_s:
            return f"had work, and made no step for {patience_s:.3g} s"
        return ""

    async def _start(self, spec: EngineSpec) -> None:
        loop = asyncio.get_running_loop()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        reading, writing = os.pipe()
        output = os.fdopen(reading, "rb")
        with theirs, os.fdopen(writing, "wb") as pipe:
            self._child = _popen(theirs, pipe.fileno())
        self._output_pipe, _ = await loop.connect_read_pipe(lambda: self._output, output)
        await loop.create_unix_connection(lambda: self, sock=self._socket)
        self.send(encode(Start(spec=spec, beat_s=self._config.beat_s)))

    async def _watch(self, has_work: Callable[[], bool]) -> None:
        tick_s = self._config.beat_s / 2
        if self._why:
            self.hang_up()
        while not self._closed.done():
            await asyncio.wait([self._closed], timeout=tick_s)
            if fault := self._tick(tick_s, has_work()):
                self.kill(fault)

    async def _close(self) -> None:
        """Hang up, so that it ends; kill it if it does not; reap it; collect its last words."""
        loop = asyncio.get_running_loop()
        if self._transport is not None:
            self._transport.abort()
        elif self._socket is not None:
            self._socket.close()
        deadline = loop.time() + _LEAVE_S
        while self._child is not None and self._child.poll() is None:
            if loop.time() >= deadline:
                self._child.kill()
            await asyncio.sleep(0.002)
        if self._output_pipe is not None:
            await asyncio.wait([self._output.closed], timeout=_LEAVE_S)
            self._output_pipe.close()
        await asyncio.sleep(0)  # the transports say goodbye in the next turn of the loop

    def _obituary(self) -> str:
        assert self._child is not None and self._child.returncode is not None
        code = self._child.returncode
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        last = self._output.tail.decode(errors="replace").strip()[-_SHOWN_CHARS:]
        return f"the engine process {self._why or ended}" + (f"; its last output: {last}" if last else "")


class _Output(asyncio.Protocol):
    """The end of what the process writes to its standard output and error."""

    def __init__(self, closed: "asyncio.Future[None]") -> None:
        self.closed = closed
        self.tail = b""

    def data_received(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-_TAIL_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def _popen(sock: socket.socket, output: int) -> "subprocess.Popen[bytes]":
    """The process, in a session of its own: Ctrl-C in a terminal is for the front end to handle."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE, str(sock.fileno()), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[sock.fileno()],
        start_new_session=True,
    )
