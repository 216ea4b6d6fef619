"""How good an answer is: a figure between 0 and 1 beside what was wanted, and whether it passes.

What is wanted is the reference where the log has one, else what the incumbent answered; then the figure is
agreement. Answers that are scored right or wrong pass if they are right. Graded ones pass if they are not
worse than the incumbent's own by more than the margin, or reach the bar where that is absolute.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from tokenmill.core import UsageError
from tokenmill.evals.rouge import rouge
from tokenmill.evals.sql import normalised_sql
from tokenmill.evals.tasks.extraction import first_object
from tokenmill.evals.tasks.labels import label_said

__all__ = ["GRADED", "SCORERS", "Scorer", "find_scorer", "passes"]

Scorer: TypeAlias = Callable[[str, str], float]
"""The figure of (wanted, given)."""

GRADED: Final = frozenset({"rouge"})


def find_scorer(name: str, labels: Sequence[str] = ()) -> Scorer:
    """The scorer of this name; `labels` are the closed set of `label`. Raises UsageError."""
    if name == "label":
        return partial(_label, labels=tuple(labels))
    if name not in SCORERS:
        raise UsageError(f"there is no scorer {name!r}", hint=f"use one of {', '.join([*SCORERS, 'label'])}")
    return SCORERS[name]


def passes(score: float, incumbent_score: float, *, name: str, margin: float, bar: float | None) -> bool:
    """Whether an answer passes; `bar` is None if it is relative to the incumbent."""
    if name not in GRADED:
        return score >= 1.0
    return score >= (incumbent_score - margin if bar is None else bar)


def _exact(wanted: str, given: str) -> float:
    return float(_plain(wanted) == _plain(given))


def _contains(wanted: str, given: str) -> float:
    return float(bool(_plain(wanted)) and _plain(wanted) in _plain(given))


def _label(wanted: str, given: str, labels: Sequence[str]) -> float:
    known = labels if wanted in labels else (*labels, wanted)
    return float(label_said(given, known) == wanted)


def _json(wanted: str, given: str) -> float:
    """The same JSON value, whatever the order of keys and the white space; texts without regard to case and
    spaces at their ends.
    """
    target, said = _value(wanted), _value(given)
    return float(said is not None and _canonical(target) == _canonical(said))


def _sql(wanted: str, given: str) -> float:
    return float(normalised_sql(_unfenced(wanted)) == normalised_sql(_unfenced(given)))


def _rouge(wanted: str, given: str) -> float:
    return rouge(wanted, given)["rougeL"]


SCORERS: Final[dict[str, Scorer]] = {
    "exact": _exact,
    "contains": _contains,
    "json": _json,
    "sql": _sql,
    "rouge": _rouge,
}


def _plain(text: str) -> str:
    return " ".join(text.split())


def _value(text: str) -> Any:
    """The JSON value that a text is, or the first object in it; None for neither."""
    try:
        return json.loads(_unfenced(text))
    except (ValueError, RecursionError):
        return first_object(text)


def _unfenced(text: str) -> str:
    found = re.search(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    return found[1].strip() if found else text.strip()


def _canonical(value: Any) -> Any:
    """The value with texts made plain; 1 equals 1.0, and neither is true."""
    if isinstance(value, dict):
        return {str(name): _canonical(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_canonical(each) for each in value]
    if isinstance(value, str):
        return " ".join(value.lower().split())
    return (isinstance(value, bool), value)
