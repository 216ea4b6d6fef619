"""The process in which grammars are tried before the engine compiles them: start, ask, replace, end.

What it does is in `compile_worker`. Here is the engine's end: every wait is bounded, and a process that
does not answer is killed and replaced at the next grammar.
"""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any, Final

from tokenmill.core import ResourceError
from tokenmill.engine.structured import compile_worker
from tokenmill.models.child import end_child, exchange

__all__ = ["CompileProcess"]

_START_SECONDS: Final = 20.0
_GRACE_SECONDS: Final = 0.5
_QUEUE_SECONDS: Final = 10.0


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
            answer = exchange(child, _line({"kind": kind, "source": source}), self._seconds)
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
            if exchange(self._child, self._setup, _START_SECONDS) is None:
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
