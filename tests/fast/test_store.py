"""The store of one host: the contract, and what is special to SQLite."""

import asyncio
import os
import stat
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.fast.store_contract import CHECKS, NOON, entry, hold, key
from tokenmill.core import StorageError, UsageError
from tokenmill.store import LedgerQuery, SqliteConfig, SqliteStore, hash_secret, new_secret, open_store
from tokenmill.store.database import require_safe_wal


def run(path: Path, check: Callable[[SqliteStore], Awaitable[None]], **settings: Any) -> None:
    async def work() -> None:
        store = SqliteStore(path, SqliteConfig(**settings))
        try:
            await check(store)
        finally:
            await store.close()

    asyncio.run(work())


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_contract(name: str, tmp_path: Path) -> None:
    run(tmp_path / "server.db", CHECKS[name])


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    async def fill(store: SqliteStore) -> None:
        await store.add_key(key(), hash_secret("tm_a"))
        await store.settle([entry("a")])
        await store.hold(hold("b", 5))

    async def look(store: SqliteStore) -> None:
        assert await store.find_key(hash_secret("tm_a")) == key()
        assert await store.spent("key_k", 0.0) == 10
        assert await store.holds() == [hold("b", 5)]

    run(tmp_path / "server.db", fill)
    run(tmp_path / "server.db", look)


