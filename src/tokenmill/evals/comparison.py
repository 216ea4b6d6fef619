"""Two runs of one task on the same items: what differs, where, by how much, and whether that is proven.

Pairs decide: an item counts by what both systems made of it. Runs of different tasks, versions or items are
refused. The first run is the incumbent, the second the candidate, differences are the second less the first.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenmill.core import NotFoundError, UsageError
from tokenmill.evals.data import read_rows, read_text
from tokenmill.evals.results import item_from_json
from tokenmill.evals.statistics import (
    Difference,
    Interval,
    MeanBootstrap,
    NoiseFloor,
    PairedCounts,
    Verdict,
    holm,
    mcnemar,
    mean_interval,
    noise_floor,
    paired,
    verdict,
)
from tokenmill.evals.task import ItemResult

__all__ = ["Comparison", "EvalRun", "Figures", "compare", "judge", "noise_between", "read_run"]

_RESULT: Final = "result.json"
_ITEMS: Final = "items.jsonl"
_SAME: Final = ("task", "version", "questions")
_TEXT: Final = "logprob_per_token"
"""The metric of items that are read in windows; its answer is a list of (scored tokens, log-probability)."""


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """A finished run as its folder holds it: the header of the result, and the items by id."""

    path: Path
    result: Mapping[str, Any]
    items: Mapping[str, ItemResult]

    @property
    def name(self) -> str:
        """The model's name."""
        model = self.result.get("model")
        return str(model.get("name", "?")) if isinstance(model, dict) else "?"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One metric of the two runs on the items that both answered.

    `p` is two-sided, of "no difference": McNemar's, exact, where items are right or wrong. `wins` and
    `losses` are items in which the second run is better or worse. A figure of a slice has its name.
    """

    metric: str
    slice: str
    num_items: int
    first: Interval
    second: Interval
    difference: Interval
    wins: int
    losses: int
    p: float
    p_mid: float | None
    evidence: Difference

    def to_json(self) -> dict[str, Any]:
        """Without the evidence."""
        fields = {name: getattr(self, name) for name in ("metric", "slice", "num_items", "wins", "losses")}
        intervals = ("first", "second", "difference")
        fields |= {name: getattr(self, name).to_json() for name in intervals}
        return fields | {"p": self.p, "p_mid": self.p_mid}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two runs say about each other. `slices` are of the headline metric, `slice_p` corrected for their
    number; `won` and `lost` are the ids in which the second run is better and worse.
    """

    first: EvalRun
    second: EvalRun
    metric: str
    confidence: float
    figures: Sequence[Figures]
    slices: Sequence[Figures]
    slice_p: Sequence[float]
    won: Sequence[str]
    lost: Sequence[str]
    unanswered: Sequence[str]

    @property
    def headline(self) -> Figures:
        """The figures of the headline metric."""
        return next(each for each in self.figures if each.metric == self.metric)

    def to_json(self, num_examples: int) -> dict[str, Any]:
        """As one document, with that many examples of each direction."""
        slices = zip(self.slices, self.slice_p, strict=True)
        return {
            "task": self.first.result["task"],
            "version": self.first.result["version"],
            "first": {"path": str(self.first.path), "model": self.first.result.get("model")},
            "second": {"path": str(self.second.path), "model": self.second.result.get("model")},
            "metric": self.metric,
            "confidence": self.confidence,
            "metrics": [each.to_json() for each in self.figures],
            "slices": [{**each.to_json(), "p_corrected": p} for each, p in slices],
            "won": [self.example(id) for id in self.won[:num_examples]],
            "lost": [self.example(id) for id in self.lost[:num_examples]],
            "unanswered": list(self.unanswered),
        }

    def example(self, id: str) -> dict[str, Any]:
        """What both answered to an item."""
        return {"id": id, "first": self.first.items[id].answer, "second": self.second.items[id].answer}


