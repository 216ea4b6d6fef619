"""What a run will try, what that is expected to take and cost, and what does not fit into its time.

Made once, before anything is spent, and written down: a run that was killed keeps to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tokenmill.core import UsageError
from tokenmill.evals.statistics import provable_margin
from tokenmill.optimize.candidate import Candidate, Workshop
from tokenmill.optimize.problem import Problem
from tokenmill.optimize.records import Lost

__all__ = ["Plan", "PlannedCandidate", "plan_run", "plan_to_try"]

_DISAGREEMENT: Final = 0.1
"""Of candidate and incumbent, for what can be proven; a guess that the report replaces by what was found."""


@dataclass(frozen=True, kw_only=True)
class PlannedCandidate:
    """One candidate and the seconds that it is expected to take, to make and to measure."""

    name: str
    kind: str
    make_s: float
    measure_s: float
    is_tried: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The candidates in order, with what is left out. `provable` is the smallest loss that so many rows of
    certify can rule out for so many finalists, if a tenth of the answers differ; None: none.
    """

    candidates: tuple[PlannedCandidate, ...]
    budget_s: float
    expected_s: float
    expected_usd: float
    num_certify: int
    provable: float | None
    margin: float

    @property
    def left_out(self) -> list[Lost]:
        """What does not fit into the time."""
        return [
            Lost(
                candidate=each.name,
                stage="plan",
                reason=f"{each.make_s + each.measure_s:.0f} s more do not fit into {self.budget_s:.0f} s",
            )
            for each in self.candidates
            if not each.is_tried
        ]


def plan_run(
    problem: Problem,
    candidates: Sequence[Candidate],
    workshop: Workshop,
    *,
    budget_s: float,
    max_finalists: int,
) -> Plan:
    """Controls first, then what is expected to be done soonest, as long as the time lasts.

    Raises UsageError if there is nothing to try.
    """
    if not candidates:
        raise UsageError(
            "there is no candidate", hint="pull a model (tokenmill pull smollm2-135m), or give --model"
        )
    num_items = len(problem.select) + len(problem.certify)
    expected = {each.name: each.expected(workshop, num_items) for each in candidates}
    if len(expected) < len(candidates):
        raise UsageError("two candidates have one name", hint="give each its own")
    in_order = sorted(candidates, key=lambda each: (not each.is_control, sum(expected[each.name])))
    planned: list[PlannedCandidate] = []
    total_s = 0.0
    for each in in_order:
        need_s = sum(expected[each.name])
        is_tried = each.is_control or total_s + need_s <= budget_s or not planned
        total_s += need_s if is_tried else 0.0
        planned.append(
            PlannedCandidate(
                name=each.name,
                kind=each.kind,
                make_s=expected[each.name].make_s,
                measure_s=expected[each.name].measure_s,
                is_tried=is_tried,
            )
        )
    return Plan(
        candidates=tuple(planned),
        budget_s=budget_s,
        expected_s=total_s,
        expected_usd=total_s / 3600 * problem.usd_per_hour,
        num_certify=len(problem.certify),
        provable=_provable(len(problem.certify), min(max_finalists, len(planned)), problem.bar.confidence),
        margin=problem.bar.margin,
    )


def _provable(num: int, num_candidates: int, confidence: float) -> float | None:
    try:
        return provable_margin(
            num, disagreement=_DISAGREEMENT, confidence=confidence, num_candidates=num_candidates
        )
    except UsageError:
        return None


def plan_to_try(plan: Plan, candidates: Mapping[str, Candidate]) -> list[Candidate]:
    """The candidates that the plan tries, in its order."""
    return [candidates[each.name] for each in plan.candidates if each.is_tried]
