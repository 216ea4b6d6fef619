"""Is the candidate as good as the incumbent, but for a margin? The verdict, and how many items it takes.

Pass: the difference is above minus the margin, proven at the stated confidence. Fail: it is below, proven so.
Undecided: neither. With several candidates each of the two errors keeps its rate for all of them together
(Holm 1979), so that the best of many is no luckier than one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from tokenmill.core import UsageError
from tokenmill.evals.statistics.interval import bisect, check_confidence, normal_quantile
from tokenmill.evals.statistics.paired import Difference, constrained_share

__all__ = [
    "Outcome",
    "Verdict",
    "holm",
    "items_needed",
    "provable_margin",
    "verdict",
    "verdicts",
]

Outcome: TypeAlias = Literal["pass", "fail", "undecided"]

_HOPELESS: Final = 100
"""So many times the items there are is no advice to get more."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of one candidate.

    `alpha` is what the correction for `num_candidates` left of `1 - confidence`. `more_items` is None where
    none would help.
    """

    outcome: Outcome
    difference: float
    margin: float
    confidence: float
    alpha: float
    num_candidates: int
    num_items: int
    num_units: int
    p_pass: float
    p_fail: float
    more_items: int | None
    evidence: Difference

    @property
    def lower(self) -> float:
        """One-sided lower bound of the difference, at `1 - alpha`."""
        return self.evidence.lower(self.alpha)

    @property
    def upper(self) -> float:
        """One-sided upper bound of the difference, at `1 - alpha`."""
        return self.evidence.upper(self.alpha)

    @property
    def words(self) -> str:
        """The verdict as a sentence."""
        rate = f"{self.confidence:.4g} confidence"
        if self.num_candidates > 1:
            rate += f" for all {self.num_candidates} candidates together"
        if self.outcome == "pass":
            return f"pass: at most {max(0.0, -self.lower):.4f} worse, margin {self.margin:g}, {rate}"
        if self.outcome == "fail":
            return f"fail: at least {max(0.0, -self.upper):.4f} worse, margin {self.margin:g}, {rate}"
        reach = f"between {self.lower:+.4f} and {self.upper:+.4f}, margin {self.margin:g}"
        if self.more_items is None:
            return f"undecided: {reach}; the difference is so near the margin that more items will not tell"
        return f"undecided: about {self.more_items} more items needed; {reach}, {rate}"

    def to_json(self) -> dict[str, Any]:
        """Every field but the evidence, bounds and words; an infinite bound is null."""
        names = (name for name in self.__dataclass_fields__ if name != "evidence")
        fields = {name: getattr(self, name) for name in names}
        bounds = {"lower": self.lower, "upper": self.upper}
        fields |= {name: value if math.isfinite(value) else None for name, value in bounds.items()}
        return fields | {"words": self.words}


def verdict(
    difference: Difference, *, margin: float, confidence: float = 0.95, num_candidates: int = 1
) -> Verdict:
    """The verdict on one candidate out of `num_candidates` that were tried on these items (Bonferroni).

    The metric lies between 0 and 1, higher is better; `margin` is what it may lose. Raises UsageError.
    """
    if not 0 < margin < 1:
        raise UsageError(f"a margin of {margin:g} means nothing", hint="give what may be lost, such as 0.02")
    if num_candidates < 1:
        raise UsageError(f"{num_candidates} candidates", hint="give a number of at least 1")
    alpha = (1 - check_confidence(confidence)) / num_candidates
    p_pass = max(difference.p_above(-margin), _unseen(difference.mean, -margin, difference.num_units))
    p_fail = max(difference.p_below(-margin), _unseen(-difference.mean, margin, difference.num_units))
    found = Verdict(
        outcome="undecided",
        difference=difference.mean,
        margin=margin,
        confidence=confidence,
        alpha=alpha,
        num_candidates=num_candidates,
        num_items=difference.num_items,
        num_units=difference.num_units,
        p_pass=p_pass,
        p_fail=p_fail,
        more_items=None,
        evidence=difference,
    )
    return _decided(found, alpha)


def verdicts(
    differences: Mapping[str, Difference], *, margin: float, confidence: float = 0.95
) -> dict[str, Verdict]:
    """The verdicts on all candidates of one set of items, corrected with Holm's steps."""
    num = len(differences)
    found = {
        name: verdict(difference, margin=margin, confidence=confidence, num_candidates=num)
        for name, difference in differences.items()
    }
    pass_levels = _holm_levels([each.p_pass for each in found.values()], 1 - confidence)
    fail_levels = _holm_levels([each.p_fail for each in found.values()], 1 - confidence)
    decided = {}
    for at, (name, each) in enumerate(found.items()):
        alpha = fail_levels[at] if each.p_fail <= fail_levels[at] else pass_levels[at]
        decided[name] = each if alpha == each.alpha else _decided(each, alpha)
    return decided


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979): at most alpha is significant at alpha."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = most
    return adjusted


