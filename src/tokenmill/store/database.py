"""An SQLite file with one thread that writes: many callers share one transaction, and one wait for the disk.

    async callers ─► queue ─► writer thread: BEGIN, a savepoint a caller, COMMIT (synced) ─► all are answered

A caller that is cancelled leaves no transaction open, for the thread owns it; what it asked is still done.
Reads have connections of their own and wait for nobody. A write that the disk refused ends writing for good
(what the disk holds then is not known until the file is opened again), while reads go on. The write-ahead log
is moved into the file by the writer alone, whose errors count, too; SQLite's own way ignores them.
"""

import asyncio
import contextlib
import fcntl
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from tokenmill.core import StorageError
from tokenmill.store.schema import APPLICATION_ID, MIGRATIONS

__all__ = ["Database", "SqliteConfig", "require_safe_wal"]

_T = TypeVar("_T")

_SYNCHRONOUS: Final = "FULL"
_MAX_GROUP: Final = 512
_NUM_READERS: Final = 3
_MAX_LOG_BYTES: Final = 64 << 20
_FIXED_IN: Final = ((3, 51, 3), (3, 50, 7), (3, 44, 6))
_FATAL: Final = (
    apsw.IOError,
    apsw.FullError,
    apsw.CorruptError,
    apsw.NotADBError,
    apsw.CantOpenError,
    apsw.NoMemError,
    apsw.ReadOnlyError,
    apsw.PermissionsError,
    apsw.ProtocolError,
)
"""After these nobody knows what the disk holds, or nothing can be written to it."""


@dataclass(frozen=True, kw_only=True)
class SqliteConfig:
    """`min_free_bytes` are kept for settling what was begun: below, nothing new is written.

    `busy_s` is how long to wait for another process that writes, `log_pages` (4 KiB) how long the write-ahead
    log grows before it is moved into the file.
    """

    min_free_bytes: int = 64 << 20
    busy_s: float = 5.0
    log_pages: int = 1000


def require_safe_wal(version: str) -> None:
    """Refuse an SQLite that can damage a file in write-ahead-log mode (sqlite.org/wal.html#walresetbug)."""
    numbers = tuple(int(part) for part in version.split(".")[:3])
    newest = _FIXED_IN[0]
    if numbers >= newest or any(numbers[:2] == fixed[:2] and numbers >= fixed for fixed in _FIXED_IN):
        return
    raise StorageError(
        f"SQLite {version} can damage a database with a write-ahead log",
        hint="install apsw >= 3.51.3, which brings a mended one",
    )


