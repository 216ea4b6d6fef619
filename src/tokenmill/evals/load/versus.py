"""Two systems side by side: the same requests, in turns (A B A B), and the table that buyers know.

Turns alternate so that what changes on the machine or the network meanwhile meets both. Samples of all
rounds of one system are taken together. An improvement is 1 - B / A for what should be small, and B / A - 1
for what should be large; its interval draws the requests of both again (bootstrap).

Money: a machine at a price an hour costs that whether it is busy or not, so the seconds of the rounds are
paid in full. From outside only waiting is seen: the part of it before the first token is charged to input,
the rest to output. That split is an estimate, and says so; the sum is not. A price list is taken as given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.evals.load.samples import Sample
from tokenmill.evals.load.summary import duration
from tokenmill.evals.load.sweep import LevelResult

__all__ = [
    "Comparison",
    "Figure",
    "Label",
    "MachinePrice",
    "Side",
    "TokenPrice",
    "compare_sides",
    "token_prices",
]

Label: TypeAlias = Literal["measured", "estimated", "given", "not measured"]
"""How a figure came about."""

_NUM_RESAMPLES = 1000
_MAX_DRAWN = 1 << 20
_MIN_TO_COMPARE = 2

_Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MachinePrice:
    """What the machine costs, in dollars an hour."""

    usd_per_hour: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.usd_per_hour < 1e6:
            raise UsageError(f"a price of {self.usd_per_hour} dollars an hour", hint="use 0 or more")


@dataclass(frozen=True, kw_only=True)
class TokenPrice:
    """What a provider asks, in dollars for a million tokens in and out."""

    usd_per_1m_in: float
    usd_per_1m_out: float

    def __post_init__(self) -> None:
        if not (0.0 <= self.usd_per_1m_in < 1e6 and 0.0 <= self.usd_per_1m_out < 1e6):
            raise UsageError("a price for tokens is no price", hint="use dollars for a million, 0 or more")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One system: its rounds, and what is known beside them. `joules` is the energy of all rounds."""

    name: str
    rounds: Sequence[LevelResult]
    context_length: int | None = None
    price: MachinePrice | TokenPrice | None = None
    joules: float | None = None
    energy_label: Label = "not measured"

    @property
    def samples(self) -> list[Sample]:
        """Measured samples of all rounds."""
        return [s for result in self.rounds for s in result.run.samples if not s.is_warmup]

    @property
    def ok(self) -> list[Sample]:
        """Those that succeeded."""
        return [sample for sample in self.samples if sample.status == "ok"]

    @property
    def seconds(self) -> float:
        """How long its rounds took together."""
        return sum(duration([s for s in result.run.samples if not s.is_warmup]) for result in self.rounds)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of the table: the same figure of both, None where there is none, and the improvement with
    interval.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    label_a: Label
    label_b: Label
    improvement: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The table, and how many requests of each succeeded, of how many."""

    figures: tuple[Figure, ...]
    num_ok: tuple[int, int]
    num_requests: tuple[int, int]


def compare_sides(a: Side, b: Side, seed: int = 0) -> Comparison:
    """The table of two systems that were measured with the same requests."""
    rng = np.random.default_rng(seed)
    figures: list[Figure] = []
    for title, time_of in _LATENCIES:
        times = (_times(a.ok, time_of), _times(b.ok, time_of))
        figures += [_latency(f"{title} p{level * 100:g}", level, *times, rng) for level in (0.5, 0.99)]
    figures.append(_throughput(a, b))
    figures.append(_per_token("J/output token", "J", a, b, lambda side: _joules_per_token(side, False)))
    figures.append(_per_token("J/total token", "J", a, b, lambda side: _joules_per_token(side, True)))
    figures += [_price(a, b, which) for which in (0, 1)]
    context = (a.context_length, b.context_length)
    figures.append(_plain("context", "tokens", *context, larger_is_better=True))
    return Comparison(
        figures=tuple(figures),
        num_ok=(len(a.ok), len(b.ok)),
        num_requests=(len(a.samples), len(b.samples)),
    )


def token_prices(side: Side) -> tuple[float | None, float | None, Label]:
    """Dollars for a million tokens in and out, and how they came about."""
    ok = side.ok
    if isinstance(side.price, TokenPrice):
        return side.price.usd_per_1m_in, side.price.usd_per_1m_out, "given"
    if side.price is None or not ok:
        return None, None, "not measured"
    usd = side.price.usd_per_hour * side.seconds / 3600.0
    waiting = sum(sample.ttft_s("sent") or 0.0 for sample in ok)
    share = waiting / (sum(sample.e2e_s("sent") for sample in ok) or 1.0)
    num_input = sum(sample.num_input_tokens for sample in ok)
    num_output = sum(sample.num_output_tokens for sample in ok)
    return 1e6 * usd * share / max(1, num_input), 1e6 * usd * (1 - share) / max(1, num_output), "estimated"


_LATENCIES: tuple[tuple[str, Callable[[Sample], float | None]], ...] = (
    ("TTFT", lambda sample: sample.ttft_s()),
    ("TPOT", lambda sample: sample.tpot_s),
    ("end to end", lambda sample: sample.e2e_s()),
)


def _times(samples: Sequence[Sample], time_of: Callable[[Sample], float | None]) -> _Floats:
    return np.array([1e3 * time for sample in samples if (time := time_of(sample)) is not None])


def _latency(name: str, level: float, a: _Floats, b: _Floats, rng: np.random.Generator) -> Figure:
    value_a, value_b = (float(np.quantile(times, level)) if len(times) else None for times in (a, b))
    labels: tuple[Label, Label] = (_label(value_a), _label(value_b))
    improvement = _improvement(value_a, value_b, larger_is_better=False)
    low = high = None
    if improvement is not None and min(len(a), len(b)) >= _MIN_TO_COMPARE:
        drawn_a, drawn_b = _redrawn(a, level, rng), _redrawn(b, level, rng)
        # A time of 0 is one that the clock does not resolve: all pieces of an answer came at once.
        drawn = 1 - drawn_b[drawn_a > 0] / drawn_a[drawn_a > 0]
        low, high = (float(bound) for bound in np.quantile(drawn, [0.025, 0.975]))
    return Figure(
        name=name,
        unit="ms",
        a=value_a,
        b=value_b,
        label_a=labels[0],
        label_b=labels[1],
        improvement=improvement,
        low=low,
        high=high,
    )


def _redrawn(times: _Floats, level: float, rng: np.random.Generator) -> _Floats:
    """The quantile of samples drawn again, many times."""
    num_rows = max(1, min(_NUM_RESAMPLES, _MAX_DRAWN // len(times)))
    parts = []
    for first in range(0, _NUM_RESAMPLES, num_rows):
        shape = (min(num_rows, _NUM_RESAMPLES - first), len(times))
        parts.append(np.quantile(times[rng.integers(0, len(times), shape)], level, axis=1))
    return np.concatenate(parts)


def _throughput(a: Side, b: Side) -> Figure:
    """Output tokens a second over all rounds; the interval is the rounds' own spread, if there are
    several.
    """
    rates = [_rounds(a), _rounds(b)]
    values = [
        sum(s.num_output_tokens for s in side.ok) / side.seconds if side.seconds else None for side in (a, b)
    ]
    ratios = [y / x - 1 for x, y in zip(*rates, strict=False) if x > 0]
    return Figure(
        name="output",
        unit="tokens/s",
        a=values[0],
        b=values[1],
        label_a=_label(values[0]),
        label_b=_label(values[1]),
        improvement=_improvement(*values, larger_is_better=True),
        low=min(ratios) if len(ratios) > 1 else None,
        high=max(ratios) if len(ratios) > 1 else None,
    )


def _rounds(side: Side) -> list[float]:
    return [result.summary.output_tokens_per_s for result in side.rounds]


def _joules_per_token(side: Side, with_input: bool) -> tuple[float | None, Label]:
    """The energy of all turns over their tokens; both with warm-up, which took energy too."""
    ok = [s for result in side.rounds for s in result.run.samples if s.status == "ok"]
    num_tokens = sum(s.num_output_tokens + with_input * s.num_input_tokens for s in ok)
    if side.joules is None or not num_tokens:
        return None, "not measured"
    return side.joules / num_tokens, side.energy_label


def _per_token(
    name: str, unit: str, a: Side, b: Side, of: Callable[[Side], tuple[float | None, Label]]
) -> Figure:
    (value_a, label_a), (value_b, label_b) = of(a), of(b)
    improvement = _improvement(value_a, value_b, larger_is_better=False)
    return Figure(
        name=name, unit=unit, a=value_a, b=value_b, label_a=label_a, label_b=label_b, improvement=improvement
    )


def _price(a: Side, b: Side, which: int) -> Figure:
    def of(side: Side) -> tuple[float | None, Label]:
        usd_in, usd_out, label = token_prices(side)
        return (usd_out if which else usd_in), label

    return _per_token(("$/1M in", "$/1M out")[which], "$", a, b, of)


def _plain(name: str, unit: str, a: float | None, b: float | None, *, larger_is_better: bool) -> Figure:
    labels: list[Label] = ["not measured" if value is None else "given" for value in (a, b)]
    improvement = _improvement(a, b, larger_is_better=larger_is_better)
    return Figure(
        name=name, unit=unit, a=a, b=b, label_a=labels[0], label_b=labels[1], improvement=improvement
    )


def _label(value: float | None) -> Label:
    return "not measured" if value is None else "measured"


def _improvement(a: float | None, b: float | None, *, larger_is_better: bool) -> float | None:
    if a is None or b is None or a <= 0:
        return None
    return b / a - 1 if larger_is_better else 1 - b / a
