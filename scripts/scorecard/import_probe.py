"""Imports hostile cases in a watched child, and judges how each of them ended.

A case ends well in exactly one of two ways: the model is loaded and sound, or one error of ours names the
file and the field, in under a second of processor time and 64 MiB of memory, with nothing executed and
nothing left behind. A child that hangs or dies is replaced; that is a violation of the case it worked on.
"""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from scripts.scorecard.hostile_files import CANARY, HostileCase, write_case
from scripts.scorecard.import_child import Answer
from tokenmill.core import StorageError, UsageError

__all__ = ["MAX_BYTES", "MAX_CPU_S", "ImportProbe", "Tried", "faults"]

MAX_CPU_S = 1.0
MAX_BYTES = 64 << 20
_PATIENCE_S = 10.0
_MAX_MESSAGE_CHARS = 1000
_MEMORY = "/dev/shm"  # an import flushes what it writes, which is not what is measured here
_ROOT = Path(__file__).parents[2]


class Tried(NamedTuple):
    """A case, how its import ended (None if the child hung or died), and all that is wrong with that."""

    case: HostileCase
    answer: Answer | None
    faults: list[str]


class ImportProbe:
    """A child that imports, and the folder that it works in. A context manager.

    `control` names a guard of `import_child.CONTROLS` to leave out; empty for none.
    """

    def __init__(self, control: str = "") -> None:
        self._control = control
        self._child: subprocess.Popen[str] | None = None
        self._folder = Path(
            tempfile.mkdtemp(prefix="hostile-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)
        )
        self._count = 0

    def __enter__(self) -> "ImportProbe":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, cases: Sequence[HostileCase]) -> Iterator[Tried]:
        """Try each case, in order."""
        for case in cases:
            yield self.try_case(case)

    def try_case(self, case: HostileCase) -> Tried:
        """Write the case, have it imported, judge, and clean up."""
        self._count += 1
        folder = self._folder / f"case{self._count}"
        target = write_case(case, folder)
        try:
            ended = self._ask({"case": str(folder), "target": str(target)})
            has_canary = any(CANARY in path.name for path in folder.rglob("*"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found = [f"{CANARY} was created"] if has_canary else []
        if isinstance(ended, str):
            return Tried(case, None, [*found, ended])
        return Tried(case, ended, [*found, *faults(case, ended, target)])

    def _ask(self, job: dict[str, str]) -> Answer | str:
        """The child's answer, or what became of it."""
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        print(json.dumps(job), file=child.stdin, flush=True)
        is_ready, _, _ = select.select([child.stdout], [], [], _PATIENCE_S)
        line = child.stdout.readline() if is_ready else ""
        if line:
            return Answer(**json.loads(line))
        self._end()
        return f"the child died with code {child.returncode}" if is_ready else f"hung for {_PATIENCE_S:.0f} s"

    def _started(self) -> "subprocess.Popen[str]":
        if self._child is None:
            command = [sys.executable, "-m", "scripts.scorecard.import_child", self._control]
            self._child = subprocess.Popen(
                command,
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=_environment(self._folder),
            )
        return self._child

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        streams: tuple[IO[str] | None, ...] = (self._child.stdin, self._child.stdout)
        for stream in streams:
            if stream is not None:
                stream.close()
        self._child.wait()
        self._child = None


def faults(case: HostileCase, answer: Answer, target: Path) -> list[str]:
    """Everything that is wrong with how a case ended."""
    found = [*answer.events, *answer.left]
    if answer.outcome == "broke":
        found.append(f"{answer.error}: {answer.message}")
    elif case.expected not in ("either", answer.outcome):
        found.append(f"{answer.outcome} ({answer.message})" if answer.message else answer.outcome)
    if answer.outcome == "refused":
        found += _message_faults(case, answer, target)
    if answer.cpu_s >= MAX_CPU_S:
        found.append(f"took {answer.cpu_s:.2f} s")
    if answer.grew_bytes >= MAX_BYTES:
        found.append(f"needed {answer.grew_bytes >> 20} MiB")
    return found


def _message_faults(case: HostileCase, answer: Answer, target: Path) -> Iterator[str]:
    """One line that names file and field, and the next step."""
    message = answer.message
    named = message.replace(str(target), "", 1)
    # Of a name that cannot be used the name itself is the fault, of a full disk the store's place.
    if named == message and case.exit_code not in (UsageError.exit_code, StorageError.exit_code):
        yield f"does not name the file: {message}"
    if not re.search(case.field, named):
        yield f"does not name {case.field}: {named}"
    if len(message) > _MAX_MESSAGE_CHARS or not message.isprintable():
        yield f"is not one short line ({len(message)} characters): {message[:200]!r}"
    if not answer.hint:
        yield f"has no hint: {message}"
    if case.exit_code != answer.exit_code:
        yield f"has exit code {answer.exit_code}, not {case.exit_code}: {message}"


def _environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{_ROOT / 'src'}:{_ROOT}",
        "HOME": str(folder),
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
