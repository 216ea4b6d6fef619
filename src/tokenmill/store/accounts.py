"""Budgets: the most that an attempt can come to is set aside before it begins, and settled after its end.

    ticket = await accounts.reserve(key, request_id, attempt, nano_usd, durable=False)
    ... the attempt runs ...
    await accounts.settle([entry])              # or release(ticket), if it never began

What a key has spent in its period plus what is set aside never exceeds its budget: check and reservation are
one step without an await between. For a local attempt memory is enough, since a crash ends the attempt, too.
Before an upstream call, and always where several hosts share the store, a hold is durable first.

What a crash leaves: a hold whose attempt nobody saw end may have been billed in full, so it becomes a line
of the ledger at all that it held, with the finish `failed`, no tokens, and the model `unknown`. With one
server that happens at the start; among several hosts, once a hold is older than any attempt may be.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias, TypeVar

from tokenmill.core import UsageError
from tokenmill.store.interface import Hold, Store
from tokenmill.store.periods import Period, SteadyClock, period_of
from tokenmill.store.records import BudgetPeriod, Entry, Key
from tokenmill.store.rows import budget_error

__all__ = ["Accounts", "Ticket"]

_T = TypeVar("_T")
_Write: TypeAlias = Callable[[Sequence[Entry]], Awaitable[int]]

_MAX_NANO_USD: Final = 1 << 62
_SWEEP_S: Final = 300.0
_NEVER: Final = Period(0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Money set aside for one attempt."""

    request_id: str
    attempt: int
    key_id: str
    nano_usd: int
    at_s: float
    is_durable: bool


