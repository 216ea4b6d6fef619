"""What every store must do, as checks that the tests of SQLite and of PostgreSQL run alike.

A check gets an empty store; stores of the same test do not share projects, keys or requests.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from tokenmill.core import BudgetError, NotFoundError, UsageError
from tokenmill.store import (
    Accounts,
    Budget,
    Entry,
    Hold,
    Key,
    LedgerQuery,
    Limits,
    SteadyClock,
    Store,
    hash_secret,
    new_secret,
)

NOON = 1_790_000_000.0
DAY = 86400.0


class FakeTime:
    """A wall clock and a machine's own time, moved by hand; a step moves the wall alone."""

    def __init__(self, wall_s: float = NOON) -> None:
        self.wall_s = wall_s
        self.passed_s = 1000.0

    def wall(self) -> float:
        return self.wall_s

    def passed(self) -> float:
        return self.passed_s

    def pass_s(self, seconds: float) -> None:
        self.passed_s += seconds
        self.wall_s += seconds

    def step_s(self, seconds: float) -> None:
        self.wall_s += seconds

    def clock(self) -> SteadyClock:
        return SteadyClock(self.wall, self.passed)


def key(name: str = "k", budget: Budget | None = None, **fields: Any) -> Key:
    given: dict[str, Any] = {"name": name, "project": "mill", "created_s": NOON} | fields
    return Key(id=f"key_{name}", budget=budget, **given)


def entry(request_id: str, price: int = 10, **fields: Any) -> Entry:
    values: dict[str, Any] = {
        "attempt": 0,
        "kind": "local",
        "at_s": NOON,
        "key_id": "key_k",
        "project": "mill",
        "model": "small",
        "deployment": "here",
        "tier": "standard",
        "finish": "completed",
        "num_prompt_tokens": 7,
        "num_cached_tokens": 3,
        "num_output_tokens": 5,
        "nanoseconds": 11,
        "nanojoules": 13,
        "cost_nano_usd": 2,
    }
    return Entry(request_id=request_id, price_nano_usd=price, **(values | fields))


def hold(request_id: str, nano_usd: int, **fields: Any) -> Hold:
    values: dict[str, Any] = {"attempt": 0, "key_id": "key_k", "at_s": NOON}
    return Hold(request_id=request_id, nano_usd=nano_usd, **(values | fields))


async def keys_are_kept(store: Store) -> None:
    secret = new_secret()
    full = key(
        "full",
        Budget(nano_usd=5, period="month"),
        scopes=("inference", "admin"),
        tiers=("fast",),
        tags=("a", "ü"),
        limits=Limits(requests_per_minute=3, concurrency=1),
        capture=True,
        expires_s=NOON + 5,
    )
    before = await store.key_version()
    await store.add_key(full, secret.secret_hash)
    assert await store.find_key(hash_secret(secret.secret)) == full
    assert await store.find_key(hash_secret("tm_other")) is None
    assert await store.key_version() > before
    with pytest.raises(UsageError, match="already"):
        await store.add_key(full, hash_secret("tm_else"))
    with pytest.raises(UsageError, match="already"):
        await store.add_key(replace(full, id="key_2"), secret.secret_hash)
    later = key("later", created_s=NOON + 1)
    await store.add_key(later, hash_secret("tm_later"))
    assert await store.keys() == [full, later]


async def keys_change(store: Store) -> None:
    old, new = new_secret(), new_secret()
    await store.add_key(key(), old.secret_hash)
    version = await store.key_version()
    revoked = key(revoked_s=NOON)
    await store.update_key(revoked)
    assert await store.find_key(old.secret_hash) == revoked
    await store.update_key(key(), new.secret_hash)
    assert await store.find_key(old.secret_hash) is None
    assert await store.find_key(new.secret_hash) == key()
    assert await store.key_version() == version + 2
    with pytest.raises(NotFoundError):
        await store.update_key(key("none"))
    with pytest.raises(UsageError):
        await store.update_key(key(), b"short")


async def a_line_counts_once(store: Store) -> None:
    lines = [entry("a"), entry("b"), entry("a", kind="shadow"), entry("a", attempt=1)]
    assert await store.settle(lines) == 4
    assert await store.settle([entry("a", 999), entry("c")]) == 1
    assert await store.settle([]) == 0
    assert await store.spent("key_k", 0.0) == 50
    assert [line async for line in store.entries(LedgerQuery(where={"kind": "shadow"}))] == [lines[2]]


