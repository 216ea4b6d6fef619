"""The noise floor: how far a system is from itself when the same items are asked again.

Sampling, batching and an endpoint's own changes flip answers. A difference between two systems that is no
larger than that says nothing about either.
"""

from typing import NamedTuple

import numpy as np

from tokenmill.core import UsageError
from tokenmill.evals.statistics.bootstrap import Values, mean_interval
from tokenmill.evals.statistics.interval import Interval

__all__ = ["NoiseFloor", "noise_floor"]


class NoiseFloor(NamedTuple):
    """`flips` is the share of items whose figure changed; `size` the mean of how far, both with intervals."""

    flips: Interval
    size: Interval


def noise_floor(first: Values, second: Values, *, confidence: float = 0.95) -> NoiseFloor:
    """Of two runs of the same system on the same items in the same order. Raises UsageError."""
    first_N, second_N = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first_N.shape != second_N.shape or not len(first_N):
        raise UsageError(
            f"{len(first_N)} and {len(second_N)} items cannot be paired",
            hint="give two runs of the same items",
        )
    distance_N = np.abs(first_N - second_N)
    return NoiseFloor(
        flips=mean_interval((distance_N > 0).astype(np.float64), confidence=confidence),
        size=mean_interval(distance_N, confidence=confidence),
    )
