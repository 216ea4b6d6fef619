"""Reading the data of tasks: CSV, JSON lines, a JSON list or plain lines, also gzip or bzip2, with the place
of every row, so that whatever is wrong with one can be named by file and line.

What the fields of a row mean is for the task that asks for them.
"""

import bz2
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, NoReturn

from tokenmill.core import NotFoundError, StorageError, UsageError

__all__ = ["DataRow", "Place", "find_file", "read_bytes", "read_json", "read_lines", "read_rows", "read_text"]

_OPENERS: Final[Mapping[str, Callable[[Path], "IO[bytes] | gzip.GzipFile"]]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
}
_MAX_BYTES: Final = 1 << 30


class Place(NamedTuple):
    """A file and a line of it, counted from 1; line 0 is the whole file."""

    path: Path
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)

    def refuse(self, what: str, hint: str = "") -> NoReturn:
        """Raise UsageError that names the place."""
        raise UsageError(
            f"{self}: {what}", hint=hint or "mend the line, or see docs/evaluation.md for the layout"
        )


@dataclass(frozen=True)
class DataRow:
    """The fields of one item, and where it stands."""

    fields: Mapping[str, Any]
    place: Place

    def text(self, name: str) -> str:
        """A field that is text and not blank. Raises UsageError."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            self.place.refuse(f"{name} is {_shown(value)}, expected text{self._others(name)}")
        return value

    def _others(self, name: str) -> str:
        """The fields that are there, if this one is not: perhaps it has another name."""
        return "" if name in self.fields else f"; the fields are {', '.join(self.fields) or 'none'}"

    def texts(self, name: str, least: int = 2) -> tuple[str, ...]:
        """A field that is a list of texts. Raises UsageError."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            self.place.refuse(f"{name} is {_shown(value)}, expected a list of texts{self._others(name)}")
        if len(value) < least:
            self.place.refuse(f"{name} has {len(value)} entries, expected at least {least}")
        return tuple(value)

    def index(self, name: str, size: int) -> int:
        """A field that is a number from 0 to size-1, also as text. Raises UsageError."""
        value = self.fields.get(name)
        number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < size:
            self.place.refuse(f"{name} is {_shown(value)}, expected a number from 0 to {size - 1}")
        return number

    def one_of(self, name: str, labels: Sequence[str]) -> int:
        """Which of these labels a field is. Raises UsageError."""
        value = self.fields.get(name)
        label = str(value).strip() if isinstance(value, str | int) else ""
        if label not in labels:
            self.place.refuse(f"{name} is {_shown(value)}, expected one of {', '.join(labels)}")
        return list(labels).index(label)


def find_file(path: Path, *names: str) -> Path:
    """`path` itself if it is a file, else the first of these files that the folder has.

    Each is looked for as it is, and with `.gz` and `.bz2`. Raises NotFoundError.
    """
    if path.is_file():
        return path
    for name in names:
        for suffix in ("", *_OPENERS):
            if (path / f"{name}{suffix}").is_file():
                return path / f"{name}{suffix}"
    what = f"{path} has no {' and no '.join(names)}" if path.is_dir() else f"{path} does not exist"
    raise NotFoundError(what, hint="give the folder of the data, or a file, with --data")


def read_bytes(path: Path) -> bytes:
    """A whole file, unpacked. Raises UsageError, NotFoundError, StorageError."""
    with _read_errors(path), _open(path) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        Place(path).refuse(f"is larger than {_MAX_BYTES >> 30} GiB", hint="give a part of it")
    return data


