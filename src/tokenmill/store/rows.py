"""How keys, lines and holds become rows and back, and the questions to the ledger, for both databases.

The SQL here is what SQLite and PostgreSQL both understand, but for the mark of a parameter and for dates,
which are passed in. No text of a client is ever part of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any, Final, NamedTuple, TypeAlias, get_args

import msgspec

from tokenmill.core import BudgetError, StorageError, UsageError
from tokenmill.store.interface import Hold, LedgerQuery, LedgerSum, SumBy
from tokenmill.store.periods import DAY_S
from tokenmill.store.records import Budget, Entry, Key

__all__ = [
    "ENTRY_COLUMNS",
    "Dialect",
    "Question",
    "Value",
    "body_of_key",
    "budget_error",
    "check_entries",
    "check_idempotency_name",
    "day_of",
    "entry_of_row",
    "entry_values",
    "hold_of_row",
    "key_of_body",
    "lines_question",
    "spent_questions",
    "sums_of_rows",
    "sums_question",
]

Value: TypeAlias = str | int | float | bytes | None
"""What a column can hold."""

ENTRY_COLUMNS: Final = tuple(field.name for field in fields(Entry))
"""The columns of the ledger that are the fields of an Entry, in their order."""

_SUMMED: Final = ENTRY_COLUMNS[-7:]
_MAX_INTEGER: Final = (1 << 63) - 1
_HALF: Final = 1 << 32
_MAX_NAME_CHARS: Final = 255


class Dialect(NamedTuple):
    """What differs between the databases: the mark of a parameter, and the day and month of `at_s`."""

    mark: str
    day: str
    month: str

    def by(self, name: SumBy) -> str:
        """The expression that lines are grouped by. Raises UsageError for one that there is not."""
        if name not in get_args(SumBy):
            raise UsageError(f"the ledger cannot be summed by {name!r}", hint="see `tokenmill ledger --help`")
        return {"day": self.day, "month": self.month}.get(name, name)


class Question(NamedTuple):
    """A statement and its parameters."""

    sql: str
    values: tuple[Value, ...]


def body_of_key(key: Key) -> str:
    """All of a key as JSON."""
    return msgspec.json.encode(key).decode()


def key_of_body(body: Any) -> Key:
    """Back. Raises StorageError for what is no key."""
    assert isinstance(body, str), "the column is text"
    try:
        return msgspec.json.decode(body, type=Key)
    except (msgspec.DecodeError, UsageError) as error:
        raise StorageError(f"a key in the database makes no sense ({error})") from error


def budget_error(key_id: str, budget: Budget, left: int, nano_usd: int) -> BudgetError:
    """What a call is told for which a key has too little left."""
    period = {"total": "", "day": " of today (UTC)", "month": " of this month (UTC)"}[budget.period]
    return BudgetError(
        f"{left / 1e9:.9f} USD are left of the budget{period} of key {key_id}, and this call may come to "
        f"{nano_usd / 1e9:.9f} USD",
        hint="ask for fewer tokens, wait for calls that run, or raise the budget",
    )


def check_entries(entries: Sequence[Entry]) -> None:
    """Raise UsageError for a line that no ledger could hold: negative, too large, no time."""
    for entry in entries:
        numbers = [getattr(entry, name) for name in _SUMMED]
        if not all(0 <= number <= _MAX_INTEGER for number in numbers) or not math.isfinite(entry.at_s):
            raise UsageError(f"the line of {entry.request_id} has a figure below 0 or above 2^63")


def entry_values(entry: Entry) -> tuple[Value, ...]:
    """The values of `ENTRY_COLUMNS`. Text that a database cannot hold gets replacement characters."""
    values = astuple(entry)
    return tuple(_storable(value) if isinstance(value, str) else value for value in values)


def _storable(text: str) -> str:
    if text.isprintable():
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def entry_of_row(row: Sequence[Any]) -> Entry:
    """Back."""
    return msgspec.convert(dict(zip(ENTRY_COLUMNS, row, strict=True)), Entry)


def hold_of_row(row: Sequence[Any]) -> Hold:
    """From request_id, attempt, key_id, nano_usd, at_s."""
    request_id, attempt, key_id, nano_usd, at_s = row
    return Hold(request_id=request_id, attempt=attempt, key_id=key_id, nano_usd=int(nano_usd), at_s=at_s)


def day_of(at_s: float) -> int:
    """The day of UTC that a point in time lies in, counted from 1970."""
    return math.floor(at_s / DAY_S)


def spent_questions(key_id: str, since_s: float, until_s: float | None, mark: str) -> list[Question]:
    """What to add up for a key's spending: whole days from `days`, what is left at both ends by line."""
    end = math.inf if until_s is None else until_s
    first = math.ceil(since_s / DAY_S)
    last = None if until_s is None else math.floor(until_s / DAY_S)
    if last is not None and last <= first:
        return [_lines_between(key_id, since_s, end, mark)]
    days = f"SELECT sum(price_nano_usd) FROM days WHERE key_id = {mark} AND day >= {mark}"
    values: tuple[Value, ...] = (key_id, first)
    if last is not None:
        days, values = f"{days} AND day < {mark}", (*values, last)
    questions = [Question(days, values)]
    if since_s < first * DAY_S:
        questions.append(_lines_between(key_id, since_s, first * DAY_S, mark))
    if last is not None and last * DAY_S < end:
        questions.append(_lines_between(key_id, last * DAY_S, end, mark))
    return questions