def items_needed(
    margin: float,
    *,
    disagreement: float,
    difference: float = 0.0,
    confidence: float = 0.95,
    power: float = 0.8,
    num_candidates: int = 1,
) -> int:
    """Items for a candidate whose true difference is `difference` to be decided with probability `power`.

    `disagreement` is the expected share of items on which exactly one of the two is right; for a graded
    metric, the mean square of the differences. The decision is pass if the difference is above minus the
    margin, fail if below. Raises UsageError if it is at the margin, where no number is enough.
    """
    distance = abs(difference + margin)
    if not 0 < margin < 1 or not 0 <= disagreement <= 1 or distance < 1e-9 or not 0.5 <= power < 1:
        raise UsageError(
            f"no plan for margin {margin:g}, disagreement {disagreement:g}, difference {difference:g}",
            hint="0 < margin < 1, 0 <= disagreement <= 1, 0.5 <= power < 1, difference away from -margin",
        )
    alpha = (1 - check_confidence(confidence)) / num_candidates
    disagreement = max(disagreement, abs(difference))
    wins, losses = (disagreement + difference) / 2, (disagreement - difference) / 2
    share = constrained_share(wins, losses, 1.0, -margin)
    null_spread = math.sqrt(max(0.0, 2 * share - margin * (1 + margin)))
    true_spread = math.sqrt(max(0.0, disagreement - difference**2))
    reach = -normal_quantile(alpha) * null_spread + normal_quantile(power) * true_spread
    # The second term is the step of a count, which an exact test pays for.
    num = (reach / distance) ** 2 + 1 / distance
    least = math.log(alpha) / math.log(_unseen(difference, -margin, 1)) if difference > -margin else 1.0
    return math.ceil(max(num, least))


def provable_margin(
    num_items: int,
    *,
    disagreement: float,
    confidence: float = 0.95,
    power: float = 0.8,
    num_candidates: int = 1,
) -> float:
    """How small a loss this many items can rule out, for a candidate that is truly equal.

    Raises UsageError if not even a margin of 0.5 is in reach.
    """

    def needs_more(margin: float) -> bool:
        need = items_needed(
            margin,
            disagreement=disagreement,
            confidence=confidence,
            power=power,
            num_candidates=num_candidates,
        )
        return need > num_items

    if needs_more(0.5):
        raise UsageError(f"{num_items} items prove nothing", hint="get more items that both systems answer")
    return bisect(needs_more, 0.0, 0.5, num_steps=40)


def _unseen(mean: float, boundary: float, num: int) -> float:
    """How probable it is that `num` items hide what would bring a mean above `boundary` down to it.

    The loss may sit in rare items at the end of the scale, -1, of which none was drawn.
    """
    if mean <= boundary:
        return 1.0
    return float(((1 + boundary) / (1 + mean)) ** num) if mean > -1 else 1.0


def _holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """The level at which Holm's steps test each of them; after the first that is kept it falls no more."""
    levels, level, is_stopped = [0.0] * len(p_values), 0.0, False
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        if not is_stopped:
            level = alpha / (len(p_values) - rank)
            is_stopped = p_values[at] > level
        levels[at] = level
    return levels


def _decided(found: Verdict, alpha: float) -> Verdict:
    """The verdict at this level."""
    outcome: Outcome = "undecided"
    if found.p_pass <= alpha:
        outcome = "pass"
    elif found.p_fail <= alpha:
        outcome = "fail"
    return replace(
        found,
        outcome=outcome,
        alpha=alpha,
        more_items=_more_items(found, found.evidence) if outcome == "undecided" else None,
    )


def _more_items(found: Verdict, difference: Difference) -> int | None:
    """Items to come until the difference, if it stays as it was seen, is decided; None if hopeless."""
    have, size = difference.num_units, difference.num_items / difference.num_units
    mean = difference.mean
    if abs(mean + found.margin) < 1e-6:
        return None
    need = items_needed(
        found.margin,
        disagreement=min(1.0, difference.variance + mean**2),
        difference=mean,
        confidence=found.confidence,
        num_candidates=found.num_candidates,
    )
    return math.ceil(max(1, need - have) * size) if need <= _HOPELESS * have else None
