"""What the server asks of its store, whichever database keeps it.

Every method that writes returns after the write is durable. Callers await; a database thread of the store
owns every transaction, so that a cancelled caller leaves none open. Every object belongs to a project, which
is part of every question: what another project owns is not found.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from tokenmill.store.records import Entry, Key

__all__ = ["Hold", "LedgerQuery", "LedgerSum", "Store", "SumBy"]

SumBy: TypeAlias = Literal[
    "key_id",
    "project",
    "feature",
    "end_user",
    "model",
    "deployment",
    "tier",
    "kind",
    "finish",
    "day",
    "month",
]
"""What the ledger can be summed by; days and months are of UTC."""


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Money that is set aside for an attempt before it begins: the most that it can come to."""

    request_id: str
    attempt: int
    key_id: str
    nano_usd: int
    at_s: float


@dataclass(frozen=True, kw_only=True)
class LedgerQuery:
    """Which lines of the ledger: from `since_s`, before `until_s`, and equal in each of `where`."""

    since_s: float = 0.0
    until_s: float | None = None
    where: Mapping[SumBy, str] | None = None


@dataclass(frozen=True, kw_only=True)
class LedgerSum:
    """Lines that are equal in what they were summed by: `group` has one text for each of it."""

    group: tuple[str, ...]
    num_entries: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    nanoseconds: int
    nanojoules: int
    cost_nano_usd: int
    price_nano_usd: int


class Store(Protocol):
    """Keys, holds and the ledger. Files, batches and captures have interfaces of their own beside it."""

    async def add_key(self, key: Key, secret_hash: bytes) -> None:
        """Keep a new key. Raises UsageError if its id or hash is there already."""
        ...

    async def find_key(self, secret_hash: bytes) -> Key | None:
        """The key with this SHA-256 of its secret, revoked or not."""
        ...

    async def keys(self) -> list[Key]:
        """All keys, the oldest first."""
        ...

    async def update_key(self, key: Key, secret_hash: bytes | None = None) -> None:
        """Replace what is kept of the key with this id: revoke, rotate, change. NotFoundError without it."""
        ...

    async def key_version(self) -> int:
        """Grows with every change of a key: what is cached of keys is good while it stands still."""
        ...

    async def hold(self, hold: Hold) -> None:
        """Set money aside, once for (request_id, attempt), if the key's budget has it left.

        Raises BudgetError otherwise. What other hosts hold counts, where there are any.
        """
        ...

    async def settle(self, entries: Sequence[Entry]) -> int:
        """Write lines of the ledger and release the holds of their attempts, in one transaction.

        A line that is there already is left as it is. Returns how many were new.
        """
        ...

    async def holds(self) -> list[Hold]:
        """What is still set aside: after a crash, attempts whose end nobody saw."""
        ...

    async def spent(self, key_id: str, since_s: float) -> int:
        """The prices of a key's lines since then, in nanodollars."""
        ...

    async def sums(self, query: LedgerQuery, by: Sequence[SumBy]) -> list[LedgerSum]:
        """Sums of the lines, grouped, the largest price first."""
        ...

    def entries(self, query: LedgerQuery) -> AsyncIterator[Entry]:
        """The lines themselves, in order of time, without holding them all in memory."""
        ...

    async def close(self) -> None:
        """Write what waits, and end the thread."""
        ...
