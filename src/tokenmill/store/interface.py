"""What the server asks of its store, whichever database keeps it.

Every method that writes returns after the write is durable. Callers await; a database thread of the store
owns every transaction, so that a cancelled caller leaves none open. Every object belongs to a project, which
is part of every question: what another project owns is not found.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from tokenmill.store.records import Entry, Key

__all__ = ["Hold", "LedgerQuery", "LedgerSum", "Remembered", "RememberedState", "Store", "SumBy"]

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


RememberedState: TypeAlias = Literal["new", "in_progress", "mismatch", "done"]
"""Of an idempotency key: yours to carry out; being carried out; used for another body; answered already."""


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What is known of an idempotency key; `status` and `response` are the first answer once it is `done`."""

    state: RememberedState
    status: int = 0
    response: bytes = b""


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

    @property
    def is_shared(self) -> bool:
        """Whether several hosts spend from it, so that only the database knows what is left of a budget."""
        ...

    def admit(self) -> None:
        """Raise StorageError if no paid work should begin: a write failed, or the disk is nearly full."""
        ...

    def claim(self) -> None:
        """Be the one server that spends from a store that is not shared. Raises StorageError if one is."""
        ...

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

        Raises BudgetError otherwise. What other hosts hold counts, where there are any. The same hold again
        changes nothing; UsageError for an attempt that is settled already.
        """
        ...

    async def release(self, request_id: str, attempt: int) -> None:
        """Give back what an attempt held that did not begin. No-op without a hold."""
        ...

    async def settle(self, entries: Sequence[Entry]) -> int:
        """Write lines of the ledger and release the holds of their attempts, in one transaction.

        A line that is there already is left as it is. Returns how many were new.
        """
        ...

    async def holds(self) -> list[Hold]:
        """What is still set aside: after a crash, attempts whose end nobody saw."""
        ...

    async def spent(self, key_id: str, since_s: float, until_s: float | None = None) -> int:
        """The prices of a key's lines since then, and before `until_s` if given, in nanodollars."""
        ...

    async def sums(self, query: LedgerQuery, by: Sequence[SumBy]) -> list[LedgerSum]:
        """Sums of the lines, grouped, the largest price first."""
        ...

    def entries(self, query: LedgerQuery) -> AsyncIterator[Entry]:
        """The lines themselves, in order of time, without holding them all in memory."""
        ...

    async def erase_end_user(self, project: str, end_user: str) -> int:
        """Put a random word in the place of an end user's id in the ledger; the counts stay.

        Returns in how many lines. The id is then in no file of the database, free pages and logs included,
        as far as the database promises that.
        """
        ...

    async def remember(self, project: str, name: str, body_hash: bytes, now_s: float) -> Remembered:
        """Ask for an idempotency key, and take it if it is `new`: then `answer` or `forget` must follow.

        A key is kept for 24 hours. One that a process took that died before it answered is `new` again.
        Raises UsageError for a name that is empty or longer than 255 characters.
        """
        ...

    async def answer(self, project: str, name: str, status: int, response: bytes) -> None:
        """Keep the answer for an idempotency key that is carried out; failures (500) are answers, too."""
        ...

    async def forget(self, project: str, name: str) -> None:
        """Give up an idempotency key that is not answered, because nothing was carried out."""
        ...

    async def close(self) -> None:
        """Write what waits, and end the thread."""
        ...
