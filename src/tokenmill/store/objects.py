"""Files, batches and lines in the SQLite store, beside the ledger that they are billed in.

    line = (await objects.lease(batch_id, 16, until_s, now_s))[0]
    ... the line is answered ...
    await objects.close_line(line, LineEnd(state="answered", ...), entries)      # both, or neither

A lease is a random name on the row. Whoever closes a line must still hold it, in the transaction that writes
the answer, the counts and the ledger; so a worker that was too slow, or is a copy, writes nothing. Leases of
a process that died are free at once, others when their time is over. Every question names its project.
"""

import secrets
from collections.abc import Sequence
from typing import Any, Final

import apsw
import msgspec

from tokenmill.core import ResourceError, UsageError
from tokenmill.store.object_records import (
    Batch,
    BatchApi,
    BatchFault,
    BatchOutcome,
    FilePurpose,
    Line,
    LineEnd,
    LineResult,
    LineState,
    NewLine,
    StoredFile,
)
from tokenmill.store.object_rows import (
    BATCH_COLUMNS,
    FILE_COLUMNS,
    ask,
    batch_of_row,
    columns,
    encoded,
    file_of_row,
    not_there,
    page_of,
)
from tokenmill.store.records import Entry
from tokenmill.store.sqlite import SqliteStore, settle_entry

__all__ = ["Answered", "ObjectStore"]

_LINE: Final = ("batch_id", "number", "custom_id", "offset", "length", "num_tries", "num_failures", "lease")
_RESULT: Final = ("number", "custom_id", "state", "status", "body")
_JSON: Final = ("metadata", "faults")
_COUNT_OF: Final[dict[LineState, str]] = {
    "answered": "num_answered",
    "errored": "num_errored",
    "cancelled": "num_cancelled",
    "expired": "num_expired",
}


class Answered(msgspec.Struct, frozen=True):
    """The first answer for an idempotency key, kept in the transaction that makes what it tells of."""

    name: str
    status: int
    body: bytes


