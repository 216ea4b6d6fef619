"""The main job: a workload in, the cheapest deployment that passes out.

    outcome = optimize(config, folder, candidates, machine)

plan, explore, measure each finalist once on the rows that certify, judge, choose, write it all down.
Everything that is finished is in the folder by content, so the same call goes on after a kill, and ends
with the same candidates, splits, seeds and figures of quality. `outcome` holds what the report is made of.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenmill.core import StorageError, TokenmillError
from tokenmill.optimize.book import Book
from tokenmill.optimize.candidate import Candidate
from tokenmill.optimize.cascades import Cascade, cascade_of, is_worth_it
from tokenmill.optimize.choice import Choice, choose
from tokenmill.optimize.measure import Machine, Measured, measure
from tokenmill.optimize.plan import Plan, plan_run, plan_to_try
from tokenmill.optimize.problem import Problem
from tokenmill.optimize.records import Artefact, Explored, Figures, Item, Lost
from tokenmill.optimize.search import Explorer, Finalist, SearchConfig
from tokenmill.optimize.verdict import Gate, Judged, judge_all
from tokenmill.runs import RunFolder, content_hash
from tokenmill.workload import freeze, look, num_looks

__all__ = ["Entry", "OptimizeConfig", "Outcome", "Say", "gates_of", "header_of", "optimize", "terms_gate"]

_FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig:
    """How the search goes: `budget_s` is what it may take as far as that can be foreseen."""

    budget_s: float = 1800.0
    search: SearchConfig = field(default_factory=SearchConfig)
    with_cascades: bool = True


class Entry(NamedTuple):
    """One candidate that was measured on certify, or follows from one that was."""

    name: str
    kind: str
    artefact: Artefact
    figures: Figures
    items: tuple[Item, ...]
    candidate: Candidate
    cascade: Cascade | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run found. `entries` are by name, in the order of measuring; `num_looks` counts everything that
    was ever measured on these rows of certify in this folder.
    """

    problem: Problem
    plan: Plan
    entries: Mapping[str, Entry]
    judged: Mapping[str, Judged]
    choice: Choice
    lost: Sequence[Lost]
    explored: Sequence[Explored]
    num_looks: int
    header: Mapping[str, Any]

    @property
    def winner(self) -> Entry | None:
        """The one that is to be served; None: keep the incumbent."""
        return self.entries.get(self.choice.winner)


Say = Callable[[str, int, int], None]
"""Told (what, done, of how many)."""


def header_of(problem: Problem, candidates: Sequence[Candidate], config: OptimizeConfig) -> dict[str, Any]:
    """What a run's folder is known by: with another one of these it is another run."""
    return {
        "format": _FORMAT,
        **problem.digests,
        "candidates": {each.name: content_hash(dict(each.recipe)) for each in candidates},
        "seed": config.search.seed,
        "shares": list(config.search.shares),
        "max_finalists": config.search.max_finalists,
        "budget_s": config.budget_s,
        "with_cascades": config.with_cascades,
    }


