"""The store of one host: an SQLite file. What is written together is in one transaction, or not at all."""

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from tokenmill.core import NotFoundError, UsageError
from tokenmill.store import rows
from tokenmill.store.database import Database, SqliteConfig
from tokenmill.store.interface import Hold, LedgerQuery, LedgerSum, Remembered, SumBy
from tokenmill.store.periods import DAY_S, period_of
from tokenmill.store.records import Budget, Entry, Key

__all__ = ["SqliteStore", "settle_entry"]

_T = TypeVar("_T")

_DIALECT: Final = rows.Dialect(
    mark="?",
    day="strftime('%Y-%m-%d', CAST(at_s AS INTEGER), 'unixepoch')",
    month="strftime('%Y-%m', CAST(at_s AS INTEGER), 'unixepoch')",
)
_PAGE: Final = 1000
_AT: Final = rows.ENTRY_COLUMNS.index("at_s")
_INSERT: Final = (
    f"INSERT INTO ledger ({', '.join(rows.ENTRY_COLUMNS)}) "
    f"VALUES ({', '.join('?' * len(rows.ENTRY_COLUMNS))}) "
    "ON CONFLICT (request_id, attempt, kind) DO NOTHING"
)
_ADD_TO_DAY: Final = (
    "INSERT INTO days (key_id, day, price_nano_usd) VALUES (?, ?, ?) "
    "ON CONFLICT (key_id, day) DO UPDATE SET price_nano_usd = price_nano_usd + excluded.price_nano_usd"
)


