"""Intervals of a share and of a quantile: what counting alone proves, whatever the distribution.

Wilson's is short and right on average over the unknown share; the exact one of Clopper and Pearson never
covers less than it says and is longer. Means of other figures are `bootstrap`'s.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenmill.core import UsageError
from tokenmill.evals.statistics.interval import (
    Interval,
    binomial_tail,
    bisect,
    check_confidence,
    normal_quantile,
)

__all__ = ["exact_interval", "quantile_interval", "wilson_interval"]


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """The score interval of a share (Wilson 1927). Without trials it is [0, 1]."""
    _check_counts(successes, trials)
    if trials == 0:
        return Interval(estimate=math.nan, low=0.0, high=1.0, confidence=confidence, method="wilson")
    square = normal_quantile(0.5 + check_confidence(confidence) / 2) ** 2
    share = successes / trials
    centre = (successes + square / 2) / (trials + square)
    half = math.sqrt(square * (share * (1 - share) * trials + square / 4)) / (trials + square)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(estimate=share, low=low, high=high, confidence=confidence, method="wilson")


def exact_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """The interval of a share that covers at least as often as it says (Clopper and Pearson 1934)."""
    _check_counts(successes, trials)
    each = (1 - check_confidence(confidence)) / 2
    low, high = 0.0, 1.0
    if successes > 0:
        low = bisect(lambda p: binomial_tail(successes, trials, p) < each, 0.0, successes / trials)
    if successes < trials:
        high = bisect(lambda p: 1 - binomial_tail(successes + 1, trials, p) > each, successes / trials, 1.0)
    share = successes / trials if trials else math.nan
    return Interval(estimate=share, low=low, high=high, confidence=confidence, method="clopper-pearson")


def quantile_interval(
    values: Sequence[float] | NDArray[np.float64], quantile: float, *, confidence: float = 0.95
) -> Interval:
    """The interval of a quantile, such as p99, between two of the sorted values; no distribution is assumed.

    The estimate is the smallest value with at least that share at or below it. An end is infinite where the
    values are too few: a p99 has an upper end from 368 values at 95 %. Raises UsageError without values.
    """
    each = (1 - check_confidence(confidence)) / 2
    sorted_N = np.sort(np.asarray(values, np.float64))
    num = len(sorted_N)
    if num == 0 or not 0 < quantile < 1:
        raise UsageError(
            f"no quantile {quantile:g} of {num} values", hint="give values, and 0 < quantile < 1"
        )
    # P(the r-th smallest <= the quantile) = P(at least r of n lie below it) = binomial_tail(r, n, quantile).
    low_rank = _last_rank(num, quantile, 1 - each)
    high_rank = _last_rank(num, quantile, each) + 1
    rank = min(num, max(1, math.ceil(quantile * num - 1e-9)))
    low = float(sorted_N[low_rank - 1]) if low_rank else -math.inf
    high = float(sorted_N[high_rank - 1]) if high_rank <= num else math.inf
    need = math.ceil(math.log(each) / math.log(quantile))
    note = "" if high_rank <= num else f"no upper end: {num} values, {need} are needed"
    return Interval(
        estimate=float(sorted_N[rank - 1]),
        low=low,
        high=high,
        confidence=confidence,
        method="order statistics",
        note=note,
    )


def _last_rank(num: int, quantile: float, probability: float) -> int:
    """The largest rank in 0..num that the quantile reaches with more than this probability."""
    low, high = 0, num + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if binomial_tail(middle, num, quantile) > probability else (low, middle)
    return low


def _check_counts(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials:
        raise UsageError(f"{successes} of {trials} is no share", hint="give 0 <= successes <= trials")
