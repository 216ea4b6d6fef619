"""The side of the parent: a runner in a child process, which may die, hang or say nonsense.

Each of these ends the child and is a `ChildFault` with the reason; nothing waits without a bound. A child
is stopped while it is not asked anything: threads of a peer that spin on after their work would slow the
next one down.
"""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["Child", "ChildFault"]

_MAX_ANSWER = 1 << 16
_SHOWN = 80


class ChildFault(Exception):
    """Why a runner gives no figures, in one line."""


class Child:
    """A runner. A context manager; after a fault, and at the end, the process is gone."""

    def __init__(self, command: Sequence[str], log: Path, *, cwd: Path, env: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=cwd,
                env=env,
                process_group=0,
                bufsize=0,
            )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def call(self, name: str, *, patience_s: float, **fields: Any) -> dict[str, Any]:
        """Ask, and wait for the answer at most `patience_s` seconds. Raises ChildFault."""
        try:
            answer = self._exchange(json.dumps({"call": name, **fields}), patience_s)
        except ChildFault as fault:
            self.close()
            raise ChildFault(f"{name}: {fault}") from None
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            raise ChildFault(f"{name}: {answer['error']}")
        os.kill(self.pid, signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()

    def _exchange(self, line: str, patience_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        if self._process.returncode is not None:
            raise ChildFault(self._death())
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except OSError:
            raise ChildFault(self._death()) from None
        text = self._line(time.monotonic() + patience_s)
        if text is None:
            raise ChildFault(f"no answer in {patience_s:.0f} s")
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ChildFault(f"answered nonsense: {text[:_SHOWN]!r}")
        return answer

    def _line(self, deadline: float) -> bytes | None:
        """One line of output; None if the time is over before it ends."""
        assert self._process.stdout is not None
        text = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(self._process.stdout.fileno(), _MAX_ANSWER)
                text += part
                if not part:
                    raise ChildFault(self._death())
                if len(text) > _MAX_ANSWER:
                    raise ChildFault(f"answered nonsense: {text[:_SHOWN]!r}")
        return text

    def _death(self) -> str:
        """How it ended, with the last words of its log."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        code = self._process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        return f"{how}{': ' if words else ''}{words}"