class ObjectStore:
    """Files, batches and lines of `store`. One for a process; its workers share it."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._process = secrets.token_hex(8)

    async def add_file(self, file: StoredFile, max_bytes: int, answered: Answered | None = None) -> None:
        """Keep a file. Raises ResourceError if the project's files would have over `max_bytes` together."""

        def work(connection: apsw.Connection) -> None:
            sql = "SELECT coalesce(sum(num_bytes), 0) FROM files WHERE project = ?"
            total = connection.execute(sql, (file.project,)).get
            if total + file.num_bytes > max_bytes:
                raise ResourceError(
                    f"the files of this project would have {total + file.num_bytes} bytes, over {max_bytes}",
                    hint="delete some (DELETE /v1/files/ID)",
                )
            _insert(connection, "files", FILE_COLUMNS, file)
            _answer(connection, file.project, answered)

        await self._store.write(work)

    async def file(self, project: str, file_id: str) -> StoredFile:
        """A file. Raises NotFoundError, also for another project's."""
        found = await self._store.read(lambda connection: _file(connection, project, file_id))
        if found is None:
            raise not_there("file", file_id)
        return found

    async def files(
        self, project: str, purposes: Sequence[FilePurpose], *, after: str, limit: int, newest_first: bool
    ) -> list[StoredFile]:
        """Files of a project, `limit` of those that come after the one with the id `after`."""
        where = f"purpose IN ({', '.join('?' * len(purposes))})"
        return await self._store.read(
            lambda connection: [
                file_of_row(row)
                for row in page_of(
                    connection, "files", FILE_COLUMNS, (project, *purposes), where, after, limit, newest_first
                )
            ]
        )

    async def delete_file(self, project: str, file_id: str) -> None:
        """Forget a file. Raises NotFoundError, and UsageError while a batch that has not ended reads it."""

        def work(connection: apsw.Connection) -> None:
            if _file(connection, project, file_id) is None:
                raise not_there("file", file_id)
            sql = "SELECT id FROM batches WHERE input_file_id = ? AND ended_s IS NULL"
            if (reader := connection.execute(sql, (file_id,)).get) is not None:
                raise UsageError(f"{reader} has not ended and reads this file", hint="cancel it, or wait")
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))

        await self._store.write(work, settles=True)

    async def expired_files(self, now_s: float, limit: int = 100) -> list[StoredFile]:
        """Files of all projects whose time is over, and which no batch reads."""
        sql = (
            f"SELECT {columns(FILE_COLUMNS)} FROM files WHERE expires_s <= ? AND NOT EXISTS "
            "(SELECT 1 FROM batches WHERE input_file_id = files.id AND ended_s IS NULL) LIMIT ?"
        )
        found = await self._store.read(lambda connection: ask(connection, sql, (now_s, limit)))
        return [file_of_row(row) for row in found]

    async def file_ids(self) -> set[str]:
        """The ids of all files there are, for who looks for content that belongs to none."""
        found = await self._store.read(lambda connection: ask(connection, "SELECT id FROM files"))
        return {row[0] for row in found}

    async def add_batch(
        self,
        batch: Batch,
        max_open: int,
        *,
        lines: Sequence[NewLine] = (),
        file: StoredFile | None = None,
        answered: Answered | None = None,
    ) -> None:
        """Keep a new batch, and with it its input file and its lines, if they are given.

        Raises NotFoundError without its input file, ResourceError if its project has `max_open` that have
        not ended.
        """

        def work(connection: apsw.Connection) -> None:
            sql = "SELECT count(*) FROM batches WHERE project = ? AND ended_s IS NULL"
            if connection.execute(sql, (batch.project,)).get >= max_open:
                raise ResourceError(f"{max_open} batches of this project have not ended", hint="wait for one")
            if file is not None:
                _insert(connection, "files", FILE_COLUMNS, file)
            elif (found := _file(connection, batch.project, batch.input_file_id)) is None:
                raise not_there("file", batch.input_file_id)
            elif found.purpose != "batch":
                raise UsageError(f"{found.id} is no input of a batch", hint="upload one with purpose batch")
            _insert(connection, "batches", BATCH_COLUMNS, batch)
            _add_lines(connection, batch.id, lines)
            _answer(connection, batch.project, answered)

        await self._store.write(work)

    async def batch(self, project: str, batch_id: str, api: BatchApi) -> Batch:
        """A batch. Raises NotFoundError, also for another project's and the other API's."""
        sql = f"SELECT {columns(BATCH_COLUMNS)} FROM batches WHERE id = ? AND project = ? AND api = ?"
        found = await self._store.read(lambda connection: ask(connection, sql, (batch_id, project, api)))
        if not found:
            raise not_there("batch", batch_id)
        return batch_of_row(found[0])

    async def batches(
        self, project: str, api: BatchApi, *, after: str = "", limit: int, newest_first: bool = True
    ) -> list[Batch]:
        """Batches of a project, as of `files`."""
        return await self._store.read(
            lambda connection: [
                batch_of_row(row)
                for row in page_of(
                    connection,
                    "batches",
                    BATCH_COLUMNS,
                    (project, api),
                    "api = ?",
                    after,
                    limit,
                    newest_first,
                )
            ]
        )

    async def open_batches(self) -> list[Batch]:
        """Batches of all projects that have not ended, the oldest first."""
        sql = f"SELECT {columns(BATCH_COLUMNS)} FROM batches WHERE ended_s IS NULL ORDER BY created_s, id"
        found = await self._store.read(lambda connection: ask(connection, sql))
        return [batch_of_row(row) for row in found]

    async def recent_batches(self, limit: int) -> list[Batch]:
        """Batches of all projects, those that have not ended first, then the newest."""
        sql = (
            f"SELECT {columns(BATCH_COLUMNS)} FROM batches "
            "ORDER BY ended_s IS NOT NULL, created_s DESC LIMIT ?"
        )
        found = await self._store.read(lambda connection: ask(connection, sql, (limit,)))
        return [batch_of_row(row) for row in found]

    async def delete_batch(self, project: str, batch_id: str, api: BatchApi) -> list[str]:
        """Forget a batch that has ended; returns the ids of its files, which are forgotten, too.

        Raises NotFoundError, and UsageError for one that has not ended.
        """

        def work(connection: apsw.Connection) -> list[str]:
            sql = (
                "SELECT ended_s, input_file_id, output_file_id FROM batches "
                "WHERE id = ? AND project = ? AND api = ?"
            )
            found = ask(connection, sql, (batch_id, project, api))
            if not found:
                raise not_there("batch", batch_id)
            ended_s, *file_ids = found[0]
            if ended_s is None:
                raise UsageError(f"{batch_id} has not ended", hint="cancel it, or wait")
            connection.executemany("DELETE FROM files WHERE id = ?", [(each,) for each in file_ids])
            connection.execute("DELETE FROM batches WHERE id = ?", (batch_id,))
            return [each for each in file_ids if each]

        return await self._store.write(work, settles=True)

    async def begin_stage(self, batch_id: str, change: int = 1) -> int:
        """Count that a stage of a batch begins (-1: that it could not be tried); returns how often it did."""
        sql = (
            "UPDATE batches SET num_stage_tries = max(0, num_stage_tries + ?) WHERE id = ? "
            "RETURNING num_stage_tries"
        )
        return await self._store.write(
            lambda connection: int(connection.execute(sql, (change, batch_id)).get or 0), settles=True
        )

    async def clear_lines(self, batch_id: str, limit: int = 5000) -> bool:
        """Forget some of a batch's lines; returns whether there may be more."""
        sql = "DELETE FROM lines WHERE id IN (SELECT id FROM lines WHERE batch_id = ? LIMIT ?)"

        def work(connection: apsw.Connection) -> bool:
            connection.execute(sql, (batch_id, limit))
            return connection.changes() == limit

        return await self._store.write(work, settles=True)

    async def stale_batches(self) -> list[str]:
        """Batches that have ended, or are deleted, and still have lines."""
        sql = (
            "SELECT DISTINCT batch_id FROM lines WHERE NOT EXISTS "
            "(SELECT 1 FROM batches WHERE batches.id = lines.batch_id AND ended_s IS NULL)"
        )
        found = await self._store.read(lambda connection: ask(connection, sql))
        return [row[0] for row in found]

    async def last_line(self, batch_id: str) -> int:
        """The highest number of a batch's lines, -1 if there are none."""
        sql = "SELECT coalesce(max(number), -1) FROM lines WHERE batch_id = ?"
        found = await self._store.read(lambda connection: ask(connection, sql, (batch_id,)))
        return int(found[0][0])

    async def add_lines(self, batch_id: str, lines: Sequence[NewLine]) -> None:
        """Keep lines of a batch that is being read; those that are there already stay as they are."""

        def work(connection: apsw.Connection) -> None:
            if _add_lines(connection, batch_id, lines):
                # It gets on, so what ended it before was no fault of the batch.
                connection.execute("UPDATE batches SET num_stage_tries = 0 WHERE id = ?", (batch_id,))

        await self._store.write(work)

    async def start_batch(self, batch_id: str, model: str, now_s: float) -> None:
        """All lines are there: they may be answered. No-op if it is no longer being read."""
        sql = (
            "UPDATE batches SET status = 'in_progress', in_progress_s = ?, model = ?, num_stage_tries = 0, "
            "num_lines = (SELECT count(*) FROM lines WHERE batch_id = batches.id) "
            "WHERE id = ? AND status = 'validating'"
        )
        await self._run(sql, (now_s, model, batch_id))

    async def fail_batch(self, batch_id: str, faults: Sequence[BatchFault], now_s: float) -> None:
        """End a batch that cannot be read, or whose files cannot be written."""
        sql = (
            "UPDATE batches SET status = 'failed', outcome = 'failed', output_file_id = '', "
            "error_file_id = '', ended_s = ?, faults = ? WHERE id = ?"
        )
        await self._run(sql, (now_s, encoded(tuple(faults)), batch_id))

    async def cancel_batch(self, project: str, batch_id: str, api: BatchApi, now_s: float) -> None:
        """Answer no more of it. No-op if it is being ended, or has ended. Raises NotFoundError."""
        await self.batch(project, batch_id, api)
        sql = (
            "UPDATE batches SET status = 'cancelling', outcome = 'cancelled', cancelling_s = ? "
            "WHERE id = ? AND status IN ('validating', 'in_progress')"
        )
        await self._run(sql, (now_s, batch_id))

    async def lease(
        self, batch_id: str, limit: int, until_s: float, *, suspects: bool = False, max_calm_tries: int = 2
    ) -> list[Line]:
        """Take up to `limit` lines, the first ones, until `until_s`.

        `suspects` are lines whose lease was lost `max_calm_tries` times: what they did may have ended the
        process, so they are taken on their own.
        """
        lease = f"{self._process}.{secrets.token_hex(8)}"
        condition = "num_tries >= ?" if suspects else "num_tries < ?"
        sql = (
            "UPDATE lines SET state = 'leased', num_tries = num_tries + 1, lease = ?, leased_until_s = ? "
            "WHERE id IN (SELECT id FROM lines WHERE batch_id = ? AND state = 'pending' "
            f"AND {condition} ORDER BY number LIMIT ?) RETURNING {columns(_LINE)}"
        )
        values = (lease, until_s, batch_id, max_calm_tries, limit)
        found = await self._store.write(lambda connection: ask(connection, sql, values))
        lines = [Line(**dict(zip(_LINE, row, strict=True))) for row in found]
        return sorted(lines, key=lambda line: line.number)

    async def renew(self, leases: Sequence[str], until_s: float) -> None:
        """Keep leases until then, as far as they are still held."""
        if leases:
            marks = ", ".join("?" * len(leases))
            sql = f"UPDATE lines SET leased_until_s = ? WHERE state = 'leased' AND lease IN ({marks})"
            await self._run(sql, (until_s, *leases))

    async def free_lost(self, now_s: float) -> int:
        """Free the lines whose worker is gone: of another process, or past its time. Returns how many."""
        sql = (
            "UPDATE lines SET state = 'pending', lease = '' WHERE state = 'leased' "
            "AND (leased_until_s < ? OR substr(lease, 1, ?) <> ?)"
        )
        values = (now_s, len(self._process), self._process)

        def work(connection: apsw.Connection) -> int:
            connection.execute(sql, values)
            return connection.changes()

        return await self._store.write(work, settles=True)

    async def close_line(self, line: Line, end: LineEnd, entries: Sequence[Entry]) -> int:
        """End a lease, and write what the line came to, the counts of its batch and its lines of the ledger.

        Nothing of it is written if the lease is not held any more. Returns how many lines of the ledger were
        new.
        """
        return await self._store.write(
            lambda connection: _close_line(connection, line, end, entries), settles=True
        )

    async def end_pending(self, batch_id: str, state: LineState) -> None:
        """End all lines that nobody has begun."""
        count = _COUNT_OF[state]

        def work(connection: apsw.Connection) -> None:
            sql = "UPDATE lines SET state = ? WHERE batch_id = ? AND state = 'pending'"
            connection.execute(sql, (state, batch_id))
            ended = connection.changes()
            connection.execute(f"UPDATE batches SET {count} = {count} + ? WHERE id = ?", (ended, batch_id))

        await self._store.write(work, settles=True)

    async def open_lines(self, batch_id: str) -> tuple[int, int, int]:
        """How many lines are pending, of these suspects (of two tries or more), and how many leased."""
        sql = (
            "SELECT (SELECT count(*) FROM lines WHERE batch_id = ?1 AND state = 'pending'), "
            "(SELECT count(*) FROM lines WHERE batch_id = ?1 AND state = 'pending' AND num_tries >= 2), "
            "(SELECT count(*) FROM lines WHERE batch_id = ?1 AND state = 'leased')"
        )
        found = await self._store.read(lambda connection: ask(connection, sql, (batch_id,)))
        pending, suspects, leased = found[0]
        return pending, suspects, leased

    async def finalize(
        self, batch_id: str, outcome: BatchOutcome, output_id: str, error_id: str, now_s: float
    ) -> bool:
        """Begin to write a batch's files, under these ids, if no line is open. Returns whether it did."""
        sql = (
            "UPDATE batches SET status = 'finalizing', outcome = ?, output_file_id = ?, error_file_id = ?, "
            "finalizing_s = ?, num_stage_tries = 0, "
            "num_lines = (SELECT count(*) FROM lines WHERE batch_id = batches.id) "
            "WHERE id = ? AND status IN ('in_progress', 'cancelling') "
            "AND NOT EXISTS (SELECT 1 FROM lines "
            "WHERE batch_id = batches.id AND state IN ('pending', 'leased'))"
        )

        def work(connection: apsw.Connection) -> bool:
            connection.execute(sql, (outcome, output_id, error_id, now_s, batch_id))
            return connection.changes() == 1

        return await self._store.write(work, settles=True)

    async def results(self, batch_id: str, after: int, limit: int) -> list[LineResult]:
        """What lines came to, in order, from the number behind `after` on."""
        sql = (
            f"SELECT {columns(_RESULT)} FROM lines WHERE batch_id = ? AND number > ? ORDER BY number LIMIT ?"
        )
        found = await self._store.read(lambda connection: ask(connection, sql, (batch_id, after, limit)))
        return [LineResult(**dict(zip(_RESULT, row, strict=True))) for row in found]

    async def end_batch(self, batch: Batch, files: Sequence[StoredFile], now_s: float) -> None:
        """A batch's files are written: keep them, and end it. No-op if that was done."""

        def work(connection: apsw.Connection) -> None:
            if ask(connection, "SELECT status FROM batches WHERE id = ?", (batch.id,)) != [("finalizing",)]:
                return
            for file in files:
                _insert(connection, "files", FILE_COLUMNS, file)
            ids = {file.id for file in files}
            kept = [each if each in ids else "" for each in (batch.output_file_id, batch.error_file_id)]
            sql = (
                "UPDATE batches SET status = outcome, output_file_id = ?, error_file_id = ?, ended_s = ? "
                "WHERE id = ?"
            )
            connection.execute(sql, (*kept, now_s, batch.id))

        await self._store.write(work, settles=True)

    async def _run(self, sql: str, values: tuple[Any, ...]) -> None:
        await self._store.write(lambda connection: ask(connection, sql, values), settles=True)


