"""An estimate with the range that the data leave open, and the distributions that ranges are made of.

Binomial tails are sums of their terms, so numpy and the standard library are enough.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.core import UsageError

__all__ = ["Interval", "binomial_tail", "bisect", "check_confidence", "normal_quantile", "normal_tail"]

_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided interval. An end is infinite where the data set no bound; a NaN estimate is undefined.

    `method` names how it was made, `note` says in words what a reader must know about it, mostly nothing.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    method: str
    note: str = ""

    def map(self, scale: float, shift: float) -> "Interval":
        """The interval of `scale * x + shift`; `scale` is positive."""
        return Interval(
            estimate=scale * self.estimate + shift,
            low=scale * self.low + shift,
            high=scale * self.high + shift,
            confidence=self.confidence,
            method=self.method,
            note=self.note,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it: what is infinite or undefined becomes null."""
        fields: dict[str, Any] = {
            name: value if math.isfinite(value) else None
            for name, value in (("estimate", self.estimate), ("low", self.low), ("high", self.high))
        }
        fields |= {"confidence": self.confidence, "method": self.method}
        return fields | ({"note": self.note} if self.note else {})


def check_confidence(confidence: float) -> float:
    """The confidence, if it is one. Raises UsageError."""
    if not 0.5 <= confidence < 1:
        raise UsageError(f"a confidence of {confidence:g} means nothing", hint="give a number such as 0.95")
    return confidence


def normal_quantile(probability: float) -> float:
    """The point below which a standard normal lies with this probability."""
    return _NORMAL.inv_cdf(probability)


def normal_tail(point: float) -> float:
    """How probable it is that a standard normal is at least `point`."""
    return 0.5 * math.erfc(point / math.sqrt(2))


@lru_cache(maxsize=4096)
def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """P(X >= successes) for X binomial. The smaller tail is summed, so both keep their digits."""
    if successes <= 0:
        return 1.0
    if successes > trials or probability <= 0:
        return 0.0
    if probability >= 1:
        return 1.0
    if successes > trials * probability:
        return float(_terms(successes, trials, probability).sum())
    return 1.0 - float(_terms(trials - successes + 1, trials, 1.0 - probability).sum())


def _terms(first: int, trials: int, probability: float) -> NDArray[np.float64]:
    """P(X = first), P(X = first + 1) ... P(X = trials)."""
    rest = math.lgamma(trials + 1) - math.lgamma(first + 1) - math.lgamma(trials - first + 1)
    start = rest + first * math.log(probability) + (trials - first) * math.log1p(-probability)
    steps = np.arange(first, trials, dtype=np.float64)
    ratios = np.log((trials - steps) / (steps + 1)) + math.log(probability) - math.log1p(-probability)
    logs: NDArray[np.float64] = np.exp(start + np.concatenate([[0.0], np.cumsum(ratios)]))
    return logs


def bisect(is_below: Callable[[float], bool], low: float, high: float, *, num_steps: int = 60) -> float:
    """Where `is_below` turns from true to false between two points."""
    for _ in range(num_steps):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return 0.5 * (low + high)
