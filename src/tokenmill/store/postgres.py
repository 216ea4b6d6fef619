"""The store of several hosts: a PostgreSQL database, which alone knows what is left of a budget.

A hold locks its key's row, then reads in one statement, so from one snapshot, what is spent and what is held:
between two statements another host could settle, and its money would be seen in neither. Every transaction
runs in a thread of ours, on a connection of that thread; a caller that is cancelled leaves none open.
"""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from tokenmill.core import NotFoundError, StorageError, UsageError
from tokenmill.store import rows
from tokenmill.store.interface import Hold, LedgerQuery, LedgerSum, Remembered, SumBy
from tokenmill.store.periods import DAY_S, period_of
from tokenmill.store.postgres_schema import MIGRATIONS
from tokenmill.store.records import Budget, Entry, Key

if TYPE_CHECKING:
    import psycopg

__all__ = ["PostgresStore"]

_T = TypeVar("_T")
_Connection: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"

_DIALECT: Final = rows.Dialect(
    mark="%s",
    day="to_char(to_timestamp(floor(at_s)) AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    month="to_char(to_timestamp(floor(at_s)) AT TIME ZONE 'UTC', 'YYYY-MM')",
)
_PAGE: Final = 1000
_AT: Final = rows.ENTRY_COLUMNS.index("at_s")
_NUM_THREADS: Final = 8
_MAX_TRIES: Final = 5
_REFUSE_S: Final = 1.0
_MIGRATION_LOCK: Final = 0x746D6C31
_TAKE_OVER_S: Final = 900.0
_SESSION: Final = "SET synchronous_commit = on; SET lock_timeout = '10s'"
_INSERT: Final = (
    f"INSERT INTO ledger ({', '.join(rows.ENTRY_COLUMNS)}) "
    f"VALUES ({', '.join(['%s'] * len(rows.ENTRY_COLUMNS))}) "
    "ON CONFLICT (request_id, attempt, kind) DO NOTHING"
)
_ADD_TO_DAY: Final = (
    "INSERT INTO days (key_id, day, price_nano_usd) VALUES (%s, %s, %s) ON CONFLICT (key_id, day) "
    "DO UPDATE SET price_nano_usd = days.price_nano_usd + excluded.price_nano_usd"
)
_LOCK_KEY: Final = "SELECT body FROM keys WHERE id = %s FOR UPDATE"
_RELEASE: Final = "DELETE FROM holds WHERE request_id = %s AND attempt = %s"
_LEFT: Final = (
    "SELECT (SELECT coalesce(sum(price_nano_usd), 0) FROM days WHERE key_id = %s AND day >= %s AND day < %s) "
    "+ (SELECT coalesce(sum(nano_usd), 0) FROM holds WHERE key_id = %s)"
)
_LAST_DAY: Final = 1 << 62


