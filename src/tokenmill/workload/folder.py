"""A folder of workload files that grows at its end and is cut at its beginning.

    calls-20261122T205501-1f6c.jsonl     at most a day and so many bytes each; only the newest is appended to
    erasures.jsonl                       what was erased, each line with the hash of the one before
    pseudonyms.key                       the secret that makes end users' ids to pseudonyms
    lock                                 held by whoever writes: a server for a batch of lines, an erasure

Nothing stays open between batches, so that a server and an erasure can take turns. What was appended is on
the disk when `append` returns; half a line that a crash left behind is cut off by whoever writes next.
"""

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tokenmill.core import StorageError, UsageError

__all__ = ["ERASURES_NAME", "FolderConfig", "WorkloadFolder", "disk_errors", "sync_folder"]

ERASURES_NAME: Final = "erasures.jsonl"
_LOCK_NAME: Final = "lock"
_KEY_NAME: Final = "pseudonyms.key"
_TIME: Final = "%Y%m%dT%H%M%S"
_DAY_S: Final = 86400.0
_PRIVATE: Final = 0o600
_BLOCK: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Bounds: bytes of all files together and of one, and the days after which a line is gone."""

    max_bytes: int = 1 << 30
    max_file_bytes: int = 64 << 20
    keep_days: float = 30.0

    def __post_init__(self) -> None:
        if not 1 << 12 <= self.max_file_bytes <= self.max_bytes <= 1 << 50:
            raise UsageError(
                f"max_bytes is {self.max_bytes}, max_file_bytes {self.max_file_bytes}",
                hint="use 4096 <= max_file_bytes <= max_bytes",
            )
        if not 0.0 < self.keep_days <= 36500.0:
            raise UsageError(f"keep_days is {self.keep_days}", hint="use a value above 0, at most 36500")


class WorkloadFolder:
    """One folder. Any thread, any process: whoever writes holds its lock. Made where it is not there."""

    def __init__(self, path: Path, config: FolderConfig | None = None) -> None:
        self.path = path
        self.config = config or FolderConfig()

    def files(self) -> list[Path]:
        """The workload files, the oldest first. Raises StorageError."""
        with disk_errors(self.path):
            return sorted(self.path.glob("calls-*.jsonl")) if self.path.is_dir() else []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, and make the folder if need be. Raises StorageError."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(lock)

    def pseudonym(self, project: str, end_user: str) -> str:
        """What stands for an end user in the files: the same each time, of no use without the key.

        Empty for no end user. Raises StorageError.
        """
        if not end_user:
            return ""
        message = f"{len(project)}:{project}{end_user}".encode("utf-8", "surrogatepass")
        return "u_" + hmac.new(self._key(), message, hashlib.sha256).hexdigest()[:32]

    def append(self, lines: Sequence[bytes]) -> None:
        """Write whole lines to the newest file; the caller holds the lock.

        Raises StorageError, and then none of these lines is kept.
        """
        with disk_errors(self.path):
            path = self._current(sum(map(len, lines)))
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _PRIVATE)
            try:
                size = os.fstat(file).st_size
                try:
                    _write_all(file, b"".join(lines))
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, size)
                    raise
            finally:
                os.close(file)
            if size == 0:
                sync_folder(self.path)

    def trim(self, now_s: float | None = None) -> int:
        """Delete files that are too old, then the oldest until the rest fits; the caller holds the lock.

        Returns how many. Raises StorageError.
        """
        now_s = time.time() if now_s is None else now_s
        with disk_errors(self.path):
            for left in self.path.glob("*.tmp"):
                left.unlink()
            files = self.files()
            sizes = [path.stat().st_size for path in files]
            num_gone, total = 0, sum(sizes)
            for path, size in zip(files, sizes, strict=True):
                is_old = now_s - _begun_s(path) >= self.config.keep_days * _DAY_S
                if not is_old and total <= self.config.max_bytes:
                    break
                path.unlink()
                num_gone, total = num_gone + 1, total - size
            if num_gone:
                sync_folder(self.path)
        return num_gone

    def _current(self, num_bytes: int) -> Path:
        """Where the next lines go: the newest file if it is of today and has room, else a new one."""
        now_s, files = time.time(), self.files()
        if files:
            newest = files[-1]
            _mend_tail(newest)
            is_of_today = now_s - _begun_s(newest) < min(_DAY_S, self.config.keep_days * _DAY_S / 2)
            if is_of_today and newest.stat().st_size + num_bytes <= self.config.max_file_bytes:
                return newest
        name = datetime.fromtimestamp(now_s, UTC).strftime(_TIME)
        path = self.path / f"calls-{name}-0000.jsonl"
        if files and path <= files[-1]:  # more than one in a second
            begun, number = files[-1].stem.rsplit("-", 1)
            path = self.path / f"{begun}-{int(number, 16) + 1:04x}.jsonl"
        return path

    def _key(self) -> bytes:
        path = self.path / _KEY_NAME
        with disk_errors(self.path):
            with contextlib.suppress(FileNotFoundError):
                return path.read_bytes()
            with self.locked():
                if not path.exists():
                    temporary = path.with_suffix(".new")
                    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _PRIVATE)
                    try:
                        _write_all(file, secrets.token_bytes(32))
                        os.fsync(file)
                    finally:
                        os.close(file)
                    temporary.replace(path)
                    sync_folder(self.path)
                return path.read_bytes()


def sync_folder(folder: Path) -> None:
    """Make new and removed names of a folder durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _begun_s(path: Path) -> float:
    """The time in a file's name: its lines are younger. One without a time is as old as can be."""
    try:
        return datetime.strptime(path.stem.split("-")[1], _TIME).replace(tzinfo=UTC).timestamp()
    except (ValueError, IndexError):
        return 0.0


def _mend_tail(path: Path) -> None:
    """Cut off half a line at the end."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        at = end
        while at:
            start = max(0, at - _BLOCK)
            file.seek(start)
            found = file.read(at - start).rfind(b"\n")
            if found >= 0:
                at = start + found + 1
                break
            at = start
        if at != end:
            file.truncate(at)
            os.fsync(file.fileno())


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk says of a file or folder as StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", hint="check it, and its disk") from None
