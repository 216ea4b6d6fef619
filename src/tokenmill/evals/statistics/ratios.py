"""Ratios of two means: cost per passing answer, and how much of a teacher's quality a student keeps.

Both parts have their own interval; the ratio's follows from them and their correlation (MOVER, Donner and
Zou 2012: Fieller's interval with the parts' own, unequal arms). Where the part below may be zero, the ratio
has no upper end, and says so.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tokenmill.core import UsageError
from tokenmill.evals.statistics.bootstrap import NUM_RESAMPLES, Values, cluster_sums, mean_interval
from tokenmill.evals.statistics.interval import Interval, bisect
from tokenmill.evals.statistics.proportions import exact_interval

__all__ = ["chance_corrected", "cost_per_pass", "ratio_interval", "retention"]


def chance_corrected(score: Interval, chance: float) -> Interval:
    """A score between 0 and 1 on the scale where guessing is 0 and perfect is 1. Raises UsageError."""
    if not 0 <= chance < 1:
        raise UsageError(f"a chance level of {chance:g}", hint="give what guessing reaches, 0 <= chance < 1")
    return score.map(1 / (1 - chance), -chance / (1 - chance))


def cost_per_pass(
    costs: Values,
    passes: Values,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """All costs over the number of passing answers, in the unit of `costs`; failed answers cost too.

    `passes` are 0 or 1. Without a passing answer the estimate is undefined and only the lower end means
    anything. Raises UsageError without items.
    """
    costs_N, passes_N = np.asarray(costs, np.float64), np.asarray(passes, np.float64)
    if costs_N.shape != passes_N.shape or not np.isin(passes_N, (0.0, 1.0)).all():
        raise UsageError("costs and passes do not fit", hint="give one cost and one 0 or 1 for each item")
    cost = mean_interval(
        costs_N, confidence=confidence, bounds=(0.0, math.inf), seed=seed, num_resamples=num_resamples
    )
    if not passes_N.any():
        most = exact_interval(0, len(passes_N), confidence=confidence).high
        note = f"none of {len(passes_N)} answers passed: only a lower end is known"
        return replace(cost, estimate=math.nan, low=cost.low / most, high=math.inf, method="mover", note=note)
    share = mean_interval(passes_N, confidence=confidence)
    return ratio_interval(cost, share, correlation=_correlation(costs_N, passes_N))


def retention(
    student: Values,
    teacher: Values,
    *,
    chance: float = 0.0,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """The student's chance-corrected score over the teacher's, on the same items in the same order.

    Undefined, with a note, where the teacher is not above chance. Raises UsageError.
    """
    student_N, teacher_N = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    if student_N.shape != teacher_N.shape:
        raise UsageError(
            f"{len(student_N)} and {len(teacher_N)} items cannot be paired",
            hint="give the same items of both",
        )
    parts = [
        chance_corrected(mean_interval(values_N, clusters, confidence=confidence, bounds=(0.0, 1.0)), chance)
        for values_N in (student_N, teacher_N)
    ]
    return ratio_interval(parts[0], parts[1], correlation=_correlation(student_N, teacher_N, clusters))


def ratio_interval(numerator: Interval, denominator: Interval, *, correlation: float = 0.0) -> Interval:
    """The interval of a ratio, from those of its parts and the correlation of their estimates.

    If the denominator may be zero the upper end is infinite; if its estimate is not above zero, the ratio is
    undefined.
    """
    found = Interval(
        estimate=math.nan, low=-math.inf, high=math.inf, confidence=numerator.confidence, method="mover"
    )
    if not denominator.estimate > 0:
        return replace(found, note="undefined: what it is divided by is not above zero")
    ratio = numerator.estimate / denominator.estimate
    found = replace(found, estimate=ratio)
    if denominator.low <= 0:
        return replace(found, note="no interval: what it is divided by may be zero")

    def covers(value: float) -> bool:
        return _is_covered(value, numerator, denominator, correlation)

    step = max(abs(ratio), abs(numerator.high - numerator.low) / denominator.estimate, 1e-300)
    below, above = ratio - step, ratio + step
    while covers(below) and math.isfinite(below):
        below = ratio - 2 * (ratio - below)
    while covers(above) and math.isfinite(above):
        above = ratio + 2 * (above - ratio)
    low = bisect(lambda value: not covers(value), below, ratio)
    high = bisect(covers, ratio, above)
    return replace(found, low=low, high=high)


def _is_covered(ratio: float, numerator: Interval, denominator: Interval, correlation: float) -> bool:
    """Can `numerator - ratio * denominator` be zero? Its arm towards zero is made of the parts' arms."""
    distance = numerator.estimate - ratio * denominator.estimate
    is_above = distance > 0
    arm = numerator.estimate - numerator.low if is_above else numerator.high - numerator.estimate
    # The denominator's share of the arm points up or down with the sign of the ratio.
    if is_above == (ratio > 0):
        other = denominator.high - denominator.estimate
    else:
        other = denominator.estimate - denominator.low
    square = arm**2 + (ratio * other) ** 2 - 2 * correlation * arm * ratio * other
    return distance**2 <= max(square, 0.0)


def _correlation(
    first_N: NDArray[np.float64],
    second_N: NDArray[np.float64],
    clusters: Sequence[Hashable] | None = None,
) -> float:
    """Of the means of the two, from their totals by cluster; 0 where one does not vary."""
    if clusters is not None:
        first_N = cluster_sums(first_N - first_N.mean(), clusters)
        second_N = cluster_sums(second_N - second_N.mean(), clusters)
    if len(first_N) < 2 or np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return 0.0
    return float(np.corrcoef(first_N, second_N)[0, 1])
