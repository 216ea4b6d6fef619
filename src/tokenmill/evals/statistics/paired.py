"""Two systems on the same items: how the difference of right and wrong answers is tested.

Only items on which exactly one is right tell anything about the difference. The test of a difference other
than zero is exact: Tango's score (1998) orders the outcomes, and the probability of what is at least as far
is summed under the least favourable share of disagreement, within its confidence set (Berger and Boos 1994).
Differences that are not -1, 0 or 1, and items in clusters, are `MeanBootstrap`'s.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.core import UsageError
from tokenmill.evals.statistics.bootstrap import NUM_RESAMPLES, MeanBootstrap, Values
from tokenmill.evals.statistics.interval import (
    Interval,
    binomial_tail,
    bisect,
    check_confidence,
    normal_quantile,
    normal_tail,
)
from tokenmill.evals.statistics.proportions import exact_interval

__all__ = ["Difference", "McNemar", "PairedCounts", "constrained_share", "mcnemar", "paired"]

_MAX_EXACT: Final = 4000
"""Disagreements up to which the sum is taken; beyond, the normal approximation of the score is as good."""
_NUM_POINTS: Final = 24
_LEFT_OUT: Final = 1e-5
"""Probability of the shares of disagreement that are not tried; it is added to the p-value."""


class Difference(Protocol):
    """A mean difference, candidate less incumbent, as evidence."""

    @property
    def mean(self) -> float:
        """The difference of the means."""

    @property
    def num_items(self) -> int:
        """Items that both answered."""

    @property
    def num_units(self) -> int:
        """Items, or clusters of items, that are independent."""

    @property
    def variance(self) -> float:
        """Of one unit: the squared standard error of the mean times `num_units`."""

    def p_above(self, value: float) -> float:
        """One-sided p-value of the claim that the true difference is more than `value`."""

    def p_below(self, value: float) -> float:
        """One-sided p-value of the claim that it is less."""

    def lower(self, alpha: float) -> float:
        """What it is not below, but for a probability of `alpha`."""

    def upper(self, alpha: float) -> float:
        """What it is not above, but for a probability of `alpha`."""

    def interval(self, confidence: float) -> Interval:
        """The two-sided interval, for reading; a decision is `p_above`'s and `p_below`'s."""


class McNemar(NamedTuple):
    """Two-sided p-values of "neither is better" (McNemar 1947): exact, and mid-p (Lancaster 1961)."""

    exact: float
    mid: float


def mcnemar(wins: int, losses: int) -> McNemar:
    """From the items that only the candidate and that only the incumbent has right."""
    if wins < 0 or losses < 0:
        raise UsageError(f"{wins} and {losses} are no counts", hint="give counts of at least 0")
    num, most = wins + losses, max(wins, losses)
    if wins == losses:
        return McNemar(1.0, 1.0)
    tail = binomial_tail(most, num, 0.5)
    return McNemar(min(1.0, 2 * tail), tail + binomial_tail(most + 1, num, 0.5))


@dataclass(frozen=True)
class PairedCounts:
    """Items that only the candidate has right, that only the incumbent has right, and all items."""

    wins: int
    losses: int
    num_items: int

    def __post_init__(self) -> None:
        if min(self.wins, self.losses) < 0 or self.wins + self.losses > self.num_items or not self.num_items:
            raise UsageError(
                f"{self.wins} wins and {self.losses} losses of {self.num_items} items cannot be",
                hint="give counts of items that were answered by both",
            )

    @property
    def num_units(self) -> int:
        """Every item is independent of the others."""
        return self.num_items

    @property
    def mean(self) -> float:
        """The difference of the shares that are right."""
        return (self.wins - self.losses) / self.num_items

    @property
    def variance(self) -> float:
        """Of one item's difference."""
        return (self.wins + self.losses) / self.num_items - self.mean**2

    def p_above(self, value: float) -> float:
        """As `Difference`."""
        return _p_above(self.wins, self.losses, self.num_items, value)

    def p_below(self, value: float) -> float:
        """As `Difference`."""
        return _p_above(self.losses, self.wins, self.num_items, -value)

    def lower(self, alpha: float) -> float:
        """As `Difference`."""
        return bisect(lambda value: self.p_above(value) <= alpha, -1.0, self.mean, num_steps=16)

    def upper(self, alpha: float) -> float:
        """As `Difference`."""
        return bisect(lambda value: self.p_below(value) > alpha, self.mean, 1.0, num_steps=16)

    def interval(self, confidence: float) -> Interval:
        """Tango's score interval."""
        point = normal_quantile(0.5 + check_confidence(confidence) / 2)

        def score(value: float) -> float:
            return _score_of(self.wins, self.losses, self.num_items, value)

        low = -1.0 if self.mean == -1 else bisect(lambda value: score(value) > point, -1.0, self.mean)
        high = 1.0 if self.mean == 1 else bisect(lambda value: score(value) > -point, self.mean, 1.0)
        return Interval(estimate=self.mean, low=low, high=high, confidence=confidence, method="tango score")


