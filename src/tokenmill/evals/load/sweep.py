"""Several loads on one target: a list of levels, or a search for the highest that keeps a service level.

A level is a rate, a concurrency or a recorded trace. Each gets prompts of its own, so that no level finds
the one before in the prefix cache.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokenmill.core import UsageError
from tokenmill.evals.load.arrivals import ArrivalKind, ClosedLoop, OpenLoop, at_rate
from tokenmill.evals.load.driver import DriveConfig, LoadRun, ProgressCallback, drive
from tokenmill.evals.load.summary import Slo, Summary, summarize
from tokenmill.evals.load.target import LoadRequest, Target
from tokenmill.evals.load.traces import Call, replayed

__all__ = ["Level", "LevelKind", "LevelResult", "Source", "find_highest", "run_level"]

LevelKind: TypeAlias = Literal["rate", "concurrency", "trace"]

Source: TypeAlias = Callable[[int], Sequence[LoadRequest]]
"""The requests of the level with this number."""

_MAX_RUNS = 12
_CLOSE = 1.1


@dataclass(frozen=True, kw_only=True)
class Level:
    """A load: requests a second, requests at a time, or a trace's own times at a multiple of their speed."""

    kind: LevelKind
    value: float
    arrivals: ArrivalKind = "poisson"
    calls: tuple[Call, ...] = ()

    def __str__(self) -> str:
        if self.kind == "rate":
            return f"{self.value:.3g}/s"
        return f"{self.value:g} at once" if self.kind == "concurrency" else f"trace x{self.value:g}"

    def schedule(self, num_requests: int, seed: int) -> OpenLoop | ClosedLoop:
        """When its requests are sent."""
        if self.kind == "concurrency":
            return ClosedLoop(concurrency=round(self.value))
        if self.kind == "trace":
            return OpenLoop(times_s=replayed(self.calls, self.value)[:num_requests])
        return OpenLoop(times_s=at_rate(self.value, num_requests, kind=self.arrivals, seed=seed))


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """A level, its figures, and the samples that they are made of."""

    level: Level
    summary: Summary
    run: LoadRun


async def run_level(
    target: Target,
    requests: Sequence[LoadRequest],
    level: Level,
    config: DriveConfig,
    *,
    slo: Slo | None = None,
    seed: int = 0,
    stop: asyncio.Event | None = None,
    on_progress: ProgressCallback | None = None,
) -> LevelResult:
    """One load, and its figures."""
    arrivals = level.schedule(len(requests), seed)
    run = await drive(target, requests, arrivals, config, stop=stop, on_progress=on_progress)
    return LevelResult(level=level, summary=summarize(run, slo), run=run)


async def find_highest(
    keeps: Callable[[float], Awaitable[bool]], start: float, *, whole: bool, is_stopped: Callable[[], bool]
) -> float | None:
    """The highest value that keeps its promise, to a tenth, within twelve runs; None if none did.

    It doubles from `start`, or halves, until it has a value on either side, and then goes to their
    geometric mean. `whole` values are at least 1. What is measured is noisy, so the answer is too: see the
    intervals of its run.
    """
    if start <= 0:
        raise UsageError(f"the search starts at {start}", hint="use a value above 0")
    good: float | None = None
    bad: float | None = None
    value = start
    for _ in range(_MAX_RUNS):
        is_good = await keeps(value)
        if is_stopped():
            return good
        good, bad = (value, bad) if is_good else (good, value)
        value = _next(good, bad, whole)
        if value in (good, bad) or (good is not None and bad is not None and bad / good <= _CLOSE):
            break
    return good


def _next(good: float | None, bad: float | None, whole: bool) -> float:
    """Where to look next; a known value if there is nothing between."""
    if bad is None:
        assert good is not None
        return 2 * good
    value = bad / 2 if good is None else math.sqrt(good * bad)
    return max(1.0, float(math.floor(value))) if whole else value
