"""Rows of the tables that come with tokenmill: reading them strictly, naming file and line of what is bad.

A table is a CSV file with a header. Every row belongs to a date and a source; without them it is refused.
Where the user's data folder has a file of the same name, it takes the place of the one in the package.
"""

import csv
import io
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from tokenmill.core import StorageError, UsageError

__all__ = [
    "Row",
    "TableText",
    "data_home",
    "optional_number",
    "parse_rows",
    "read_table",
    "read_text",
    "required",
    "valid_date",
    "write_atomically",
]

_T = TypeVar("_T")
_MAX_BYTES: Final = 8 << 20
_MAX_FIELD: Final = 2000
_DATE: Final = re.compile(r"20\d\d(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?\b")


class TableText(NamedTuple):
    """A table as text, and where it came from."""

    name: str
    text: str
    is_users: bool


class Row(NamedTuple):
    """One row by column, and `FILE:LINE`, which every complaint starts with."""

    where: str
    fields: Mapping[str, str]

    def bad(self, why: str) -> UsageError:
        """An error that names the place."""
        return UsageError(f"{self.where}: {why}", hint="mend that line; nothing was changed")


def data_home() -> Path:
    """The folder of the user's own tables and calibrations: `costs` in the data folder of tokenmill."""
    if home := os.environ.get("TOKENMILL_HOME"):
        return Path(home).expanduser().absolute() / "costs"
    data = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    base = Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share"
    return base / "tokenmill" / "costs"


def read_table(name: str, home: Path | None = None) -> TableText:
    """The user's table of this name, else that of the package."""
    own = (home or data_home()) / name
    if own.is_file():
        return TableText(str(own), read_text(own), True)
    text = resources.files("tokenmill.costs").joinpath("data", name).read_text(encoding="utf-8")
    return TableText(name, text, False)


def read_text(path: Path) -> str:
    """A table that somebody gave. Raises UsageError if it is no text file of a sane size."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES >> 20} MB", hint="give a table of prices")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})", hint="give a CSV file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start})", hint="save it as UTF-8") from error


def parse_rows(table: TableText, columns: Sequence[str], make: Callable[[Row], _T]) -> tuple[_T, ...]:
    """Every row made into a value by `make`. Raises UsageError with file and line.

    All of `columns` must be there, in any order; others are ignored.
    """
    reader = csv.reader(io.StringIO(table.text, newline=""), strict=True)
    made = []
    try:
        header = next(reader, [])
        missing = [column for column in columns if column not in header]
        if missing:
            why = f"the header has no column {', '.join(missing)}"
            raise UsageError(f"{table.name}:1: {why}", hint=f"the columns are {','.join(columns)}")
        line = reader.line_num + 1
        for cells in reader:
            where, line = f"{table.name}:{line}", reader.line_num + 1
            if not cells:
                continue
            row = Row(where, dict(zip(header, (cell.strip() for cell in cells), strict=False)))
            if len(cells) != len(header):
                raise row.bad(f"{len(cells)} fields, the header has {len(header)}")
            if any(len(cell) > _MAX_FIELD or not cell.isprintable() for cell in cells):
                raise row.bad("a field is too long or holds control characters")
            made.append(make(row))
    except csv.Error as error:
        raise UsageError(f"{table.name}:{reader.line_num}: {error}", hint="quote what has commas") from error
    return tuple(made)


def required(row: Row, column: str) -> str:
    """A field that may not be empty."""
    value = row.fields[column]
    if not value:
        raise row.bad(f"{column} is empty")
    return value


def optional_number(row: Row, column: str, low: float, high: float) -> float | None:
    """A number within sane bounds, or None where the field is empty."""
    text = row.fields[column]
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise row.bad(f"{column} is {text[:40]!r}, no number") from None
    if not math.isfinite(value) or not low <= value <= high:
        raise row.bad(f"{column} is {text[:40]}, not between {low:g} and {high:g}")
    return value


def valid_date(row: Row, column: str) -> str:
    """A date as YYYY, YYYY-MM or YYYY-MM-DD, with a remark after it or not."""
    text = required(row, column)
    if _DATE.match(text) is None:
        raise row.bad(f"{column} is {text[:40]!r}, no date such as 2026-05-31")
    return text


def write_atomically(target: Path, content: bytes) -> None:
    """The old file or the new one, never a part of it."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        hint = "check the permissions of that folder, or set TOKENMILL_HOME"
        raise StorageError(f"{target}: {error.strerror or error}", hint=hint) from error
