"""The main job: candidates for a workload, measured and judged; the cheapest that passes, with its
evidence.
"""

from tokenmill.optimize.candidate import Candidate, CannotBeMadeError, Expected, Opened, Workshop
from tokenmill.optimize.choice import Choice
from tokenmill.optimize.measure import Machine
from tokenmill.optimize.problem import Problem, problem_of
from tokenmill.optimize.records import Artefact, Figures, Item, Lineage
from tokenmill.optimize.run import OptimizeConfig, Outcome, optimize
from tokenmill.optimize.search import SearchConfig

__all__ = [
    "Artefact",
    "Candidate",
    "CannotBeMadeError",
    "Choice",
    "Expected",
    "Figures",
    "Item",
    "Lineage",
    "Machine",
    "Opened",
    "OptimizeConfig",
    "Outcome",
    "Problem",
    "SearchConfig",
    "Workshop",
    "optimize",
    "problem_of",
]
