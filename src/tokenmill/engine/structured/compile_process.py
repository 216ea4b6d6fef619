"""The process in which grammars are tried before the engine compiles them: start, ask, replace, end.

What it does is in `compile_worker`. Here is the engine's end: every wait is bounded, and a process that
does not answer is killed and replaced at the next grammar.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, Final

from tokenmill.core import ResourceError
from tokenmill.engine.structured import compile_worker
from tokenmill.models.child import end_child

__all__ = ["CompileProcess"]

_START_SECONDS: Final = 20.0
_GRACE_SECONDS: Final = 0.5
_QUEUE_SECONDS: Final = 10.0
_PIECE_BYTES: Final = 1 << 16


class CompileProcess:
    """A child process that compiles one grammar at a time, started at first use. Safe between threads."""

    def __init__(self, setup: Mapping[str, Any], seconds: float) -> None:
        """`setup` is what `compile_worker.serve` reads first; `seconds` bounds one compilation."""
        self._setup = _line({**setup, "seconds": seconds})
        self._seconds = seconds + _GRACE_SECONDS
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def compile(self, kind: str, source: str) -> dict[str, Any]:
        """The child's answer: `num_bytes` that the result holds, or `problem` and `is_limit`.

        Raises ResourceError if the child died or hung, or other grammars kept it for ten seconds.
        """
        if not self._lock.acquire(timeout=_QUEUE_SECONDS):
            raise ResourceError("too many grammars are being compiled", hint="try again later")
        try:
            child = self._started()
            answer = _exchange(child, _line({"kind": kind, "source": source}), self._seconds)
            if answer is None:
                self._stop()
                raise ResourceError("the process that compiles grammars ended", hint="use another grammar")
            return answer
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the child, also while it compiles. The next grammar would start another one."""
        child = self._child
        if child is not None:
            child.kill()
        with self._lock:
            self._stop()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            self._stop()
            self._child = subprocess.Popen(
                [sys.executable, "-I", compile_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            weakref.finalize(self, end_child, self._child)
            if _exchange(self._child, self._setup, _START_SECONDS) is None:
                self._stop()
                raise ResourceError("the process that compiles grammars does not start")
        assert self._child is not None
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            end_child(child)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _exchange(child: "subprocess.Popen[bytes]", data: bytes, seconds: float) -> dict[str, Any] | None:
    """Send a line and receive one, within `seconds` together; None if the child ended or is late."""
    assert child.stdin is not None and child.stdout is not None
    deadline = time.monotonic() + seconds
    unsent, received = memoryview(data), b""
    os.set_blocking(child.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
        selector.register(child.stdin, selectors.EVENT_WRITE)
        selector.register(child.stdout, selectors.EVENT_READ)
        while not received.endswith(b"\n"):
            ready = [key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))]
            if not ready:
                return None
            if child.stdin in ready:
                unsent = unsent[os.write(child.stdin.fileno(), unsent[:_PIECE_BYTES]) :]
                if not unsent:
                    selector.unregister(child.stdin)
            if child.stdout in ready:
                piece = os.read(child.stdout.fileno(), _PIECE_BYTES)
                if not piece:
                    return None
                received += piece
        return dict(json.loads(received))
    return None
