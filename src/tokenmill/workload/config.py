"""`workload.yaml`: which log, what it costs today, what must hold, what may be spent; read strictly.

    log: log.jsonl.gz
    incumbent: {name: openai/gpt-5-mini, price_in: 0.25, price_out: 2.0, price_date: 2026-08-05}
    quality: {scorer: json, bar: incumbent, margin: 0.02}
    slo: {e2e_ms: 500}

Every key has a default but `log`. What is not known, or makes no sense, is an error with file and line.
Relative paths are meant from the file's folder. Keys of endpoints are never in it, only names of variables.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec
import yaml

from tokenmill.core import NotFoundError, StorageError, UsageError
from tokenmill.workload.formats import COLUMNS
from tokenmill.workload.terms import Terms

__all__ = [
    "SCORERS",
    "Incumbent",
    "Quality",
    "Scorer",
    "Slo",
    "SplitConfig",
    "WorkloadConfig",
    "read_workload",
]

Scorer: TypeAlias = Literal["exact", "json", "label", "contains", "rouge", "sql"]
SCORERS: Final[tuple[Scorer, ...]] = ("exact", "json", "label", "contains", "rouge", "sql")

_MAX_BYTES: Final = 1 << 20
_HINT: Final = "see docs/workload.md"


@dataclass(frozen=True, kw_only=True)
class Incumbent:
    """Who answers today. "recorded": the answers are in the log. "endpoint": also a live one at `url`, whose
    key is in the variable `key_env`. "model": a model directory or a name of the store (`name`).

    Prices are USD for 10^6 tokens on `price_date`, according to `price_source`; None: nobody said.
    """

    kind: Literal["recorded", "endpoint", "model"] = "recorded"
    name: str = ""
    url: str = ""
    key_env: str = ""
    price_in: float | None = None
    price_cached: float | None = None
    price_out: float | None = None
    price_date: str = ""
    price_source: str = ""

    def __post_init__(self) -> None:
        for name in ("price_in", "price_cached", "price_out"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, 0.0, 5000.0, "USD for 1,000,000 tokens")
        if (self.price_in is None) != (self.price_out is None):
            given, missing = (
                ("price_in", "price_out") if self.price_out is None else ("price_out", "price_in")
            )
            raise UsageError(f"{given} is there and {missing} is not", hint="give both, or none")
        if self.price_in is not None and not self.price_date:
            raise UsageError("price_in has no date", hint="give price_date: when was this the price?")
        if self.kind == "endpoint" and not self.url:
            raise UsageError("kind is endpoint without a url", hint="give the URL (url:)")
        if self.kind == "model" and not self.name:
            raise UsageError("kind is model without a name", hint="give its name or folder (name:)")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a candidate must reach. `bar` "incumbent": not worse than the incumbent by more than `margin`; a
    number: a mean score of at least that, whatever `margin` is. The statement holds with `confidence`.
    """

    scorer: Scorer = "exact"
    bar: float | Literal["incumbent"] = "incumbent"
    margin: float = 0.02
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not isinstance(self.bar, str):
            _check("bar", self.bar, 0.0, 1.0, "a mean score, or incumbent")
        if not 0.0 < self.margin < 1.0:
            raise UsageError(f"margin is {self.margin:g}", hint="use a value between 0 and 1, such as 0.02")
        if not 0.5 < self.confidence < 1.0:
            raise UsageError(f"confidence is {self.confidence:g}", hint="use a value above 0.5, below 1")


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Bounds of latency in milliseconds at a percentile: to the first token, between tokens, to the end."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    percentile: float = 95.0

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, 0.01, 1e8, "milliseconds")
        _check("percentile", self.percentile, 50.0, 99.99, "for example 95")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Shares of the rows. `by` "time": the newest are certified; "cluster": by chance; "auto": time where all
    rows have one. Texts with at least `near` of their pieces in common stay together.
    """

    train: float = 0.7
    select: float = 0.1
    certify: float = 0.2
    by: Literal["auto", "time", "cluster"] = "auto"
    seed: int = 0
    near: float = 0.7

    def __post_init__(self) -> None:
        for name in ("train", "select", "certify"):
            _check(name, getattr(self, name), 0.0, 1.0, "a share of the rows")
        if abs(self.train + self.select + self.certify - 1.0) > 1e-6 or not self.certify:
            raise UsageError(
                f"train, select and certify are {self.train:g}, {self.select:g} and {self.certify:g}",
                hint="their sum is 1, and certify has some",
            )
        _check("near", self.near, 0.3, 1.0, "a likeness")

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of train, select and certify."""
        return self.train, self.select, self.certify


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """A workload and what is wanted of it.

    `columns` name the columns of a CSV log (keys of `formats.COLUMNS`). `slice_by` is what a row's slice
    is: "log" what the log says, "answer" the right answer, "json:FIELD" a field of it, "none". `labels` is
    the closed set of answers, if it is one. `price_per_hour` is the machine's, in USD; `budget_s` what the
    search may take.
    """

    log: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    slice_by: str = "log"
    incumbent: Incumbent = field(default_factory=Incumbent)
    quality: Quality = field(default_factory=Quality)
    slo: Slo = field(default_factory=Slo)
    price_per_hour: float | None = None
    price_per_hour_source: str = ""
    budget_s: float = 1800.0
    labels: tuple[str, ...] = ()
    terms: Terms = field(default_factory=Terms)
    split: SplitConfig = field(default_factory=SplitConfig)

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in COLUMNS:
                raise UsageError(f"columns.{name} is not known", hint=f"use {', '.join(COLUMNS)}")
        if self.slice_by not in ("log", "answer", "none") and not self.slice_by.removeprefix("json:"):
            raise UsageError("slice_by names no field", hint="use log, answer, none or json:FIELD")
        if self.slice_by not in ("log", "answer", "none") and not self.slice_by.startswith("json:"):
            raise UsageError(f"slice_by is {self.slice_by!r}", hint="use log, answer, none or json:FIELD")
        if self.price_per_hour is not None:
            _check("price_per_hour", self.price_per_hour, 0.0, 1e5, "USD")
        _check("budget_s", self.budget_s, 1.0, 30 * 86400.0, "seconds")
        if len(set(self.labels)) < len(self.labels):
            raise UsageError("labels has one twice", hint="give each once")
        if self.quality.scorer == "label" and not self.labels:
            raise UsageError("scorer is label, and there are no labels", hint="give them (labels:)")


