"""A run folder: what decides the figures, the lines made so far, and the result at the end.

    run.json        the header: what the figures depend on, and its hash; a run goes on under the same only
    NAME.jsonl      lines that were finished, in the order in which they were
    NAME.json       a document, whole or not there

Lines are appended in groups; each group is one write, followed by fsync, so after `kill -9` at most the last
line is cut in half, and after a power cut at most the last group is missing. A line that is cut off is
removed when the file is used next, and its work is done again. One process at a time holds a folder. What the
lines mean is for their writer.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tokenmill.core import StorageError, UsageError

__all__ = ["RunFolder", "content_hash"]

_HEADER: Final = "run"


def content_hash(value: Any) -> str:
    """SHA-256, in hex, of a value as JSON with sorted keys and no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class RunFolder:
    """An open run folder, locked until `close`."""

    def __init__(self, path: Path, header: Mapping[str, Any], *, resume: bool = False) -> None:
        """Begin a run, or go on with the one that is there.

        Raises UsageError if a run is there and `resume` is not set, if its header differs, or while another
        process has it open; StorageError if the disk refuses.
        """
        self.path = path
        self.header = json.loads(json.dumps(header, allow_nan=False))
        with _disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / f"{_HEADER}.lock").open("w")
        try:
            self._take_lock()
            self._begin(resume)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The finished lines of `NAME.jsonl`, none if there is no such file; a half-written last one is cut
        off. Raises UsageError, with file and line, for a line that is damaged.
        """
        path = self.path / f"{name}.jsonl"
        if not path.exists():
            return
        with _disk_errors(path):
            _cut_half_line(path)
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    yield _object(line, f"{path}:{number}")

    def append(self, name: str, values: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to `NAME.jsonl`; they are on the disk when this returns."""
        text = "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)
        path = self.path / f"{name}.jsonl"
        with _disk_errors(path):
            if path.exists():
                _cut_half_line(path)
            with path.open("ab", buffering=0) as file:
                data = memoryview(_utf8(text))
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())

    def write(self, name: str, document: Mapping[str, Any]) -> Path:
        """Write `NAME.json` so that it is always whole: the old one or the new one. Gives its path."""
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        path, draft = self.path / f"{name}.json", self.path / f".{name}.json.draft"
        with _disk_errors(path):
            with draft.open("wb") as file:
                file.write(_utf8(text))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            _sync_folder(self.path)
        return path

    def read(self, name: str) -> dict[str, Any] | None:
        """The document `NAME.json`, None if there is none. Raises UsageError for one that is damaged."""
        path = self.path / f"{name}.json"
        with _disk_errors(path):
            return _object(path.read_text("utf-8"), str(path)) if path.exists() else None

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.path} is used by another process", hint="wait for it, or use another folder"
            ) from None

    def _begin(self, resume: bool) -> None:
        before = self.read(_HEADER)
        document = {"hash": content_hash(self.header), "header": self.header}
        if before is None:
            self.write(_HEADER, document)
        elif before != document:
            raise UsageError(
                f"{self.path} holds a run of something else: {_difference(before, self.header)}",
                hint="use another folder for this run",
            )
        elif not resume:
            raise UsageError(f"{self.path} holds this run already", hint="--resume goes on with it")


def _difference(before: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """The fields that are not the same, with the old value and the new one."""
    old = before.get("header")
    if not isinstance(old, dict):
        return "its header is damaged"
    names = [name for name in sorted({*old, *header}) if old.get(name) != header.get(name)]
    shown = [f"{name} was {_short(old.get(name))} and is {_short(header.get(name))}" for name in names[:4]]
    return ", ".join(shown) or "its header was changed"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: no JSON object", hint="remove the run's folder and run it again")
    return value


def _utf8(text: str) -> bytes:
    """JSON text as bytes; half a surrogate pair, which is no Unicode, as its escape."""
    return text.encode(errors="backslashreplace")


def _cut_half_line(path: Path) -> None:
    """Remove what follows the last end of line."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StorageError(f"{path}: {reason}", hint="check the folder and the space on its disk") from error