class Database:
    """The file at `path`, made if it is missing. Raises StorageError if it is not ours or does not open."""

    def __init__(self, path: Path, config: SqliteConfig | None = None, *, vfs: str | None = None) -> None:
        require_safe_wal(apsw.sqlite_lib_version())
        self.path = path
        self._config = config or SqliteConfig()
        self._vfs = vfs
        self._failure = ""
        self._is_closed = False
        self._log_pages = 0
        self._lock_fd: int | None = None
        _make_file(path)
        self._connection = self._open()
        self._readers = threading.local()
        self._open_readers: list[apsw.Connection] = []
        self._pool = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="store-read")
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-write", daemon=True)
        self._thread.start()

    async def write(self, work: Callable[[apsw.Connection], _T], *, settles: bool = False) -> _T:
        """Run `work` in a transaction and return what it returned, once that is on the disk.

        What it raises undoes its own changes only. `settles`: it ends something that was begun, and may use
        the space kept for that. Raises StorageError if the disk failed, or is nearly full.
        """
        if settles:
            self._check_open()
        else:
            self.admit()
        loop = asyncio.get_running_loop()
        job = _Job(work, loop, loop.create_future())
        self._jobs.put(job)
        value: _T = await job.future
        return value

    async def read(self, work: Callable[[apsw.Connection], _T]) -> _T:
        """Run `work` on a connection that only reads, which sees what is committed."""
        if self._is_closed:
            raise StorageError(f"{self.path} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, work)

    def admit(self) -> None:
        """Raise StorageError if nothing new should begin: the disk failed, or is nearly full."""
        self._check_open()
        free = self.free_bytes()
        if free < self._config.min_free_bytes:
            raise StorageError(
                f"{free >> 20} MiB are free at {self.path.parent}, and {self._config.min_free_bytes >> 20} "
                "are kept for what has begun",
                hint="make room; then it goes on by itself",
            )

    def free_bytes(self) -> int:
        """What is free on the disk for us."""
        try:
            found = os.statvfs(self.path.parent)
        except OSError as error:
            raise StorageError(f"{self.path.parent} cannot be read ({error.strerror})") from error
        return found.f_bavail * found.f_frsize

    def claim(self) -> None:
        """Be the one server of this file until closed. Raises StorageError if another process is."""
        if self._lock_fd is not None:
            return
        descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            hint = "stop it, give this one another file, or use PostgreSQL for several"
            raise StorageError(f"another server uses {self.path}", hint=hint) from error
        self._lock_fd = descriptor

    async def move_log(self) -> None:
        """Move the write-ahead log into the file and empty it, so that what was deleted is in neither."""
        loop = asyncio.get_running_loop()
        job = _Job(_truncate, loop, loop.create_future(), is_alone=True)
        self._check_open()
        self._jobs.put(job)
        await job.future

    async def close(self) -> None:
        """Write what waits, move the log into the file, end the threads."""
        if self._is_closed:
            return
        self._is_closed = True
        self._jobs.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._end)

    def _end(self) -> None:
        self._thread.join()
        self._pool.shutdown()
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                job.fail(StorageError(f"{self.path} is closed"))
                _answer([job])
        # A connection that the disk failed may fail again as it closes.
        for connection in (*self._open_readers, self._connection):
            with contextlib.suppress(apsw.Error):
                connection.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise StorageError(f"{self.path} is closed")
        if self._failure:
            raise StorageError(
                f"{self.path} takes no more writes, for one failed: {self._failure}",
                hint="check the disk, then start again",
            )

    def _open(self) -> apsw.Connection:
        connection: apsw.Connection | None = None
        try:
            connection = self._connect()
            _migrate(connection, self.path)
            # What an earlier process could not sync may be in memory only: write it anew, or fail now.
            _checkpoint(connection, apsw.SQLITE_CHECKPOINT_PASSIVE)
        except (apsw.Error, StorageError) as error:
            if connection is not None:
                with contextlib.suppress(apsw.Error):
                    connection.close()
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{self.path} cannot be opened ({error})", hint=_hint(error)) from error
        return connection

    def _connect(self) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        connection = apsw.Connection(str(self.path), flags=flags, vfs=self._vfs)
        connection.set_busy_timeout(round(self._config.busy_s * 1000))
        # For the one transaction that makes it a log: its journal must not come back after a power cut.
        connection.pragma("synchronous", "EXTRA")
        mode = connection.pragma("journal_mode", "wal")
        if mode != "wal":
            connection.close()
            raise StorageError(f"{self.path} cannot have a write-ahead log (it is {mode})")
        connection.pragma("synchronous", _SYNCHRONOUS)
        connection.pragma("foreign_keys", True)
        connection.pragma("secure_delete", True)
        connection.pragma("journal_size_limit", _MAX_LOG_BYTES)
        connection.pragma("trusted_schema", False)
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.set_wal_hook(self._after_commit)
        return connection

    def _after_commit(self, _connection: apsw.Connection, _name: str, num_pages: int) -> int:
        self._log_pages = num_pages
        return apsw.SQLITE_OK

    def _read(self, work: Callable[[apsw.Connection], _T]) -> _T:
        try:
            connection: apsw.Connection | None = getattr(self._readers, "connection", None)
            if connection is None:
                connection = self._readers.connection = self._connect()
                connection.pragma("query_only", True)
                self._open_readers.append(connection)
            return work(connection)
        except apsw.Error as error:
            raise StorageError(f"{self.path} cannot be read ({error})", hint=_hint(error)) from error

    def _run(self) -> None:
        """The writer thread."""
        while True:
            group, goes_on = self._next_group()
            alone = group.pop() if group and group[-1].is_alone else None
            if group:
                self._commit(group)
            if alone is not None:
                self._run_alone(alone)
            if not goes_on:
                break
            if self._log_pages >= self._config.log_pages and not self._failure:
                self._guarded(lambda: _checkpoint(self._connection, apsw.SQLITE_CHECKPOINT_PASSIVE))
                self._log_pages = 0
        if not self._failure:
            self._guarded(lambda: _truncate(self._connection))

    def _run_alone(self, job: "_Job") -> None:
        error = self._guarded(lambda: job.keep(job.work(self._connection)))
        if error is not None:
            job.fail(error)
        _answer([job])

    def _next_group(self) -> "tuple[list[_Job], bool]":
        group: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            group.append(job)
            if len(group) >= _MAX_GROUP or job.is_alone:
                return group, True
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _commit(self, group: "Sequence[_Job]") -> None:
        """All of them in one transaction; each is answered when it is on the disk, or not at all."""
        error = self._guarded(lambda: self._transact(group))
        if error is not None:
            for job in group:
                job.fail(error)
        _answer(group)

    def _transact(self, group: "Sequence[_Job]") -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        for job in group:
            connection.execute("SAVEPOINT job")
            try:
                job.keep(job.work(connection))
            except (*_FATAL, apsw.BusyError, apsw.LockedError, apsw.InterruptError):
                raise
            except Exception as error:
                connection.execute("ROLLBACK TO job")
                job.fail(error)
            connection.execute("RELEASE job")
        connection.execute("COMMIT")

    def _guarded(self, work: Callable[[], object]) -> StorageError | None:
        """Run it; an error of the disk is remembered and ends all writing."""
        if self._failure:
            return StorageError(f"{self.path} takes no more writes: {self._failure}", hint="start again")
        try:
            work()
        except apsw.Error as error:
            if isinstance(error, apsw.BusyError | apsw.LockedError):
                failure = f"{self.path} is in use by another process"
            else:
                failure = f"{self.path} cannot be written ({error})"
                self._failure = str(error)
            with contextlib.suppress(apsw.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            return StorageError(failure, hint=_hint(error))
        return None


class _Job:
    """What one caller wants done, and where its answer goes."""

    def __init__(
        self,
        work: Callable[[apsw.Connection], Any],
        loop: asyncio.AbstractEventLoop,
        future: "asyncio.Future[Any]",
        *,
        is_alone: bool = False,
    ) -> None:
        self.work = work
        self.loop = loop
        self.future = future
        self.is_alone = is_alone
        self._value: Any = None
        self._error: BaseException | None = None

    def keep(self, value: Any) -> None:
        """What it will be answered if the transaction holds."""
        self._value = value

    def fail(self, error: BaseException) -> None:
        """What it will be answered in place of a value; the first error stays."""
        self._error = self._error or error

    def resolve(self) -> None:
        """Answer, in the caller's loop; one that was cancelled is not there any more."""
        if self.future.done():
            return
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._value)