def read_workload(path: Path) -> WorkloadConfig:
    """The workload in a file.

    Raises NotFoundError without it, StorageError if it cannot be read, UsageError that names file, line and
    field for what it says.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no file {path}", hint="`tokenmill init LOG.jsonl` writes one"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})", hint="check it") from None
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path} has {len(data)} bytes", hint=f"at most {_MAX_BYTES}")
    lines = _lines(path, data)
    try:
        value = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is no YAML ({' '.join(str(error).split())[:200]})", hint="mend it"
        ) from None
    try:
        value = _with_texts(value)
        _check_keys(value, WorkloadConfig, "")
        found = msgspec.convert(value, WorkloadConfig, strict=True, dec_hook=_read_path)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        place = place.rstrip("`").replace("[...]", "")
        shown = f"{place}: {what}{_choices(place)}" if place else what
        raise UsageError(f"{_where(path, lines, place)}: {shown}", hint=_HINT) from None
    except UsageError as error:
        place = error.message.split()[0].strip(",")
        raise UsageError(f"{_where(path, lines, place)}: {error.message}", hint=error.hint or _HINT) from None
    return dataclasses.replace(found, log=path.parent / found.log, incumbent=_placed(found.incumbent, path))


def _placed(incumbent: Incumbent, path: Path) -> Incumbent:
    """With the folder of a model, which begins with ./ or ../, as seen from the file's folder."""
    if incumbent.kind != "model" or not incumbent.name.startswith(("./", "../")):
        return incumbent
    return dataclasses.replace(incumbent, name=str((path.parent / incumbent.name).resolve()))


def _where(path: Path, lines: Mapping[str, int], place: str) -> str:
    """File and line of a field, which may be named without the ones that it is in."""
    named = (line for name, line in lines.items() if name == place or name.endswith(f".{place}"))
    line = next(named, 0)
    return f"{path}:{line}" if line and place else str(path)


def _choices(place: str) -> str:
    """What a field may be, where that is one of a few words."""
    kind: Any = WorkloadConfig
    for name in place.split("."):
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    found = [each for part in (kind, *typing.get_args(kind)) for each in typing.get_args(part)]
    words = [each for each in found if isinstance(each, str)]
    return f", expected {', '.join(words)}" if words else ""


def _lines(path: Path, data: bytes) -> dict[str, int]:
    """The line of every field. Raises UsageError for what is no YAML, and for a key that is there twice."""
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
        return dict(_places(root, "", path)) if root is not None else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        said = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise UsageError(f"{where}: is no YAML ({said})", hint="mend it") from None


def _places(node: yaml.Node, place: str, path: Path) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, inner in node.value:
            name = f"{place}.{key.value}" if place else str(key.value)
            line = key.start_mark.line + 1
            if name in seen:
                raise UsageError(f"{path}:{line}: {name} is there twice", hint="give it once")
            seen.add(name)
            yield name, line
            yield from _places(inner, name, path)
    elif isinstance(node, yaml.SequenceNode):
        for at, inner in enumerate(node.value):
            yield f"{place}[{at}]", inner.start_mark.line + 1
            yield from _places(inner, f"{place}[{at}]", path)


def _with_texts(value: Any) -> Any:
    """A date, which YAML reads out of a plain 2026-08-05, as the text that it was."""
    if isinstance(value, dict):
        return {key: _with_texts(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_texts(inner) for inner in value]
    return value.isoformat() if isinstance(value, date) else value


def _check_keys(value: object, kind: Any, place: str) -> None:
    """Refuse keys that no field has, anywhere below."""
    if isinstance(kind, types.UnionType):
        return
    if not dataclasses.is_dataclass(kind):
        return
    if not isinstance(value, dict):
        raise UsageError(f"{place or 'the file'} is no mapping")
    hints = typing.get_type_hints(kind)
    for key, inner in value.items():
        where = f"{place}.{key}" if place else str(key)
        if key not in hints:
            raise UsageError(f"{where} is not known", hint=f"use {', '.join(hints)}")
        _check_keys(inner, hints[key], where)


def _read_path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    raise ValueError("expected the name of a file")


def _check(name: str, value: float, low: float, high: float, what: str) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value:g}", hint=f"use a value from {low:g} to {high:g}: {what}")
