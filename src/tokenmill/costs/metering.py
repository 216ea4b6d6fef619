"""Gives each request its seconds, joules and dollars, so that the parts sum to the whole step.

A step's time is split by what caused it: by the rows that a request computed, the rows it wanted logits of,
and the tokens of the cache it read, at `StepPrices`. What a step takes anyhow (the weights are read once) is
borne by the rows for whose sake it is made: a request that only fills rows which would stand idle is charged
what it adds. What a request caused with rows of its prompt is input, with rows of its answer output; a row of
guesses is its own, right or wrong. Tokens that were found in the cache cost what reading them costs, and
nothing else.

Amounts are integers of nanoseconds, nanojoules or nanodollars, and the parts lie between rounded running
sums, so nothing is lost or counted twice, and each part is within one unit of its exact share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Charge",
    "F64Array",
    "RowShare",
    "StepPrices",
    "StepUse",
    "add_charges",
    "meter_step",
    "split",
    "step_weights",
]


F64Array: TypeAlias = npt.NDArray[np.float64]
"""Weights of the parts of a step."""

_MOST: Final = float(1 << 62)


class RowShare(NamedTuple):
    """What one request did in one step; no count is negative.

    `prefill_rows` of its prompt and `decode_rows` of its output were computed, and `out_rows` of them, the
    last ones, had logits; attention read `fresh_kv_tokens` that this request had computed and
    `cached_kv_tokens` found in the prefix cache. Tokens that several requests read together count in parts.
    `own` is what else was done for it alone, in the unit of the prices. `fills` says that it only takes what
    others leave idle.
    """

    request: str
    prefill_rows: int = 0
    decode_rows: int = 0
    out_rows: int = 0
    fresh_kv_tokens: float = 0.0
    cached_kv_tokens: float = 0.0
    own: float = 0.0
    fills: bool = False


@dataclass(frozen=True, kw_only=True)
class StepPrices:
    """What the parts of a step take, as an estimate of its time says. The unit is free: only ratios count."""

    base: float = 0.0
    row: float = 0.0
    out_row: float = 0.0
    kv_token: float = 0.0

    def __post_init__(self) -> None:
        assert min(self.base, self.row, self.out_row, self.kv_token) >= 0, f"a negative price in {self}"


@dataclass(frozen=True, kw_only=True)
class StepUse:
    """What a whole step took: nanoseconds, nanojoules, nanodollars."""

    nanoseconds: int
    nanojoules: int = 0
    nanodollars: int = 0

    def __post_init__(self) -> None:
        assert min(self.nanoseconds, self.nanojoules, self.nanodollars) >= 0, "a negative amount"


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a request is charged, by kind of token: (nanoseconds, nanojoules, nanodollars) of each."""

    input: tuple[int, int, int] = (0, 0, 0)
    cached: tuple[int, int, int] = (0, 0, 0)
    output: tuple[int, int, int] = (0, 0, 0)

    def total(self) -> tuple[int, int, int]:
        """All three kinds together."""
        return _add(_add(self.input, self.cached), self.output)

    def __add__(self, other: "Charge") -> "Charge":
        return Charge(
            input=_add(self.input, other.input),
            cached=_add(self.cached, other.cached),
            output=_add(self.output, other.output),
        )


def split(amount: int, weights: "Sequence[float] | F64Array") -> list[int]:
    """Whole parts in proportion to `weights`, each within one of its exact share, that sum to `amount`.

    Each part lies between two running sums, so nothing is lost; without any weight the parts are even.
    An amount is below 2^63.
    """
    if not len(weights):
        assert amount == 0, "an amount and nobody to bear it"
        return []
    sums = np.cumsum(weights if np.any(weights) else np.ones(len(weights)))
    ends = np.minimum(np.rint(amount * (sums / sums[-1])).clip(max=_MOST).astype(np.int64), amount)
    ends[sums == sums[-1]] = amount
    parts: list[int] = np.diff(ends, prepend=0).tolist()
    return parts


def meter_step(use: StepUse, prices: StepPrices, shares: Sequence[RowShare]) -> dict[str, Charge]:
    """Every request's part of a step; they sum exactly to `use`. Requests must differ."""
    assert len({share.request for share in shares}) == len(shares), "a request twice in one step"
    weights = step_weights(prices, shares)
    amounts = (use.nanoseconds, use.nanojoules, use.nanodollars)
    parts = [split(amount, weights) for amount in amounts]
    charges = {}
    for at, share in enumerate(shares):
        seconds, joules, dollars = (part[3 * at : 3 * at + 3] for part in parts)
        kinds = list(zip(seconds, joules, dollars, strict=True))
        charges[share.request] = Charge(input=kinds[0], cached=kinds[1], output=kinds[2])
    return charges


def add_charges(sums: Mapping[str, Charge], step: Mapping[str, Charge]) -> dict[str, Charge]:
    """Charges of several steps, by request."""
    return {**sums, **{request: sums.get(request, Charge()) + charge for request, charge in step.items()}}


def step_weights(prices: StepPrices, shares: Sequence[RowShare]) -> F64Array:
    """What each request has part in a step: three numbers each, for input, cached input and output."""
    table = np.array([share[1:] for share in shares], np.float64).reshape(-1, len(RowShare._fields) - 1)
    prefills, decodes, outs, fresh, cached, own, fills = table.T
    rows = prefills + decodes
    # Who only fills what is idle pays for what is done anyhow if there is nobody else.
    pays_base = fills == 0.0 if np.any(rows[fills == 0.0]) else np.ones(len(rows), bool)
    row = prices.row + pays_base * (prices.base / max(1.0, rows[pays_base].sum()))
    out_decodes = np.minimum(outs, decodes)
    decode_part = np.where(rows > 0, decodes / np.maximum(rows, 1.0), 1.0)
    read = fresh * prices.kv_token
    weights = np.empty((len(rows), 3))
    weights[:, 0] = prefills * row + (outs - out_decodes) * prices.out_row + (1 - decode_part) * read
    weights[:, 1] = cached * prices.kv_token
    weights[:, 2] = decodes * row + out_decodes * prices.out_row + decode_part * read + own
    return weights.reshape(-1)


def _add(left: tuple[int, int, int], right: tuple[int, int, int]) -> tuple[int, int, int]:
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]
