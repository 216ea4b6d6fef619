"""Does a candidate pass? From the lines of the certifying part alone, so that anybody can say it again.

Quality: paired non-inferiority against the incumbent's recorded answers, or a share that reaches an absolute
bar; each error rate holds for all candidates together (Holm), overall and in the slices. A candidate passes
if it does overall and no slice is proven worse: a slice alone is mostly too small to prove that it is as
good, which is said beside it. Limits of latency and the terms of what it was trained on stand beside quality.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from tokenmill.evals.statistics import (
    Difference,
    Interval,
    Verdict,
    exact_interval,
    mcnemar,
    mean_interval,
    paired,
    verdicts,
)
from tokenmill.evals.statistics.interval import binomial_tail
from tokenmill.optimize.records import Figures, Item

__all__ = ["Bar", "Gate", "Judged", "Outcome", "ShareAbove", "SliceVerdict", "judge", "judge_all"]

Outcome: TypeAlias = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What must be kept: at most `margin` worse than the incumbent, or with `absolute` at least that share of
    passing answers.
    """

    margin: float
    confidence: float = 0.95
    absolute: float | None = None


class Gate(NamedTuple):
    """Something beside quality that must hold: its name, whether it does, and the words for it."""

    name: str
    outcome: Outcome
    words: str


@dataclass(frozen=True)
class ShareAbove:
    """A share of passing answers against a bar, as a `Difference`: exact binomial tests, nothing paired.

    Its mean is the share less (bar + margin), so that "above minus the margin" means "above the bar".
    """

    num_passing: int
    num_items: int
    bar: float

    @property
    def num_units(self) -> int:
        """Every item is independent."""
        return self.num_items

    @property
    def mean(self) -> float:
        """As `Difference`."""
        return self.num_passing / self.num_items - self.bar

    @property
    def variance(self) -> float:
        """Of one item."""
        share = self.num_passing / self.num_items
        return share * (1 - share)

    def p_above(self, value: float) -> float:
        """As `Difference`."""
        return binomial_tail(self.num_passing, self.num_items, min(1.0, max(0.0, self.bar + value)))

    def p_below(self, value: float) -> float:
        """As `Difference`."""
        share = min(1.0, max(0.0, self.bar + value))
        return 1 - binomial_tail(self.num_passing + 1, self.num_items, share)

    def lower(self, alpha: float) -> float:
        """As `Difference`."""
        return self._interval(alpha).low - self.bar

    def upper(self, alpha: float) -> float:
        """As `Difference`."""
        return self._interval(alpha).high - self.bar

    def interval(self, confidence: float) -> Interval:
        """Of Clopper and Pearson."""
        found = exact_interval(self.num_passing, self.num_items, confidence=confidence)
        return found.map(1.0, -self.bar)

    def _interval(self, alpha: float) -> Interval:
        return exact_interval(self.num_passing, self.num_items, confidence=max(0.5, 1 - 2 * alpha))


@dataclass(frozen=True, kw_only=True)
class SliceVerdict:
    """The verdict on one slice, with both sides' share of passing answers."""

    slice: str
    num_items: int
    candidate: Interval
    incumbent: Interval
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "slice": self.slice,
            "num_items": self.num_items,
            "candidate": self.candidate.to_json(),
            "incumbent": self.incumbent.to_json(),
            "verdict": self.verdict.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What was found of one candidate. `wins` and `losses` are rows in which it is better and worse."""

    candidate: str
    outcome: Outcome
    overall: Verdict
    slices: tuple[SliceVerdict, ...]
    gates: tuple[Gate, ...]
    wins: int
    losses: int
    p_same: float
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For the report and the certificate."""
        names = ("candidate", "outcome", "wins", "losses", "p_same")
        fields = {name: getattr(self, name) for name in names}
        return {
            **fields,
            "reasons": list(self.reasons),
            "overall": self.overall.to_json(),
            "slices": [each.to_json() for each in self.slices],
            "gates": [each._asdict() for each in self.gates],
        }


