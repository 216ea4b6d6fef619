"""Whether two SQL queries give the same: by running both on a SQLite database, or else by their text.

A model's query runs in the sandbox, in SQLite on a copy of the database in memory, where only reading is
authorised; steps, rows, sizes, memory and seconds are bounded. Rows are compared without their order unless
the reference orders them; the names of columns do not count, their order does.
"""

import base64
import re
from typing import Final, NamedTuple

from tokenmill.core import UsageError
from tokenmill.evals.sandbox import SandboxConfig, run_python

__all__ = ["SqlVerdict", "normalised_sql", "same_result"]

_MAX_DATABASE_BYTES: Final = 64 << 20
_CONFIG: Final = SandboxConfig(wall_seconds=20.0, cpu_seconds=10, memory_bytes=1 << 30)
# What runs in the sandbox. It is ours; the queries are data to it.
_PROGRAM: Final = """
import base64
import sqlite3
import sys

MAX_STEPS, STEPS, MAX_ROWS = 20_000_000, 10_000, 100_000
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}

database = sqlite3.connect(":memory:")
database.deserialize(base64.b64decode(inputs["database"]))
database.execute("PRAGMA temp_store = MEMORY")
database.text_factory = lambda data: data.decode("utf-8", "replace")
database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1 << 20)
database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
database.set_authorizer(lambda action, *rest: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY)


def rows_of(query):
    left = [MAX_STEPS // STEPS]

    def tick():
        left[0] -= 1
        return left[0] < 0

    database.set_progress_handler(tick, STEPS)
    rows = database.execute(query).fetchmany(MAX_ROWS + 1)
    if len(rows) > MAX_ROWS:
        raise ValueError("too many rows")
    return [tuple(plain(value) for value in row) for row in rows]


def plain(value):
    return round(value, 6) + 0.0 if isinstance(value, (int, float)) else value


def key(row):
    return [(type(value).__name__, value) for value in row if value is not None], len(row)
"""
_TESTS: Final = """
wanted = rows_of(inputs["reference"])
try:
    given = rows_of(inputs["query"])
    if not inputs["ordered"]:
        wanted, given = sorted(wanted, key=key), sorted(given, key=key)
    result = {"same": wanted == given, "error": ""}
except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
    result = {"same": False, "error": f"{type(error).__name__}: {error}"[:300]}
"""


class SqlVerdict(NamedTuple):
    """Whether the results are the same, and why the query could not be run, or nothing."""

    same: bool
    error: str


def same_result(database: bytes, reference: str, query: str) -> SqlVerdict:
    """Run both queries on a database, the bytes of a SQLite file.

    Raises UsageError if the reference cannot be run.
    """
    if len(database) > _MAX_DATABASE_BYTES:
        raise UsageError(
            "the database is too large", hint=f"use one of at most {_MAX_DATABASE_BYTES >> 20} MiB"
        )
    inputs = {
        "database": base64.b64encode(database).decode(),
        "reference": reference,
        "query": query,
        "ordered": re.search(r"(?i)\border\s+by\b(?![^()]*\))", reference) is not None,
    }
    outcome = run_python(_PROGRAM, _TESTS, inputs=inputs, wants_value=True, config=_CONFIG)
    if outcome.passed:
        return SqlVerdict(outcome.value["same"], outcome.value["error"])
    alone = run_python(_PROGRAM, "rows_of(inputs['reference'])", inputs=inputs, config=_CONFIG)
    if not alone.passed:
        raise UsageError(
            f"the reference {reference[:80]!r} cannot be run: {alone.reason}", hint="correct the data"
        )
    return SqlVerdict(False, outcome.reason)


def normalised_sql(query: str) -> str:
    """The query on one line, in lower case outside of quotes, spaces only where needed, `<>` as `!=`, one
    kind of quotes, without aliases' AS and a semicolon at its end.
    """
    parts = re.split(r"('(?:[^']|'')*'|\"[^\"]*\")", query.strip().rstrip("; \n"))
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"'{part[1:-1]}'"
        else:
            part = re.sub(r"\s+", " ", part.lower().replace("<>", "!="))
            parts[index] = re.sub(r"\s*([(),=<>!*+/;]+)\s*", r"\1", re.sub(r"\bas\b ?", "", part))
    return "".join(parts).strip()
