"""The store of several hosts against a real PostgreSQL server: the contract, and what is special to it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tests.fast.store_contract import CHECKS, NOON, FakeTime, entry, hold, key
from tests.server.postgres_server import postgres_server
from tokenmill.core import BudgetError, StorageError
from tokenmill.store import Accounts, Budget, Store, hash_secret, open_store
from tokenmill.store import postgres as postgres_module

_TABLES = "keys, ledger, days, holds, idempotency, counters, tokenmill_schema"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP TABLE IF EXISTS {_TABLES}")
    return server


def run(url: str, check: Callable[[Store], Awaitable[None]]) -> None:
    async def work() -> None:
        store = open_store(url)
        try:
            await check(store)
        finally:
            await store.close()

    asyncio.run(work())


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_contract(name: str, url: str) -> None:
    run(url, CHECKS[name])


def overspent(url: str) -> int:
    """What two hosts spend above the budget when all their calls, local ones too, come at once."""

    async def work() -> int:
        hosts = [open_store(url) for _ in range(2)]
        owner = key(budget=Budget(nano_usd=100))
        await hosts[0].add_key(owner, hash_secret("tm_a"))
        accounts = [Accounts(host, FakeTime().clock()) for host in hosts]

        async def attempt(i: int) -> None:
            try:
                await accounts[i % 2].reserve(owner, f"r{i}", 0, 10)
            except BudgetError:
                return
            await accounts[i % 2].settle([entry(f"r{i}", 10)])

        await asyncio.gather(*(attempt(i) for i in range(80)))
        spent = await hosts[0].spent("key_k", 0.0)
        assert await hosts[0].holds() == []
        for host in hosts:
            await host.close()
        return spent - 100

    return asyncio.run(work())


def test_two_hosts_cannot_overspend(url: str) -> None:
    assert overspent(url) == 0


def test_without_the_lock_two_hosts_overspend(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    lock = " FOR UPDATE"
    monkeypatch.setattr(postgres_module, "_LOCK_KEY", postgres_module._LOCK_KEY.removesuffix(lock))
    assert overspent(url) > 0


def test_holds_of_a_dead_host_are_settled_when_no_attempt_can_run_any_more(url: str) -> None:
    async def check(store: Store) -> None:
        now = FakeTime()
        await store.add_key(key(budget=Budget(nano_usd=100)), hash_secret("tm_a"))
        await store.hold(hold("old", 30, at_s=NOON - 4000))
        await store.hold(hold("other-host", 20, at_s=NOON - 10))
        accounts = Accounts(store, now.clock())
        await accounts.start()
        assert [each.request_id for each in await store.holds()] == ["other-host"]
        assert await store.spent("key_k", 0.0) == 30
        now.pass_s(4000)
        await accounts.reserve(key("free"), "next", 0, 5)
        assert await store.spent("key_k", 0.0) == 50

    run(url, check)


def test_a_broken_connection_is_made_again(url: str) -> None:
    import psycopg

    async def check(store: Store) -> None:
        await store.settle([entry("a")])
        with psycopg.connect(url, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tokenmill'"
            )
        assert await store.settle([entry("b")]) == 1
        assert await store.spent("key_k", 0.0) == 20

    run(url, check)


def test_a_write_that_failed_stops_what_is_new_for_a_moment(url: str) -> None:
    import psycopg

    async def check(store: Store) -> None:
        with psycopg.connect(url, autocommit=True) as other:
            other.execute("ALTER TABLE ledger RENAME TO hidden")
            with pytest.raises(StorageError, match="ledger"):
                await store.settle([entry("a")])
            with pytest.raises(StorageError):
                store.admit()
            other.execute("ALTER TABLE hidden RENAME TO ledger")
        assert await store.settle([entry("a")]) == 1
        store.admit()

    run(url, check)


def test_stores_that_open_together_make_the_tables_once(url: str) -> None:
    async def work() -> None:
        stores = await asyncio.gather(*(asyncio.to_thread(open_store, url) for _ in range(6)))
        for store in stores:
            await store.close()

    asyncio.run(work())