async def spending_has_bounds_in_time(store: Store) -> None:
    rng = Random(5)
    begin = math.floor(NOON / DAY) * DAY
    times = [begin + rng.choice([0.0, 1.0, DAY / 2, DAY - 0.001]) + DAY * rng.randrange(5) for _ in range(60)]
    lines = [entry(f"r{i}", 1 << i % 40, at_s=at_s) for i, at_s in enumerate(times)]
    await store.settle(lines)
    edges = [0.0, begin, begin + 1.0, begin + DAY / 3, begin + DAY, begin + 2.5 * DAY, begin + 4 * DAY]
    for since in edges:
        for until in [*edges, None]:
            end = math.inf if until is None else until
            expected = sum(line.price_nano_usd for line in lines if since <= line.at_s < end)
            assert await store.spent("key_k", since, until) == expected, (since, until)
    assert await store.spent("key_other", 0.0) == 0


async def sums_are_exact(store: Store) -> None:
    huge = (1 << 63) - 1
    await store.settle([entry(f"h{i}", 1 << 50, nanojoules=huge, nanoseconds=huge) for i in range(5)])
    await store.settle([entry("other", 1, model="large", feature="mail", at_s=NOON + 40 * DAY)])
    (total,) = await store.sums(LedgerQuery(), [])
    assert (total.num_entries, total.nanojoules) == (6, 5 * huge + 13)
    assert total.nanoseconds == 5 * huge + 11
    found = await store.sums(LedgerQuery(), ["model", "month"])
    assert [each.group for each in found] == [("small", "2026-09"), ("large", "2026-10")]
    assert [each.price_nano_usd for each in found] == [5 << 50, 1]
    (one,) = await store.sums(LedgerQuery(where={"feature": "mail", "day": "2026-10-31"}), ["feature"])
    assert (one.group, one.num_output_tokens, one.num_cached_tokens) == (("mail",), 5, 3)
    assert await store.sums(LedgerQuery(until_s=NOON), []) == []
    with pytest.raises(UsageError, match="summed by"):
        await store.sums(LedgerQuery(), ["request_id; DROP TABLE keys"])  # type: ignore[list-item]


async def days_and_months_end_at_midnight_utc(store: Store) -> None:
    midnight = 1_798_761_600.0  # 2027-01-01T00:00:00Z
    await store.settle([entry("old", at_s=midnight - 0.0001), entry("new", at_s=midnight)])
    found = await store.sums(LedgerQuery(), ["day", "month"])
    assert {each.group for each in found} == {("2026-12-31", "2026-12"), ("2027-01-01", "2027-01")}


async def lines_come_in_order(store: Store) -> None:
    rng = Random(3)
    lines = [entry(f"r{i}", i, at_s=NOON + rng.randrange(40)) for i in range(2300)]
    await store.settle(lines)
    found = [line async for line in store.entries(LedgerQuery())]
    assert sorted(found, key=lambda line: line.price_nano_usd) == lines
    assert [line.at_s for line in found] == sorted(line.at_s for line in lines)
    some = [line async for line in store.entries(LedgerQuery(since_s=NOON + 3, until_s=NOON + 5))]
    assert {line.at_s for line in some} == {NOON + 3, NOON + 4}


async def holds_keep_to_the_budget(store: Store) -> None:
    await store.add_key(key(budget=Budget(nano_usd=100, period="day")), hash_secret("tm_a"))
    await store.settle([entry("yesterday", 1000, at_s=NOON - DAY), entry("today", 40)])
    await store.hold(hold("a", 50))
    await store.hold(hold("a", 50))
    with pytest.raises(BudgetError):
        await store.hold(hold("b", 11))
    await store.hold(hold("b", 10))
    assert [each.request_id for each in await store.holds()] == ["a", "b"]
    await store.release("b", 0)
    await store.release("b", 0)
    assert await store.settle([entry("a", 45)]) == 1
    assert await store.holds() == []
    with pytest.raises(UsageError, match="settled"):
        await store.hold(hold("a", 1))
    await store.hold(hold("c", 15))
    await store.hold(hold("d", 999, key_id="key_without_budget"))


async def parallel_holds_do_not_overspend(store: Store) -> None:
    await store.add_key(key(budget=Budget(nano_usd=100)), hash_secret("tm_a"))

    async def attempt(i: int) -> bool:
        try:
            await store.hold(hold(f"r{i}", 10))
        except BudgetError:
            return False
        await store.settle([entry(f"r{i}", 10)])
        return True

    done = await asyncio.gather(*(attempt(i) for i in range(60)))
    assert sum(done) == 10
    assert await store.spent("key_k", 0.0) == 100


