"""Writing files so that a crash leaves either the old one or the new one, and hashing them.

A new file is written beside its place, flushed to the disk, then renamed over it; the folder is flushed
too, because that is where the name lives. A full or read-only disk becomes a StorageError that names the
path; what was there before is untouched.
"""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from tokenmill.core.errors import StorageError

__all__ = ["atomic_file", "check_free_space", "copy_file", "disk_errors", "hash_file", "sync_folder"]

_CHUNK: Final = 1 << 20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names `path` and the next step."""
    try:
        yield
    except OSError as error:
        hint = "check the permissions of that folder, or set TOKENMILL_HOME"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free some space, or set TOKENMILL_HOME to a larger disk"
        raise StorageError(f"{path}: {error.strerror or error}", hint=hint) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` only when the block ends without an error, flushed to the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_file(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file as hex; `progress` gets the bytes read so far. Raises StorageError."""
    digest = hashlib.sha256()
    with disk_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(file.tell())
    return digest.hexdigest()


def copy_file(
    source: IO[bytes], target: IO[bytes], limit: int, progress: Callable[[int], None]
) -> tuple[int, str]:
    """Copy up to `limit` + 1 bytes; returns (bytes, SHA-256), so that more than `limit` shows as such."""
    digest = hashlib.sha256()
    done = 0
    while done <= limit and (chunk := source.read(min(_CHUNK, limit + 1 - done))):
        target.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        progress(done)
    return done, digest.hexdigest()


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise StorageError if the file system of `folder` has less than `num_bytes` free."""
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StorageError(
            f"{folder}: {num_bytes / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free",
            hint="free some space, or set TOKENMILL_HOME to a larger disk",
        )
