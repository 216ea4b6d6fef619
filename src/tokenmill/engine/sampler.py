"""Chooses the next token of each row: from a request's parameters to the kernels' choices, and back.

A draw is a race with noise that is a pure function of (seed, position, token); `kernels.sampling_twin` has
it. So a request with a seed gives the same tokens whatever else is in the batch, in whatever steps it is
computed, again after a preemption, and with drafts or without. A row is stateless: what counts for the
penalties, drafts included, is in its tokens. Grammars come as masks; which tokens end a request, and when
they may, is the caller's part.

Shape legend: L rows of logits, R sampled rows, V vocabulary, K most likely tokens.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenmill.core import SamplingParams, TokenLogprobs
from tokenmill.kernels import (
    Choice,
    Executor,
    F32Array,
    I32Array,
    U32Array,
    choose_tokens,
    log_sum_exp_rows,
    top_token_ids,
)

__all__ = ["Sampled", "SamplingRow", "choice_of", "logprobs_of", "logprobs_of_all", "sample", "top_logprobs"]

_GREEDY_BELOW = 1e-5
"""A temperature that leaves only differences below the precision of the logits to chance."""

_LOWEST = np.finfo(np.float32).min
_ROWS_AT_ONCE = 16


class SamplingRow(NamedTuple):
    """How one token is chosen.

    `position` is that of the new token in its sequence, and `tokens[:position]` what comes before it: the
    prompt, of length `num_prompt`, output and drafts. `logits_row` is the row of the logits; several may
    share one. `banned` ids must not be chosen now, nor an id that completes one of the sequences in
    `bad_words`. `mask` [ceil(V / 32)] has a bit for each token, lowest first, set where it is allowed.
    """

    params: SamplingParams
    seed: int
    position: int
    logits_row: int
    tokens: "array[int]"
    num_prompt: int
    banned: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    mask: U32Array | None = None


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A token for each of R rows.

    Where `valid` is false there is none: the logits had NaN or no finite maximum, or nothing was allowed;
    ignore the id. `logprobs` is None where it was not asked for or the row is not valid.
    """

    token_ids: I32Array
    valid: npt.NDArray[np.bool_]
    logprobs: tuple[TokenLogprobs | None, ...]


def sample(logits_LV: F32Array, rows: Sequence[SamplingRow], executor: Executor | None = None) -> Sampled:
    """Choose a token for each row. A row that has none is marked, the others stand. Changes no logits.

    `executor` lends its threads, as in `choose_tokens`.
    """
    token_ids = choose_tokens(logits_LV, [choice_of(row) for row in rows], executor=executor)
    valid = token_ids >= 0
    return Sampled(token_ids=token_ids, valid=valid, logprobs=_logprobs(logits_LV, rows, token_ids))


def logprobs_of(logits_LV: F32Array, token_ids: Sequence[int]) -> list[float]:
    """Natural log-probability of one given token in each row; the sum under the logarithm is in float64."""
    return [logprob for (logprob,) in logprobs_of_all(logits_LV, [(token_id,) for token_id in token_ids])]


def logprobs_of_all(logits_LV: F32Array, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """As `logprobs_of`, for any number of tokens in each row."""
    sizes = [len(ids) for ids in token_ids]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    wanted_N = logits_LV[rows, np.fromiter(chain.from_iterable(token_ids), np.int64, len(rows))]
    logprobs = iter((wanted_N.astype(np.float64) - log_sum_exp_rows(logits_LV)[rows]).tolist())
    return [list(islice(logprobs, size)) for size in sizes]


def top_logprobs(logits_LV: F32Array, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Natural log-probability of a given token and of the `num_top` most likely ones, for each row.

    Most likely first, of equals the lowest id. Impossible tokens have minus infinity; where a logit is NaN
    or infinite all are NaN.
    """
    sums_L = _log_sums(logits_LV)
    own_L = logits_LV[np.arange(len(token_ids)), np.asarray(token_ids, dtype=np.int64)] - sums_L
    ids_LK = top_token_ids(logits_LV, num_top)
    top_LK = np.take_along_axis(logits_LV, ids_LK, axis=1) - sums_L[:, None]
    return [
        TokenLogprobs(token_id=int(token_id), logprob=own, top=tuple(zip(ids, top, strict=True)))
        for token_id, own, ids, top in zip(
            token_ids, own_L.tolist(), ids_LK.tolist(), top_LK.tolist(), strict=True
        )
    ]


def _log_sums(logits_LV: F32Array) -> npt.NDArray[np.float64]:
    """log(sum(exp)) of each row, where minus infinity, which the kernel would refuse, adds nothing."""
    parts = [logits_LV[i : i + _ROWS_AT_ONCE] for i in range(0, len(logits_LV), _ROWS_AT_ONCE)]
    return np.concatenate([log_sum_exp_rows(np.maximum(part, _LOWEST)) for part in parts])


def _logprobs(
    logits_LV: F32Array, rows: Sequence[SamplingRow], token_ids: I32Array
) -> tuple[TokenLogprobs | None, ...]:
    """Those of the rows that ask for them, of the logits as the model made them."""
    result: list[TokenLogprobs | None] = [None] * len(rows)
    asked = [
        (index, row.logits_row, row.params.logprobs)
        for index, row in enumerate(rows)
        if row.params.logprobs is not None and token_ids[index] >= 0
    ]
    if asked:
        indices = [index for index, _, _ in asked]
        asked_LV = logits_LV[[logits_row for _, logits_row, _ in asked]]
        most = max(num_top for _, _, num_top in asked)
        made = top_logprobs(asked_LV, token_ids[indices].tolist(), most)
        for (index, _, num_top), entry in zip(asked, made, strict=True):
            result[index] = TokenLogprobs(
                token_id=entry.token_id, logprob=entry.logprob, top=entry.top[:num_top]
            )
    return tuple(result)


def choice_of(row: SamplingRow) -> Choice:
    """What the kernels need; a row that changes nothing and draws nothing needs little."""
    params = row.params
    greedy = params.temperature < _GREEDY_BELOW
    if greedy and not (params.logit_bias or row.banned or row.bad_words or params.penalises):
        return Choice(logits_row=row.logits_row, mask=row.mask)
    assert 0 <= row.position <= len(row.tokens), "all tokens before the new one are there"
    choice = Choice(
        logits_row=row.logits_row,
        bias=params.logit_bias,
        banned=_banned(row) if row.bad_words else row.banned,
        mask=row.mask,
        inverse_temperature=0.0 if greedy else 1.0 / params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=row.seed,
        position=row.position,
    )
    if not params.penalises:
        return choice
    return choice._replace(
        tokens=np.asarray(row.tokens, dtype=np.int32)[: row.position],
        num_prompt=row.num_prompt,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
    )


def _banned(row: SamplingRow) -> list[int]:
    """Ids that are banned, and those that would complete a bad word. A word may begin in the prompt."""
    completing = [word[-1] for word in row.bad_words if word and _ends_with(row, word[:-1])]
    return [*row.banned, *completing]


def _ends_with(row: SamplingRow, words: tuple[int, ...]) -> bool:
    """Whether these are the last tokens before the new one."""
    start = row.position - len(words)
    return start >= 0 and tuple(row.tokens[start : row.position]) == words
