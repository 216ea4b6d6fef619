"""The values in a log, one at a time with the line where each begins: JSON lines, a JSON list, or CSV.

Files are streamed, also out of gzip and bzip2, and no line is held that is longer than the bound, so that a
log of any size can be read. A line that cannot be read is a fault with its number, never the end of the rest.
"""

import bz2
import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec

from tokenmill.core import NotFoundError, StorageError, UsageError
from tokenmill.workload.row import Fault

__all__ = ["MAX_LINE_BYTES", "Line", "read_lines"]

MAX_LINE_BYTES: Final = 4 << 20
_CHUNK: Final = 1 << 16
_EXCERPT: Final = 200
_BOM: Final = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """An object of a log, and the line where it begins."""

    number: int
    value: dict[str, Any]


def read_lines(path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line | Fault]:
    """The objects of a file, and a fault for each that cannot be read; blank lines are neither.

    Raises NotFoundError, StorageError; UsageError for what is no such file at all.
    """
    if not path.exists():
        raise NotFoundError(f"there is no file {path}", hint="give the log of calls, such as log.jsonl")
    if not path.is_file():
        raise UsageError(f"{path} is no file", hint="give the log of calls, such as log.jsonl")
    with _read_errors(path), _open(path) as file:
        suffixes = [each.lower() for each in path.suffixes if each.lower() not in (".gz", ".bz2")]
        if suffixes[-1:] in ([".csv"], [".tsv"]):
            yield from _csv_rows(file, path, max_line_bytes, "\t" if suffixes[-1] == ".tsv" else ",")
            return
        head = file.peek(_CHUNK)[:_CHUNK].removeprefix(_BOM).lstrip()
        if head.startswith(b"["):
            yield from _json_list(file, path, max_line_bytes)
        else:
            yield from _json_lines(file, max_line_bytes)


def _open(path: Path) -> Any:
    """A file of bytes with `peek`, unpacked if its name says that it is packed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return bz2.open(path, "rb") if path.suffix == ".bz2" else path.open("rb")


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """What disk and unpackers say, as errors of ours."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UsageError(f"{path} is damaged ({error})", hint="pack it again, or give it unpacked") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})", hint="check it") from None


def _json_lines(file: IO[bytes], max_bytes: int) -> Iterator[Line | Fault]:
    for number, data in _bounded_lines(file, max_bytes):
        if data is None:
            yield Fault(number, f"is longer than {max_bytes} bytes")
            continue
        if number == 1:
            data = data.removeprefix(_BOM)
        if data.strip():
            yield _decoded(number, data)


def _bounded_lines(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number; None for one that is too long, which is read past and not kept."""
    number = 0
    while data := file.readline(max_bytes + 1):
        number += 1
        if len(data) <= max_bytes or data.endswith(b"\n"):
            yield number, data
            continue
        while data and not data.endswith(b"\n"):
            data = file.readline(_CHUNK)
        yield number, None


def _decoded(number: int, data: bytes) -> Line | Fault:
    shown = data[:_EXCERPT].decode("utf-8", "replace").rstrip("\r\n")
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        said = str(error)
        if "depth" in said or "recursion" in said.lower():
            said = "too deep"
        return Fault(number, f"is no JSON ({said})", line=shown)
    except RecursionError:
        return Fault(number, "is no JSON (too deep)", line=shown)
    if not isinstance(value, dict):
        return Fault(number, f"is {_kind(value)}, expected an object", line=shown)
    return Line(number, value)


def _kind(value: Any) -> str:
    names = {str: "a text", list: "a list", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def _json_list(file: IO[bytes], path: Path, max_bytes: int) -> Iterator[Line | Fault]:
    """The entries of a list. Raises UsageError where it is damaged: where would the next begin?"""
    decoder, text, number = json.JSONDecoder(), "", 1
    reader = _Utf8(file)
    text = reader.more().lstrip("\ufeff")
    number += text[: text.index("[")].count("\n")
    text = text[text.index("[") + 1 :]
    while True:
        stripped = text.lstrip(" \t\r\n,")
        number += text[: len(text) - len(stripped)].count("\n")
        text = stripped
        if text.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(text)
            is_whole = end < len(text)
        except (ValueError, RecursionError) as error:
            value, end, is_whole, said = None, 0, False, str(error)
        else:
            said = "the list does not end"
        if not is_whole:
            chunk = reader.more() if len(text) <= max_bytes else ""
            if not chunk:
                where = f"{path}:{number}"
                hint = "mend it, or write an object a line"
                raise UsageError(f"{where}: is no JSON, or longer than {max_bytes} bytes ({said})", hint=hint)
            text += chunk
            continue
        if isinstance(value, dict):
            yield Line(number, value)
        else:
            yield Fault(number, f"is {_kind(value)}, expected an object", line=text[: min(end, _EXCERPT)])
        number += text[:end].count("\n")
        text = text[end:]


class _Utf8:
    """Chunks of text; a character that is cut in two waits for its second half."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def more(self) -> str:
        data = self._file.read(_CHUNK * 16)
        return self._decoder.decode(data, final=not data)


def _csv_rows(file: IO[bytes], path: Path, max_bytes: int, delimiter: str) -> Iterator[Line | Fault]:
    """The rows under a header. Fields may hold line ends, so a row's number is where it begins."""
    too_long: list[int] = []
    reader = csv.reader(_csv_lines(file, max_bytes, too_long), delimiter=delimiter, strict=True)
    header: list[str] = []
    begins = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Fault(begins, f"is no CSV ({error})")
            begins = reader.line_num + 1
            continue
        finally:
            yield from (Fault(each, f"is longer than {max_bytes} bytes") for each in too_long)
            too_long.clear()
        number, begins = begins, reader.line_num + 1
        if not header:
            header = _header(row, path)
        elif row and len(row) != len(header):
            yield Fault(
                number, f"has {len(row)} fields, expected {len(header)}", line=delimiter.join(row)[:_EXCERPT]
            )
        elif row:
            yield Line(number, dict(zip(header, row, strict=True)))


def _csv_lines(file: IO[bytes], max_bytes: int, too_long: list[int]) -> Iterator[str]:
    """The lines as text; one that is too long is blank, and its number is noted."""
    for number, data in _bounded_lines(file, max_bytes):
        if data is None:
            too_long.append(number)
        yield "" if data is None else data.decode("utf-8", "replace").removeprefix("\ufeff")


def _header(row: list[str], path: Path) -> list[str]:
    names = [each.strip() for each in row]
    if len(set(names)) < len(names) or not all(names):
        raise UsageError(f"{path}:1: the columns {', '.join(names)[:200]} are not all named, each once")
    return names
