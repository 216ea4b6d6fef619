"""The tasks by name."""

from typing import Final

from tokenmill.core import NotFoundError
from tokenmill.evals.task import Task
from tokenmill.evals.tasks import (
    chat,
    code,
    commonsense,
    extraction,
    functions,
    gsm8k,
    ifeval,
    labels,
    maths,
    mmlu,
    perplexity,
    sql,
    summaries,
)

__all__ = ["TASKS", "find_task"]

_MODULES: Final = (
    *(mmlu, commonsense, gsm8k, perplexity),
    *(code, maths, ifeval, functions, labels, extraction, summaries, sql, chat),
)

TASKS: Final[dict[str, Task]] = {task.name: task for module in _MODULES for task in module.TASKS}
"""Every task, in the order in which they are listed."""


def find_task(name: str) -> Task:
    """The task of this name, `_` as good as `-`. Raises NotFoundError with those that are near."""
    for spelling in (name, name.replace("_", "-")):
        if spelling in TASKS:
            return TASKS[spelling]
    near = [each for each in TASKS if name.lower().split("-")[0].split("_")[0] in each]
    hint = f"did you mean {', '.join(near)}?" if near else "`tokenmill tasks` lists them"
    raise NotFoundError(f"there is no task {name!r}", hint=hint)