def optimize(
    problem: Problem,
    folder: Path,
    candidates: Sequence[Candidate],
    machine: Machine,
    config: OptimizeConfig | None = None,
    *,
    say: Say = lambda what, done, total: None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> Outcome:
    """Run the main job, or go on with it. Raises UsageError for a folder that holds another run."""
    config = config or OptimizeConfig()
    header = header_of(problem, candidates, config)
    with RunFolder(folder, header, resume=True) as run:
        freeze(run, problem.splits)
        book = Book(run)
        explorer = Explorer(problem, book, machine, config.search, say=say)
        plan = plan_run(
            problem,
            candidates,
            explorer.workshop("plan"),
            budget_s=config.budget_s,
            max_finalists=config.search.max_finalists,
        )
        on_plan(plan)
        finalists = explorer.run(plan_to_try(plan, {each.name: each for each in candidates}))
        lost = [*plan.left_out, *explorer.lost]
        entries: dict[str, Entry] = {}
        for finalist in finalists:
            entry = _measured(finalist, problem, book, explorer, machine, say)
            if isinstance(entry, Lost):
                lost.append(entry)
            else:
                entries[entry.name] = entry
        if config.with_cascades:
            entries |= _cascades(entries, finalists, problem)
        return _outcome(problem, plan, entries, lost, book, header)


def _measured(
    finalist: Finalist, problem: Problem, book: Book, explorer: Explorer, machine: Machine, say: Say
) -> Entry | Lost:
    """A finalist's figures on certify: those of the book, or a look that is counted before it is taken."""
    candidate, artefact = finalist.candidate, finalist.artefact
    key = _measure_key(finalist, problem)
    known = book.measured(key)
    if known is None:
        look(book.run, problem.splits, key)
        say(f"measuring {candidate.name}", 0, len(problem.certify))
        try:
            found = asyncio.run(_measure(finalist, problem, explorer, machine, say))
        except StorageError:
            raise
        except TokenmillError as error:
            return Lost(candidate=candidate.name, stage="make", reason=f"it cannot be served: {error}")
        book.keep_measured(key, candidate.name, found.figures, found.items)
        known = found.figures, found.items
    figures, items = known
    return Entry(candidate.name, candidate.kind, artefact, figures, items, candidate)


async def _measure(
    finalist: Finalist, problem: Problem, explorer: Explorer, machine: Machine, say: Say
) -> Measured:
    name = finalist.candidate.name
    async with finalist.candidate.opened(finalist.artefact, explorer.workshop(finalist.key)) as opened:
        return await measure(
            name,
            opened,
            problem.select,
            problem.certify,
            problem.rules,
            machine,
            artefact_bytes=finalist.artefact.num_bytes,
            on_progress=lambda done, total: say(f"measuring {name}", done, total),
        )


def _measure_key(finalist: Finalist, problem: Problem) -> str:
    """What a measurement stands under: the artefact as it is, the rows, the rules."""
    return content_hash(
        {
            "made": finalist.key,
            "artefact": finalist.artefact.digest,
            "certify": problem.digests["certify"],
            "rules": problem.digests["rules"],
        }
    )


def _cascades(
    entries: Mapping[str, Entry], finalists: Sequence[Finalist], problem: Problem
) -> dict[str, Entry]:
    """One for each that is cheap enough to be asked first."""
    cases = {case.id: case for case in problem.certify}
    mean_usd = [case.usd for case in problem.certify if case.usd is not None]
    usd = sum(mean_usd) / len(mean_usd) if mean_usd else None
    found: dict[str, Entry] = {}
    if problem.bar.absolute is not None:
        return found
    for finalist in finalists:
        entry = entries.get(finalist.candidate.name)
        if entry is None or not is_worth_it(finalist.select, usd):
            continue
        cascade = cascade_of(
            entry.name,
            finalist.select,
            entry.items,
            entry.figures,
            cases,
            margin=problem.bar.margin,
            confidence=problem.bar.confidence,
        )
        if cascade is not None:
            found[cascade.name] = Entry(
                cascade.name,
                "cascade",
                entry.artefact,
                cascade.figures,
                cascade.items,
                entry.candidate,
                cascade,
            )
    return found


def _outcome(
    problem: Problem,
    plan: Plan,
    entries: Mapping[str, Entry],
    lost: Sequence[Lost],
    book: Book,
    header: Mapping[str, Any],
) -> Outcome:
    figures = {name: entry.figures for name, entry in entries.items()}
    judged = judge_all(
        [item for entry in entries.values() for item in entry.items],
        problem.bar,
        figures,
        {name: gates_of(entry, problem) for name, entry in entries.items()},
        num_slo_percent=None if problem.slo is None else problem.slo.percentile,
    )
    choice = choose(judged, figures, problem.incumbent_cost, lost)
    return Outcome(
        problem=problem,
        plan=plan,
        entries=entries,
        judged=judged,
        choice=choice,
        lost=tuple(lost),
        explored=tuple(book.all_explored()),
        num_looks=num_looks(book.run, problem.splits),
        header=header,
    )


def gates_of(entry: Entry, problem: Problem) -> list[Gate]:
    """What must hold beside quality and latency."""
    gates = [terms_gate(entry.artefact, problem.denied)]
    if entry.cascade is not None:
        certified = entry.cascade.certified
        gates.append(Gate("cascade", "pass" if certified.is_proven else "undecided", certified.words))
    return gates


def terms_gate(artefact: Artefact, denied: frozenset[str]) -> Gate:
    """Whether it saw rows that the terms deny."""
    seen = [id for id in artefact.trained_on if id in denied]
    if not seen:
        return Gate("terms", "pass", "no row that the terms deny was used")
    return Gate(
        "terms", "fail", f"it was made from {len(seen)} rows whose terms deny that (the first is {seen[0]})"
    )
