"""Text that a command is given in a file or through a pipe: bounded, decoded, refused if it is no text."""

import gzip
import sys
import zlib
from pathlib import Path
from typing import IO, Final

from tokenmill.core import NotFoundError, StorageError, UsageError

__all__ = ["MAX_TEXT_BYTES", "STDIN", "read_stdin", "read_text_file", "stdin_is_terminal"]

MAX_TEXT_BYTES: Final = 64 << 20
STDIN: Final = "-"

_GZIP_MAGIC: Final = b"\x1f\x8b"


def stdin_is_terminal() -> bool:
    """True if a person sits at standard input; a closed one counts as that, for nothing comes from it."""
    return sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()


def read_stdin() -> str:
    """All of standard input. Raises UsageError if it is no UTF-8 text or larger than 64 MiB."""
    return _decode(_read_bounded(sys.stdin.buffer, "standard input"), "standard input")


def read_text_file(path: Path) -> str:
    """A text file, decompressed if it is gzip; `-` is standard input.

    Raises NotFoundError, StorageError for a file that cannot be read, UsageError as `read_stdin` does.
    """
    if str(path) == STDIN:
        return read_stdin()
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == _GZIP_MAGIC
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            data = _read_bounded(file, str(path))
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist", hint="give the path of a text file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: damaged gzip data ({error})", hint="make the file again") from error
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read ({error.strerror or error})",
            hint="give the path of a readable text file",
        ) from error
    return _decode(data, str(path))


def _read_bounded(file: "IO[bytes] | gzip.GzipFile", name: str) -> bytes:
    data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(f"{name} is larger than {MAX_TEXT_BYTES >> 20} MiB", hint="give a part of it")
    return data


def _decode(data: bytes, name: str) -> str:
    hint = "give plain text in UTF-8"
    if b"\0" in data:
        raise UsageError(f"{name} is binary, not text", hint=hint)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 (byte {error.start})", hint=hint) from error