def _lines_between(key_id: str, since_s: float, until_s: float, mark: str) -> Question:
    sql = f"SELECT sum(price_nano_usd) FROM ledger WHERE key_id = {mark} AND at_s >= {mark} AND at_s < {mark}"
    return Question(sql, (key_id, since_s, until_s))


def sums_question(query: LedgerQuery, by: Sequence[SumBy], dialect: Dialect) -> Question:
    """Groups, the number of lines, and of each figure the upper and lower 32 bits: no sum overflows."""
    groups = [dialect.by(name) for name in by]
    halves = (f"sum({name} >> 32), sum({name} & {_HALF - 1})" for name in _SUMMED)
    where, values = _where(query, dialect)
    sql = f"SELECT {', '.join([*groups, 'count(*)', *halves])} FROM ledger WHERE {where}"
    return Question(f"{sql} GROUP BY {', '.join(groups)}" if groups else sql, values)


def sums_of_rows(found: Sequence[Sequence[Any]], num_groups: int) -> list[LedgerSum]:
    """The answer to `sums_question`, the largest price first."""
    sums = [_sum_of_row(row, num_groups) for row in found if row[num_groups]]
    return sorted(sums, key=lambda each: (-each.price_nano_usd, each.group))


def _sum_of_row(row: Sequence[Any], num_groups: int) -> LedgerSum:
    count, *halves = row[num_groups:]
    pairs = zip(halves[::2], halves[1::2], strict=True)
    totals = [int(high) * _HALF + int(low) for high, low in pairs]
    return LedgerSum(
        group=tuple(map(str, row[:num_groups])),
        num_entries=count,
        **dict(zip(_SUMMED, totals, strict=True)),
    )


def lines_question(
    query: LedgerQuery, after: tuple[float, int] | None, limit: int, dialect: Dialect
) -> Question:
    """Lines in order of time, from behind the line (at_s, id) `after`; the id comes last."""
    where, values = _where(query, dialect)
    if after is not None:
        where += f" AND (at_s, id) > ({dialect.mark}, {dialect.mark})"
        values = (*values, *after)
    columns = ", ".join((*ENTRY_COLUMNS, "id"))
    return Question(f"SELECT {columns} FROM ledger WHERE {where} ORDER BY at_s, id LIMIT {limit}", values)


def _where(query: LedgerQuery, dialect: Dialect) -> tuple[str, tuple[Value, ...]]:
    terms, found = [f"at_s >= {dialect.mark}"], list[Value]([query.since_s])
    if query.until_s is not None:
        terms.append(f"at_s < {dialect.mark}")
        found.append(query.until_s)
    equal: Mapping[SumBy, str] = query.where or {}
    for name, value in equal.items():
        terms.append(f"{dialect.by(name)} = {dialect.mark}")
        found.append(value)
    return " AND ".join(terms), tuple(found)


def check_idempotency_name(name: str) -> None:
    """Raise UsageError for a name that no idempotency key may have."""
    if not 1 <= len(name) <= _MAX_NAME_CHARS:
        raise UsageError("an idempotency key has 1 to 255 characters", hint="use a random UUID")