class PostgresStore:
    """Keys, holds and the ledger in the database at `url`, whose tables are made if they are missing.

    Raises UsageError without psycopg (the extra `postgres`), StorageError if it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._psycopg = _driver()
        self._url = url
        self._local = threading.local()
        self._connections: list[_Connection] = []
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="store")
        self._owner = secrets.token_hex(8)
        self._failure = ""
        self._failed_s = 0.0
        self._is_closed = False
        try:
            self._once(_migrate)
        except self._psycopg.Error as error:
            raise self._storage_error(error) from error

    @property
    def is_shared(self) -> bool:
        """Always: any number of hosts may spend from it."""
        return True

    def admit(self) -> None:
        """As `Store.admit`: refuse for a moment after a write that failed, then let calls try again."""
        if self._failure and time.monotonic() - self._failed_s < _REFUSE_S:
            raise StorageError(self._failure, hint="look at the database server")

    def claim(self) -> None:
        """Nothing: the database keeps several servers apart."""

    async def add_key(self, key: Key, secret_hash: bytes) -> None:
        """As `Store.add_key`."""
        values = (key.id, secret_hash, key.created_s, rows.body_of_key(key))

        def work(connection: _Connection) -> None:
            sql = "INSERT INTO keys (id, secret_hash, created_s, body) VALUES (%s, %s, %s, %s)"
            try:
                connection.execute(sql, values)
            except self._psycopg.errors.IntegrityError as error:
                raise UsageError(f"there is a key {key.id} already") from error
            _count_key_change(connection)

        await self._write(work, max_tries=1)

    async def find_key(self, secret_hash: bytes) -> Key | None:
        """As `Store.find_key`."""
        question = rows.Question("SELECT body FROM keys WHERE secret_hash = %s", (secret_hash,))
        found = await self._read(question)
        return rows.key_of_body(found[0][0]) if found else None

    async def keys(self) -> list[Key]:
        """As `Store.keys`."""
        found = await self._read(rows.Question("SELECT body FROM keys ORDER BY created_s, id", ()))
        return [rows.key_of_body(body) for (body,) in found]

    async def update_key(self, key: Key, secret_hash: bytes | None = None) -> None:
        """As `Store.update_key`."""
        values = (rows.body_of_key(key), secret_hash, key.id)

        def work(connection: _Connection) -> None:
            sql = "UPDATE keys SET body = %s, secret_hash = coalesce(%s, secret_hash) WHERE id = %s"
            try:
                found = connection.execute(sql, values).rowcount
            except self._psycopg.errors.IntegrityError as error:
                raise UsageError(f"the secret of {key.id} is no hash, or that of another key") from error
            if not found:
                raise NotFoundError(f"there is no key {key.id}", hint="see `tokenmill keys list`")
            _count_key_change(connection)

        await self._write(work)

    async def key_version(self) -> int:
        """As `Store.key_version`."""
        sql = "SELECT value FROM counters WHERE name = 'key_version'"
        return int((await self._read(rows.Question(sql, ())))[0][0])

    async def hold(self, hold: Hold) -> None:
        """As `Store.hold`."""
        await self._write(partial(_hold, hold=hold))

    async def release(self, request_id: str, attempt: int) -> None:
        """As `Store.release`."""
        await self._write(partial(_execute, sql=_RELEASE, values=(request_id, attempt)))

    async def settle(self, entries: Sequence[Entry]) -> int:
        """As `Store.settle`."""
        rows.check_entries(entries)
        # In one order on all hosts, so that two transactions do not wait for each other's days.
        ordered = sorted(entries, key=lambda entry: (entry.key_id, entry.at_s, entry.request_id))
        return await self._write(lambda connection: sum(_settle(connection, entry) for entry in ordered))

    async def holds(self) -> list[Hold]:
        """As `Store.holds`."""
        sql = "SELECT request_id, attempt, key_id, nano_usd, at_s FROM holds ORDER BY at_s, request_id"
        return [rows.hold_of_row(row) for row in await self._read(rows.Question(sql, ()))]

    async def spent(self, key_id: str, since_s: float, until_s: float | None = None) -> int:
        """As `Store.spent`."""
        questions = rows.spent_questions(key_id, since_s, until_s, _DIALECT.mark)
        sums = [await self._read(question) for question in questions]
        return sum(int(found[0][0] or 0) for found in sums)

    async def sums(self, query: LedgerQuery, by: Sequence[SumBy]) -> list[LedgerSum]:
        """As `Store.sums`."""
        found = await self._read(rows.sums_question(query, by, _DIALECT))
        return rows.sums_of_rows(found, len(by))

    async def entries(self, query: LedgerQuery) -> AsyncIterator[Entry]:
        """As `Store.entries`. Lines that are settled meanwhile may be among them."""
        after: tuple[float, int] | None = None
        while True:
            page = await self._read(rows.lines_question(query, after, _PAGE, _DIALECT))
            for *values, _ in page:
                yield rows.entry_of_row(values)
            if len(page) < _PAGE:
                return
            after = (page[-1][_AT], page[-1][-1])

    async def erase_end_user(self, project: str, end_user: str) -> int:
        """As `Store.erase_end_user`. The table is vacuumed; the server's logs and archives are not ours."""
        sql = "UPDATE ledger SET end_user = %s WHERE project = %s AND end_user = %s AND end_user <> ''"
        values = (f"erased-{secrets.token_hex(8)}", project, end_user)
        num_lines = await self._write(lambda connection: connection.execute(sql, values).rowcount)
        await self._run(partial(self._try, _vacuum, 1))
        return num_lines

    async def remember(self, project: str, name: str, body_hash: bytes, now_s: float) -> Remembered:
        """As `Store.remember`. One that was taken is `new` again after 15 minutes without an answer."""
        rows.check_idempotency_name(name)
        return await self._write(
            partial(
                _remember, owner=self._owner, project=project, name=name, body_hash=body_hash, now_s=now_s
            )
        )

    async def answer(self, project: str, name: str, status: int, response: bytes) -> None:
        """As `Store.answer`."""
        sql = (
            "UPDATE idempotency SET status = %s, response = %s "
            "WHERE project = %s AND name = %s AND status IS NULL"
        )
        await self._write(partial(_execute, sql=sql, values=(status, response, project, name)))

    async def forget(self, project: str, name: str) -> None:
        """As `Store.forget`."""
        sql = "DELETE FROM idempotency WHERE project = %s AND name = %s AND status IS NULL"
        await self._write(partial(_execute, sql=sql, values=(project, name)))

    async def close(self) -> None:
        """As `Store.close`."""
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(None, self._pool.shutdown)
        for connection in self._connections:
            connection.close()

    async def _write(self, work: Callable[[_Connection], _T], *, max_tries: int = _MAX_TRIES) -> _T:
        """In a transaction that is tried again if the server gave it up; so `work` may be done twice."""
        try:
            value = await self._run(partial(self._try, partial(_in_transaction, work), max_tries))
        except StorageError as error:
            self._failure, self._failed_s = error.message, time.monotonic()
            raise
        self._failure = ""
        return value

    async def _read(self, question: rows.Question) -> list[tuple[Any, ...]]:
        def work(connection: _Connection) -> list[tuple[Any, ...]]:
            return connection.execute(question.sql, question.values).fetchall()

        return await self._run(partial(self._try, work, _MAX_TRIES))

    async def _run(self, work: Callable[[], _T]) -> _T:
        if self._is_closed:
            raise StorageError("the store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _try(self, work: Callable[[_Connection], _T], max_tries: int) -> _T:
        """Run it on this thread's connection; again where the server says so, or the connection broke."""
        errors = self._psycopg.errors
        for tries_left in reversed(range(max_tries)):
            try:
                return self._once(work)
            except (errors.DeadlockDetected, errors.SerializationFailure, errors.OperationalError) as error:
                if not tries_left:
                    raise self._storage_error(error) from error
                time.sleep(0.01 * (max_tries - tries_left))
            except self._psycopg.Error as error:
                raise self._storage_error(error) from error
        raise AssertionError("it is tried at least once")

    def _once(self, work: Callable[[_Connection], _T]) -> _T:
        connection: _Connection | None = getattr(self._local, "connection", None)
        if connection is None or connection.closed:
            connection = self._psycopg.connect(
                self._url, autocommit=True, connect_timeout=5, application_name="tokenmill"
            )
            connection.execute(_SESSION)
            self._local.connection = connection
            self._connections = [each for each in self._connections if not each.closed] + [connection]
        return work(connection)

    def _storage_error(self, error: Exception) -> StorageError:
        first = (str(error) or type(error).__name__).splitlines()[0]
        return StorageError(f"PostgreSQL: {first}", hint="look at the URL, the rights, and the server's log")


def _driver() -> ModuleType:
    try:
        import psycopg
    except ImportError as error:
        hint = 'pip install "tokenmill[postgres]"'
        raise UsageError("PostgreSQL needs psycopg, which is not installed", hint=hint) from error
    return psycopg


def _in_transaction(work: Callable[[_Connection], _T], connection: _Connection) -> _T:
    with connection.transaction():
        return work(connection)


def _migrate(connection: _Connection) -> None:
    """Bring the tables up to date; hosts that start together do it one after the other."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
        connection.execute("CREATE TABLE IF NOT EXISTS tokenmill_schema (version bigint NOT NULL)")
        found = connection.execute("SELECT version FROM tokenmill_schema").fetchone()
        version = 0 if found is None else int(found[0])
        if version > len(MIGRATIONS):
            raise StorageError("the database was written by a newer version of tokenmill", hint="use that")
        for script in MIGRATIONS[version:]:
            connection.execute(script)
        connection.execute("DELETE FROM tokenmill_schema")
        connection.execute("INSERT INTO tokenmill_schema VALUES (%s)", (len(MIGRATIONS),))


def _vacuum(connection: _Connection) -> None:
    connection.execute("VACUUM ledger")


def _execute(connection: _Connection, sql: str, values: tuple[rows.Value, ...]) -> None:
    connection.execute(sql, values)


def _count_key_change(connection: _Connection) -> None:
    connection.execute("UPDATE counters SET value = value + 1 WHERE name = 'key_version'")


def _hold(connection: _Connection, hold: Hold) -> None:
    found = connection.execute(_LOCK_KEY, (hold.key_id,)).fetchone()
    where = (hold.request_id, hold.attempt)
    if connection.execute("SELECT 1 FROM holds WHERE request_id = %s AND attempt = %s", where).fetchone():
        return
    if connection.execute("SELECT 1 FROM ledger WHERE request_id = %s AND attempt = %s", where).fetchone():
        raise UsageError(f"attempt {hold.attempt} of {hold.request_id} is settled already")
    budget = None if found is None else rows.key_of_body(found[0]).budget
    if budget is not None:
        _check_budget(connection, hold, budget)
    connection.execute(
        "INSERT INTO holds (request_id, attempt, key_id, nano_usd, at_s) VALUES (%s, %s, %s, %s, %s) "
        "ON CONFLICT DO NOTHING",
        (hold.request_id, hold.attempt, hold.key_id, hold.nano_usd, hold.at_s),
    )


def _check_budget(connection: _Connection, hold: Hold, budget: Budget) -> None:
    period = period_of(budget.period, hold.at_s)
    last = _LAST_DAY if period.end_s is None else rows.day_of(period.end_s)
    values = (hold.key_id, rows.day_of(period.begin_s), last, hold.key_id)
    found = connection.execute(_LEFT, values).fetchone()
    assert found is not None
    left = budget.nano_usd - int(found[0])
    if hold.nano_usd > left:
        raise rows.budget_error(hold.key_id, budget, left, hold.nano_usd)


def _settle(connection: _Connection, entry: Entry) -> int:
    """1 if the line is new."""
    is_new = connection.execute(_INSERT, rows.entry_values(entry)).rowcount
    if is_new:
        day = (entry.key_id, rows.day_of(entry.at_s), entry.price_nano_usd)
        connection.execute(_ADD_TO_DAY, day)
    connection.execute(_RELEASE, (entry.request_id, entry.attempt))
    return is_new


def _remember(
    connection: _Connection, owner: str, project: str, name: str, body_hash: bytes, now_s: float
) -> Remembered:
    connection.execute("DELETE FROM idempotency WHERE at_s <= %s", (now_s - DAY_S,))
    is_new = connection.execute(
        "INSERT INTO idempotency (project, name, body_hash, owner, at_s) VALUES (%s, %s, %s, %s, %s) "
        "ON CONFLICT DO NOTHING",
        (project, name, body_hash, owner, now_s),
    ).rowcount
    if is_new:
        return Remembered(state="new")
    found = connection.execute(
        "SELECT body_hash, at_s, status, response FROM idempotency "
        "WHERE project = %s AND name = %s FOR UPDATE",
        (project, name),
    ).fetchone()
    if found is None:
        return Remembered(state="in_progress")
    known_hash, at_s, status, response = found
    if bytes(known_hash) != body_hash:
        return Remembered(state="mismatch")
    if status is not None:
        return Remembered(state="done", status=status, response=bytes(response))
    if now_s - at_s < _TAKE_OVER_S:
        return Remembered(state="in_progress")
    connection.execute(
        "UPDATE idempotency SET owner = %s, at_s = %s WHERE project = %s AND name = %s",
        (owner, now_s, project, name),
    )
    return Remembered(state="new")
