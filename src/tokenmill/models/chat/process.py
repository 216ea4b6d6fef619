"""The caller's end of the process in which a chat template runs (`worker`).

It sets the budget of each answer: a fixed part, in which every sound template is done many times over, and
a part for each character of what is rendered. Processor time and memory are kept by the kernel, in the
child; here every wait is bounded besides.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenmill.models.child import end_child, exchange

__all__ = ["TemplateProcess"]

_SECONDS: Final = 0.2
_SECONDS_PER_CHAR: Final = 20e-6
"""Processor time. Compiling takes most of it: about 4 microseconds a character of the largest templates."""

_MAX_COMPILED_CHARS: Final = 40_000
_MAX_SECONDS: Final = 4.0
_MEMORY_BYTES: Final = 48 << 20
_MEMORY_PER_CHAR: Final = 20
_WAIT_SECONDS: Final = 30.0
_WORKER: Final = Path(__file__).with_name("worker.py")
_KEPT_VARIABLES: Final = ("LD_LIBRARY_PATH", "TZ")


class TemplateProcess:
    """Renders templates in a child, started at first use and ended with its owner. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., TemplateProcess] | None = None

    def start(self) -> None:
        """Start the child, and do not wait for it."""
        with self._lock:
            self._started()

    def render(self, source: str, context: Mapping[str, Any], mark: str = "") -> dict[str, str]:
        """The text as `text`, or why there is none as `refused`, `exhausted`, `broken` or `escaped`."""
        text = json.dumps(context, ensure_ascii=False)
        seconds = _SECONDS + _SECONDS_PER_CHAR * min(len(source), _MAX_COMPILED_CHARS)
        seconds += min(_SECONDS_PER_CHAR * len(text), _MAX_SECONDS)
        memory = _MEMORY_BYTES + _MEMORY_PER_CHAR * (len(source) + len(text))
        head = {"source": source, "mark": mark, "seconds": seconds, "memory_bytes": memory}
        with self._lock:
            child = self._started()
            answer = exchange(child, f"[{json.dumps(head)}, {text}]\n".encode(), _WAIT_SECONDS)
            if answer is None or "exhausted" in answer or "escaped" in answer:
                self._stop()  # what is left of it serves nobody
            if answer is None:
                return {"exhausted": _reason(child.returncode, seconds, memory)}
            return {key: str(value) for key, value in answer.items()}

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is not None and self._child.poll() is not None:
            self._stop()
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-EP", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
                start_new_session=True,
            )
            self._end = weakref.finalize(self, end_child, self._child)
        return self._child

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._child = self._end = None


def _reason(returncode: int, seconds: float, memory: int) -> str:
    """Why a child gave no answer."""
    reasons = {
        -signal.SIGPROF: f"over {seconds:.1f} s of processor time",
        -signal.SIGKILL: f"no answer within {_WAIT_SECONDS:.0f} s",
    }
    return reasons.get(returncode, f"exit code {returncode}, with {memory >> 20} MiB of memory")