def judge_all(
    items: Iterable[Item],
    bar: Bar,
    figures: Mapping[str, Figures],
    gates: Mapping[str, Sequence[Gate]],
    *,
    num_slo_percent: float | None = None,
) -> dict[str, Judged]:
    """The verdicts on all candidates that were measured, by name.

    `figures` and `gates` are those of each candidate; a candidate without lines has no verdict.
    """
    by_name: dict[str, list[Item]] = {}
    for item in items:
        by_name.setdefault(item.candidate, []).append(item)
    if not by_name:
        return {}
    overall = verdicts(
        {name: _difference(lines, bar) for name, lines in by_name.items()},
        margin=bar.margin,
        confidence=bar.confidence,
    )
    slices = _slices(by_name, bar)
    found = {}
    for name, lines in by_name.items():
        own = [*gates.get(name, ())]
        if name in figures and num_slo_percent is not None:
            own.append(_slo_gate(figures[name], num_slo_percent))
        found[name] = judge(name, lines, overall[name], slices[name], own)
    return found


def judge(
    name: str, lines: Sequence[Item], overall: Verdict, slices: Sequence[SliceVerdict], gates: Sequence[Gate]
) -> Judged:
    """The verdict on one, from its parts."""
    reasons = [overall.words] if overall.outcome != "pass" else []
    worse = [each for each in slices if each.verdict.outcome == "fail"]
    reasons += [f"the slice {each.slice} is worse: {each.verdict.words}" for each in worse]
    reasons += [gate.words for gate in gates if gate.outcome != "pass"]
    outcomes = {overall.outcome, *(gate.outcome for gate in gates), *(each.verdict.outcome for each in worse)}
    outcome: Outcome = "pass" if outcomes == {"pass"} else "fail" if "fail" in outcomes else "undecided"
    wins = sum(each.score > each.incumbent_score for each in lines)
    losses = sum(each.score < each.incumbent_score for each in lines)
    return Judged(
        candidate=name,
        outcome=outcome,
        overall=overall,
        slices=tuple(slices),
        gates=tuple(gates),
        wins=wins,
        losses=losses,
        p_same=mcnemar(wins, losses).exact,
        reasons=tuple(reasons),
    )


def _slices(by_name: Mapping[str, Sequence[Item]], bar: Bar) -> dict[str, list[SliceVerdict]]:
    """Of every candidate, corrected for all slices of all candidates together; none where there is one."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for name, lines in by_name.items():
        for item in lines:
            groups.setdefault((name, item.slice), []).append(item)
    names = {slice for _, slice in groups}
    if len(names) < 2:
        return {name: [] for name in by_name}
    keys = {f"{at}": key for at, key in enumerate(sorted(groups))}
    found = verdicts(
        {at: _difference(groups[key], bar) for at, key in keys.items()},
        margin=bar.margin,
        confidence=bar.confidence,
    )
    by_candidate: dict[str, list[SliceVerdict]] = {name: [] for name in by_name}
    for at, (name, slice) in keys.items():
        lines = groups[name, slice]
        by_candidate[name].append(
            SliceVerdict(
                slice=slice or "(no slice)",
                num_items=len(lines),
                candidate=_mean([each.score for each in lines], bar),
                incumbent=_mean([each.incumbent_score for each in lines], bar),
                verdict=found[at],
            )
        )
    return by_candidate


def _mean(values: Sequence[float], bar: Bar) -> Interval:
    return mean_interval(values, confidence=bar.confidence, bounds=(0.0, 1.0))


def _difference(lines: Sequence[Item], bar: Bar) -> Difference:
    if bar.absolute is not None:
        return ShareAbove(sum(each.passed for each in lines), len(lines), bar.absolute + bar.margin)
    clusters = [each.cluster or each.id for each in lines]
    scores_N = np.array([each.score for each in lines])
    incumbent_N = np.array([each.incumbent_score for each in lines])
    return paired(scores_N, incumbent_N, clusters if len(set(clusters)) < len(clusters) else None)


def _slo_gate(figures: Figures, percent: float) -> Gate:
    """Latency: the share of requests that kept every limit, and whether that is proven."""
    share = figures.slo_share
    if share is None or share.estimate is None:
        return Gate("latency", "undecided", "latency was not measured")
    words = f"{100 * share.estimate:.1f} % of requests kept the latency limits, {percent:g} % are asked for"
    if figures.slo_kept:
        return Gate("latency", "pass", words)
    return Gate("latency", "fail", words)
