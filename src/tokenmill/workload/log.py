"""Reading a log whatever its format: rows with ids, and what makes none kept aside by line.

The format is found from the first lines and holds for the whole log. A folder is read file by file, in the
order of names: a batch's input and output, or the files of a capture.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tokenmill.core import NotFoundError, ResourceError, UsageError
from tokenmill.workload.formats import COLUMNS, FORMATS, Columns, Draft, Format, pairs_format
from tokenmill.workload.lines import MAX_LINE_BYTES, Line, read_lines
from tokenmill.workload.messages import DraftError
from tokenmill.workload.row import Fault, Log, Row, row_id

__all__ = ["MAX_ROWS", "read_log"]

MAX_ROWS: Final = 1_000_000
_PEEKED: Final = 50
_SUFFIXES: Final = (".jsonl", ".json", ".csv", ".tsv", ".ndjson")
_MAX_SHARED: Final = 1024


def read_log(
    path: Path,
    *,
    columns: Columns | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    max_rows: int = MAX_ROWS,
) -> Log:
    """The rows and faults of a file, or of the files of a folder.

    `columns` says which columns of flat rows have what, by the keys of `formats.COLUMNS`. Raises
    NotFoundError, StorageError, ResourceError for too many rows; UsageError for a format that nobody knows,
    and for a log in which no line makes a row.
    """
    chosen = _checked(columns or {})
    reader = _Reader(max_rows)
    format: Format | None = None
    files = _files(path)
    for file in files:
        lines = read_lines(file, max_line_bytes=max_line_bytes)
        head = _peek(lines)
        values = [each.value for each in head if isinstance(each, Line)]
        format = format or (_format_of(values, file, chosen) if values else None)
        reader.file = file.name if len(files) > 1 else ""
        for line in _chain(head, lines):
            reader.take(line, format)
    if format is None:
        _refuse(path, reader.faults)
    rows, faults = reader.finish()
    if not rows:
        _refuse(path, faults)
    return Log(tuple(rows), tuple(faults), format.name if format else "")


def _refuse(path: Path, faults: list[Fault]) -> None:
    first = min(faults, key=lambda each: each.number, default=None)
    if first is None:
        raise UsageError(f"{path} is empty", hint="give a log with a call a line")
    raise UsageError(
        f"{path}: no line makes a row; the first: {path.name if not first.file else first.file}:"
        f"{first.number} {first.reason}",
        hint="see docs/workload.md for the formats",
    )


def _checked(columns: Columns) -> Columns:
    for what in columns:
        if what not in COLUMNS:
            raise UsageError(f"there is no column for {what}", hint=f"use {', '.join(COLUMNS)}")
    return columns


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(each for each in path.iterdir() if _is_log(each))
    if not files:
        raise NotFoundError(f"{path} has no logs", hint=f"give a folder with {', '.join(_SUFFIXES)} files")
    return files


def _is_log(path: Path) -> bool:
    suffixes = [each for each in path.suffixes if each not in (".gz", ".bz2")]
    is_ours = path.name == "erasures.jsonl" or path.name.endswith(".rejected.jsonl")
    return path.is_file() and bool(suffixes) and suffixes[-1] in _SUFFIXES and not is_ours


def _peek(lines: Iterator[Line | Fault]) -> list[Line | Fault]:
    head: list[Line | Fault] = []
    for line in lines:
        head.append(line)
        if sum(isinstance(each, Line) for each in head) >= _PEEKED or len(head) >= 20 * _PEEKED:
            break
    return head


def _chain(head: list[Line | Fault], rest: Iterator[Line | Fault]) -> Iterator[Line | Fault]:
    yield from head
    yield from rest


def _format_of(values: list[dict[str, Any]], file: Path, columns: Columns) -> Format:
    """The format that most of these lines have. Raises UsageError."""
    votes = Counter(name for value in values if (name := _name_of(value)))
    fields = max(values, key=len)
    flat = pairs_format(columns, list(fields))
    if columns and flat:
        return flat
    if votes:
        name = votes.most_common(1)[0][0]
        return next(each for each in FORMATS if each.name == name)
    if flat is None:
        raise UsageError(
            f"{file}: no format is known with the fields {', '.join(fields)[:200]}",
            hint="name them: columns: {prompt: ..., answer: ...} in workload.yaml, or see docs/workload.md",
        )
    return flat


def _name_of(value: Mapping[str, Any]) -> str:
    return next((each.name for each in FORMATS if each.matches(value)), "")


class _Reader:
    """Takes the lines of all files; holds the rows, and the parts that wait for their others."""

    def __init__(self, max_rows: int) -> None:
        self.faults: list[Fault] = []
        self.file = ""
        self._max_rows = max_rows
        self._drafts: list[tuple[int, str, Draft]] = []
        self._places: dict[str, int] = {}
        self._texts: dict[str, str] = {}

    def take(self, line: Line | Fault, format: Format | None) -> None:
        """Read one line. Raises ResourceError beyond the bound."""
        if isinstance(line, Fault) or format is None:
            reason = line.reason if isinstance(line, Fault) else "has no known format"
            self._fault(line.number, reason, line.line if isinstance(line, Fault) else "")
            return
        try:
            if not format.matches(line.value):
                raise DraftError(_mismatch(line.value, format))
            drafts = format.drafts(line.value)
        except DraftError as error:
            self._fault(line.number, error.message)
            return
        for draft in drafts:
            self._add(line.number, draft)

    def _fault(self, number: int, reason: str, line: str = "") -> None:
        if len(self.faults) >= self._max_rows:
            hint = "is it a log of calls? see docs/workload.md"
            raise ResourceError(f"more than {self._max_rows} lines are no call", hint=hint)
        self.faults.append(Fault(number, reason, self.file, line))

    def _add(self, number: int, draft: Draft) -> None:
        place = self._places.get(draft.key) if draft.key else None
        if place is not None:
            first, file, before = self._drafts[place]
            both = _clash(before, draft)
            if both:
                self._fault(number, f"{both} of {draft.key} is in line {first} already")
                return
            self._drafts[place] = (first, file, _joined(before, draft))
            return
        if len(self._drafts) >= self._max_rows:
            raise ResourceError(f"the log has more than {self._max_rows} calls", hint="give a part of it")
        if draft.key:
            self._places[draft.key] = len(self._drafts)
        self._drafts.append((number, self.file, self._shared(draft)))

    def _shared(self, draft: Draft) -> Draft:
        """System prompts are the same text again and again: they are held once."""
        for message in (draft.request or {}).get("messages", ()):
            text = message["content"]
            if message["role"] in ("system", "developer") and text and len(self._texts) < _MAX_SHARED:
                message["content"] = self._texts.setdefault(text, text)
        return draft

    def finish(self) -> tuple[list[Row], list[Fault]]:
        """All rows, and all faults by line."""
        rows: list[Row] = []
        repeats: Counter[str] = Counter()
        seen: dict[tuple[str, str], int] = {}
        for number, file, draft in self._drafts:
            self.file = file
            if draft.request is None or draft.answer is None:
                what = "request" if draft.request is None else "answer"
                where = "; its file belongs into the same folder" if draft.own_id else ""
                self._fault(number, f"there is no {what} for {draft.key}{where}")
                continue
            plain = row_id(draft.request, draft.own_id)
            if draft.own_id and (plain, draft.answer) in seen:
                self._fault(number, f"is the call of line {seen[plain, draft.answer]} again")
                continue
            seen.setdefault((plain, draft.answer), number)
            repeat, repeats[plain] = repeats[plain], repeats[plain] + 1
            id = row_id(draft.request, draft.own_id, repeat) if repeat else plain
            rows.append(_row(id, number, file, draft))
        self.faults.sort(key=lambda each: (each.file, each.number))
        return rows, self.faults


def _mismatch(value: Mapping[str, Any], format: Format) -> str:
    other = _name_of(value)
    found = f"looks like {other}" if other else f"has the fields {', '.join(value)[:120] or 'none'}"
    return f"is no line of {format.name}: it {found}"


def _clash(first: Draft, second: Draft) -> str:
    if first.request is not None and second.request is not None:
        return "the request"
    return "the answer" if first.answer is not None and second.answer is not None else ""


def _joined(first: Draft, second: Draft) -> Draft:
    names = (each.name for each in dataclasses.fields(Draft))
    changes = {name: getattr(second, name) for name in names if getattr(first, name) in (None, "", ())}
    return dataclasses.replace(first, **changes)


def _row(id: str, number: int, file: str, draft: Draft) -> Row:
    fields: Iterable[str] = (each.name for each in dataclasses.fields(Draft))
    given = {name: getattr(draft, name) for name in fields if name not in ("key", "own_id")}
    return Row(id=id, number=number, file=file, **given)
