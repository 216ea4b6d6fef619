"""Intervals of a mean, and of a ratio of means, from the items themselves: resampled, studentised, seeded.

Items of one cluster (a conversation, a document) stay together. Each resample is measured in its own
standard errors (the bootstrap-t of Efron, second-order right where the percentile one is not, Hall 1992),
which matters for one-sided bounds of skewed figures.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenmill.core import UsageError
from tokenmill.evals.statistics.interval import Interval, check_confidence
from tokenmill.evals.statistics.proportions import wilson_interval

__all__ = ["NUM_RESAMPLES", "MeanBootstrap", "Values", "cluster_sums", "mean_interval"]

NUM_RESAMPLES: Final = 10_000
_MAX_CELLS: Final = 1 << 17
_ROUNDING: Final = 1e-12
"""Rounding leaves this share of the squares as a trace of a spread that is none."""

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class MeanBootstrap:
    """The mean of items in clusters, with its resamples.

    `sums_G` and `sizes_G` are each cluster's total and number of items; the mean is the total of one over the
    total of the other. `studentised_B` are the resamples' distances from it in their own standard errors,
    sorted.
    """

    sums_G: NDArray[np.float64]
    sizes_G: NDArray[np.float64]
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES

    @staticmethod
    def of(
        values: Values,
        clusters: Sequence[Hashable] | None = None,
        *,
        seed: int = 0,
        num_resamples: int = NUM_RESAMPLES,
    ) -> "MeanBootstrap":
        """Of values, each its own cluster unless `clusters` says which. Raises UsageError without values."""
        values_N = np.asarray(values, np.float64)
        if values_N.ndim != 1 or len(values_N) == 0 or not np.isfinite(values_N).all():
            raise UsageError("a mean needs finite values", hint="give at least one, and no NaN")
        if clusters is None:
            return MeanBootstrap(values_N, np.ones(len(values_N)), seed, num_resamples)
        if len(clusters) != len(values_N):
            raise UsageError(
                f"{len(values_N)} values, {len(clusters)} clusters", hint="give one for each value"
            )
        sizes_G = cluster_sums(np.ones(len(values_N)), clusters)
        return MeanBootstrap(cluster_sums(values_N, clusters), sizes_G, seed, num_resamples)

    @property
    def num_items(self) -> int:
        """Items in all clusters."""
        return int(self.sizes_G.sum())

    @property
    def num_units(self) -> int:
        """Clusters."""
        return len(self.sums_G)

    @property
    def variance(self) -> float:
        """What one cluster adds to the uncertainty: the squared standard error times the clusters."""
        return self.standard_error**2 * self.num_units

    @property
    def mean(self) -> float:
        """The mean of all items."""
        return float(self.sums_G.sum() / self.sizes_G.sum())

    @property
    def standard_error(self) -> float:
        """Of the mean, from the spread between clusters; infinite for one cluster."""
        num = len(self.sums_G)
        if num < 2:
            return math.inf
        spread = float(((self.sums_G - self.mean * self.sizes_G) ** 2).sum())
        if spread <= _ROUNDING * float((self.sums_G**2).sum()):
            return 0.0
        return float(math.sqrt(num / (num - 1) * spread) / self.sizes_G.sum())

    @cached_property
    def studentised_B(self) -> NDArray[np.float64]:
        """Sorted. A resample without spread counts as infinitely far on its side, on both if it has none."""
        rng = np.random.default_rng(self.seed)
        num = len(self.sums_G)
        chunk = max(1, _MAX_CELLS // num)
        parts = [
            _studentised(rng, self.sums_G, self.sizes_G, min(chunk, self.num_resamples - at), self.mean)
            for at in range(0, self.num_resamples, chunk)
        ]
        return np.sort(np.concatenate(parts))

    def lower(self, alpha: float) -> float:
        """The mean is below this with probability `alpha` at most (one-sided)."""
        return self._moved(self._quantile(1 - alpha))

    def upper(self, alpha: float) -> float:
        """The mean is above this with probability `alpha` at most (one-sided)."""
        return self._moved(self._quantile(alpha))

    def p_above(self, value: float) -> float:
        """One-sided p-value of the claim that the mean is more than `value`."""
        return self._p_value(value, 1)

    def p_below(self, value: float) -> float:
        """One-sided p-value of the claim that the mean is less than `value`."""
        return self._p_value(value, -1)

    def interval(self, confidence: float) -> Interval:
        """The two-sided interval."""
        each = (1 - check_confidence(confidence)) / 2
        method = "bootstrap-t" if self.num_items == self.num_units else "cluster bootstrap-t"
        note = "all values are equal: the interval says nothing" if self.standard_error == 0 else ""
        return Interval(
            estimate=self.mean,
            low=self.lower(each),
            high=self.upper(each),
            confidence=confidence,
            method=method,
            note=note or ("one value says nothing about the spread" if self.num_units < 2 else ""),
        )

    def _moved(self, quantile: float) -> float:
        error = self.standard_error
        return self.mean if error == 0 or quantile == 0 else self.mean - quantile * error

    def _quantile(self, probability: float) -> float:
        """Of the studentised distances, the conservative order statistic of (B + 1) p."""
        position = probability * (self.num_resamples + 1)
        if probability > 0.5:
            rank = math.ceil(position - 1e-9)
            return float(self.studentised_B[rank - 1]) if rank <= self.num_resamples else math.inf
        rank = math.floor(position + 1e-9)
        return float(self.studentised_B[rank - 1]) if rank >= 1 else -math.inf

    def _p_value(self, value: float, sign: int) -> float:
        error = self.standard_error
        if math.isinf(error) or sign * (self.mean - value) <= 0:
            return 1.0
        if error == 0:
            return 1 / (1 + self.num_resamples)
        seen = sign * (self.mean - value) / error
        distances_B = self.studentised_B if sign > 0 else -self.studentised_B[::-1]
        num_beyond = self.num_resamples - int(np.searchsorted(distances_B, seen, side="left"))
        return (1 + num_beyond) / (1 + self.num_resamples)


def cluster_sums(values_N: NDArray[np.float64], clusters: Sequence[Hashable]) -> NDArray[np.float64]:
    """The total of each cluster, in the order in which they first appear."""
    places: dict[Hashable, int] = {}
    group_N = np.array([places.setdefault(cluster, len(places)) for cluster in clusters])
    return np.bincount(group_N, weights=values_N).astype(np.float64)


def _studentised(
    rng: np.random.Generator,
    sums_G: NDArray[np.float64],
    sizes_G: NDArray[np.float64],
    num: int,
    mean: float,
) -> NDArray[np.float64]:
    """Distances of `num` resampled means from the mean, in their own standard errors."""
    num_clusters = len(sums_G)
    drawn_BG = rng.integers(0, num_clusters, size=(num, num_clusters))
    sums_BG, sizes_BG = sums_G[drawn_BG], sizes_G[drawn_BG]
    size_B = sizes_BG.sum(axis=1)
    mean_B = sums_BG.sum(axis=1) / size_B
    square_B = np.einsum("bg,bg->b", sums_BG, sums_BG)
    sums_BG -= mean_B[:, None] * sizes_BG
    spread_B = np.einsum("bg,bg->b", sums_BG, sums_BG)
    spread_B[spread_B <= _ROUNDING * square_B] = 0.0
    error_B = np.sqrt(num_clusters / max(1, num_clusters - 1) * spread_B) / size_B
    with np.errstate(divide="ignore", invalid="ignore"):
        distance_B: NDArray[np.float64] = (mean_B - mean) / error_B
    lost_B = np.isnan(distance_B)
    # Both tails must stay as heavy as they can be.
    distance_B[lost_B] = np.where(np.arange(num)[lost_B] % 2 == 0, np.inf, -np.inf)
    return distance_B


def mean_interval(
    values: Values,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """The interval of a mean: Wilson's where every value is 0 or 1 and alone, else the bootstrap's.

    `bounds` are what the figure itself cannot leave, such as (0, 1). Raises UsageError without values.
    """
    values_N = np.asarray(values, np.float64)
    if clusters is None and len(values_N) and np.isin(values_N, (0.0, 1.0)).all():
        return wilson_interval(int(values_N.sum()), len(values_N), confidence=confidence)
    items = MeanBootstrap.of(values_N, clusters, seed=seed, num_resamples=num_resamples)
    found = items.interval(confidence)
    return replace(found, low=max(bounds[0], found.low), high=min(bounds[1], found.high))