def paired(
    candidate: Values,
    incumbent: Values,
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Difference:
    """The difference of two systems on the same items in the same order, by the test that fits.

    Raises UsageError if the two have not as many finite figures.
    """
    candidate_N, incumbent_N = np.asarray(candidate, np.float64), np.asarray(incumbent, np.float64)
    if candidate_N.shape != incumbent_N.shape:
        raise UsageError(
            f"{len(candidate_N)} and {len(incumbent_N)} items cannot be paired",
            hint="give both systems' figures of the same items",
        )
    difference_N = candidate_N - incumbent_N
    is_binary = np.isin(candidate_N, (0.0, 1.0)).all() and np.isin(incumbent_N, (0.0, 1.0)).all()
    if clusters is None and is_binary and len(difference_N):
        wins, losses = int((difference_N > 0).sum()), int((difference_N < 0).sum())
        return PairedCounts(wins, losses, len(difference_N))
    return MeanBootstrap.of(difference_N, clusters, seed=seed, num_resamples=num_resamples)


def constrained_share(wins: float, losses: float, num: float, difference: float) -> float:
    """The likeliest share of losses if wins exceed them by `difference` of all items (Tango 1998)."""
    linear = -wins - losses + (2 * num - wins + losses) * difference
    root = math.sqrt(max(0.0, linear**2 + 8 * num * losses * difference * (1 - difference)))
    return max(0.0, -difference, (root - linear) / (4 * num))


def _score_of(wins: int, losses: int, num: int, difference: float) -> float:
    """Tango's statistic for one outcome."""
    return float(_score(np.array([float(wins)]), np.array([float(losses)]), num, difference)[0])


def _score(
    wins_X: NDArray[np.float64], losses_X: NDArray[np.float64], num: int, difference: float
) -> NDArray[np.float64]:
    """Tango's statistic: the excess of wins over what `difference` expects, in standard errors."""
    linear_X = -wins_X - losses_X + (2 * num - wins_X + losses_X) * difference
    root_X = np.sqrt(np.maximum(0.0, linear_X**2 + 8 * num * losses_X * difference * (1 - difference)))
    share_X = np.maximum((root_X - linear_X) / (4 * num), max(0.0, -difference))
    variance_X = num * (2 * share_X + difference * (1 - difference))
    excess_X = wins_X - losses_X - num * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        score_X = excess_X / np.sqrt(np.maximum(variance_X, 0.0))
    return np.where(np.abs(excess_X) <= 1e-9 * num, 0.0, score_X)


@lru_cache(maxsize=65536)
def _p_above(wins: int, losses: int, num: int, difference: float) -> float:
    """P-value of the claim that the true difference is more than `difference`."""
    seen = _score_of(wins, losses, num, difference)
    if difference <= -1:
        return 0.0
    if difference >= 1 or seen <= 0:
        return 1.0
    if wins + losses > _MAX_EXACT:
        return normal_tail(seen)
    total = exact_interval(wins + losses, num, confidence=1 - _LEFT_OUT)
    # 2 * share of losses + difference = share of disagreement.
    least = max(0.0, -difference, (total.low - difference) / 2)
    most = min((1 - difference) / 2, max(least, (total.high - difference) / 2))
    shares_P = np.linspace(least, most, _NUM_POINTS)
    wins_W = _window(num, least + difference, most + difference)
    losses_L = _window(num, least, most)
    return min(1.0, _worst_tail(wins_W, losses_L, num, difference, seen, shares_P) + _LEFT_OUT)


def _window(num: int, least: float, most: float) -> NDArray[np.float64]:
    """The counts that a share within these bounds can lead to, but for less than 1e-9."""
    reach = 7 * math.sqrt(num * max(least * (1 - least), most * (1 - most), 0.0)) + 15
    low, high = math.floor(num * least - reach), math.ceil(num * most + reach)
    return np.arange(max(0, low), min(num, high) + 1, dtype=np.float64)


def _worst_tail(
    wins_W: NDArray[np.float64],
    losses_L: NDArray[np.float64],
    num: int,
    difference: float,
    seen: float,
    shares_P: NDArray[np.float64],
) -> float:
    """The largest probability, over shares of losses, of a statistic of at least `seen`."""
    wins_X, losses_X = (grid.ravel() for grid in np.meshgrid(wins_W, losses_L, indexing="ij"))
    kept_X = wins_X + losses_X <= num
    kept_X[kept_X] = _score(wins_X[kept_X], losses_X[kept_X], num, difference) >= seen - 1e-9
    wins_X, losses_X = wins_X[kept_X], losses_X[kept_X]
    rest_X = num - wins_X - losses_X
    log_ways_X = math.lgamma(num + 1) - _log_factorial(wins_X) - _log_factorial(losses_X)
    log_ways_X -= _log_factorial(rest_X)
    worst = 0.0
    for share in shares_P:
        won, same = max(share + difference, 1e-300), max(1 - 2 * share - difference, 1e-300)
        lost = max(share, 1e-300)
        logs_X = log_ways_X + wins_X * math.log(won) + losses_X * math.log(lost) + rest_X * math.log(same)
        worst = max(worst, float(np.exp(logs_X).sum()))
    return worst


def _log_factorial(counts_X: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of whole numbers, by Stirling's series above 20 and exactly below."""
    small = np.array([math.lgamma(count + 1) for count in range(21)])
    with np.errstate(divide="ignore", invalid="ignore"):
        series_X = (
            counts_X * np.log(counts_X)
            - counts_X
            + 0.5 * np.log(2 * math.pi * counts_X)
            + 1 / (12 * counts_X)
            - 1 / (360 * counts_X**3)
            + 1 / (1260 * counts_X**5)
        )
    return np.where(counts_X <= 20, small[np.minimum(counts_X, 20).astype(np.int64)], series_X)
