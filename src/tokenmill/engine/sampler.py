"""Chooses the next token of each row: greedy, or drawn from the row's own distribution.

A draw uses one uniform number, made by a Philox counter generator (Salmon et al. 2011) from the request's
seed and the position of the token. So a request with a seed gives the same tokens whatever else is in the
batch, in whatever steps it is computed, and again after a preemption.

The order is that of transformers: temperature, then top-k, then top-p on what is left, renormalised.
Penalties, logit bias and grammars are not here.

Shape legend: L rows, V vocabulary, C candidates of one row.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.core import SamplingParams, TokenLogprobs
from tokenmill.kernels import F32Array, I32Array, log_sum_exp_rows

__all__ = ["Sampled", "SamplingRow", "logprobs_of", "sample", "top_logprobs"]

_Indices: TypeAlias = npt.NDArray[np.intp]

_BLOCK = 256
_GROUP = 64
_MIN_TEMPERATURE = 1e-6
# The most likely candidate has weight 1.
_THRESHOLDS = (*(math.exp(-2.0 * i) for i in range(1, 10)), 0.0)


class SamplingRow(NamedTuple):
    """How one row is sampled; `position` is that of the new token in its sequence."""

    params: SamplingParams
    seed: int
    position: int
    logits_row: int
    tokens: "array[int]"
    num_prompt: int
    banned: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    mask: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A token for each row. Where `valid` is false the logits had no finite maximum; ignore the token."""

    token_ids: I32Array
    valid: npt.NDArray[np.bool_]
    logprobs: tuple[TokenLogprobs | None, ...]


def sample(logits_LV: F32Array, rows: Sequence[SamplingRow]) -> Sampled:
    """Choose a token for each row. A row with NaN or infinite maximum is marked; the others stand."""
    logits_LV = logits_LV[[row.logits_row for row in rows]]
    token_ids = logits_LV.argmax(axis=1).astype(np.int32)
    valid = np.isfinite(logits_LV[np.arange(len(rows)), token_ids])
    for index, row in enumerate(rows):
        if valid[index] and not row.params.greedy:
            token_ids[index] = _draw(logits_LV[index], row, top=int(token_ids[index]))
    return Sampled(token_ids=token_ids, valid=valid, logprobs=(None,) * len(rows))


def top_logprobs(logits_LV: F32Array, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities."""
    return [
        TokenLogprobs(token_id=t, logprob=p)
        for t, p in zip(token_ids, logprobs_of(logits_LV, token_ids), strict=True)
    ]


def logprobs_of(logits_LV: F32Array, token_ids: Sequence[int]) -> list[float]:
    """Natural log-probability of one given token in each row; the sum under the logarithm is in float64."""
    wanted_L = logits_LV[np.arange(len(token_ids)), np.asarray(token_ids, dtype=np.int64)]
    logprobs: list[float] = (wanted_L.astype(np.float64) - log_sum_exp_rows(logits_LV)).tolist()
    return logprobs


def _draw(logits_V: F32Array, row: SamplingRow, top: int) -> int:
    """Draw from one row; `top` is its most likely token."""
    key = np.array([row.seed, row.position], dtype=np.uint64)
    uniform = float(np.random.Generator(np.random.Philox(key=key)).random())
    params, highest = row.params, logits_V[top]
    if 0 < params.top_k < logits_V.shape[0]:
        candidates_C = _top_k(logits_V, params.top_k)
        weights_C = _weights(logits_V[candidates_C], highest, params.temperature)
    else:
        candidates_C = None
        weights_C = _weights(logits_V, highest, params.temperature)
    if params.top_p < 1.0:
        kept_C = _nucleus(weights_C, params.top_p)
        candidates_C = kept_C if candidates_C is None else candidates_C[kept_C]
        weights_C = weights_C[kept_C]
    index = _pick(weights_C, uniform)
    return index if candidates_C is None else int(candidates_C[index])


def _weights(logits_C: F32Array, highest: np.float32, temperature: float) -> F32Array:
    """Probabilities but for a common factor; the most likely token has 1."""
    weights_C: F32Array = logits_C - highest
    weights_C *= np.float32(1.0 / max(temperature, _MIN_TEMPERATURE))
    return np.exp(weights_C, out=weights_C)


def _top_k(logits_V: F32Array, top_k: int) -> _Indices:
    """The `top_k` largest values' indices, without sorting the vocabulary.

    The k-th largest of the maxima of small groups is a lower bound of the k-th largest value; few values
    are above it.
    """
    num_groups = logits_V.shape[0] // _GROUP
    if top_k > num_groups:
        return np.argpartition(logits_V, -top_k)[-top_k:]
    maxima = logits_V[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0)
    above_C = np.flatnonzero(logits_V >= np.partition(maxima, -top_k)[-top_k])
    return above_C[np.argpartition(logits_V[above_C], -top_k)[-top_k:]]


def _nucleus(weights_C: F32Array, top_p: float) -> _Indices:
    """The smallest set of most likely candidates whose weight reaches `top_p` of all, most likely first.

    Only candidates above a threshold are sorted; it is lowered until they weigh enough.
    """
    needed = top_p * float(weights_C.sum(dtype=np.float64))
    for threshold in _THRESHOLDS:
        above_C = np.flatnonzero(weights_C >= threshold)
        if threshold == 0.0 or float(weights_C[above_C].sum(dtype=np.float64)) >= needed:
            break
    sorted_C = above_C[np.argsort(-weights_C[above_C], kind="stable")]
    return sorted_C[: _nucleus_size(weights_C[sorted_C], needed)]


def _nucleus_size(sorted_weights_C: F32Array, needed: float) -> int:
    """How many of the leading weights it takes to reach `needed`; at least one."""
    cumulative_C = np.cumsum(sorted_weights_C, dtype=np.float64)
    return min(int(np.searchsorted(cumulative_C, needed)) + 1, len(sorted_weights_C))


def _pick(weights_C: F32Array, uniform: float) -> int:
    """The index at which the running sum of the weights passes `uniform` of the total.

    Sums of blocks come first, so that only one block is summed item by item.
    """
    starts = np.arange(0, len(weights_C), _BLOCK)
    block_sums = np.cumsum(np.add.reduceat(weights_C, starts), dtype=np.float64)
    target = uniform * float(block_sums[-1])
    block = _first_above(block_sums, target)
    before = float(block_sums[block - 1]) if block else 0.0
    inside = np.cumsum(weights_C[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    return int(starts[block]) + _first_above(inside, target - before)


def _first_above(cumulative: npt.NDArray[np.float64], target: float) -> int:
    """First index whose running sum is above `target`; where rounding leaves none, the last with weight."""
    last = int(np.searchsorted(cumulative, cumulative[-1]))
    return min(int(np.searchsorted(cumulative, target, side="right")), last)
