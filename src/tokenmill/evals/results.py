"""From the results of items to one document: figures with intervals, chance, slices, tokens, seconds.

Items without an answer are counted and listed, and are in no figure.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from tokenmill.evals.statistics import Interval, MeanBootstrap, chance_corrected, mean_interval
from tokenmill.evals.task import ItemResult, Task

__all__ = ["item_from_json", "item_to_json", "summary"]

_CONFIDENCE: Final = 0.95
_SHOWN_ERRORS: Final = 20


def item_to_json(item: ItemResult) -> dict[str, Any]:
    """A line of a result file."""
    fields = asdict(item)
    return fields if item.error else {name: value for name, value in fields.items() if name != "error"}


def item_from_json(fields: Mapping[str, Any]) -> ItemResult:
    """The item of a line. Raises TypeError if it is none."""
    return ItemResult(**fields)


def summary(task: Task, items: Sequence[ItemResult]) -> dict[str, Any]:
    """What the items say together: figures, slices, errors, tokens."""
    answered = [item for item in items if not item.error]
    failed = [item for item in items if item.error]
    figures = _figures(task, answered)
    slices = sorted({item.slice for item in answered})
    headline = figures.get(task.metric)
    return {
        "metric": task.metric,
        "num_items": len(items),
        "num_answered": len(answered),
        "num_errors": len(failed),
        "errors": [{"id": item.id, "error": item.error} for item in failed[:_SHOWN_ERRORS]],
        "value": None if headline is None else headline.to_json(),
        "chance": task.chance,
        "chance_corrected": (
            None
            if headline is None or task.chance is None
            else chance_corrected(headline, task.chance).to_json()
        ),
        "metrics": {name: figure.to_json() for name, figure in figures.items()},
        "slices": {name: _slice(task, answered, name) for name in slices} if len(slices) > 1 else {},
        "tokens": _tokens(items),
    }


def _slice(task: Task, items: Iterable[ItemResult], name: str) -> dict[str, Any]:
    own = [item for item in items if item.slice == name]
    figure = _figures(task, own).get(task.metric)
    return {"num_answered": len(own), "value": None if figure is None else figure.to_json()}


def _figures(task: Task, items: Sequence[ItemResult]) -> dict[str, Interval]:
    """Each metric's mean over the items that have it; a task that reads also has its perplexity."""
    names = dict.fromkeys(name for item in items for name in item.metrics)
    figures = {name: _mean([item.metrics[name] for item in items if name in item.metrics]) for name in names}
    if task.aggregate == "perplexity" and (figure := _perplexity(items)):
        figures[task.metric] = figure
    return figures


def _mean(values: Sequence[float]) -> Interval:
    return mean_interval(values, confidence=_CONFIDENCE)


def _perplexity(items: Sequence[ItemResult]) -> Interval | None:
    """Over all scored tokens; windows are what is drawn anew, for tokens of one window hang together."""
    windows = [(num, logprob) for item in items for num, logprob in item.answer if num]
    if not windows:
        return None
    sizes_W, logprobs_W = np.array(windows, np.float64).T
    found = MeanBootstrap(logprobs_W, sizes_W).interval(_CONFIDENCE)
    estimate, low, high = (_exp(-value) for value in (found.estimate, found.high, found.low))
    return replace(found, estimate=estimate, low=low, high=high, note="over windows")


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _tokens(items: Sequence[ItemResult]) -> dict[str, Any]:
    num_input = sum(item.num_input_tokens for item in items)
    num_cached = sum(item.num_cached_tokens for item in items)
    num_output = sum(item.num_output_tokens for item in items)
    share = num_cached / num_input if num_input else None
    return {"input": num_input, "cached": num_cached, "cached_share": share, "output": num_output}
