"""From a step's logits to tokens and scores: hands each row to the sequence that wanted it.

A generated token is chosen under the request's parameters and its grammar, a given one is scored. A guess
stands if the token drawn at its place is the same; nothing else is needed to verify it, because what is
drawn depends on the sequence alone (`sampler.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokenmill.core import TokenLogprobs, TokenmillError
from tokenmill.engine.embedding import EmbeddingState
from tokenmill.engine.runner import HiddenRows, OutRows
from tokenmill.engine.sampler import SamplingRow, logprobs_of_all, sample, top_logprobs
from tokenmill.engine.sequence import GenerationState, ScoringState
from tokenmill.engine.structured.grammar import GrammarState, U32Array
from tokenmill.kernels import F32Array, I32Array

__all__ = ["append_token", "replace_refused", "take_hidden", "take_logits"]

_NOT_FINITE = "the model's logits are not finite numbers"
_NOTHING_LEFT = "no token may come next: the grammar, bad words and biases leave none"


def take_logits(out: OutRows, clock: Callable[[], float]) -> None:
    """Sample, score, and append; a row that gives no token fails its own sequence only."""
    samples: list[_Sample] = []
    scored: list[tuple[int, int, ScoringState]] = []
    prompts: list[tuple[int, int, GenerationState]] = []
    for index, (sequence, position) in enumerate(out.rows):
        if isinstance(sequence, ScoringState):
            scored.append((index, position, sequence))
        elif isinstance(sequence, GenerationState) and position < sequence.num_prompt - 1:
            prompts.append((index, position, sequence))
        elif isinstance(sequence, GenerationState):
            samples += _samples(sequence, position, index)
    if samples:
        _sample(out, samples, clock)
    if scored:
        _score(out.logits_LV, scored)
    for index, position, state in prompts:
        num_top, target = state.params.prompt_logprobs or 0, state.tokens[position + 1]
        state.append_prompt(position, top_logprobs(out.logits_LV[index : index + 1], [target], num_top)[0])


def take_hidden(out: HiddenRows) -> None:
    """Pool the final norm's rows."""
    for row, hidden_D in zip(out.rows, out.hidden_LD, strict=True):
        assert isinstance(row.sequence, EmbeddingState)
        row.sequence.append(row.position, hidden_D)


def append_token(
    state: GenerationState, token_id: int, logprobs: TokenLogprobs | None, logits_V: F32Array, now_s: float
) -> None:
    """Append what was chosen from these logits; nothing (below 0) fails the sequence."""
    if token_id >= 0:
        state.append(token_id, logprobs, now_s=now_s)
    else:
        state.fail(_NOTHING_LEFT if np.isfinite(logits_V.max()) else _NOT_FINITE, now_s=now_s)


class _Sample(NamedTuple):
    """A row to be sampled, for whom, and the token that it was computed from.

    `may_wait` if the best token is to be tried before there is a mask: a greedy row, of no guesses.
    """

    row: SamplingRow
    state: GenerationState
    last_token: int
    is_draft: bool
    may_wait: bool


def _samples(state: GenerationState, position: int, logits_row: int) -> Iterator[_Sample]:
    """The samples taken from the logits at one position: one, or where the prompt ends one a completion."""
    # Tokens of an earlier row of this step may be appended already; drafts follow the last computed token.
    known = state.num_computed + 1 if state.drafts else state.num_total
    tokens = state.tokens[:known] + state.drafts if state.drafts else state.tokens
    family = (state, *state.siblings) if position == state.num_prompt - 1 else (state,)
    for each in family:
        row = SamplingRow(
            params=each.params,
            seed=each.seed,
            position=position + 1,
            logits_row=logits_row,
            tokens=tokens,
            num_prompt=each.num_prompt,
            banned=each.banned_at(position + 1),
            bad_words=each.bad_words,
        )
        may_wait = each.grammar is not None and each.params.greedy and not state.drafts
        yield _Sample(row, each, tokens[position], position >= known, may_wait)


def _sample(out: OutRows, samples: Sequence[_Sample], clock: Callable[[], float]) -> None:
    """Choose a token for each row and append those that stand.

    A row stands if every guess before it was right. Rows come in order, so it is enough to look at the
    last: its position must be the sequence's last, and it must have been computed from that token.
    """
    tokens = _choose(out, samples, clock)
    now_s = clock()
    for each, token in zip(samples, tokens, strict=True):
        state, position = each.state, each.row.position
        state.num_drafted += each.is_draft
        if state.finished or position != state.num_total or each.last_token != state.tokens[-1]:
            continue
        state.num_accepted += each.is_draft
        append_token(state, token.token_id, token.logprobs, out.logits_LV[each.row.logits_row], now_s)