class SqliteStore:
    """Keys, holds and the ledger in the file at `path`, which is made if it is missing.

    Raises StorageError if it cannot be opened. Other rooms keep their tables in the same file: `write` and
    `read` run their transactions.
    """

    def __init__(self, path: Path, config: SqliteConfig | None = None, *, vfs: str | None = None) -> None:
        self._database = Database(path, config, vfs=vfs)
        # Tells idempotency keys of this process from those that a dead one took.
        self._owner = secrets.token_hex(8)

    @property
    def path(self) -> Path:
        """The file."""
        return self._database.path

    @property
    def is_shared(self) -> bool:
        """Never: one server spends from a file."""
        return False

    def admit(self) -> None:
        """As `Store.admit`."""
        self._database.admit()

    def claim(self) -> None:
        """As `Store.claim`; ends with `close`, or with the process."""
        self._database.claim()

    async def write(self, work: Callable[[apsw.Connection], _T], *, settles: bool = False) -> _T:
        """Run `work` in a transaction on the thread that writes, and return what it returned, once durable.

        What it raises undoes its own changes only, and is raised here. It should be quick, for everybody's
        writes wait for it; a caller that is cancelled does not stop it. `settles`: see `Database.write`.
        """
        return await self._database.write(work, settles=settles)

    async def read(self, work: Callable[[apsw.Connection], _T]) -> _T:
        """Run `work` on a connection that only reads, on another thread than the one that writes."""
        return await self._database.read(work)

    async def add_key(self, key: Key, secret_hash: bytes) -> None:
        """As `Store.add_key`."""
        values = (key.id, secret_hash, key.created_s, rows.body_of_key(key))

        def work(connection: apsw.Connection) -> None:
            try:
                connection.execute(
                    "INSERT INTO keys (id, secret_hash, created_s, body) VALUES (?,?,?,?)", values
                )
            except apsw.ConstraintError as error:
                raise UsageError(f"there is a key {key.id} already") from error
            _count_key_change(connection)

        await self.write(work)

    async def find_key(self, secret_hash: bytes) -> Key | None:
        """As `Store.find_key`."""

        def work(connection: apsw.Connection) -> Key | None:
            body = connection.execute("SELECT body FROM keys WHERE secret_hash = ?", (secret_hash,)).get
            return None if body is None else rows.key_of_body(body)

        return await self.read(work)

    async def keys(self) -> list[Key]:
        """As `Store.keys`."""

        def work(connection: apsw.Connection) -> list[Key]:
            found = connection.execute("SELECT body FROM keys ORDER BY created_s, id").fetchall()
            return [rows.key_of_body(body) for (body,) in found]

        return await self.read(work)

    async def update_key(self, key: Key, secret_hash: bytes | None = None) -> None:
        """As `Store.update_key`."""
        values = (rows.body_of_key(key), secret_hash, key.id)

        def work(connection: apsw.Connection) -> None:
            try:
                connection.execute(
                    "UPDATE keys SET body = ?, secret_hash = coalesce(?, secret_hash) WHERE id = ?", values
                )
            except apsw.ConstraintError as error:
                raise UsageError(f"the secret of {key.id} is no hash, or that of another key") from error
            if not connection.changes():
                raise NotFoundError(f"there is no key {key.id}", hint="see `tokenmill keys list`")
            _count_key_change(connection)

        await self.write(work)

    async def key_version(self) -> int:
        """As `Store.key_version`."""
        return await self.read(
            lambda connection: int(
                connection.execute("SELECT value FROM counters WHERE name = 'key_version'").get
            )
        )

    async def hold(self, hold: Hold) -> None:
        """As `Store.hold`."""
        await self.write(lambda connection: _hold(connection, hold))

    async def release(self, request_id: str, attempt: int) -> None:
        """As `Store.release`."""
        await self.write(lambda connection: _release(connection, request_id, attempt), settles=True)

    async def settle(self, entries: Sequence[Entry]) -> int:
        """As `Store.settle`."""
        rows.check_entries(entries)
        return await self.write(
            lambda connection: sum(settle_entry(connection, entry) for entry in entries), settles=True
        )

    async def holds(self) -> list[Hold]:
        """As `Store.holds`."""

        def work(connection: apsw.Connection) -> list[Hold]:
            sql = "SELECT request_id, attempt, key_id, nano_usd, at_s FROM holds ORDER BY at_s, request_id"
            return [rows.hold_of_row(row) for row in connection.execute(sql)]

        return await self.read(work)

    async def spent(self, key_id: str, since_s: float, until_s: float | None = None) -> int:
        """As `Store.spent`."""
        return await self.read(lambda connection: _spent(connection, key_id, since_s, until_s))

    async def sums(self, query: LedgerQuery, by: Sequence[SumBy]) -> list[LedgerSum]:
        """As `Store.sums`."""
        question = rows.sums_question(query, by, _DIALECT)
        found = await self.read(partial(_fetch, question=question))
        return rows.sums_of_rows(found, len(by))

    async def entries(self, query: LedgerQuery) -> AsyncIterator[Entry]:
        """As `Store.entries`. Lines that are settled meanwhile may be among them."""
        after: tuple[float, int] | None = None
        while True:
            question = rows.lines_question(query, after, _PAGE, _DIALECT)
            page = await self.read(partial(_fetch, question=question))
            for *values, _ in page:
                yield rows.entry_of_row(values)
            if len(page) < _PAGE:
                return
            after = (page[-1][_AT], page[-1][-1])

    async def erase_end_user(self, project: str, end_user: str) -> int:
        """As `Store.erase_end_user`. StorageError if another process keeps the log; then erase again."""
        tombstone = f"erased-{secrets.token_hex(8)}"

        def work(connection: apsw.Connection) -> int:
            sql = "UPDATE ledger SET end_user = ? WHERE project = ? AND end_user = ? AND end_user <> ''"
            connection.execute(sql, (tombstone, project, end_user))
            return connection.changes()

        num_lines = await self.write(work, settles=True)
        await self._database.move_log()
        return num_lines

    async def remember(self, project: str, name: str, body_hash: bytes, now_s: float) -> Remembered:
        """As `Store.remember`."""
        rows.check_idempotency_name(name)
        owner = self._owner
        return await self.write(
            lambda connection: _remember(connection, owner, project, name, body_hash, now_s)
        )

    async def answer(self, project: str, name: str, status: int, response: bytes) -> None:
        """As `Store.answer`."""
        values = (status, response, project, name)
        sql = (
            "UPDATE idempotency SET status = ?, response = ? "
            "WHERE project = ? AND name = ? AND status IS NULL"
        )
        await self.write(lambda connection: _execute(connection, sql, values), settles=True)

    async def forget(self, project: str, name: str) -> None:
        """As `Store.forget`."""
        sql = "DELETE FROM idempotency WHERE project = ? AND name = ? AND status IS NULL"
        await self.write(lambda connection: _execute(connection, sql, (project, name)), settles=True)

    async def close(self) -> None:
        """As `Store.close`."""
        await self._database.close()


