"""Cascades of what was measured: a candidate first, the incumbent for what it is not sure of.

Nothing new is asked: both sides' answers to every row are known, so a cascade's lines follow from them. Every
row pays for the first attempt; a deferred one pays the incumbent as well and waits for both. How long the
incumbent takes a recorded log does not say, so latencies of a cascade are those of its first part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenmill.evals.statistics import cost_per_pass, mean_interval, wilson_interval
from tokenmill.optimize.cascade import Certified, Kept, bound, careful_to_bold, learn_then_test, threshold_for
from tokenmill.optimize.cases import Case
from tokenmill.optimize.records import Figures, Item, Range

__all__ = ["Cascade", "cascade_of", "is_worth_it"]


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """A cascade with its lines and figures on certify, and what is guaranteed."""

    name: str
    first: str
    certified: Certified
    boldest: Certified | None
    items: tuple[Item, ...]
    figures: Figures


def cascade_of(
    first: str,
    select: Sequence[Item],
    certify: Sequence[Item],
    figures: Figures,
    cases: dict[str, Case],
    *,
    margin: float,
    confidence: float,
) -> Cascade | None:
    """The cascade of a measured candidate and the incumbent; None where no threshold keeps the risk on
    select, or a cascade would keep nothing or everything.
    """
    rows = [_kept(each) for each in select]
    threshold = threshold_for(rows, max_risk=margin, confidence=confidence)
    if threshold is None or not any(each.probability < threshold for each in rows):
        return None
    own = [_kept(each) for each in certify]
    certified = bound(own, threshold, max_risk=margin, confidence=confidence)
    boldest = learn_then_test(
        own, careful_to_bold(rows, max_risk=margin), max_risk=margin, confidence=confidence
    )
    name = f"{first} > incumbent"
    items = tuple(_line(name, each, threshold, cases[each.id]) for each in certify)
    return Cascade(
        name=name,
        first=first,
        certified=certified,
        boldest=boldest,
        items=items,
        figures=_figures(figures, items, confidence),
    )


def is_worth_it(select: Sequence[Item], usd: float | None) -> bool:
    """Whether what the first attempt keeps can pay for the attempts: costs against the incumbent's."""
    if usd is None or not select:
        return False
    own = math.fsum(each.usd for each in select) / len(select)
    return own < usd


def _kept(item: Item) -> Kept:
    return Kept(item.probability or 0.0, item.score < item.incumbent_score)


def _line(name: str, item: Item, threshold: float, case: Case) -> Item:
    """The row as the cascade answers it."""
    if not item.error and (item.probability or 0.0) >= threshold:
        return replace(item, candidate=name)
    return replace(
        item,
        candidate=name,
        score=case.score,
        passed=case.passed,
        usd=item.usd + (case.usd or 0.0),
        answer=case.answer,
        deferred_to="incumbent",
        error="",
    )


def _figures(figures: Figures, items: Sequence[Item], confidence: float) -> Figures:
    """The first part's figures with quality and money of the whole."""
    passed = [float(each.passed) for each in items]
    costs = [each.usd for each in items]
    num_deferred = sum(bool(each.deferred_to) for each in items)
    return replace(
        figures,
        num_errors=sum(bool(each.error) for each in items),
        quality=Range.of(
            mean_interval([each.score for each in items], confidence=confidence, bounds=(0.0, 1.0))
        ),
        pass_share=Range.of(mean_interval(passed, confidence=confidence)),
        usd_per_request=Range.of(mean_interval(costs, confidence=confidence, bounds=(0.0, math.inf))),
        usd_per_pass=Range.of(cost_per_pass(costs, passed, confidence=confidence)),
        usd_per_million_out=None,
        joules_per_token=None,
        joules_per_pass=None,
        energy_label="not measured",
        energy_note="what the incumbent uses for the deferred calls is not known",
        deferred_share=Range.of(wilson_interval(num_deferred, len(items), confidence=confidence)),
    )