@dataclass
class _Account:
    """What is known of one key. `spent` is right for `period` while `is_fresh`; else it is read again.

    While the ledger is read, no line of the key may be on its way, or it could be counted twice or not at
    all: `num_settling` counts those, `idle` waits for none, `reading` keeps new ones back.
    """

    kind: BudgetPeriod | None = None
    period: Period = _NEVER
    spent: int = 0
    reserved: int = 0
    is_fresh: bool = False
    num_settling: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Accounts:
    """What the keys of a store may still spend. One for a server process, used from one event loop.

    `max_attempt_s`: no attempt takes longer; a hold that is older, of another host, is settled.
    """

    def __init__(
        self, store: Store, clock: SteadyClock | None = None, *, max_attempt_s: float = 3600.0
    ) -> None:
        self._store = store
        self._clock = clock or SteadyClock()
        self._max_attempt_s = max_attempt_s
        self._accounts: dict[str, _Account] = {}
        self._tickets: dict[tuple[str, int], Ticket] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start: asyncio.Task[None] | None = None
        self._swept_s = 0.0

    def now_s(self) -> float:
        """The time that periods are counted in: what a line's `at_s` should be taken from."""
        return self._clock.now_s()

    async def start(self) -> None:
        """Be the one spender of a store that is not shared, and settle what a crash left.

        The first reservation does it otherwise. Raises StorageError if another server is there.
        """
        if self._start is None or (self._start.done() and self._start.exception() is not None):
            self._start = asyncio.create_task(self._begin())
        await asyncio.shield(self._start)

    async def reserve(
        self, key: Key, request_id: str, attempt: int, nano_usd: int, *, durable: bool = False
    ) -> Ticket:
        """Set aside the most that an attempt can come to, `durable` if it may cost money elsewhere.

        Raises BudgetError if the key's budget does not have it, StorageError if the store takes no paid
        work. Asked again for an attempt that has a ticket, it gives the same one.
        """
        if not 0 <= nano_usd < _MAX_NANO_USD:
            raise UsageError(f"{nano_usd} nanodollars cannot be set aside")
        await self._started()
        self._store.admit()
        if (known := self._tickets.get((request_id, attempt))) is not None:
            return known
        account = self._accounts.setdefault(key.id, _Account())
        is_hold = durable or (self._store.is_shared and key.budget is not None)
        if key.budget is not None and not self._store.is_shared:
            await self._refresh(account, key)
            # From here to the reservation nothing awaits: that is what makes it atomic.
            if account.spent + account.reserved + nano_usd > key.budget.nano_usd:
                left = key.budget.nano_usd - account.spent - account.reserved
                raise budget_error(key.id, key.budget, left, nano_usd)
        ticket = Ticket(
            request_id=request_id,
            attempt=attempt,
            key_id=key.id,
            nano_usd=nano_usd,
            at_s=self.now_s(),
            is_durable=is_hold,
        )
        self._open(account, ticket)
        if is_hold:
            await self._hold(ticket)
        return ticket

    async def settle(self, entries: Sequence[Entry], write: _Write | None = None) -> int:
        """Write what attempts came to, and give back the rest of what was set aside.

        `write` writes the lines in the place of `Store.settle`, with what belongs into the same transaction.

        Returns how many lines were new: each (request, attempt, kind) is counted once, however often it is
        settled. A caller that is cancelled does not stop it. If the store fails, StorageError: what was set
        aside stays so, and settling can be tried again.
        """
        await self._started()
        stamped = [self._stamped(entry) for entry in entries]
        return await self._finish(self._settle(stamped, write or self._store.settle))

    async def release(self, ticket: Ticket) -> None:
        """Give back all of what was set aside for an attempt that never began. No-op once it is settled."""
        if self._tickets.get((ticket.request_id, ticket.attempt)) is ticket:
            await self._finish(self._release(ticket))

    async def remaining(self, key: Key) -> int | None:
        """What is left of a key's budget in this period, in nanodollars, without what is set aside.

        None for a key without a budget. Below 0 if the budget was made smaller than what is spent.
        """
        if key.budget is None:
            return None
        await self._started()
        if self._store.is_shared:
            period = period_of(key.budget.period, self.now_s())
            spent = await self._store.spent(key.id, period.begin_s, period.end_s)
            held = sum(hold.nano_usd for hold in await self._store.holds() if hold.key_id == key.id)
            return key.budget.nano_usd - spent - held
        account = self._accounts.setdefault(key.id, _Account())
        await self._refresh(account, key)
        return key.budget.nano_usd - account.spent - account.reserved

    async def _begin(self) -> None:
        self._store.claim()
        await self._sweep()

    async def _started(self) -> None:
        if self._start is None or not self._start.done() or self._start.exception() is not None:
            await self.start()
        elif self._store.is_shared and self.now_s() - self._swept_s > _SWEEP_S:
            await self._sweep()

    async def _sweep(self) -> None:
        """Settle holds whose attempts nobody will: those of an earlier process, or too old."""
        self._swept_s = now_s = self.now_s()
        left = [hold for hold in await self._store.holds() if self._is_left(hold, now_s)]
        if not left:
            return
        projects = {key.id: key.project for key in await self._store.keys()}
        await self._store.settle([_lost_line(hold, projects.get(hold.key_id, ""), now_s) for hold in left])

    def _is_left(self, hold: Hold, now_s: float) -> bool:
        if (hold.request_id, hold.attempt) in self._tickets:
            return False
        return not self._store.is_shared or abs(now_s - hold.at_s) > self._max_attempt_s

    def _stamped(self, entry: Entry) -> Entry:
        """The line at a time between its reservation and now, whatever clock its time came from."""
        now_s = self.now_s()
        ticket = self._tickets.get((entry.request_id, entry.attempt))
        at_s = min(entry.at_s, now_s) if ticket is None else min(max(entry.at_s, ticket.at_s), now_s)
        return entry if at_s == entry.at_s else replace(entry, at_s=at_s)

    def _open(self, account: _Account, ticket: Ticket) -> None:
        self._tickets[ticket.request_id, ticket.attempt] = ticket
        account.reserved += ticket.nano_usd

    def _close(self, request_id: str, attempt: int) -> bool:
        """Whether there was a ticket."""
        ticket = self._tickets.pop((request_id, attempt), None)
        if ticket is not None:
            self._accounts[ticket.key_id].reserved -= ticket.nano_usd
        return ticket is not None

    async def _hold(self, ticket: Ticket) -> None:
        """Make it durable; whoever gives up meanwhile, or is refused, leaves nothing set aside."""
        hold = Hold(
            request_id=ticket.request_id,
            attempt=ticket.attempt,
            key_id=ticket.key_id,
            nano_usd=ticket.nano_usd,
            at_s=ticket.at_s,
        )
        task = self._task(self._store.hold(hold))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._task(self._undo(task, ticket))
            raise
        except BaseException:
            self._close(ticket.request_id, ticket.attempt)
            raise

    async def _undo(self, holding: "asyncio.Task[None]", ticket: Ticket) -> None:
        await asyncio.wait([holding])
        if holding.exception() is None:
            await self._release(ticket)
        else:
            self._close(ticket.request_id, ticket.attempt)

    async def _release(self, ticket: Ticket) -> None:
        if ticket.is_durable:
            await self._store.release(ticket.request_id, ticket.attempt)
        self._close(ticket.request_id, ticket.attempt)

    async def _settle(self, entries: Sequence[Entry], write: _Write) -> int:
        # In one order for all, for two that wait for each other's accounts would never end.
        key_ids = sorted({entry.key_id for entry in entries})
        accounts = [self._accounts.setdefault(key_id, _Account()) for key_id in key_ids]
        for account in accounts:
            async with account.reading:
                account.num_settling += 1
                account.idle.clear()
        num_new: int | None = None
        try:
            num_new = await write(entries)
        finally:
            for account in accounts:
                account.num_settling -= 1
                account.is_fresh = account.is_fresh and num_new is not None
                if not account.num_settling:
                    account.idle.set()
            if num_new is not None:
                self._count(entries, num_new == len(entries))
        return num_new

    def _count(self, entries: Sequence[Entry], all_are_new: bool) -> None:
        """Add the lines that are durable now to what is known. Where it is not clear which of them were new,
        the ledger will be asked."""
        for entry in entries:
            account = self._accounts[entry.key_id]
            self._close(entry.request_id, entry.attempt)
            if not all_are_new:
                account.is_fresh = False
            elif entry.at_s in account.period:
                account.spent += entry.price_nano_usd

    async def _refresh(self, account: _Account, key: Key) -> None:
        """Make `spent` right for the key's period that is now."""
        assert key.budget is not None
        while not self._is_fresh(account, key.budget.period):
            async with account.reading:
                if self._is_fresh(account, key.budget.period):
                    break
                while account.num_settling:
                    await account.idle.wait()
                account.kind = key.budget.period
                account.period = period = period_of(key.budget.period, self.now_s())
                account.spent = await self._store.spent(key.id, period.begin_s, period.end_s)
                account.is_fresh = True

    def _is_fresh(self, account: _Account, kind: BudgetPeriod) -> bool:
        return account.is_fresh and account.kind == kind and self.now_s() in account.period

    async def _finish(self, work: "Coroutine[Any, Any, _T]") -> _T:
        """Run it to its end, also if the caller is cancelled."""
        return await asyncio.shield(self._task(work))

    def _task(self, work: "Coroutine[Any, Any, _T]") -> "asyncio.Task[_T]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen by whoever waits; if nobody does, what was set aside stays so


def _lost_line(hold: Hold, project: str, now_s: float) -> Entry:
    return Entry(
        request_id=hold.request_id,
        attempt=hold.attempt,
        kind="upstream",
        at_s=min(hold.at_s, now_s),
        key_id=hold.key_id,
        project=project,
        model="unknown",
        deployment="unknown",
        tier="standard",
        finish="failed",
        num_prompt_tokens=0,
        num_cached_tokens=0,
        num_output_tokens=0,
        nanoseconds=0,
        nanojoules=0,
        cost_nano_usd=hold.nano_usd,
        price_nano_usd=hold.nano_usd,
    )
