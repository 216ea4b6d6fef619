"""Files and batches as rows of SQLite and back, beside what every question of `ObjectStore` needs."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

import apsw
import msgspec

from tokenmill.core import NotFoundError
from tokenmill.store.object_records import Batch, BatchFault, StoredFile

__all__ = [
    "BATCH_COLUMNS",
    "FILE_COLUMNS",
    "ask",
    "batch_of_row",
    "columns",
    "encoded",
    "file_of_row",
    "not_there",
    "page_of",
]

FILE_COLUMNS: Final = tuple(each.name for each in fields(StoredFile))
"""The columns of `files`, in order."""
BATCH_COLUMNS: Final = tuple(each.name for each in fields(Batch))
"""The columns of `batches`, in order."""


def file_of_row(row: Sequence[Any]) -> StoredFile:
    """A file from its row."""
    return StoredFile(**dict(zip(FILE_COLUMNS, row, strict=True)))


def batch_of_row(row: Sequence[Any]) -> Batch:
    """A batch from its row."""
    values = dict(zip(BATCH_COLUMNS, row, strict=True))
    values["metadata"] = msgspec.json.decode(values["metadata"], type=dict[str, str])
    values["faults"] = msgspec.json.decode(values["faults"], type=tuple[BatchFault, ...])
    return Batch(**values)


def columns(names: Sequence[str]) -> str:
    """Names of columns as a statement has them."""
    return ", ".join(names)


def encoded(value: object) -> str:
    """A value as JSON."""
    return msgspec.json.encode(value).decode()


def not_there(what: str, name: str) -> NotFoundError:
    """The error for what is not there, or is not this project's."""
    return NotFoundError(f"there is no {what} {name[:80]!r}", hint="list those that there are")


def ask(connection: apsw.Connection, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """All rows of a question."""
    return connection.execute(sql, tuple(values)).fetchall()


def page_of(
    connection: apsw.Connection,
    table: str,
    names: Sequence[str],
    values: Sequence[Any],
    where: str,
    after: str,
    limit: int,
    newest_first: bool,
) -> list[tuple[Any, ...]]:
    """Rows of a project (the first of `values`), in order of time, behind the one with the id `after`."""
    order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
    bounds = ""
    if after:
        sql = f"SELECT created_s FROM {table} WHERE id = ? AND project = ?"
        created_s = connection.execute(sql, (after, values[0])).get
        if created_s is None:
            raise not_there({"files": "file", "batches": "batch"}[table], after)
        bounds = f"AND (created_s, id) {sign} (?, ?)"
        values = (*values, created_s, after)
    sql = (
        f"SELECT {', '.join(names)} FROM {table} WHERE project = ? AND {where} {bounds} "
        f"ORDER BY created_s {order}, id {order} LIMIT ?"
    )
    return ask(connection, sql, (*values, limit))