def read_run(folder: Path) -> EvalRun:
    """A finished run: the folder of one task, or one that holds only that.

    Raises NotFoundError if there is none, UsageError if a file in it is damaged, with file and line.
    """
    path = _run_folder(folder)
    try:
        result = json.loads(read_text(path / _RESULT))
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict) or any(name not in result for name in _SAME):
        raise UsageError(f"{path / _RESULT} is no result of an evaluation", hint="run tokenmill eval again")
    items: dict[str, ItemResult] = {}
    for row in read_rows(path / _ITEMS):
        try:
            item = item_from_json(row.fields)
            usable = all(isinstance(value, int | float) for value in item.metrics.values())
        except (TypeError, AttributeError):
            usable = False
        if not usable:
            row.place.refuse("is no result of an item", "run tokenmill eval again")
        items[item.id] = item  # what was asked again comes later
    return EvalRun(path=path, result=result, items=items)


def _run_folder(folder: Path) -> Path:
    if folder.name == _RESULT:
        return folder.parent
    if (folder / _RESULT).is_file():
        return folder
    inner = sorted(path.parent for path in folder.glob(f"*/{_RESULT}"))
    if len(inner) == 1:
        return inner[0]
    if inner:
        names = ", ".join(path.name for path in inner)
        raise UsageError(f"{folder} holds several tasks: {names}", hint=f"give one, such as {inner[0]}")
    if (folder / _ITEMS).is_file():
        raise NotFoundError(f"{folder} is not finished", hint="go on with it: tokenmill eval ... --resume")
    raise NotFoundError(f"{folder} holds no {_RESULT}", hint="give a folder of tokenmill eval --out")


def compare(first: EvalRun, second: EvalRun, *, metric: str = "", confidence: float = 0.95) -> Comparison:
    """Compare two runs on the items that both answered; the headline metric is the task's, or `metric`.

    Raises UsageError if the runs are not of the same task, version and items, or nothing is left to compare.
    """
    _check_same(first, second)
    unanswered = [id for id, item in first.items.items() if item.error or second.items[id].error]
    both = [id for id in first.items if id not in set(unanswered)]
    names = dict.fromkeys(name for id in both for name in first.items[id].metrics)
    if not names:
        raise UsageError(
            f"{first.path} and {second.path} have no item that both answered", hint="see the errors in them"
        )
    asked = metric or str(first.result.get("metric", ""))
    headline = _TEXT if asked == "perplexity" and _TEXT in names else asked
    if headline not in names:
        raise UsageError(f"there is no metric {headline!r}", hint=f"there are {', '.join(names)}")
    figures = [_figures(first, second, both, name, "", confidence) for name in names]
    groups: dict[str, list[str]] = {}
    for id in both:
        groups.setdefault(first.items[id].slice, []).append(id)
    slices = [
        _figures(first, second, ids, headline, name, confidence)
        for name, ids in sorted(groups.items())
        if len(groups) > 1
    ]
    change = {id: _value(second, id, headline) - _value(first, id, headline) for id in both}
    return Comparison(
        first=first,
        second=second,
        metric=headline,
        confidence=confidence,
        figures=figures,
        slices=slices,
        slice_p=holm([each.p for each in slices]),
        won=[id for id in both if change[id] > 0],
        lost=[id for id in both if change[id] < 0],
        unanswered=unanswered,
    )


def judge(
    found: Comparison, *, margin: float, num_candidates: int = 1, confidence: float | None = None
) -> Verdict:
    """Is the second run as good as the first but for a margin, as one of so many candidates?

    Raises UsageError if the metric does not lie between 0 and 1, or items were not answered.
    """
    if found.unanswered:
        raise UsageError(
            f"{len(found.unanswered)} items were not answered, the first is {found.unanswered[0]}",
            hint="a verdict needs them all: tokenmill eval ... --resume asks them again",
        )
    values = [
        item.metrics[found.metric] for run in (found.first, found.second) for item in run.items.values()
    ]
    if min(values) < 0 or max(values) > 1:
        raise UsageError(f"{found.metric} does not lie between 0 and 1", hint="give --metric, or no --margin")
    return verdict(
        found.headline.evidence,
        margin=margin,
        confidence=found.confidence if confidence is None else confidence,
        num_candidates=num_candidates,
    )