def test_many_writes_share_a_transaction(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        num_commits = 0

        def count(connection: apsw.Connection) -> None:
            def hook() -> bool:
                nonlocal num_commits
                num_commits += 1
                return False

            connection.set_commit_hook(hook)

        await store.write(count)
        await asyncio.gather(*(store.settle([entry(f"r{i}")]) for i in range(400)))
        assert 1 < num_commits < 40

    run(tmp_path / "server.db", check)


def test_a_write_that_fails_undoes_only_itself(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        def half(connection: apsw.Connection) -> None:
            connection.execute("UPDATE counters SET value = 77")
            raise UsageError("no")

        results = await asyncio.gather(
            store.settle([entry("a")]), store.write(half), store.settle([entry("b")]), return_exceptions=True
        )
        assert [type(result) for result in results] == [int, UsageError, int]
        assert await store.key_version() == 0
        assert await store.spent("key_k", 0.0) == 20

    run(tmp_path / "server.db", check)


def test_a_cancelled_caller_leaves_no_transaction_open(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        begun, may_go = threading.Event(), threading.Event()

        def slow(connection: apsw.Connection) -> None:
            begun.set()
            may_go.wait(5)

        blocked = asyncio.create_task(store.write(slow))
        await asyncio.to_thread(begun.wait, 5)
        tasks = [asyncio.create_task(store.settle([entry(f"r{i}")])) for i in range(20)]
        await asyncio.sleep(0)
        for task in (*tasks, blocked):
            task.cancel()
        may_go.set()
        assert await store.settle([entry("after")]) == 1
        assert await store.write(lambda connection: connection.in_transaction)
        other = apsw.Connection(str(store.path))
        other.execute("BEGIN IMMEDIATE; ROLLBACK")
        other.close()
        assert await store.spent("key_k", 0.0) == 210

    run(tmp_path / "server.db", check)


def test_another_process_is_seen(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        secret = new_secret()
        version = await store.key_version()
        other = SqliteStore(store.path)
        await other.add_key(key(), secret.secret_hash)
        assert await store.key_version() > version
        assert await store.find_key(secret.secret_hash) == key()
        await other.update_key(replace(key(), revoked_s=NOON))
        found = await store.find_key(secret.secret_hash)
        assert found is not None
        assert not found.is_valid(NOON)
        await other.close()

    run(tmp_path / "server.db", check)


def test_one_server_at_a_time(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        store.claim()
        store.claim()
        other = SqliteStore(store.path)
        with pytest.raises(StorageError, match="another server"):
            other.claim()
        await other.close()

    run(tmp_path / "server.db", check)
    run(tmp_path / "server.db", check)


def test_idempotency_keys_of_a_dead_process_are_free(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        assert (await store.remember("mill", "once", b"1", NOON)).state == "new"

    run(tmp_path / "server.db", check)
    run(tmp_path / "server.db", check)


def test_an_erased_end_user_is_in_no_file(tmp_path: Path) -> None:
    who = "alice-4711@mill.example"

    def found() -> set[str]:
        return {path.name for path in tmp_path.iterdir() if who.encode() in path.read_bytes()}

    async def check(store: SqliteStore) -> None:
        await store.settle([entry(f"r{i}", end_user=who) for i in range(300)])
        assert found()
        assert await store.erase_end_user("mill", who) == 300
        assert not found()

    run(tmp_path / "server.db", check)
    assert not found()


def test_nobody_else_may_read_the_file(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        await store.settle([entry("a")])
        for path in (tmp_path / "new").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

    run(tmp_path / "new" / "server.db", check)


def test_no_secret_is_in_the_file(tmp_path: Path) -> None:
    secret = new_secret()

    async def check(store: SqliteStore) -> None:
        await store.add_key(key(), secret.secret_hash)

    run(tmp_path / "server.db", check)
    assert secret.secret_hash in (tmp_path / "server.db").read_bytes()
    assert secret.secret[3:].encode() not in (tmp_path / "server.db").read_bytes()


@pytest.mark.parametrize("version", ["3.51.3", "3.54.1", "4.0.0", "3.50.7", "3.50.12", "3.44.6"])
def test_a_mended_sqlite_is_taken(version: str) -> None:
    require_safe_wal(version)


@pytest.mark.parametrize("version", ["3.51.2", "3.50.6", "3.44.5", "3.45.0", "3.49.9", "3.40.1", "3.7.0"])
def test_an_affected_sqlite_is_refused(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: version)
    with pytest.raises(StorageError, match=version):
        SqliteStore(tmp_path / "server.db")
    assert not (tmp_path / "server.db").exists()


def test_a_full_disk_stops_what_is_new_and_not_what_has_begun(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        store.admit()
        await store.hold(hold("a", 5))
        free = os.statvfs(tmp_path)
        fake = os.statvfs_result((free.f_bsize, free.f_frsize, 0, 0, 0, 0, 0, 0, 0, 0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "statvfs", lambda _: fake)
            for refused in (store.hold(hold("b", 5)), store.add_key(key(), hash_secret("tm_a"))):
                with pytest.raises(StorageError, match="MiB are free"):
                    await refused
            with pytest.raises(StorageError, match="make room"):
                store.admit()
            assert await store.settle([entry("a")]) == 1
        store.admit()
        await store.hold(hold("b", 5))

    run(tmp_path / "server.db", check)


@pytest.mark.parametrize(
    ("content", "message"), [(b"this is no database at all" * 100, "not a database"), (b"", "")]
)
def test_what_is_no_database_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "server.db"
    path.write_bytes(content)
    if message:
        with pytest.raises(StorageError, match=message):
            SqliteStore(path)
        assert path.read_bytes() == content
    else:
        asyncio.run(SqliteStore(path).close())


def test_databases_of_others_and_of_the_future_are_refused(tmp_path: Path) -> None:
    other = apsw.Connection(str(tmp_path / "other.db"))
    other.execute("CREATE TABLE cookies (x)")
    other.close()
    with pytest.raises(StorageError, match="another program"):
        SqliteStore(tmp_path / "other.db")
    asyncio.run(SqliteStore(tmp_path / "server.db").close())
    newer = apsw.Connection(str(tmp_path / "server.db"))
    newer.pragma("user_version", 99)
    newer.close()
    with pytest.raises(StorageError, match="newer version"):
        SqliteStore(tmp_path / "server.db")


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "server.db"):
        with pytest.raises(StorageError):
            open_store(str(path))
    with pytest.raises(UsageError, match="mysql"):
        open_store("mysql://host/x")
    with pytest.raises(StorageError, match="PostgreSQL"):
        open_store("postgresql://nobody@127.0.0.1:1/none?connect_timeout=1")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        store = SqliteStore(tmp_path / "server.db")
        await store.close()
        await store.close()
        for refused in (store.settle([entry("a")]), store.keys(), store.sums(LedgerQuery(), [])):
            with pytest.raises(StorageError, match="closed"):
                await refused

    asyncio.run(work())


def test_the_log_is_moved_into_the_file_as_it_grows(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        for i in range(60):
            await store.settle([entry(f"{i}-{j}", feature="x" * 900) for j in range(20)])
        assert (tmp_path / "server.db-wal").stat().st_size < 2_000_000
        assert (tmp_path / "server.db").stat().st_size > 800_000

    run(tmp_path / "server.db", check, log_pages=50)
