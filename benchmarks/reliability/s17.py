"""S17: money is exact, and no budget is overspent.

Two parts, each with its control:

- ledger: `cases` lines are settled, each one to five times, at once and late, by callers some of whom are
  cancelled, over lives of a server that end in crashes, under a wall clock that is stepped by -1 h, +1 h,
  +1 year and back. An oracle in plain dictionaries says what every key has spent in its period, what is left,
  and what the ledger must hold. Control: time is taken from the wall clock.
- races: `cases` / 1000 budgets for twenty calls, each asked for a hundred at once, and for a hundred again.
  Control: nothing is reserved.

A violation is a difference from the oracle of any size, or a budget that is overspent. The budget of a race
that is not used up counts, too.
"""

import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final
from unittest.mock import patch

from benchmarks.reliability.command import main
from scripts.scorecard import Line
from tokenmill.core import BudgetError
from tokenmill.store import (
    Accounts,
    Budget,
    BudgetPeriod,
    Entry,
    Key,
    LedgerQuery,
    SqliteConfig,
    SqliteStore,
    SteadyClock,
    Ticket,
    period_of,
)

__all__ = ["run", "run_ledger", "run_races"]

_CASES: Final = 1_000_000
_LINES_A_RACE: Final = 1000
_START_S: Final = 1_790_000_000.0
_STEPS_S: Final = (-3600.0, 3600.0, 365 * 86400.0, -365 * 86400.0)
_ROUNDS_A_LIFE: Final = 12
_MAX_CALLS_A_ROUND: Final = 250
_NUM_KEYS: Final = 24
_CONFIG: Final = SqliteConfig(min_free_bytes=0)


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """Both parts."""
    began = time.perf_counter()
    ledger = run_ledger(cases, seed, guard)
    races = run_races(max(1, cases // _LINES_A_RACE), seed, guard)
    parts = [ledger, races]
    figures = {f"{part.name}: {name}": value for part in parts for name, value in part.figures.items()}
    if not guard and not (ledger.violations and races.violations):
        parts = [part for part in parts if not part.violations]
    return Line(
        name="S17",
        what="ledger against an oracle; budgets under parallel calls",
        cases=sum(part.cases for part in parts),
        violations=sum(part.violations for part in parts),
        seconds=time.perf_counter() - began,
        figures=figures,
    )


class _WallClock(SteadyClock):
    """The control: a clock that follows every step of the wall's."""

    def __init__(self, times: "_Times") -> None:
        super().__init__(times.wall, times.passed)
        self._times = times

    def now_s(self) -> float:
        """What the wall says."""
        return self._times.wall()


class _Times:
    """The wall clock and true time; a server that starts reads the wall, so steps are undone before that."""

    def __init__(self) -> None:
        self.true_s = _START_S
        self.off_s = 0.0

    def wall(self) -> float:
        return self.true_s + self.off_s

    def passed(self) -> float:
        return self.true_s - _START_S


@dataclass
class _Oracle:
    """What must be true: lines by identity, and what is set aside."""

    lines: dict[tuple[str, int], Entry] = field(default_factory=dict)
    by_key: defaultdict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    open: dict[tuple[str, int], Ticket] = field(default_factory=dict)

    def settle(self, line: Entry) -> None:
        if (line.request_id, line.attempt) not in self.lines:
            self.lines[line.request_id, line.attempt] = line
            self.by_key[line.key_id].append(line)
        self.open.pop((line.request_id, line.attempt), None)

    def spent(self, key: Key, now_s: float) -> int:
        assert key.budget is not None
        period = period_of(key.budget.period, now_s)
        return sum(line.price_nano_usd for line in reversed(self.by_key[key.id]) if line.at_s in period)

    def remaining(self, key: Key, now_s: float) -> int:
        assert key.budget is not None
        held = sum(ticket.nano_usd for ticket in self.open.values() if ticket.key_id == key.id)
        return key.budget.nano_usd - self.spent(key, now_s) - held


class _Trial:
    """Servers that live one after the other on one file, and the oracle beside them."""

    def __init__(self, path: Path, rng: Random, num_lines: int, guard: bool) -> None:
        self._path = path
        self._rng = rng
        self._num_lines = num_lines
        self._guard = guard
        self._times = _Times()
        self._oracle = _Oracle()
        self._late: list[Entry] = []
        self._cut_off: list[Entry] = []
        self._num_calls = 0
        # A short trial has crashes, too.
        self._calls_a_round = min(_MAX_CALLS_A_ROUND, max(20, num_lines // 100))
        self.counts = Counter[str]()
        self.violations = Counter[str]()
        kinds: tuple[BudgetPeriod, ...] = ("total", "day", "month")
        self._keys = [
            Key(
                id=f"key_{i}",
                name=str(i),
                project="mill",
                created_s=_START_S,
                budget=Budget(nano_usd=(10**12, 3 * 10**6, 10**8)[i % 3], period=kinds[i % 3]),
            )
            for i in range(_NUM_KEYS)
        ]

    async def live(self) -> None:
        """Servers until there are enough lines, then the great comparison."""
        store = SqliteStore(self._path, _CONFIG)
        for i, key in enumerate(self._keys):
            await store.add_key(key, i.to_bytes(32))
        await store.close()
        while self.counts["lines settled"] < self._num_lines:
            await self._one_life()
        await self._compare_all()

    async def _one_life(self) -> None:
        self._times.off_s = 0.0
        store = SqliteStore(self._path, _CONFIG)
        clock = SteadyClock(self._times.wall, self._times.passed) if self._guard else _WallClock(self._times)
        accounts = Accounts(store, clock)
        await accounts.start()
        for ticket in list(self._oracle.open.values()):
            self._after_crash(ticket)
        # Whoever was cut off asks again first: what memory had set aside for it is free since the crash.
        cut_off, self._cut_off = self._cut_off, []
        await asyncio.gather(*(self._settle(accounts, [line]) for line in cut_off))
        for _ in range(_ROUNDS_A_LIFE):
            if self.counts["lines settled"] >= self._num_lines:
                break
            self._move_clocks()
            await self._round(accounts)
            await self._compare(accounts)
        await self._crash(store, accounts)

    def _after_crash(self, ticket: Ticket) -> None:
        """What was held is spent; what was set aside in memory is free."""
        if ticket.is_durable:
            self._oracle.settle(_line(ticket, ticket.at_s, ticket.nano_usd, "upstream"))
            self.counts["holds settled after a crash"] += 1
        self._oracle.open.pop((ticket.request_id, ticket.attempt), None)

    def _move_clocks(self) -> None:
        self._times.true_s += self._rng.choice([1.0, 60.0, 3600.0, 20_000.0])
        if self._rng.random() < 0.4:
            self._times.off_s = self._rng.choice([0.0, *_STEPS_S])
            self.counts["clock steps"] += 1

    async def _round(self, accounts: Accounts) -> None:
        late, self._late = self._late, []
        calls = [self._call(accounts) for _ in range(self._calls_a_round)]
        again = [self._settle(accounts, [line]) for line in late]
        await asyncio.gather(*calls, *again)

    async def _call(self, accounts: Accounts) -> None:
        rng, key = self._rng, self._rng.choice(self._keys)
        self._num_calls += 1
        most = rng.randrange(1, 200_000)
        try:
            ticket = await accounts.reserve(
                key, f"r{self._num_calls}", rng.randrange(3), most, durable=rng.random() < 0.3
            )
        except BudgetError:
            self.counts["refused"] += 1
            return
        self._oracle.open[ticket.request_id, ticket.attempt] = ticket
        fate = rng.random()
        if fate < 0.03:
            await accounts.release(ticket)
            self._oracle.open.pop((ticket.request_id, ticket.attempt))
            return
        if fate < 0.05:
            return  # still running when the server crashes
        line = _line(ticket, self._true_now(), rng.randrange(most + 1), "local")
        await self._settle(accounts, [line] * rng.randrange(1, 3))
        self._late += [line] * rng.choice([0, 0, 1, 2, 3])

    def _true_now(self) -> float:
        return self._times.true_s

    async def _settle(self, accounts: Accounts, lines: list[Entry]) -> None:
        """At once, each as a call of its own; some callers go away before the answer."""
        self.counts["lines settled"] += len(lines)
        for line in lines:
            self._oracle.settle(line)
        tasks = [asyncio.create_task(accounts.settle([line])) for line in lines]
        if self._rng.random() < 0.1:
            await asyncio.sleep(0)
            tasks[0].cancel()
            self.counts["cancelled callers"] += 1
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _compare(self, accounts: Accounts) -> None:
        """At a quiet moment everybody must have left what the oracle says."""
        while accounts._tasks:
            await asyncio.wait(set(accounts._tasks))
        for key in self._rng.sample(self._keys, 4):
            left = await accounts.remaining(key)
            expected = self._oracle.remaining(key, self._true_now())
            self.counts["comparisons"] += 1
            if left != expected:
                self.violations["remaining differs"] += 1
            if expected < 0:
                self.violations["overspent"] += 1

    async def _crash(self, store: SqliteStore, accounts: Accounts) -> None:
        """Lines are on their way as it dies: what is not written yet never will be, by this server."""
        tickets = [each for each in self._oracle.open.values() if not each.is_durable][:20]
        lines = [_line(ticket, self._true_now(), ticket.nano_usd // 2, "local") for ticket in tickets]
        tasks = [asyncio.create_task(accounts.settle([line])) for line in lines]
        for _ in range(self._rng.randrange(6)):
            await asyncio.sleep(0)
        jobs = store._database._jobs
        with contextlib.suppress(Exception):
            while True:
                jobs.get_nowait()
        await store.close()
        # Whoever wants its money asks again at the next server: each line may be there already, or not.
        self._cut_off += lines
        for line in lines:
            self._oracle.settle(line)
        for task in (*tasks, *accounts._tasks):
            task.cancel()
        await asyncio.gather(*tasks, *accounts._tasks, return_exceptions=True)
        self.counts["crashes"] += 1

    async def _compare_all(self) -> None:
        """The whole ledger, line by line; nothing is on its way any more."""
        store = SqliteStore(self._path, _CONFIG)
        accounts = Accounts(store, SteadyClock(lambda: self._times.true_s, self._times.passed))
        await accounts.start()
        for ticket in list(self._oracle.open.values()):
            self._after_crash(ticket)
        for line in (*self._cut_off, *self._late):
            await accounts.settle([line])
        found = {(e.request_id, e.attempt): e.price_nano_usd async for e in store.entries(LedgerQuery())}
        expected = {name: line.price_nano_usd for name, line in self._oracle.lines.items()}
        (total,) = await store.sums(LedgerQuery(), ())
        self.violations["lines that differ"] += len(set(found.items()) ^ set(expected.items()))
        self.violations["lines twice"] += total.num_entries - len(found)
        difference = total.price_nano_usd - sum(expected.values())
        days = sum([await store.spent(key.id, 0.0) for key in self._keys])
        self.violations["total differs"] += int(difference != 0) + int(days != total.price_nano_usd)
        self.counts["lines in the ledger"] = total.num_entries
        self.counts["nanodollars"] = total.price_nano_usd
        self.counts["difference in nanodollars"] = abs(difference)
        await store.close()


def _line(ticket: Ticket, at_s: float, price: int, kind: str) -> Entry:
    return Entry(
        request_id=ticket.request_id,
        attempt=ticket.attempt,
        kind="upstream" if kind == "upstream" else "local",
        at_s=at_s,
        key_id=ticket.key_id,
        project="mill",
        model="small",
        deployment="here",
        tier="standard",
        finish="completed",
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_output_tokens=1,
        nanoseconds=1,
        nanojoules=1,
        cost_nano_usd=price // 2,
        price_nano_usd=price,
    )


def run_ledger(cases: int, seed: int, guard: bool) -> Line:
    """Part one."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="s17-") as folder:
        trial = _Trial(Path(folder) / "server.db", Random(seed), cases, guard)
        asyncio.run(trial.live())
    return Line(
        name="ledger",
        what="the ledger against an oracle",
        cases=trial.counts["lines settled"],
        violations=trial.violations.total(),
        seconds=time.perf_counter() - began,
        figures={**trial.counts, **+trial.violations},
    )


def run_races(races: int, seed: int, guard: bool) -> Line:
    """Part two."""
    began, rng = time.perf_counter(), Random(seed)
    with tempfile.TemporaryDirectory(prefix="s17-") as folder, _reservation(guard):
        found = asyncio.run(_races(Path(folder) / "server.db", races, rng))
    return Line(
        name="races",
        what="parallel calls against one budget",
        cases=races,
        violations=found["overspent"] + found["not used up"],
        seconds=time.perf_counter() - began,
        figures={"races": races, **found},
    )


@contextlib.contextmanager
def _reservation(guard: bool) -> Iterator[None]:
    """Without the guard budgets are checked, but nothing is set aside."""

    def note(accounts: Accounts, _account: object, ticket: Ticket) -> None:
        accounts._tickets.pop((ticket.request_id, ticket.attempt), None)

    with contextlib.nullcontext() if guard else patch.object(Accounts, "_open", note):
        yield


async def _races(path: Path, races: int, rng: Random) -> Counter[str]:
    found = Counter[str]()
    store = SqliteStore(path, _CONFIG)
    accounts = Accounts(store)
    for race in range(races):
        key = Key(
            id=f"key_{race}",
            name=str(race),
            project="mill",
            created_s=0.0,
            budget=Budget(nano_usd=2000, period=rng.choice(["total", "day", "month"])),
        )
        await store.add_key(key, race.to_bytes(32))
        # The first hundred meet a key that nobody has asked for, and set aside twice of what they pay.
        for wave, most in enumerate((200, 100)):
            calls = [_racer(accounts, key, f"{race}-{wave}-{i}", rng, most) for i in range(100)]
            found["admitted"] += sum(await asyncio.gather(*calls))
            found["calls"] += len(calls)
        spent = await store.spent(key.id, 0.0)
        found["overspent"] += spent > 2000
        found["most nanodollars above the budget"] = max(
            found["most nanodollars above the budget"], spent - 2000
        )
        found["not used up"] += spent < 2000
    await store.close()
    return found


async def _racer(accounts: Accounts, key: Key, name: str, rng: Random, most: int) -> bool:
    try:
        ticket = await accounts.reserve(key, name, 0, most, durable=rng.random() < 0.2)
    except BudgetError:
        return False
    await asyncio.sleep(0)
    await accounts.settle([_line(ticket, accounts.now_s(), 100, "local")])
    return True


if __name__ == "__main__":
    sys.exit(main("s17", run, _CASES, __doc__))
