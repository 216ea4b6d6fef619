"""The day so far as the ledger has it: cost and price by key and model, and what a provider would have asked.

A day is one of UTC. The ledger is read at most every few seconds, less often where reading takes long, and
only once for all who look; what was read last is shown until then, and with the reason if it cannot be read.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from tokenmill.core import TokenmillError
from tokenmill.costs.prices import Price
from tokenmill.store import Key, LedgerQuery, LedgerSum, SumBy

__all__ = ["Books", "KeyBudget", "Ledger", "Today", "priced_nano_usd"]

_DAY_S: Final = 86400
_EVERY_S: Final = 5.0
_SHARE: Final = 0.02
"""Of all time at most this part is spent reading the ledger for the dashboard."""
_MOST_BUDGETS: Final = 200
_NANO_OF_ONE_TOKEN: Final = 1000
"""Nanodollars of a token at one dollar for 10^6."""


class Books(Protocol):
    """What of a store is read here (`store.Store`)."""

    async def sums(self, query: LedgerQuery, by: Sequence[SumBy]) -> list[LedgerSum]:
        """Sums of ledger lines."""
        ...

    async def keys(self) -> list[Key]:
        """All keys."""
        ...


@dataclass(frozen=True, kw_only=True)
class KeyBudget:
    """A key with a budget, and what is left of it in nanodollars."""

    key_id: str
    nano_usd: int
    left_nano_usd: int


@dataclass(frozen=True, kw_only=True)
class Today:
    """Sums since midnight UTC by (key, deployment), and budgets; `trouble` if it could not be read."""

    sums: tuple[LedgerSum, ...] = ()
    budgets: tuple[KeyBudget, ...] = ()
    is_read: bool = False
    trouble: str = ""


class Ledger:
    """Reads the day so far. `remaining` gives what is left of a key's budget (`Accounts.remaining`)."""

    def __init__(
        self,
        books: Books,
        remaining: Callable[[Key], Awaitable[int | None]],
        *,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.today = Today()
        self._books = books
        self._remaining = remaining
        self._wall_s = wall_s
        self._next_s = 0.0
        self._reading = asyncio.Lock()

    async def refresh(self) -> Today:
        """The day so far, read again if the last time is long enough ago. Does not raise."""
        async with self._reading:
            began_s = time.monotonic()
            if began_s >= self._next_s:
                await self._read()
                ended_s = time.monotonic()
                self._next_s = ended_s + max(_EVERY_S, (ended_s - began_s) / _SHARE)
        return self.today

    async def _read(self) -> None:
        try:
            since_s = self._wall_s() // _DAY_S * _DAY_S
            sums = await self._books.sums(LedgerQuery(since_s=since_s), ("key_id", "deployment"))
            budgets = await self._budgets()
        except TokenmillError as error:
            trouble = f"the ledger cannot be read ({type(error).__name__})"
            self.today = Today(sums=self.today.sums, budgets=self.today.budgets, trouble=trouble)
            return
        self.today = Today(sums=tuple(sums), budgets=budgets, is_read=True)

    async def _budgets(self) -> tuple[KeyBudget, ...]:
        """Of the keys that are valid and have one, at most so many."""
        found = []
        for key in await self._books.keys():
            if key.budget is None or not key.is_valid(self._wall_s()):
                continue
            left = await self._remaining(key)
            if left is not None:
                found.append(KeyBudget(key_id=key.id, nano_usd=key.budget.nano_usd, left_nano_usd=left))
            if len(found) == _MOST_BUDGETS:
                break
        return tuple(found)


def priced_nano_usd(sums: Sequence[LedgerSum], price: Price) -> int:
    """What so many tokens come to at a provider's price, cached input as such where the price knows it."""
    cached_usd = price.input_usd if price.cached_usd is None else price.cached_usd
    total = 0.0
    for each in sums:
        fresh = each.num_prompt_tokens - each.num_cached_tokens
        total += fresh * price.input_usd + each.num_cached_tokens * cached_usd
        total += each.num_output_tokens * price.output_usd
    return round(total * _NANO_OF_ONE_TOKEN)