def _answer(group: Sequence[_Job]) -> None:
    def resolve(jobs: Sequence[_Job]) -> None:
        for job in jobs:
            job.resolve()

    for loop in {job.loop for job in group}:
        # The loop of a caller that is gone may be closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(resolve, [job for job in group if job.loop is loop])


def _make_file(path: Path) -> None:
    """An empty file that nobody else may read, if there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        hint = "give the path of a file in a folder that can be written"
        raise StorageError(f"{path} cannot be made or written ({error.strerror})", hint=hint) from error


def _migrate(connection: apsw.Connection, path: Path) -> None:
    """Bring the tables up to date, in one transaction."""
    with contextlib.ExitStack() as stack:
        connection.execute("BEGIN IMMEDIATE")
        stack.callback(lambda: connection.in_transaction and connection.execute("ROLLBACK"))
        version, application = connection.pragma("user_version"), connection.pragma("application_id")
        is_empty = not connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
        if not is_empty and application != APPLICATION_ID:
            raise StorageError(f"{path} is the database of another program", hint="give another path")
        if version > len(MIGRATIONS):
            hint = "use that version, or another file"
            raise StorageError(f"{path} was written by a newer version of tokenmill", hint=hint)
        for script in MIGRATIONS[version:]:
            connection.execute(script)
        if version < len(MIGRATIONS):
            connection.pragma("application_id", APPLICATION_ID)
            connection.pragma("user_version", len(MIGRATIONS))
        connection.execute("COMMIT")


def _checkpoint(connection: apsw.Connection, mode: int) -> None:
    # Another process may be at it; then it is done, or will be.
    with contextlib.suppress(apsw.BusyError, apsw.LockedError):
        connection.wal_checkpoint(mode=mode)


def _truncate(connection: apsw.Connection) -> None:
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)


def _hint(error: apsw.Error) -> str:
    if isinstance(error, apsw.FullError):
        return "make room on the disk, then start again"
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return "this is no database, or a damaged one: restore a copy, or give another path"
    if isinstance(error, apsw.BusyError | apsw.LockedError):
        return "try again"
    return "check the disk and the rights of the file, then start again"