def _fetch(connection: apsw.Connection, question: rows.Question) -> list[tuple[Any, ...]]:
    return connection.execute(*question).fetchall()


def _execute(connection: apsw.Connection, sql: str, values: tuple[rows.Value, ...]) -> None:
    connection.execute(sql, values)


def _count_key_change(connection: apsw.Connection) -> None:
    connection.execute("UPDATE counters SET value = value + 1 WHERE name = 'key_version'")


def _hold(connection: apsw.Connection, hold: Hold) -> None:
    where = (hold.request_id, hold.attempt)
    if connection.execute("SELECT 1 FROM holds WHERE request_id = ? AND attempt = ?", where).fetchall():
        return
    if connection.execute("SELECT 1 FROM ledger WHERE request_id = ? AND attempt = ?", where).fetchall():
        raise UsageError(f"attempt {hold.attempt} of {hold.request_id} is settled already")
    body = connection.execute("SELECT body FROM keys WHERE id = ?", (hold.key_id,)).get
    budget = None if body is None else rows.key_of_body(body).budget
    if budget is not None:
        _check_budget(connection, hold, budget)
    connection.execute(
        "INSERT INTO holds (request_id, attempt, key_id, nano_usd, at_s) VALUES (?, ?, ?, ?, ?)",
        (hold.request_id, hold.attempt, hold.key_id, hold.nano_usd, hold.at_s),
    )


def _check_budget(connection: apsw.Connection, hold: Hold, budget: Budget) -> None:
    period = period_of(budget.period, hold.at_s)
    spent = _spent(connection, hold.key_id, period.begin_s, period.end_s)
    held = connection.execute("SELECT sum(nano_usd) FROM holds WHERE key_id = ?", (hold.key_id,)).get or 0
    left = budget.nano_usd - spent - held
    if hold.nano_usd > left:
        raise rows.budget_error(hold.key_id, budget, left, hold.nano_usd)


def _release(connection: apsw.Connection, request_id: str, attempt: int) -> None:
    connection.execute("DELETE FROM holds WHERE request_id = ? AND attempt = ?", (request_id, attempt))


def settle_entry(connection: apsw.Connection, entry: Entry) -> int:
    """Write a line and release the hold of its attempt, in the transaction that is open. 1 if it is new."""
    connection.execute(_INSERT, rows.entry_values(entry))
    is_new = connection.changes()
    if is_new:
        day = (entry.key_id, rows.day_of(entry.at_s), entry.price_nano_usd)
        connection.execute(_ADD_TO_DAY, day)
    _release(connection, entry.request_id, entry.attempt)
    return is_new


def _spent(connection: apsw.Connection, key_id: str, since_s: float, until_s: float | None) -> int:
    questions = rows.spent_questions(key_id, since_s, until_s, _DIALECT.mark)
    return sum(connection.execute(*question).get or 0 for question in questions)


def _remember(
    connection: apsw.Connection, owner: str, project: str, name: str, body_hash: bytes, now_s: float
) -> Remembered:
    connection.execute("DELETE FROM idempotency WHERE at_s <= ?", (now_s - DAY_S,))
    sql = "SELECT body_hash, owner, status, response FROM idempotency WHERE project = ? AND name = ?"
    found = _fetch(connection, rows.Question(sql, (project, name)))
    if found:
        known_hash, known_owner, status, response = found[0]
        if known_hash != body_hash:
            return Remembered(state="mismatch")
        if status is not None:
            return Remembered(state="done", status=status, response=response)
        if known_owner == owner:
            return Remembered(state="in_progress")
        connection.execute(
            "UPDATE idempotency SET owner = ?, at_s = ? WHERE project = ? AND name = ?",
            (owner, now_s, project, name),
        )
        return Remembered(state="new")
    connection.execute(
        "INSERT INTO idempotency (project, name, body_hash, owner, at_s) VALUES (?, ?, ?, ?, ?)",
        (project, name, body_hash, owner, now_s),
    )
    return Remembered(state="new")
