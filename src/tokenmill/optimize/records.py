"""What is written down of a run: of each answer, of each candidate, of the incumbent. Values only.

They go into the run folder as JSON lines and come back as the same values (`to_json`, `from_json`), so that a
run that was killed, `verify` and the report read one thing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from tokenmill.core import UsageError
from tokenmill.evals.statistics import Interval

__all__ = [
    "Artefact",
    "EnergyLabel",
    "Explored",
    "Figures",
    "Item",
    "Kind",
    "Level",
    "Lineage",
    "Lost",
    "Range",
    "Stage",
    "from_json",
    "to_json",
]

Kind: TypeAlias = Literal["model", "fine-tuned", "student", "classifier", "scored labels", "cascade"]

EnergyLabel: TypeAlias = Literal["measured", "estimated", "not measured"]

Stage: TypeAlias = Literal["plan", "make", "explore"]

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Range:
    """A figure with its interval; None where the data set no bound, or nothing is known."""

    estimate: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @staticmethod
    def of(interval: Interval) -> "Range":
        """Of an interval whose ends may be infinite."""
        values = [each if math.isfinite(each) else None for each in (interval.estimate, interval.low)]
        high = interval.high if math.isfinite(interval.high) else None
        return Range(estimate=values[0], low=values[1], high=high, note=interval.note)


@dataclass(frozen=True, kw_only=True)
class Item:
    """What one candidate made of one row of the certifying part, beside the incumbent's recorded answer.

    Scores lie between 0 and 1; `passed` says whether it counts as an answer that passes. `usd` is this call's
    share of what the run cost, `incumbent_usd` what the incumbent charged. Rows of one `cluster` hang
    together. `deferred_to` is the second of a cascade that answered instead.
    """

    candidate: str
    id: str
    slice: str
    cluster: str
    score: float
    passed: bool
    incumbent_score: float
    incumbent_passed: bool
    usd: float
    incumbent_usd: float | None
    e2e_s: float
    ttft_s: float | None
    num_input_tokens: int
    num_output_tokens: int
    probability: float | None
    answer: str
    deferred_to: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load of the search for the best batch: so many requests at once, and what came of it."""

    concurrency: int
    requests_per_s: float
    output_tokens_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    ttft_p99_ms: float | None
    num_errors: int
    keeps_slo: bool | None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A candidate under load at its best batch, on the certifying part. Money is at the machine's price an
    hour, for a machine that is busy all the time.

    `usd_per_million_out` is None where answers are no tokens. `slo_share` is the share of requests that kept
    every limit. `client_limited` says that the sender itself may have been the bottleneck.
    """

    num_items: int
    num_errors: int
    concurrency: int
    quality: Range
    pass_share: Range
    p50_ms: Range
    p99_ms: Range
    ttft_p50_ms: Range | None
    ttft_p99_ms: Range | None
    requests_per_s: float
    output_tokens_per_s: float
    joules_per_token: float | None
    joules_per_pass: float | None
    energy_label: EnergyLabel
    energy_note: str
    usd_per_request: Range
    usd_per_pass: Range
    usd_per_million_out: float | None
    memory_bytes: int
    artefact_bytes: int
    slo_share: Range | None
    slo_kept: bool | None
    levels: tuple[Level, ...]
    deferred_share: Range | None = None
    client_limited: bool = False


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where something that is served comes from: a source with its digest, and what its licence or terms
    say.
    """

    what: str
    name: str
    digest: str = ""
    terms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What a candidate is once it is made: files in a folder, or an existing model. `path` may be empty.

    `trained_on` are the ids of the rows that it saw. `deployment` is its part of a deployment file;
    `needs` says for people what else is needed to serve it.
    """

    path: str
    digest: str
    num_bytes: int
    seconds: float
    lineage: tuple[Lineage, ...] = ()
    trained_on: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""


@dataclass(frozen=True, kw_only=True)
class Explored:
    """What a candidate did on a part of select, at a share of its training.

    `usd` is the mean cost of a call there, at the one load that was tried; a ranking, no certified figure.
    """

    candidate: str
    share: float
    num_items: int
    score: Range
    usd: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Why a candidate was not measured on the certifying part."""

    candidate: str
    stage: Stage
    reason: str


def to_json(value: object) -> dict[str, Any]:
    """A record as JSON has it. Raises ValueError for a number that is not finite."""
    fields = msgspec.to_builtins(value)
    assert isinstance(fields, dict)
    return fields


def from_json(kind: type[_T], fields: Mapping[str, Any], where: str) -> _T:
    """A record of a line. Raises UsageError that names `where` for one that is damaged."""
    try:
        return msgspec.convert(dict(fields), kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: no {kind.__name__} ({error})", hint="use another folder") from error