def noise_between(found: Comparison, again: EvalRun) -> NoiseFloor:
    """How far the first run is from another one of the same model. Raises UsageError if it is not that."""
    _check_same(found.first, again)
    if found.first.result.get("model") != again.result.get("model"):
        raise UsageError(
            f"{again.path} is of another model than {found.first.path}", hint="give a second run of the first"
        )
    ids = [id for id, item in found.first.items.items() if not item.error and not again.items[id].error]
    return noise_floor(
        [_value(found.first, id, found.metric) for id in ids],
        [_value(again, id, found.metric) for id in ids],
        confidence=found.confidence,
    )


def _check_same(first: EvalRun, second: EvalRun) -> None:
    """Raises UsageError unless both are of the same task, version and items."""
    for name in _SAME:
        if first.result[name] != second.result[name]:
            what = "the questions are not the same" if name == "questions" else ""
            what = what or f"{name} is {first.result[name]} and {second.result[name]}"
            raise UsageError(
                f"{first.path} and {second.path} cannot be compared: {what}",
                hint="run both with the same version of tokenmill, the same data and the same --limit",
            )
    if first.items.keys() != second.items.keys():
        odd = sorted(first.items.keys() ^ second.items.keys())
        raise UsageError(
            f"{len(odd)} items are in only one of {first.path} and {second.path}, the first is {odd[0]}",
            hint="go on with the run that is not finished: tokenmill eval ... --resume",
        )


def _value(run: EvalRun, id: str, metric: str) -> float:
    try:
        return float(run.items[id].metrics[metric])
    except KeyError:
        raise UsageError(
            f"{run.path}: item {id} has no {metric}", hint="choose another --metric, or run it again"
        ) from None


def _figures(
    first: EvalRun, second: EvalRun, ids: Sequence[str], metric: str, slice: str, confidence: float
) -> Figures:
    """One metric on these items."""
    first_N = np.array([_value(first, id, metric) for id in ids])
    second_N = np.array([_value(second, id, metric) for id in ids])
    in_windows = metric == _TEXT
    evidence = _window_difference(first, second, ids) if in_windows else paired(second_N, first_N)
    if isinstance(evidence, PairedCounts):
        test = mcnemar(evidence.wins, evidence.losses)
        p, p_mid = test.exact, test.mid
    else:
        p, p_mid = min(1.0, 2 * min(evidence.p_above(0.0), evidence.p_below(0.0))), None
    one: Callable[[EvalRun], Interval] = (
        (lambda run: _window_mean(run, ids).interval(confidence))
        if in_windows
        else (lambda run: mean_interval(first_N if run is first else second_N, confidence=confidence))
    )
    return Figures(
        metric=metric,
        slice=slice,
        num_items=len(ids),
        first=one(first),
        second=one(second),
        difference=evidence.interval(confidence),
        wins=int((second_N > first_N).sum()),
        losses=int((second_N < first_N).sum()),
        p=p,
        p_mid=p_mid,
        evidence=evidence,
    )


def _windows(run: EvalRun, ids: Sequence[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(scored tokens, log-probability) of all windows."""
    windows = [pair for id in ids for pair in run.items[id].answer if pair[0]]
    return np.array(windows, np.float64).reshape(-1, 2)


def _window_mean(run: EvalRun, ids: Sequence[str]) -> MeanBootstrap:
    windows_W2 = _windows(run, ids)
    return MeanBootstrap(windows_W2[:, 1], windows_W2[:, 0])


def _window_difference(first: EvalRun, second: EvalRun, ids: Sequence[str]) -> MeanBootstrap:
    """Of log-probabilities per token; windows are what is drawn anew, for their tokens hang together."""
    first_W2, second_W2 = _windows(first, ids), _windows(second, ids)
    if first_W2.shape != second_W2.shape or (first_W2[:, 0] != second_W2[:, 0]).any():
        raise UsageError(
            f"{first.path} and {second.path} cut the text into other windows or tokens",
            hint="perplexity compares only with the same tokenizer and the same --window",
        )
    return MeanBootstrap(second_W2[:, 1] - first_W2[:, 1], first_W2[:, 0])
