"""IFEval: instructions whose following a program can check (Zhou et al. 2023, arXiv:2311.07911)."""

from tokenmill.evals.tasks.ifeval.task import IFEVAL, TASKS, instruction_accuracy

__all__ = ["IFEVAL", "TASKS", "instruction_accuracy"]
