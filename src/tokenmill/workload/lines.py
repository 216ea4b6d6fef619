"""The values in a log, one at a time with the line where each begins: JSON lines, a JSON list, or CSV.

Files are streamed, also out of gzip and bzip2, and no line is held that is longer than the bound, so that a
log of any size can be read. A line that cannot be read is a fault with its number, never the end of the rest.
"""

import bz2
import codecs
import csv
import gzip
import json
import re
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
_BEFORE_LIST: Final = re.compile(r"\ufeff?\s*\[")
_BETWEEN: Final = re.compile(r"[\s,]+")
_DELIMITERS: Final = (",", ";", "\t")


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
            yield from _csv_rows(file, path, max_line_bytes)
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
    decoder, number = json.JSONDecoder(), 1
    buffer = _Buffer(file, path)
    number += buffer.skip(_BEFORE_LIST)
    while True:
        number += buffer.skip(_BETWEEN)
        if buffer.text.startswith("]", buffer.at):
            return
        said = "the list does not end"
        try:
            value, end = decoder.raw_decode(buffer.text, buffer.at)
        except (ValueError, RecursionError) as error:
            end, said = len(buffer.text), str(error)
        if end == len(buffer.text):  # not all of it is here yet, or it would not be the end
            if len(buffer.text) - buffer.at > max_bytes + 16 * _CHUNK or not buffer.grow():
                where = f"{path}:{number}: is no JSON, or longer than {max_bytes} bytes ({said})"
                raise UsageError(where, hint="mend it, or write an object a line")
            continue
        if end - buffer.at > max_bytes:
            yield Fault(number, f"is longer than {max_bytes} bytes")
        elif isinstance(value, dict):
            yield Line(number, value)
        else:
            shown = buffer.text[buffer.at : min(end, buffer.at + _EXCERPT)]
            yield Fault(number, f"is {_kind(value)}, expected an object", line=shown)
        number += buffer.text.count("\n", buffer.at, end)
        buffer.at = end


class _Buffer:
    """Text of a file from `at` on, as much as was asked for; half a character waits for its other half."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.text = ""
        self.at = 0
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def grow(self) -> bool:
        """Read more; whether there was any. Raises UsageError."""
        data = self._file.read(16 * _CHUNK)
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise UsageError(f"{self._path} is not UTF-8", hint="write it as UTF-8") from None
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(data)

    def skip(self, pattern: "re.Pattern[str]") -> int:
        """Go on behind what fits, reading more if need be; how many line ends were in it."""
        num_lines = 0
        while True:
            match = pattern.match(self.text, self.at)
            end = match.end() if match else self.at
            num_lines += self.text.count("\n", self.at, end)
            self.at = end
            if end < len(self.text) or not self.grow():
                return num_lines


def _csv_rows(file: Any, path: Path, max_bytes: int) -> Iterator[Line | Fault]:
    """The rows under a header. Fields may hold line ends, so a row's number is where it begins."""
    aside: list[Fault] = []
    delimiter = _delimiter(file.peek(_CHUNK)[:_CHUNK])
    reader = csv.reader(_csv_lines(file, max_bytes, aside), delimiter=delimiter, strict=True)
    header: list[str] = []
    begins = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Fault(begins, f"is no CSV ({error}, up to line {reader.line_num})")
            begins = reader.line_num + 1
            continue
        finally:
            yield from aside
            aside.clear()
        number, begins = begins, reader.line_num + 1
        if not header:
            header = _header(row, path)
        elif row and len(row) != len(header):
            shown = delimiter.join(row)[:_EXCERPT]
            yield Fault(number, f"has {len(row)} fields, expected {len(header)}", line=shown)
        elif row:
            yield Line(number, dict(zip(header, row, strict=True)))


def _delimiter(head: bytes) -> str:
    """What stands between the columns' names most often."""
    first = head.splitlines()[0].decode("utf-8", "replace") if head.strip() else ""
    return max(_DELIMITERS, key=first.count)


def _csv_lines(file: IO[bytes], max_bytes: int, aside: list[Fault]) -> Iterator[str]:
    """The lines as text; one that cannot be read is blank, and noted."""
    for number, data in _bounded_lines(file, max_bytes):
        if data is None:
            aside.append(Fault(number, f"is longer than {max_bytes} bytes"))
            yield ""
            continue
        try:
            yield data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            shown = data[:_EXCERPT].decode("utf-8", "replace").rstrip("\r\n")
            aside.append(Fault(number, "is not UTF-8", line=shown))
            yield ""


def _header(row: list[str], path: Path) -> list[str]:
    names = [each.strip() for each in row]
    if len(set(names)) < len(names) or not all(names):
        raise UsageError(f"{path}:1: the columns {', '.join(names)[:200]} are not all named, each once")
    return names
