"""One task, one model: from the data to a result folder, in windows of questions, resumable.

    run.json      what decides the figures: task, version, hash of the questions, model, window
    items.jsonl   a line an item, as it is answered
    result.json   the figures (`results`), when all are there

A run that was killed goes on with the items that are missing, and gives the same figures: each answer depends
on its question alone. Items that had an error are asked again. Memory holds one window of questions, and the
ids and figures of all items.
"""

import heapq
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Final

from tokenmill.core import UsageError
from tokenmill.evals.ask import Asker, EvaluatedModel
from tokenmill.evals.results import item_from_json, item_to_json, summary
from tokenmill.evals.task import ItemResult, Question, Task
from tokenmill.runs import RunFolder

__all__ = ["EvalOptions", "EvalProgress", "evaluate"]

EvalProgress = Callable[[int, int], None]
"""Called with the number of items that are done, and of all."""

_ITEMS: Final = "items"
_TIMES: Final = "times"
_FORMAT: Final = 1
_FIRST_WINDOW: Final = 64
_WINDOW_S: Final = 20.0


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How a task is run.

    `limit` takes that many items, chosen by a hash of their ids: spread over the data, and part of what a
    larger limit takes. `window` is how many questions are asked at once, at most. `machine` is noted with the
    result.
    """

    limit: int | None = None
    resume: bool = False
    window: int = 256
    machine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What the data holds: items, those chosen, and a hash over them."""

    num_all: int
    chosen: frozenset[str]
    digest: str


def evaluate(
    task: Task,
    data: Path,
    model: EvaluatedModel,
    folder: Path,
    options: EvalOptions,
    on_progress: EvalProgress | None = None,
) -> dict[str, Any]:
    """Ask a model everything and write the result, which is returned, too.

    Raises UsageError for bad data, with file and line, and for a folder that holds another run.
    """
    survey = _survey(task, data, options.limit)
    header = {
        "format": _FORMAT,
        "task": task.name,
        "version": task.version,
        "questions": survey.digest,
        "num_items": len(survey.chosen),
        "model": {"name": model.name, **model.about},
        "window": model.window,
    }
    with RunFolder(folder, header, resume=options.resume) as run:
        done = {item.id: item for item in _items(run) if not item.error}
        _ask_missing(run, task, data, survey, done, Asker(model, task), options, on_progress)
        seconds = sum(each["seconds"] for each in run.lines(_TIMES))
        items = {item.id: item for item in _items(run)}
        result = {
            **header,
            "summary": task.summary,
            "data": {"path": str(data), "num_items": survey.num_all, "num_chosen": len(survey.chosen)},
            **summary(task, list(items.values())),
            "seconds": seconds,
            "machine": dict(options.machine),
        }
        run.write("result", result)
    return result


def _ask_missing(
    run: RunFolder,
    task: Task,
    data: Path,
    survey: _Survey,
    done: Collection[str],
    asker: Asker,
    options: EvalOptions,
    on_progress: EvalProgress | None,
) -> None:
    """Answer what is not done, window by window, each on the disk before the next."""
    num_done = len(done)
    missing = (each for each in _chosen(task, data, survey.chosen) if each.id not in done)
    size = min(_FIRST_WINDOW, options.window)
    while window := list(islice(missing, size)):
        if on_progress is not None:
            on_progress(num_done, len(survey.chosen))
        began = time.perf_counter()
        items = asker.ask(window)
        seconds = time.perf_counter() - began
        run.append(_ITEMS, map(item_to_json, items))
        run.append(_TIMES, [{"num_items": len(items), "seconds": seconds}])
        num_done += len(items)
        size = _next_size(size, seconds, options.window)
    if on_progress is not None:
        on_progress(num_done, len(survey.chosen))


def _next_size(size: int, seconds: float, largest: int) -> int:
    """How many questions to ask at once after `size` took so long: many share more, few lose less if the run
    is killed.
    """
    if seconds < _WINDOW_S / 2:
        return min(2 * size, largest)
    return max(1, size // 2) if seconds > 2 * _WINDOW_S else size


def _items(run: RunFolder) -> Iterator[ItemResult]:
    """The lines so far; of two with one id the later one counts."""
    for number, fields in enumerate(run.lines(_ITEMS), start=1):
        try:
            yield item_from_json(fields)
        except TypeError as error:
            where = f"{run.path / _ITEMS}.jsonl:{number}"
            raise UsageError(f"{where}: no result of an item ({error})", hint="use another folder") from error


def _survey(task: Task, data: Path, limit: int | None) -> _Survey:
    """Read all of the data once: it must be right before the first question is asked."""
    ids: dict[str, bytes] = {}
    for question in task.questions(data):
        if question.id in ids:
            raise UsageError(f"{data}: two items have the id {question.id!r}", hint="make the ids unique")
        ids[question.id] = sha256(_encoded(question)).digest()
    if not ids:
        raise UsageError(f"{data}: there are no items", hint="give data with at least one")
    chosen = frozenset(ids if limit is None else heapq.nsmallest(limit, ids, key=_place))
    digest = sha256()
    for id, each in ids.items():
        if id in chosen:
            digest.update(each)
    return _Survey(num_all=len(ids), chosen=chosen, digest=digest.hexdigest())


def _place(id: str) -> bytes:
    """Where an item stands in the order of limits: by chance, but always the same."""
    return sha256(f"limit {id}".encode()).digest()


def _encoded(question: Question) -> bytes:
    """Everything that is asked and compared, as bytes; of a file the name, not where it lies."""
    value = {"kind": type(question.ask).__name__, **asdict(question)}
    return json.dumps(value, sort_keys=True, default=_plain).encode()


def _plain(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


def _chosen(task: Task, data: Path, chosen: Collection[str]) -> Iterator[Question]:
    return (each for each in task.questions(data) if each.id in chosen)
