"""What the server remembers: keys, what was spent, and by whom. Plain values, whatever keeps them.

Money is whole nanodollars (10^-9 USD), energy whole nanojoules, durations whole nanoseconds: sums are exact.
Points in time are seconds of the wall clock (Unix time), for they must mean the same after a restart.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tokenmill.core import FinishReason, Tier, UsageError

__all__ = ["Budget", "BudgetPeriod", "Entry", "EntryKind", "Key", "Limits", "Scope"]

Scope: TypeAlias = Literal["inference", "admin", "metrics"]
"""What a key may do: ask models; manage keys and read the ledger; read metrics and the dashboard."""

BudgetPeriod: TypeAlias = Literal["total", "day", "month"]
"""Over what a budget is counted: for ever, or a day or month of UTC."""

EntryKind: TypeAlias = Literal["local", "upstream", "batch", "shadow"]
"""Why tokens were computed: an engine of ours, an upstream endpoint, a line of a batch, a shadowed call."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one key. None: no bound of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1 << 40:
                raise UsageError(f"{name} is {value}", hint="use a whole number from 1, or none")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """At most this much in a period, at the prices asked."""

    nano_usd: int
    period: BudgetPeriod = "total"

    def __post_init__(self) -> None:
        if not 0 <= self.nano_usd < 1 << 62:
            raise UsageError(f"a budget is {self.nano_usd} nanodollars", hint="use 0 to 4.6e9 USD")


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key without its secret, of which only the SHA-256 is kept, beside it.

    `id` is public and goes into logs. `project` is the tenant: caches, files and batches are its own.
    `tiers` are those that it may ask for, the first one where a call names none.
    """

    id: str
    name: str
    project: str
    scopes: tuple[Scope, ...] = ("inference",)
    tiers: tuple[Tier, ...] = ("standard", "batch")
    tags: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    budget: Budget | None = None
    capture: bool = False
    created_s: float
    expires_s: float | None = None
    revoked_s: float | None = None

    def is_valid(self, now_s: float) -> bool:
        """Whether it opens anything now."""
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the ledger: one attempt at one request, once. Unique on (request_id, attempt, kind).

    `price_nano_usd` is what the key pays, `cost_nano_usd` what it cost here (measured) or upstream (billed).
    `feature` and `end_user` are the client's own words for where the call comes from and for whom.
    """

    request_id: str
    attempt: int
    kind: EntryKind
    at_s: float
    key_id: str
    project: str
    feature: str = ""
    end_user: str = ""
    model: str
    deployment: str
    tier: Tier
    finish: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    nanoseconds: int
    nanojoules: int
    cost_nano_usd: int
    price_nano_usd: int
