"""Budgets under clock steps, crashes, cancelled callers and a disk that fails."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fast.store_contract import DAY, NOON, FakeTime, entry, hold, key
from tokenmill.core import BudgetError, StorageError, UsageError
from tokenmill.store import (
    Accounts,
    Budget,
    Key,
    LedgerQuery,
    SqliteStore,
    SteadyClock,
    hash_secret,
    period_of,
)

HOUR = 3600.0


def run(path: Path, check: Callable[[SqliteStore], Awaitable[None]]) -> None:
    async def work() -> None:
        store = SqliteStore(path)
        try:
            await check(store)
        finally:
            await store.close()

    asyncio.run(work())


def daily(nano_usd: int = 100) -> Key:
    return key(budget=Budget(nano_usd=nano_usd, period="day"))


@pytest.mark.parametrize("step_s", [-HOUR, HOUR, 365 * DAY, -365 * DAY, 40 * DAY])
def test_a_step_of_the_wall_clock_neither_refills_nor_locks_out(step_s: float, tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        now = FakeTime()
        accounts = Accounts(store, now.clock())
        await accounts.reserve(daily(), "a", 0, 70)
        now.step_s(step_s)
        await accounts.settle([entry("a", 70, at_s=now.wall())])
        assert await accounts.remaining(daily()) == 30
        with pytest.raises(BudgetError):
            await accounts.reserve(daily(), "b", 0, 31)
        now.step_s(-step_s)
        assert await accounts.remaining(daily()) == 30
        await accounts.reserve(daily(), "b", 0, 30)
        await accounts.settle([entry("b", 30, at_s=now.wall())])
        now.pass_s(DAY)
        assert await accounts.remaining(daily()) == 100
        # Nor does it after a restart: lines have the time that they were counted in.
        assert {line.at_s async for line in store.entries(LedgerQuery())} == {NOON}

    run(tmp_path / "server.db", check)


def test_with_a_naive_clock_a_step_refills(tmp_path: Path) -> None:
    """The control of the test above."""

    class Naive(SteadyClock):
        def now_s(self) -> float:
            return now.wall()

    now = FakeTime()

    async def check(store: SqliteStore) -> None:
        accounts = Accounts(store, Naive(now.wall, now.passed))
        await accounts.reserve(daily(), "a", 0, 70)
        await accounts.settle([entry("a", 70)])
        now.step_s(365 * DAY)
        assert await accounts.remaining(daily()) == 100

    run(tmp_path / "server.db", check)


def test_a_new_period_refills_and_counts_what_ends_in_it(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        now = FakeTime()
        accounts = Accounts(store, now.clock())
        owner = daily()
        await accounts.reserve(owner, "long", 0, 60)
        await accounts.reserve(owner, "short", 0, 40)
        await accounts.settle([entry("short", 40)])
        now.pass_s(DAY)
        assert await accounts.remaining(owner) == 40
        await accounts.settle([entry("long", 50, at_s=now.wall())])
        assert await accounts.remaining(owner) == 50

    run(tmp_path / "server.db", check)


def test_periods_are_those_of_utc() -> None:
    leap = 1_835_395_200.0  # 2028-02-29T00:00:00Z
    assert period_of("day", leap + 5) == (leap, leap + DAY)
    assert period_of("month", leap) == (leap - 28 * DAY, leap + DAY)
    december = 1_798_761_599.0
    assert period_of("month", december) == (december + 1 - 31 * DAY, december + 1)
    assert period_of("total", leap) == (0.0, None)
    assert december not in period_of("month", december + 1)


def test_what_a_crash_leaves_is_settled_in_full(tmp_path: Path) -> None:
    async def crash(store: SqliteStore) -> None:
        await store.add_key(daily(), hash_secret("tm_a"))
        accounts = Accounts(store, FakeTime().clock())
        await accounts.reserve(daily(), "local", 0, 20)
        await accounts.reserve(daily(), "upstream", 0, 30, durable=True)

    async def after(store: SqliteStore) -> None:
        accounts = Accounts(store, FakeTime().clock())
        assert await accounts.remaining(daily()) == 70
        (line,) = [line async for line in store.entries(LedgerQuery())]
        assert (line.request_id, line.price_nano_usd, line.finish) == ("upstream", 30, "failed")
        assert (line.kind, line.project, line.num_output_tokens) == ("upstream", "mill", 0)
        assert await accounts.settle([entry("upstream", 25, kind="upstream")]) == 0

    run(tmp_path / "server.db", crash)
    run(tmp_path / "server.db", after)
    run(tmp_path / "server.db", after)


def test_first_use_of_a_key_counts_what_the_ledger_has(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        await store.settle([entry("before", 95)])
        accounts = Accounts(store, FakeTime().clock())
        results = await asyncio.gather(
            *(accounts.reserve(daily(), f"r{i}", 0, 1) for i in range(20)), return_exceptions=True
        )
        assert sum(isinstance(result, BudgetError) for result in results) == 15

    run(tmp_path / "server.db", check)


def test_a_caller_that_goes_away_leaves_nothing_behind(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        accounts = Accounts(store, FakeTime().clock())
        owner = daily(10**6)
        await store.add_key(owner, hash_secret("tm_a"))
        await accounts.start()
        for num_turns in range(12):
            name = f"r{num_turns}"
            task = asyncio.create_task(accounts.reserve(owner, name, 0, 10, durable=True))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            if not isinstance(result, BaseException):
                await accounts.release(result)
        while accounts._tasks:
            await asyncio.wait(set(accounts._tasks))
        assert await store.holds() == []
        assert await accounts.remaining(owner) == 10**6

    run(tmp_path / "server.db", check)


def test_a_cancelled_settlement_is_still_counted(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        accounts = Accounts(store, FakeTime().clock())
        await accounts.reserve(daily(), "a", 0, 60)
        task = asyncio.create_task(accounts.settle([entry("a", 50)]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while accounts._tasks:
            await asyncio.wait(set(accounts._tasks))
        assert await accounts.remaining(daily()) == 50 == await store.spent("key_k", 0.0)

    run(tmp_path / "server.db", check)


def test_a_store_that_failed_keeps_what_was_set_aside_and_admits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(store: SqliteStore) -> None:
        accounts = Accounts(store, FakeTime().clock())
        await accounts.reserve(daily(), "a", 0, 60)
        monkeypatch.setattr(store._database, "_failure", "disk I/O error")
        with pytest.raises(StorageError, match="disk I/O error"):
            await accounts.settle([entry("a", 10)])
        for owner in (daily(), key("free")):
            with pytest.raises(StorageError):
                await accounts.reserve(owner, "b", 0, 1)
        assert await accounts.remaining(daily()) == 40

    run(tmp_path / "server.db", check)


def test_budgets_that_change_count_at_once(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        accounts = Accounts(store, FakeTime().clock())
        await store.settle([entry("old", 30, at_s=NOON - 2 * DAY)])
        await accounts.reserve(daily(), "a", 0, 60)
        assert await accounts.remaining(daily(50)) == -10
        assert await accounts.remaining(replace(daily(), budget=Budget(nano_usd=100, period="total"))) == 10
        assert await accounts.remaining(daily()) == 40

    run(tmp_path / "server.db", check)


def test_one_line_may_come_to_more_than_was_set_aside(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        accounts = Accounts(store, FakeTime().clock())
        await accounts.reserve(daily(), "a", 0, 60)
        await accounts.settle([entry("a", 120)])
        assert await accounts.remaining(daily()) == -20

    run(tmp_path / "server.db", check)


def test_amounts_that_make_no_sense(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        accounts = Accounts(store, FakeTime().clock())
        for amount in (-1, 1 << 62):
            with pytest.raises(UsageError):
                await accounts.reserve(daily(), "a", 0, amount)
        await accounts.reserve(daily(0), "a", 0, 0)

    run(tmp_path / "server.db", check)


def test_two_servers_do_not_spend_from_one_file(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        await Accounts(store, FakeTime().clock()).start()
        other = SqliteStore(store.path)
        with pytest.raises(StorageError, match="another server"):
            await Accounts(other, FakeTime().clock()).reserve(daily(), "a", 0, 1)
        await other.close()

    run(tmp_path / "server.db", check)


def test_holds_of_attempts_that_run_are_left_alone(tmp_path: Path) -> None:
    async def check(store: SqliteStore) -> None:
        await store.hold(hold("left", 30))
        accounts = Accounts(store, FakeTime().clock())
        await accounts.reserve(daily(), "running", 0, 10, durable=True)
        await accounts.start()
        assert [each.request_id for each in await store.holds()] == ["running"]

    run(tmp_path / "server.db", check)
