"""What a log looks like: closed labels, JSON, SQL, short answers or free text; who answered, at which price.

A guess to begin with, each with its reason, so that `tokenmill init` can write a file to be read and mended.
It never guesses what nobody can see in a log: the latency that users need, or what terms somebody agreed to.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenmill.costs import Price, load_prices
from tokenmill.workload.config import Incumbent, Quality, Scorer, WorkloadConfig
from tokenmill.workload.formats import Columns
from tokenmill.workload.log import read_log
from tokenmill.workload.row import Log, Row
from tokenmill.workload.rows import json_field

__all__ = ["Inference", "infer_log", "infer_workload", "model_price"]

_MAX_LABELS: Final = 300
_MAX_LABEL_CHARS: Final = 80
_ROWS_PER_LABEL: Final = 5
_NEARLY_ALL: Final = 0.95
_MAX_SLICES: Final = 50
_ROWS_PER_SLICE: Final = 20
_SHORT_CHARS: Final = 100
_SQL: Final = re.compile(
    r"\s*(```sql\s*)?(select\b.+\bfrom\b|with\b.+\bselect\b|insert\s+into\b|update\b.+\bset\b|delete\s+from\b)",
    flags=re.IGNORECASE | re.DOTALL,
)
_FIRST_FIELDS: Final = ("intent", "type", "category", "kind", "label", "action", "name")
_DATE: Final = re.compile(r"[-@](\d{8}|\d{4}-\d{2}-\d{2}|latest)$")


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A configuration with the log that it was guessed from; `reasons` by the name of the field."""

    config: WorkloadConfig
    log: Log
    reasons: Mapping[str, str]


class _Guess(NamedTuple):
    scorer: Scorer
    reason: str
    labels: tuple[str, ...] = ()


def infer_workload(path: Path, *, columns: Columns | None = None) -> WorkloadConfig:
    """The configuration for a log of which nobody said anything. Errors as of `read_log`."""
    return infer_log(path, columns=columns).config


def infer_log(
    path: Path, *, columns: Columns | None = None, prices: Sequence[Price] | None = None
) -> Inference:
    """As `infer_workload`, with the reasons; `prices` are those of `tokenmill prices` unless given."""
    log = read_log(path, columns=columns)
    guess = _guess([row.target for row in log.rows])
    slice_by, why_slices = _slices(log.rows, guess)
    incumbent, why_price = _incumbent(log.rows, load_prices() if prices is None else prices)
    config = WorkloadConfig(
        log=path,
        columns=columns or {},
        slice_by=slice_by,
        incumbent=incumbent,
        quality=Quality(scorer=guess.scorer),
        labels=guess.labels,
    )
    reasons = {"scorer": guess.reason, "slice_by": why_slices, "incumbent": why_price}
    return Inference(config=config, log=log, reasons=reasons)


def _guess(answers: Sequence[str]) -> _Guess:
    num = len(answers)
    num_json = sum(_is_json(each) for each in answers)
    if num_json >= _NEARLY_ALL * num:
        return _Guess("json", f"{num_json} of {num} answers are JSON")
    counts = Counter(each.strip() for each in answers)
    num_known = sum(count for count in counts.values() if count > 1)
    is_short = max(map(len, counts)) <= _MAX_LABEL_CHARS and not any("\n" in each for each in counts)
    is_closed = 2 <= len(counts) <= min(_MAX_LABELS, num // _ROWS_PER_LABEL)
    if is_short and is_closed and num_known >= _NEARLY_ALL * num:
        said = f"{num} answers are {len(counts)} different short texts: a closed set of labels"
        return _Guess("label", said, tuple(sorted(counts)))
    num_sql = sum(bool(_SQL.match(each)) for each in answers)
    if num_sql >= _NEARLY_ALL * num:
        return _Guess("sql", f"{num_sql} of {num} answers are SQL")
    lengths = sorted(map(len, answers))
    typical = lengths[int(_NEARLY_ALL * (num - 1))]
    if typical <= _SHORT_CHARS:
        return _Guess("exact", f"answers are short: 95 % have at most {typical} characters")
    return _Guess("rouge", f"answers are free text: 5 % have more than {typical} characters")


def _is_json(text: str) -> bool:
    """Whether a text is an object or a list."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _slices(rows: Sequence[Row], guess: _Guess) -> tuple[str, str]:
    named = Counter(row.slice for row in rows)
    if len(named) > 1:
        return "log", f"the log names {len(named)} slices"
    if guess.scorer == "json":
        field, num = _slicing_field([row.target for row in rows])
        if field:
            return f"json:{field}", f"the field {field!r} of the answers has {num} values"
    if guess.labels and len(guess.labels) <= _MAX_SLICES and len(rows) >= _ROWS_PER_SLICE * len(guess.labels):
        return "answer", f"each of the {len(guess.labels)} labels is a slice"
    return "log", "nothing divides the rows: they are one slice"


def _slicing_field(answers: Sequence[str]) -> tuple[str, int]:
    """A field of nearly all answers with few values, and how many."""
    first = _object(answers[0])
    names = sorted(first, key=lambda name: (name not in _FIRST_FIELDS, list(first).index(name)))
    for name in names[:20]:
        counts = Counter(json_field(each, name) for each in answers)
        num_without = counts.pop("", 0)
        is_common = num_without <= (1 - _NEARLY_ALL) * len(answers)
        if is_common and 2 <= len(counts) <= min(_MAX_SLICES, len(answers) // _ROWS_PER_SLICE):
            return name, len(counts)
    return "", 0


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text) if _is_json(text) else None
    return value if isinstance(value, dict) else {}


def _incumbent(rows: Sequence[Row], prices: Sequence[Price]) -> tuple[Incumbent, str]:
    named = Counter(row.origin for row in rows if row.origin)
    if not named:
        return Incumbent(), "the log does not say who answered"
    name, num = named.most_common(1)[0]
    said = f"{num} of {len(rows)} answers are of it"
    price = model_price(name, prices)
    if price is None:
        return Incumbent(name=name), f"{said}; `tokenmill prices` has no price of that name"
    found = Incumbent(
        name=name,
        price_in=price.input_usd,
        price_cached=price.cached_usd,
        price_out=price.output_usd,
        price_date=price.date,
        price_source=f"{price.provider} {price.model}: {price.source}",
    )
    return found, said


def model_price(name: str, prices: Sequence[Price]) -> Price | None:
    """The newest standard price of a model as logs name it: with or without provider and date."""
    provider, _, rest = name.lower().rpartition("/")
    plain = _DATE.sub("", rest)
    found = [each for each in prices if each.tier == "standard" and each.model.lower() in (rest, plain)]
    same = [each for each in found if provider and provider.endswith(each.provider.lower())]
    return max(same or found, key=lambda each: each.date, default=None)