def read_text(path: Path) -> str:
    """A whole file as text, its line ends as they are. Errors as of `read_bytes`."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        Place(path, line).refuse(f"is not UTF-8 (byte {error.start} of the file)", hint="give text in UTF-8")


def read_lines(path: Path) -> Iterator[tuple[Place, str]]:
    """The lines of a text file, without their ends. Errors as of `read_text`."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        yield Place(path, number), line.removesuffix("\r")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UsageError, with its line where it is damaged; else as `read_text`."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        Place(path, getattr(error, "lineno", 0)).refuse(f"is no JSON ({error})")


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[DataRow]:
    """The rows of a `.csv`, `.jsonl` or `.json` file; what follows is `.gz`, `.bz2` or nothing.

    `columns` names the fields of a CSV file without a header. Raises UsageError for a file that is none of
    these, or has nothing in it, and where a row is damaged; the rest as of `read_text`.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is no file"
        if path.exists():
            Place(path).refuse(found, hint="give a file")
        raise NotFoundError(f"{path} does not exist", hint="check its name")
    kind = path.with_suffix("").suffix if path.suffix in _OPENERS else path.suffix
    readers: Mapping[str, Callable[[Path], Iterator[DataRow]]] = {
        ".jsonl": _json_lines,
        ".json": _json_list,
        ".csv": partial(_csv_rows, columns=columns),
    }
    if kind not in readers:
        Place(path).refuse(
            f"is a {kind or 'nameless'} file", hint=f"give {', '.join(readers)}, or one as .gz"
        )
    empty = True
    for row in readers[kind](path):
        yield row
        empty = False
    if empty:
        Place(path).refuse("has no items", hint="give a file with at least one")


def _json_lines(path: Path) -> Iterator[DataRow]:
    for place, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            place.refuse(f"is no JSON ({_reason(error)})")
        yield _row(value, place)


def _json_list(path: Path) -> Iterator[DataRow]:
    """The entries of a list, each with the line that it begins on."""
    text, decoder = read_text(path), json.JSONDecoder()
    at, line = _skip_white(text, 0, "["), 1
    if at < 0:
        Place(path, 1).refuse("is no JSON list")
    counted = 0
    while (start := _skip_white(text, at, "")) < len(text) and text[start] != "]":
        line, counted = line + text.count("\n", counted, start), start
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            Place(path, getattr(error, "lineno", line)).refuse(f"is no JSON ({error})")
        yield _row(value, Place(path, line))
        after = _skip_white(text, at, "")
        if text[after : after + 1] not in (",", "]"):
            Place(path, 1 + text.count("\n", 0, after)).refuse("a comma or the end of the list is missing")
        at = after + (text[after] == ",")
    if start >= len(text):
        Place(path, 1 + text.count("\n")).refuse("the list does not end")


def _skip_white(text: str, at: int, expected: str) -> int:
    """Where the next character stands, or where it ends if it is the expected one, else -1."""
    while at < len(text) and text[at] in " \t\r\n\ufeff":
        at += 1
    if not expected:
        return at
    return at + 1 if text[at : at + 1] == expected else -1


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[DataRow]:
    reader = csv.reader((f"{line}\n" for _, line in read_lines(path)), strict=True)
    names, line = list(columns), 1
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            Place(path, line).refuse(f"is no CSV ({error})")
        if cells is None:
            return
        if not cells:
            continue
        if not names:
            names = cells
            continue
        if len(cells) != len(names):
            Place(path, line).refuse(f"has {len(cells)} fields, expected {len(names)}: {', '.join(names)}")
        yield DataRow(dict(zip(names, cells, strict=True)), Place(path, line))


def _row(value: Any, place: Place) -> DataRow:
    if not isinstance(value, dict):
        place.refuse(f"is {_shown(value)}, expected a JSON object")
    return DataRow(value, place)


def _open(path: Path) -> "IO[bytes] | gzip.GzipFile":
    return _OPENERS[path.suffix](path) if path.suffix in _OPENERS else path.open("rb")


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist", hint="check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: damaged compressed data ({error})", hint="get the file again") from error
    except OSError as error:
        if path.suffix == ".bz2" and error.errno is None:
            raise UsageError(
                f"{path}: damaged compressed data ({error})", hint="get the file again"
            ) from error
        raise StorageError(f"{path}: {error.strerror or error}", hint="give a readable file") from error


def _reason(error: Exception) -> str:
    """Of an error of JSON within one line: the place in it, without a count of lines."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
