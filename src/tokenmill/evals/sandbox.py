"""Runs code that nobody has read, a model's, in a process that can do nothing but compute.

    run_python(program, tests) -> Outcome

A new Python process for each program: no network, no files, no other processes or signals (the kernel
refuses the system calls), an empty environment, an empty folder, no inherited descriptors, bounds on
memory, processor time, wall time and answer; output is thrown away. Where the kernel cannot do this,
nothing is run.

What it does not protect against: faults of the kernel, side channels, and a program that was written to
cheat its own tests, which it shares an interpreter with. docs/tasks.md has the list.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenmill.core import ResourceError, UsageError
from tokenmill.evals import sandbox_worker
from tokenmill.models.child import end_child, exchange

__all__ = ["Outcome", "SandboxConfig", "run_python"]

_MAX_ANSWER_BYTES: Final = 4 << 20
_MAX_PROGRAM_CHARS: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """Bounds of one run: seconds on the wall, seconds of processor time, bytes of address space."""

    wall_seconds: float = 15.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if not (0 < self.wall_seconds <= 3600 and 0 < self.cpu_seconds <= 3600):
            raise UsageError(
                "a bound on time is not between 0 and 3600 s", hint="change the sandbox's bounds"
            )
        if not 64 << 20 <= self.memory_bytes <= 1 << 40:
            raise UsageError("memory_bytes is out of bounds", hint="Python alone needs 64 MiB")


class Outcome(NamedTuple):
    """How a run ended. `reason` is empty if it passed; `value` is what the tests left in `result`."""

    passed: bool
    reason: str
    value: Any
    seconds: float


def run_python(
    program: str,
    tests: str,
    *,
    inputs: Mapping[str, Any] | None = None,
    wants_value: bool = False,
    meant: Sequence[str] = (),
    config: SandboxConfig | None = None,
) -> Outcome:
    """Run `program`, then `tests` over its names; passed means that both came to their end without exception.

    The program finds `inputs` under that name. The tests see Python's own built-in functions whatever the
    program put in their place, but for the names in `meant`, which the program is asked for. Raises
    ResourceError where the kernel cannot lock the process in.
    """
    config = config or SandboxConfig()
    if len(program) + len(tests) > _MAX_PROGRAM_CHARS:
        return Outcome(False, "the program is too long", None, 0.0)
    secret = secrets.token_hex(16)
    request = {
        "program": program,
        "tests": tests,
        "inputs": dict(inputs or {}),
        "wants_value": wants_value,
        "meant": list(meant),
        "limits": _limits(config),
        "secret": secret,
    }
    started = time.monotonic()
    answer, status = _ask(json.dumps(request).encode() + b"\n", config.wall_seconds)
    seconds = time.monotonic() - started
    if answer is None or answer.get("secret") != secret:
        return Outcome(False, _fate(status, seconds, config), None, seconds)
    if "problem" in answer:
        raise ResourceError(
            f"the sandbox cannot be locked here ({answer['problem']}), so no code of a model is run",
            hint="use Linux with seccomp on x86-64 or ARM64",
        )
    passed = answer.get("passed") is True
    reason = "" if passed else str(answer.get("error"))
    return Outcome(passed, reason, answer.get("value") if passed else None, seconds)


def _limits(config: SandboxConfig) -> dict[str, int]:
    return {
        "RLIMIT_AS": config.memory_bytes,
        "RLIMIT_CPU": config.cpu_seconds,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 16,
        "RLIMIT_CORE": 0,
    }


def _ask(request: bytes, seconds: float) -> tuple[dict[str, Any] | None, int | None]:
    """The worker's answer, and how it ended if it did so by itself."""
    command = [sys.executable, "-I", "-S", "-B", str(Path(sandbox_worker.__file__))]
    with tempfile.TemporaryDirectory(prefix="tokenmill-sandbox-") as folder:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            answer = exchange(child, request, seconds, max_bytes=_MAX_ANSWER_BYTES)
            if answer is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.05)
            return answer, child.poll()
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            end_child(child)


def _fate(status: int | None, seconds: float, config: SandboxConfig) -> str:
    """Why there is no verdict."""
    if status is None:
        return f"no end after {config.wall_seconds:g} s" if seconds >= config.wall_seconds else "no verdict"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"killed: more than {config.cpu_seconds} s of processor time, or out of memory"
    return f"ended by signal {-status}" if status < 0 else f"left with status {status} before its tests ended"
