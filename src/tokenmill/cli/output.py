"""Where a command writes, so that every command keeps the same promises.

People and programs read different streams. Without `--json` the result goes to standard output, and notes,
warnings and progress to standard error. With `--json` standard output holds exactly one JSON document, and
everything for people goes to standard error. Nothing here knows what a command does.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tokenmill.core import StorageError, TokenmillError

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Output", "ProgressBar", "format_bytes", "format_count", "format_table"]

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_CLEAR_LINE = "\r\x1b[K"
_ONE_LINE = {**_CONTROL, ord("\n"): " ", ord("\t"): " "}


class Output:
    """The streams of one command. `as_json` says which promise holds."""

    def __init__(
        self, *, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.as_json = as_json
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self._has_document = False
        self._warned: set[str] = set()

    @property
    def human(self) -> TextIO:
        """The stream for people: standard output, or with `--json` standard error."""
        return self.stderr if self.as_json else self.stdout

    def text(self, text: str, end: str = "\n") -> None:
        """Part of the result for people; a terminal gets no control characters but newline and tab."""
        shown = text.translate(_CONTROL) if self.human.isatty() else text
        self._write(self.human, shown + end)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people; columns that hold figures are aligned to the right."""
        self.text(format_table(header, rows))

    def document(self, value: Mapping[str, Any]) -> None:
        """The result for programs; without `--json` nothing. Call it once, at the end of every command."""
        if not self.as_json:
            return
        assert not self._has_document, "a command writes one document"
        self._has_document = True
        self._write(self.stdout, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def note(self, line: str) -> None:
        """One line on standard error that is not part of the result."""
        self._write(self.stderr, line.translate(_ONE_LINE) + "\n")

    def warn(self, message: str) -> None:
        """One line on standard error; the same warning appears once."""
        if message not in self._warned:
            self._warned.add(message)
            self.note(f"warning: {message}")

    def error(self, error: TokenmillError) -> None:
        """Report the error that ends the command: a line for people, with `--json` also a document."""
        self.failure(type(error).__name__, error.message, error.hint, error.exit_code)

    def failure(self, kind: str, message: str, hint: str, exit_code: int) -> None:
        """As `error`, for what is no TokenmillError. After a result was written there is no second one."""
        self.note(f"error: {message}; {hint}" if hint else f"error: {message}")
        if self.as_json and not self._has_document:
            fields = {"type": kind, "message": message, "hint": hint, "exit_code": exit_code}
            self.document({"error": fields})

    @contextmanager
    def progress(self, unit: str = "B") -> "Iterator[ProgressBar]":
        """A bar on standard error while the block runs; nothing is drawn unless that is a terminal."""
        bar = ProgressBar(self.stderr, unit)
        try:
            yield bar
        finally:
            bar.close()

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Say on a terminal what takes a while; the line goes when the block ends."""
        shows = self.stderr.isatty()
        if shows:
            self._write(self.stderr, f"{what} ...")
        try:
            yield
        finally:
            if shows:
                self._write(self.stderr, _CLEAR_LINE)

    def flush(self) -> None:
        """Hand everything to the system. Raises StorageError if it does not take it."""
        self._write(self.stdout, "")
        self._write(self.stderr, "")

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StorageError(
                f"the output cannot be written ({error.strerror})", hint="check where it is redirected to"
            ) from error


class ProgressBar:
    """One bar a stage, drawn with tqdm. Call it with (stage, done, total) as often as you like."""

    def __init__(self, stream: TextIO, unit: str) -> None:
        self._stream = stream
        self._unit = unit
        self._stage = ""
        self._bar: tqdm[Any] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of a stage are done; a total of 0 is not drawn."""
        if not self._stream.isatty() or not total:
            return
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = self._open(stage, total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, stage: str, total: int) -> "tqdm[Any]":
        from tqdm import tqdm

        return tqdm(
            total=total,
            desc=stage,
            unit=self._unit,
            unit_scale=True,
            file=self._stream,
            leave=False,
            dynamic_ncols=True,
        )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, figures to the right; the header may be empty."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    if not lines:
        return ""
    columns = list(zip(*lines, strict=True))
    body = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    padded = []
    for column, cells in zip(columns, body, strict=True):
        width = max(len(cell) for cell in column)
        is_right = bool(cells) and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)
        padded.append([cell.rjust(width) if is_right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))


def format_bytes(num_bytes: float) -> str:
    """`98.4 MB`: decimal units, three digits."""
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"), " ")


def format_count(count: float) -> str:
    """`135 M`: decimal units, three digits."""
    return _scaled(count, ("", "k", "M", "G", "T"), " ").rstrip()


def _scaled(value: float, units: Sequence[str], space: str) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    digits = 0 if value >= 100 or power == 0 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}{space}{units[power]}"