class _Token(NamedTuple):
    """What was chosen for a row, below 0 if nothing, as in `Sampled`."""

    token_id: int
    logprobs: TokenLogprobs | None


def _choose(out: OutRows, samples: Sequence[_Sample], clock: Callable[[], float]) -> list[_Token]:
    """A token for each row.

    The best of all tokens is the best of the allowed ones if it is allowed, which is most often so, and asked
    for a fraction of a mask's time. So rows that may wait get a mask only where it is not.
    """
    tokens = _draw(out, _with_masks(samples, clock))
    waiting = {i: each for i, each in enumerate(samples) if each.may_wait}
    refused = {i: each for i, each in waiting.items() if not _allowed(each.state, tokens[i].token_id)}
    for i, token in zip(refused, _draw_masked(out, list(refused.values()), clock), strict=True):
        tokens[i] = token
    return tokens


def _draw_masked(out: OutRows, samples: Sequence[_Sample], clock: Callable[[], float]) -> Sequence[_Token]:
    """Tokens of rows that wait no longer."""
    if not samples:
        return []
    return _draw(out, _with_masks([each._replace(may_wait=False) for each in samples], clock))


def replace_refused(
    states: Mapping[int, GenerationState], ids_R: I32Array, out: OutRows, clock: Callable[[], float]
) -> None:
    """Put tokens that the grammars allow where one was chosen from all: greedy rows of a plain step.

    `states` are those with a grammar, by their row, which is also that of the logits.
    """
    refused = [row for row, state in states.items() if not _allowed(state, int(ids_R[row]))]
    samples = [each for row in refused for each in _samples(states[row], states[row].num_total - 1, row)]
    for row, token in zip(refused, _draw_masked(out, samples, clock), strict=True):
        ids_R[row] = token.token_id


def _draw(out: OutRows, samples: Sequence[_Sample]) -> list[_Token]:
    result = sample(out.logits_LV, [each.row for each in samples], out.executor)
    return list(map(_Token, result.token_ids.tolist(), result.logprobs))


def _allowed(state: GenerationState, token_id: int) -> bool:
    """True also where there is no token: a mask would not bring one."""
    return token_id < 0 or state.grammar is None or state.grammar.allows(token_id)


def _with_masks(samples: Sequence[_Sample], clock: Callable[[], float]) -> list[_Sample]:
    """Add what the grammars allow, but to rows that wait. A grammar that fails ends its request here."""
    masked: list[_Sample] = []
    # The first position of each sequence, and its masks from there on: siblings come between its rows.
    masks: dict[GenerationState, tuple[int, U32Array]] = {}
    for each in samples:
        state, row = each.state, each.row
        if state.grammar is not None and not each.may_wait and not state.finished:
            if state not in masks:
                masks[state] = row.position, _masks(state.grammar, row, clock, state)
            first, mask_RW = masks[state]
            each = each._replace(row=row._replace(mask=mask_RW[row.position - first]))
        masked.append(each)
    return masked


def _masks(
    grammar: GrammarState, row: SamplingRow, clock: Callable[[], float], state: GenerationState
) -> U32Array:
    """Masks [R, W] of a sequence's rows: before each of its guesses, and after the last."""
    drafts = row.tokens[row.position :]
    mask_RW = np.empty((len(drafts) + 1, grammar.num_words), np.uint32)
    try:
        grammar.masks(drafts, mask_RW)
    except TokenmillError as error:
        state.fail(str(error), now_s=clock())
    return mask_RW


def _score(logits_LV: F32Array, rows: Sequence[tuple[int, int, ScoringState]]) -> None:
    targets = [state.targets(position) for _, position, state in rows]
    logprobs = logprobs_of_all(_select(logits_LV, [index for index, _, _ in rows]), targets)
    for (_, position, state), each in zip(rows, logprobs, strict=True):
        state.append(position, each)


def _select(logits_LV: F32Array, indices: list[int]) -> F32Array:
    """These rows; the buffer itself, not a copy, where that is all of them."""
    return logits_LV if len(indices) == logits_LV.shape[0] else logits_LV[indices]