async def end_users_are_erased(store: Store) -> None:
    lines = [entry(f"r{i}", end_user="alice@mill", feature="mail") for i in range(3)]
    await store.settle(
        [*lines, entry("bob", end_user="bob"), entry("far", project="far", end_user="alice@mill")]
    )
    assert await store.erase_end_user("mill", "alice@mill") == 3
    assert await store.erase_end_user("mill", "alice@mill") == 0
    assert await store.erase_end_user("mill", "") == 0
    found = await store.sums(LedgerQuery(where={"project": "mill"}), ["end_user"])
    assert {each.num_entries: each.group[0].startswith("erased-") for each in found} == {3: True, 1: False}
    assert await store.spent("key_k", 0.0) == 50


async def idempotency_keys_have_one_answer(store: Store) -> None:
    async def ask(body: bytes = b"1", at_s: float = NOON, project: str = "mill") -> Any:
        return await store.remember(project, "once", body, at_s)

    states = [each.state for each in await asyncio.gather(*(ask() for _ in range(100)))]
    assert sorted(states) == ["in_progress"] * 99 + ["new"]
    assert (await ask(b"2")).state == "mismatch"
    assert (await ask(project="other")).state == "new"
    await store.forget("mill", "once")
    assert (await ask(b"2")).state == "new"
    await store.answer("mill", "once", 500, b"failed")
    await store.answer("mill", "once", 200, b"late")
    await store.forget("mill", "once")
    found = await ask(b"2", NOON + DAY - 1)
    assert (found.state, found.status, found.response) == ("done", 500, b"failed")
    assert (await ask(b"3", NOON + DAY)).state == "new"
    for name in ("", "x" * 256):
        with pytest.raises(UsageError, match="255"):
            await store.remember("mill", name, b"", NOON)


async def hostile_text_is_only_text(store: Store) -> None:
    texts = ["'); DROP TABLE ledger;--", "%s ? $1 :x", "\0null", "\ud800half", "ü\n\U0001f600", "x" * 10_000]
    await store.settle([entry(f"r{i}", feature=text, end_user=text) for i, text in enumerate(texts)])
    found = await store.sums(LedgerQuery(), ["feature"])
    assert len(found) == len(texts)
    assert await store.erase_end_user("mill", texts[0]) == 1


async def figures_that_make_no_sense_are_refused(store: Store) -> None:
    for bad in (
        entry("a", -1),
        entry("a", 1 << 63),
        entry("a", num_output_tokens=-1),
        entry("a", at_s=math.nan),
        entry("a", at_s=math.inf),
    ):
        with pytest.raises(UsageError):
            await store.settle([entry("good"), bad])
    assert await store.sums(LedgerQuery(), []) == []


async def accounts_never_overspend(store: Store) -> None:
    now = FakeTime()
    accounts = Accounts(store, now.clock())
    owner = key(budget=Budget(nano_usd=1000, period="month"))
    await store.add_key(owner, hash_secret("tm_a"))
    await store.settle([entry("earlier", 500)])

    async def attempt(i: int) -> bool:
        try:
            await accounts.reserve(owner, f"r{i}", 0, 50, durable=i % 3 == 0)
        except BudgetError:
            return False
        assert await accounts.settle([entry(f"r{i}", 50)]) == 1
        assert await accounts.settle([entry(f"r{i}", 50)]) == 0
        return True

    assert sum(await asyncio.gather(*(attempt(i) for i in range(80)))) == 10
    assert await accounts.remaining(owner) == 0 == await store.spent("key_k", 0.0) - 1000
    assert await store.holds() == []


async def tickets_are_given_back(store: Store) -> None:
    accounts = Accounts(store, FakeTime().clock())
    owner = key(budget=Budget(nano_usd=100))
    await store.add_key(owner, hash_secret("tm_a"))
    for is_durable in (False, True):
        ticket = await accounts.reserve(owner, f"r{is_durable}", 0, 70, durable=is_durable)
        assert await accounts.reserve(owner, f"r{is_durable}", 0, 70) == ticket
        assert await accounts.remaining(owner) == 30
        with pytest.raises(BudgetError, match="USD"):
            await accounts.reserve(owner, "other", 0, 31)
        await accounts.release(ticket)
        await accounts.release(ticket)
        assert await accounts.remaining(owner) == 100
    assert await accounts.remaining(key("free")) is None


CHECKS: dict[str, Callable[[Store], Awaitable[None]]] = {
    check.__name__: check
    for check in (
        keys_are_kept,
        keys_change,
        a_line_counts_once,
        spending_has_bounds_in_time,
        sums_are_exact,
        days_and_months_end_at_midnight_utc,
        lines_come_in_order,
        holds_keep_to_the_budget,
        parallel_holds_do_not_overspend,
        end_users_are_erased,
        idempotency_keys_have_one_answer,
        hostile_text_is_only_text,
        figures_that_make_no_sense_are_refused,
        accounts_never_overspend,
        tickets_are_given_back,
    )
}
