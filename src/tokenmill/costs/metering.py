"""Gives each request its seconds, joules and dollars, so that the parts sum to the whole step.

A step's time is split by what caused it. Work on new rows, prompt or output, is shared by rows; reading
the cache is shared by the tokens of it that each request sees. What a request caused while its prompt was
computed is input, while it decoded output. Tokens that were found in the cache cost what keeping them
read costs, and nothing else. Amounts are integers of nanoseconds, nanojoules or nanodollars, and the
parts lie between rounded running sums, so nothing is lost or counted twice.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Charge", "RowShare", "StepUse", "add_charges", "meter_step", "split"]


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """What one request did in one step.

    `prefill_rows` of its prompt and `decode_rows` of its output were computed; attention read
    `fresh_kv_tokens` that this request had computed and `cached_kv_tokens` found in the prefix cache.
    """

    request: str
    prefill_rows: int = 0
    decode_rows: int = 0
    fresh_kv_tokens: int = 0
    cached_kv_tokens: int = 0

    def __post_init__(self) -> None:
        counts = (self.prefill_rows, self.decode_rows, self.fresh_kv_tokens, self.cached_kv_tokens)
        assert min(counts) >= 0, f"a negative count in {self}"


@dataclass(frozen=True, kw_only=True)
class StepUse:
    """What a whole step took: nanoseconds, nanojoules, nanodollars.

    `kv_share` of it was reading the cache, from 0 to 1, as the estimate of the step says.
    """

    nanoseconds: int
    nanojoules: int = 0
    nanodollars: int = 0
    kv_share: float = 0.0

    def __post_init__(self) -> None:
        assert 0 <= self.kv_share <= 1, f"the share of the cache is {self.kv_share}"
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


def split(amount: int, weights: Sequence[float]) -> list[int]:
    """Whole parts in proportion to `weights`, each within one of its exact share, that sum to `amount`.

    Each part lies between two running sums, so nothing is lost; without any weight the parts are even.
    """
    if not weights:
        assert amount == 0, "an amount and nobody to bear it"
        return []
    sums = list(itertools.accumulate(weights if any(weights) else [1.0] * len(weights)))
    ends = [amount if end == sums[-1] else min(amount, round(amount * (end / sums[-1]))) for end in sums]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def meter_step(use: StepUse, shares: Sequence[RowShare]) -> dict[str, Charge]:
    """Every request's part of a step; they sum exactly to `use`. Requests must differ."""
    assert len({share.request for share in shares}) == len(shares), "a request twice in one step"
    weights = _weights(shares, use.kv_share)
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
    added = dict(sums)
    for request, charge in step.items():
        old = added.get(request, Charge())
        added[request] = Charge(
            input=_add(old.input, charge.input),
            cached=_add(old.cached, charge.cached),
            output=_add(old.output, charge.output),
        )
    return added


def _weights(shares: Sequence[RowShare], kv_share: float) -> list[float]:
    """Three for each request: input, cached input, output."""
    num_rows = sum(share.prefill_rows + share.decode_rows for share in shares)
    num_read = sum(share.fresh_kv_tokens + share.cached_kv_tokens for share in shares)
    # A step without rows, or without anything read, has one cause only.
    kv_share = 0.0 if not num_read else 1.0 if not num_rows else kv_share
    by_row = (1 - kv_share) / num_rows if num_rows else 0.0
    by_token = kv_share / num_read if num_read else 0.0
    weights = []
    for share in shares:
        rows = share.prefill_rows + share.decode_rows
        decodes = share.decode_rows / rows if rows else 1.0
        fresh = share.fresh_kv_tokens * by_token
        weights += [
            share.prefill_rows * by_row + (1 - decodes) * fresh,
            share.cached_kv_tokens * by_token,
            share.decode_rows * by_row + decodes * fresh,
        ]
    return weights


def _add(left: tuple[int, int, int], right: tuple[int, int, int]) -> tuple[int, int, int]:
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]
