"""Which candidates are tried where nobody names any: what is cheap first, what is trained where torch is
there.

The list follows from the workload and the models that are given, so that the same call makes the same one.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Final

from tokenmill.models.store.directory import ModelDirectory
from tokenmill.optimize.candidate import Candidate
from tokenmill.optimize.classifier import ClassifierCandidate
from tokenmill.optimize.local import local_candidates
from tokenmill.optimize.problem import Problem
from tokenmill.optimize.scored import ScoredCandidate
from tokenmill.optimize.served import answer_grammar

__all__ = ["default_candidates"]

_SHOTS: Final = 4


def default_candidates(problem: Problem, models: Sequence[ModelDirectory]) -> list[Candidate]:
    """The classifier where answers are a closed set; each model as it is, with examples, with a grammar."""
    found: list[Candidate] = []
    if problem.labels:
        found.append(ClassifierCandidate())
    has_form = answer_grammar(problem.train, problem.labels) is not None
    for directory in models:
        if problem.labels:
            name = f"{directory.name} w8a8, scored labels"
            found.append(ScoredCandidate(name=name, path=str(directory.path), digest=directory.digest))
        found += local_candidates(directory, shots=_SHOTS, has_form=has_form)
        if _can_train():
            found += _trained()(directory, problem)
    return found


def _can_train() -> bool:
    return importlib.util.find_spec("torch") is not None


def _trained() -> Callable[[ModelDirectory, Problem], list[Candidate]]:
    """A factory: training needs torch, which not everybody has."""
    from tokenmill.optimize.trained import trained_candidates

    return trained_candidates
