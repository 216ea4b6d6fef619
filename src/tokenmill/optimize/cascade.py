"""A cascade's threshold and what it guarantees: how often a kept answer is worse than the incumbent's.

A row counts against the cascade if the small model keeps it and is worse there than what the row would have
got otherwise; what is deferred is the larger one's answer. The threshold comes from select. On certify its
risk has an upper bound of Clopper and Pearson, whatever the distribution. `learn_then_test` (Angelopoulos
et al. 2021, fixed sequence) goes further: it takes thresholds of select, ordered from careful to bold,
tests each on certify at the full level, and stops at the first that is not proven, so that the last proven
one holds with the confidence stated, however many were tried. Rows must be alike and independent, as in the
log they came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.core import UsageError
from tokenmill.evals.statistics import exact_interval
from tokenmill.evals.statistics.interval import binomial_tail, check_confidence

__all__ = ["Certified", "Kept", "bound", "careful_to_bold", "learn_then_test", "risk_at", "threshold_for"]


class Kept(NamedTuple):
    """One row: how sure the small model was, and whether keeping its answer is a loss."""

    probability: float
    is_loss: bool


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A threshold, how many rows of certify are kept with it, how many of them are losses, and the bound: the
    share of all rows that are kept and lost is at most `risk_high`, at this confidence. `is_proven` says that
    it is at most what may be lost.
    """

    threshold: float
    num_items: int
    num_kept: int
    num_losses: int
    risk_high: float
    max_risk: float
    confidence: float
    method: str

    @property
    def is_proven(self) -> bool:
        """Whether the bound is within what may be lost."""
        return self.risk_high <= self.max_risk

    @property
    def words(self) -> str:
        """The bound as a sentence."""
        return (
            f"{self.num_kept} of {self.num_items} kept, {self.num_losses} of them worse: at most "
            f"{self.risk_high:.2%} of all calls are kept and worse, at {self.confidence:.4g} confidence "
            f"({self.method}); {self.max_risk:.2%} may be"
        )

    def to_json(self) -> dict[str, Any]:
        """For the certificate."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "is_proven": self.is_proven, "words": self.words}


def risk_at(rows: Sequence[Kept], threshold: float) -> tuple[int, int]:
    """How many rows are kept at a threshold, and how many of these are losses."""
    kept = [each for each in rows if each.probability >= threshold]
    return len(kept), sum(each.is_loss for each in kept)


def bound(
    rows: Sequence[Kept], threshold: float, *, max_risk: float, confidence: float = 0.95, num_tried: int = 1
) -> Certified:
    """The upper bound at a threshold that was chosen elsewhere; `num_tried` corrects for several
    (Bonferroni).

    Raises UsageError without rows.
    """
    if not rows:
        raise UsageError("a bound needs rows", hint="give a larger log")
    num_kept, num_losses = risk_at(rows, threshold)
    alpha = (1 - check_confidence(confidence)) / num_tried
    high = exact_interval(num_losses, len(rows), confidence=max(0.5, 1 - 2 * alpha)).high
    return Certified(
        threshold=threshold,
        num_items=len(rows),
        num_kept=num_kept,
        num_losses=num_losses,
        risk_high=high,
        max_risk=max_risk,
        confidence=confidence,
        method="Clopper-Pearson",
    )


def threshold_for(rows: Sequence[Kept], *, max_risk: float, confidence: float = 0.95) -> float | None:
    """The boldest threshold of select whose own upper bound keeps the risk; None if none does.

    The bound is not a proof there, for the threshold is chosen on the same rows: it is the safety that keeps
    the choice from being over-fitted, and certify decides.
    """
    if not rows:
        return None
    probabilities_N, losses_N = _sorted(rows)
    alpha = 1 - check_confidence(confidence)
    most = -1  # so many losses still have an upper bound within the risk
    while most + 1 < len(rows) and 1 - binomial_tail(most + 2, len(rows), max_risk) <= alpha:
        most += 1
    best = None
    for at, probability in enumerate(probabilities_N):
        is_last_of_equals = at + 1 == len(rows) or probabilities_N[at + 1] < probability
        if is_last_of_equals and losses_N[at] <= most:
            best = float(probability)
    return best


def careful_to_bold(rows: Sequence[Kept], *, max_risk: float, num: int = 20) -> tuple[float, ...]:
    """Thresholds of select from careful to bold: by the share that they keep, up to twice the risk
    allowed.
    """
    if not rows:
        return ()
    probabilities_N, losses_N = _sorted(rows)
    within = np.flatnonzero(losses_N <= 2 * max_risk * len(rows))
    if not len(within):
        return ()
    places = np.unique(np.linspace(len(within) / num, len(within), num).astype(int) - 1)
    return tuple(dict.fromkeys(float(probabilities_N[within[at]]) for at in places if at >= 0))


def learn_then_test(
    rows: Sequence[Kept], thresholds: Sequence[float], *, max_risk: float, confidence: float = 0.95
) -> Certified | None:
    """The boldest threshold proven on certify, testing in the order given; None if the first is not."""
    alpha = 1 - check_confidence(confidence)
    last: Certified | None = None
    for threshold in thresholds:
        num_kept, num_losses = risk_at(rows, threshold)
        # P(at most so many losses) if the risk were as large as it may be.
        p_value = 1 - binomial_tail(num_losses + 1, len(rows), max_risk) if rows else 1.0
        if p_value > alpha:
            break
        last = Certified(
            threshold=threshold,
            num_items=len(rows),
            num_kept=num_kept,
            num_losses=num_losses,
            risk_high=max_risk,
            max_risk=max_risk,
            confidence=confidence,
            method="learn-then-test, fixed sequence",
        )
    return last


def _sorted(rows: Sequence[Kept]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities from sure to unsure, and the losses up to each."""
    ordered = sorted(rows, key=lambda each: -each.probability)
    probabilities_N = np.array([each.probability for each in ordered], np.float64)
    return probabilities_N, np.cumsum([each.is_loss for each in ordered], dtype=np.int64)
