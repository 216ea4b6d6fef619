"""Which candidates are tried where nobody names any: what is cheap first, what is trained where torch is
there.

The list follows from the workload and the models that are given, so that the same call makes the same one.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from tokenmill.models.store.directory import ModelDirectory
from tokenmill.optimize.candidate import Candidate
from tokenmill.optimize.classifier import ClassifierCandidate
from tokenmill.optimize.local import local_candidates
from tokenmill.optimize.problem import Problem
from tokenmill.optimize.scored import ScoredCandidate
from tokenmill.optimize.served import answer_grammar

__all__ = ["Maker", "default_candidates"]

Maker: TypeAlias = Callable[[ModelDirectory, Problem], Sequence[Candidate]]
"""Candidates of a model for a problem."""

_SHOTS: Final = 4


def default_candidates(
    problem: Problem, models: Sequence[ModelDirectory], trained: Maker | None = None
) -> list[Candidate]:
    """The classifier where answers are a closed set; each model as it is, with examples, with a grammar.

    `trained` makes more of a model: `trained.trained_candidates`, for who has torch.
    """
    found: list[Candidate] = []
    if problem.labels:
        found.append(ClassifierCandidate())
    has_form = answer_grammar(problem.train, problem.labels) is not None
    for directory in models:
        if problem.labels:
            name = f"{directory.name} w8a8, scored labels"
            found.append(ScoredCandidate(name=name, path=str(directory.path), digest=directory.digest))
        found += local_candidates(directory, shots=_SHOTS, has_form=has_form)
        if trained is not None:
            found += trained(directory, problem)
    return found
