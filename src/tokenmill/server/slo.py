"""Objectives of the service, and how fast the room for failures that they leave is used up.

An objective says what share of calls must be good: answered at all, or answered within a time. Its burn rate
over a window is the share of bad calls divided by the share that may be bad: 1 uses the room up exactly, 14
over an hour is a fire. Every call is judged by its own times, not by buckets of a histogram; what is kept is
the number of good and bad calls in each `SLOT_S` seconds, so memory is bounded whatever the load.

A call that its client gave up is neither good nor bad. A call that was refused (a key's limit, a budget, a
full server) is none: refusals are counted with the HTTP answers.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from tokenmill.core import FinishReason, Tier, UsageError

__all__ = [
    "SLOT_S",
    "WINDOWS_S",
    "Burn",
    "CallTimes",
    "SloConfig",
    "SloMeasure",
    "SloObjective",
    "SloTracker",
]

SLOT_S: Final = 10
"""Resolution of the windows, in seconds."""
WINDOWS_S: Final = (300, 3600, 21600)
"""Five minutes, one hour, six hours: the windows that alerts on burn rates commonly use."""

SloMeasure: TypeAlias = Literal["ttft", "tpot", "e2e", "availability"]
"""Time to the first token; mean time of each token after it; of the whole answer; whether there was one."""

_NUM_SLOTS: Final = max(WINDOWS_S) // SLOT_S
_TIMED: Final[tuple[SloMeasure, ...]] = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, kw_only=True)
class SloObjective:
    """What one model (empty: each) promises in one tier (None: in all of them).

    `percentile` of its calls have their first token within `ttft_ms`, a token each `tpot_ms` after that (the
    mean of a call), and their last within `e2e_ms`; `availability` per cent are answered.
    """

    model: str = ""
    tier: Tier | None = None
    percentile: float = 99.0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    availability: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1e8:
                raise UsageError(f"{name} is {value}", hint="use milliseconds above 0")
        for name in ("percentile", "availability"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 100.0:
                raise UsageError(f"{name} is {value}", hint="use per cent above 0 and below 100, like 99.9")
        if not any(self.limit(measure) for measure in (*_TIMED, "availability")):
            raise UsageError(
                "an objective promises nothing", hint="give ttft_ms, tpot_ms, e2e_ms or availability"
            )

    def limit(self, measure: str) -> float | None:
        """Milliseconds that a measure may have, or per cent of calls that must be answered."""
        limits = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2e": self.e2e_ms}
        return limits.get(measure, self.availability)


@dataclass(frozen=True, kw_only=True)
class SloConfig:
    """All objectives. A call counts for each whose model and tier it has."""

    objectives: tuple[SloObjective, ...] = ()

    def edges_s(self, measure: SloMeasure) -> tuple[float, ...]:
        """The limits of a measure in seconds: edges that a histogram of it should have."""
        limits = (objective.limit(measure) for objective in self.objectives)
        return tuple(sorted({limit / 1000.0 for limit in limits if limit is not None}))


class CallTimes(NamedTuple):
    """How a call went: seconds to its first token and to its last, None without one, and tokens it gave."""

    model: str
    tier: Tier
    finish: FinishReason
    ttft_s: float | None
    total_s: float
    num_output_tokens: int

    @property
    def is_given_up(self) -> bool:
        """Whether its client left."""
        return self.finish == "cancelled"

    @property
    def is_answered(self) -> bool:
        """Whether there is an answer, whole or cut where it was asked to be."""
        return self.finish in ("completed", "stopped", "length")

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of each token after the first; None for fewer than two."""
        if self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return max(0.0, self.total_s - self.ttft_s) / (self.num_output_tokens - 1)


class Burn(NamedTuple):
    """One objective of one measure: burn rate and calls by window; None where there was no call."""

    objective: SloObjective
    measure: SloMeasure
    rates: tuple[float | None, ...]
    num_calls: tuple[int, ...]

    @property
    def name(self) -> str:
        """What is promised, in words: `ttft <= 500 ms for 99 %`."""
        limit = self.objective.limit(self.measure)
        if self.measure == "availability":
            return f"answered for {limit:g} %"
        return f"{self.measure} <= {limit:g} ms for {self.objective.percentile:g} %"


class _Slot:
    """Calls of `SLOT_S` seconds."""

    __slots__ = ("at", "num_bad", "num_good")

    def __init__(self, at: int) -> None:
        self.at = at
        self.num_good = 0
        self.num_bad = 0


class _Account:
    """Good and bad calls of one measure of one objective."""

    def __init__(self, objective: SloObjective, measure: SloMeasure) -> None:
        self.objective = objective
        self.measure: SloMeasure = measure
        self._slots: deque[_Slot] = deque(maxlen=_NUM_SLOTS + 1)
        share = objective.availability if measure == "availability" else objective.percentile
        assert share is not None
        self._room = 1.0 - share / 100.0

    def add(self, call: CallTimes, slot: int) -> None:
        is_good = self._is_good(call)
        if is_good is None:
            return
        if not self._slots or self._slots[-1].at < slot:
            self._slots.append(_Slot(slot))
        last = self._slots[-1]
        last.num_good += is_good
        last.num_bad += not is_good

    def _is_good(self, call: CallTimes) -> bool | None:
        """None: the call says nothing about it."""
        if self.measure == "availability":
            return call.is_answered
        if not call.is_answered:
            return None
        value = {"ttft": call.ttft_s, "tpot": call.tpot_s, "e2e": call.total_s}[self.measure]
        limit = self.objective.limit(self.measure)
        assert limit is not None
        return None if value is None else value * 1000.0 <= limit

    def burn(self, slot: int) -> Burn:
        counts = [self._count(slot - window // SLOT_S) for window in WINDOWS_S]
        rates = tuple(bad / (good + bad) / self._room if good + bad else None for good, bad in counts)
        return Burn(self.objective, self.measure, rates, tuple(good + bad for good, bad in counts))

    def _count(self, after: int) -> tuple[int, int]:
        good = bad = 0
        for slot in reversed(self._slots):
            if slot.at <= after:
                break
            good += slot.num_good
            bad += slot.num_bad
        return good, bad


class SloTracker:
    """Judges calls as they end. Points in time are monotonic seconds; it belongs to one event loop."""

    def __init__(self, config: SloConfig) -> None:
        self._accounts = tuple(_accounts(config.objectives))

    def add(self, call: CallTimes, now_s: float) -> None:
        """Count a call that has ended."""
        if call.is_given_up:
            return
        for account in self._accounts:
            wanted = account.objective
            if wanted.model in ("", call.model) and wanted.tier in (None, call.tier):
                account.add(call, int(now_s // SLOT_S))

    def burns(self, now_s: float) -> list[Burn]:
        """Burn rates of all objectives over `WINDOWS_S`, to `SLOT_S` seconds."""
        return [account.burn(int(now_s // SLOT_S)) for account in self._accounts]


def _accounts(objectives: Sequence[SloObjective]) -> Iterator[_Account]:
    """One for each promise; what is promised twice is counted once."""
    measures: tuple[SloMeasure, ...] = (*_TIMED, "availability")
    seen = set()
    for objective in objectives:
        for measure in measures:
            limit = objective.limit(measure)
            promise = (objective.model, objective.tier, measure, limit, objective.percentile)
            if limit is not None and promise not in seen:
                seen.add(promise)
                yield _Account(objective, measure)