def _close_line(connection: apsw.Connection, line: Line, end: LineEnd, entries: Sequence[Entry]) -> int:
    given_back = end.state == "pending"
    sql = (
        "UPDATE lines SET state = ?, status = ?, body = ?, lease = '', num_tries = num_tries - ?, "
        "num_failures = num_failures + ? WHERE batch_id = ? AND number = ? AND state = 'leased' AND lease = ?"
    )
    values = (end.state, end.status, end.body, given_back, end.has_failed)
    connection.execute(sql, (*values, line.batch_id, line.number, line.lease))
    if connection.changes() != 1:
        return 0
    num_new = sum(settle_entry(connection, entry) for entry in entries)
    if not given_back:
        count = _COUNT_OF[end.state]
        tokens = [
            sum(getattr(entry, name) for entry in entries if end.state == "answered")
            for name in ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")
        ]
        connection.execute(
            f"UPDATE batches SET {count} = {count} + 1, num_prompt_tokens = num_prompt_tokens + ?, "
            "num_cached_tokens = num_cached_tokens + ?, num_output_tokens = num_output_tokens + ? "
            "WHERE id = ?",
            (*tokens, line.batch_id),
        )
    return num_new


def _add_lines(connection: apsw.Connection, batch_id: str, lines: Sequence[NewLine]) -> int:
    """How many of them are new."""
    before = connection.total_changes()
    connection.executemany(
        "INSERT INTO lines (batch_id, number, custom_id, offset, length, state) "
        "VALUES (?, ?, ?, ?, ?, 'pending') ON CONFLICT DO NOTHING",
        [(batch_id, each.number, each.custom_id, each.offset, each.length) for each in lines],
    )
    return connection.total_changes() - before


def _insert(
    connection: apsw.Connection, table: str, names: Sequence[str], record: StoredFile | Batch
) -> None:
    values = [encoded(getattr(record, name)) if name in _JSON else getattr(record, name) for name in names]
    marks = ", ".join("?" * len(names))
    connection.execute(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", values)


def _answer(connection: apsw.Connection, project: str, answered: Answered | None) -> None:
    if answered is not None:
        connection.execute(
            "UPDATE idempotency SET status = ?, response = ? "
            "WHERE project = ? AND name = ? AND status IS NULL",
            (answered.status, answered.body, project, answered.name),
        )


def _file(connection: apsw.Connection, project: str, file_id: str) -> StoredFile | None:
    sql = f"SELECT {columns(FILE_COLUMNS)} FROM files WHERE id = ? AND project = ?"
    found = ask(connection, sql, (file_id, project))
    return file_of_row(found[0]) if found else None
