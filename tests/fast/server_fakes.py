"""Stand-ins for what runs behind a server, for tests of those who watch it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenmill.core import StorageError, Tier
from tokenmill.engine.counts import EngineCounts
from tokenmill.engine.serving.async_engine import EngineStats
from tokenmill.router import BackendState, BreakerState
from tokenmill.server.fleet import Deployed
from tokenmill.store import Budget, Key, LedgerQuery, LedgerSum, SumBy

__all__ = ["FakeBooks", "FakeGateway", "deployment", "key", "line", "stats"]


def stats(**more: Any) -> EngineStats:
    """An engine that is idle, but for what is said."""
    values: dict[str, Any] = {
        **{"state": "ready", "pid": 1, "num_in_flight": 0, "num_ended": {}, "num_restarts": 0},
        **{"num_resubmitted": 0, "failure": "", "num_steps": 0, "num_waiting": 0, "num_running": 0},
        **{"running_by_tier": {}, "waiting_by_tier": {}, "counts": EngineCounts()},
        **{"num_blocks": 100, "num_blocks_in_use": 0, "busy_ns": 0, "idle_ns": 0, "busy_nj": 0},
    }
    return EngineStats(**{**values, **more})


def deployment(
    name: str = "mock",
    *,
    state: BackendState = "ready",
    breaker: BreakerState = "closed",
    is_local: bool = True,
    **more: Any,
) -> Deployed:
    """A deployment in this state."""
    return Deployed(
        name=name,
        model="mock",
        is_local=is_local,
        state=lambda: state,
        breaker=lambda: breaker,
        stats=(lambda: stats(**more)) if is_local else None,
    )


@dataclass
class FakeAnswer:
    """A call that is being answered."""

    tier: Tier
    ttft_s: float | None


@dataclass
class FakeGateway:
    """As much of a gateway as is watched."""

    num_calls: int = 0
    num_unsettled: int = 0
    is_draining: bool = False
    models: tuple[str, ...] = ("mock",)
    answers: list[FakeAnswer] = field(default_factory=list)


@dataclass
class FakeBooks:
    """A ledger of these sums; it counts how often it is read."""

    lines: Sequence[LedgerSum] = ()
    all_keys: Sequence[Key] = ()
    is_broken: bool = False
    num_reads: int = 0
    since_s: float = -1.0

    async def sums(self, query: LedgerQuery, by: Sequence[SumBy]) -> list[LedgerSum]:
        self.num_reads += 1
        self.since_s = query.since_s
        if self.is_broken:
            raise StorageError("the disk is full", hint="make room")
        return list(self.lines)

    async def keys(self) -> list[Key]:
        return list(self.all_keys)


def key(name: str = "key_1", *, nano_usd: int | None = None, **more: Any) -> Key:
    """A key, with a budget if one is given."""
    budget = None if nano_usd is None else Budget(nano_usd=nano_usd)
    return Key(id=name, name=name, project="p", budget=budget, created_s=0.0, **more)


def line(group: tuple[str, ...] = ("key_1", "mock"), **more: int) -> LedgerSum:
    """A sum of the ledger: two calls of 1,000 tokens in (400 cached), 500 out."""
    values = {
        **{"num_entries": 2, "num_prompt_tokens": 1000, "num_cached_tokens": 400, "num_output_tokens": 500},
        **{"nanoseconds": 0, "nanojoules": 0, "cost_nano_usd": 1_000_000, "price_nano_usd": 3_000_000},
    }
    return LedgerSum(group=group, **{**values, **more})
