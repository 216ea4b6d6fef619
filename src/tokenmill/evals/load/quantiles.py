"""Distributions of raw samples: p50, p90, p99, with intervals that assume nothing about their shape.

A quantile is interpolated between order statistics (the seventh definition of Hyndman and Fan, numpy's
default, as vLLM's and AIPerf's tables have it). Its interval lies between two order statistics and is exact
for independent samples. Requests that queue behind each other are not independent, so under overload it is
too narrow: runs apart tell. Gaps between tokens of one answer are still less so; for these, answers are
drawn again as a whole (bootstrap).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenmill.evals.statistics import quantile_interval

__all__ = ["Distribution", "Quantile", "grouped_distribution", "simple_distribution"]

_LEVELS = (0.5, 0.9, 0.99)
_TAILS = (0.025, 0.975)
_NUM_RESAMPLES = 200

_Floats = npt.NDArray[np.float64]


class Quantile(NamedTuple):
    """A quantile and its 95 % interval; None where so few samples bound it on no side."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """`n` samples: mean, extremes, and p50, p90, p99."""

    n: int
    mean: float
    lowest: float
    highest: float
    p50: Quantile
    p90: Quantile
    p99: Quantile


def simple_distribution(values: Sequence[float]) -> Distribution | None:
    """Of samples taken as independent; None of none."""
    ordered = np.sort(np.asarray(values, float))
    if not len(ordered):
        return None
    intervals = [quantile_interval(ordered, level) for level in _LEVELS]
    return _distribution(ordered, [(_finite(each.low), _finite(each.high)) for each in intervals])


def grouped_distribution(groups: Sequence[Sequence[float]], seed: int = 0) -> Distribution | None:
    """Of samples that belong together in groups; intervals by drawing groups again, 200 times."""
    groups = [group for group in groups if len(group)]
    if not groups:
        return None
    values = np.concatenate([np.asarray(group, float) for group in groups])
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    if len(groups) < 2:
        return _distribution(ordered, [(None, None)] * len(_LEVELS))
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])[order]
    rng = np.random.default_rng(seed)
    drawn = [_redrawn(ordered, owner, len(groups), rng) for _ in range(_NUM_RESAMPLES)]
    lows, highs = np.quantile(np.array(drawn), _TAILS, axis=0)
    return _distribution(ordered, list(zip(lows.tolist(), highs.tolist(), strict=True)))


def _redrawn(
    ordered: _Floats, owner: npt.NDArray[np.int_], num_groups: int, rng: np.random.Generator
) -> _Floats:
    """The quantiles when groups are drawn with replacement."""
    weights = np.bincount(rng.integers(0, num_groups, num_groups), minlength=num_groups)[owner]
    total = np.cumsum(weights)
    places = np.searchsorted(total, np.array(_LEVELS) * total[-1])
    return np.asarray(ordered[np.minimum(places, len(ordered) - 1)], float)


def _distribution(ordered: _Floats, intervals: Sequence[tuple[float | None, float | None]]) -> Distribution:
    points = np.quantile(ordered, _LEVELS).tolist()
    p50, p90, p99 = (_quantile(at, *ends) for at, ends in zip(points, intervals, strict=True))
    return Distribution(
        n=len(ordered),
        mean=float(ordered.mean()),
        lowest=float(ordered[0]),
        highest=float(ordered[-1]),
        p50=p50,
        p90=p90,
        p99=p99,
    )


def _quantile(value: float, low: float | None, high: float | None) -> Quantile:
    """With the value inside: interpolation can put it just outside of few order statistics."""
    return Quantile(
        value, None if low is None else min(low, value), None if high is None else max(high, value)
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
