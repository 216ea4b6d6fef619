"""Sampled tokens with guesses: their distribution is the model's, and a wrong way to accept them is seen.

The model is a chain over four tokens whose logits are known, so every text of three tokens has an exact
probability. The second and third token are guessed. Chi-square on 20,000 texts, p above 0.001.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from tests.fast.engine_fakes import FakeExecutor
from tests.fast.proposer_fakes import eager_guesses
from tokenmill.core import Request, SamplingParams
from tokenmill.engine import outputs
from tokenmill.engine.core import CoreConfig, EngineCore
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.sampler import Sampled, SamplingRow, sample
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.speculation.proposers import NO_DRAFT, Draft, DraftRow, SequenceKey
from tokenmill.kernels import F32Array, StepBatch

NUM_TEXTS, NUM_TOKENS, BATCH = 20_000, 3, 500
PARAMS = SamplingParams(max_tokens=NUM_TOKENS + 1, temperature=0.8)
VOCAB = 4
LOGITS_VV = np.random.default_rng(4).normal(0.0, 1.0, (VOCAB, VOCAB)).astype(np.float32)
"""The logits after each token."""
CLOSE_VV = LOGITS_VV + np.random.default_rng(5).normal(0.0, 0.5, (VOCAB, VOCAB)).astype(np.float32)
"""Those of a draft model that nearly agrees."""
NORMAL_QUANTILE = 3.0902
"""That of 0.999."""

Guess = Callable[[int], int]


class Chain(FakeExecutor):
    """The next token depends on the last."""

    def __init__(self) -> None:
        super().__init__(num_blocks=2 * BATCH, max_rows=4 * BATCH, max_out_rows=4 * BATCH)
        self._chain_logits = np.zeros((4 * BATCH, VOCAB), np.float32)

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        self._chain_logits[: len(batch.out_rows)] = LOGITS_VV[batch.tokens[batch.out_rows]]

    def buffer(self, name: object) -> F32Array:
        return self._chain_logits


class Guesser:
    """Guesses two tokens: those that this model draws with the row's own noise, then changed by `change`."""

    def __init__(self, model_VV: F32Array, change: Guess) -> None:
        self._model_VV = model_VV
        self._change = change

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        if not rows:
            return []
        texts = [array("i", row.tokens) for row in rows]
        for _ in range(2):
            asked = [
                SamplingRow(row.params, row.seed, len(text), index, text, row.num_prompt)
                for index, (row, text) in enumerate(zip(rows, texts, strict=True))
            ]
            drawn = sample(self._model_VV[[text[-1] for text in texts]], asked).token_ids
            for text, token in zip(texts, drawn.tolist(), strict=True):
                text.append(self._change(token))
        drafts = [
            tuple(text[len(row.tokens) :][: row.max_tokens]) for row, text in zip(rows, texts, strict=True)
        ]
        return [Draft(tokens, (0.9,) * len(tokens)) if tokens else NO_DRAFT for tokens in drafts]

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        pass

    def forget(self, key: SequenceKey) -> None:
        pass


GUESSERS = {
    "right": Guesser(LOGITS_VV, lambda token: token),
    "wrong": Guesser(LOGITS_VV, lambda token: (token + 1) % VOCAB),
    "constant": Guesser(LOGITS_VV, lambda token: 2),
    "close": Guesser(CLOSE_VV, lambda token: token),
}


class Mixed(Guesser):
    """A guesser of each kind for every fourth seed."""

    def __init__(self) -> None:
        super().__init__(LOGITS_VV, lambda token: token)

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        drafts = {
            row.key: draft
            for kind, guesser in enumerate(GUESSERS.values())
            for mine in [[row for row in rows if row.seed % len(GUESSERS) == kind]]
            for row, draft in zip(mine, guesser.propose(mine), strict=True)
        }
        return [drafts[row.key] for row in rows]


def texts(guesser: Guesser, num_texts: int = NUM_TEXTS) -> tuple[list[GenerationState], int]:
    """Three tokens after a prompt, from as many seeds; and the steps that it took."""
    config = CoreConfig(num_blocks=2 * BATCH, max_sequences=BATCH, model=None)
    engine = EngineCore(Chain(), config, proposer=guesser)
    states = [
        GenerationState(
            Request(request_id=str(seed), prompt=(0,), params=PARAMS),
            index=0,
            seed=seed,
            max_total=2 + NUM_TOKENS,
            detokenizer=Detokenizer(lambda _: b""),
            end_token_ids=frozenset(),
            submitted_s=0.0,
        )
        for seed in range(num_texts)
    ]
    num_steps = 0
    with eager_guesses():
        for first in range(0, num_texts, BATCH):
            for state in states[first : first + BATCH]:
                engine.submit(state)
            while engine.has_work:
                engine.step()
                num_steps += 1
    return states, num_steps


def probabilities() -> npt.NDArray[np.float64]:
    """Of every text of three tokens, in order."""
    powers_VV = np.exp(LOGITS_VV.astype(np.float64) / PARAMS.temperature)
    chances_VV = powers_VV / powers_VV.sum(axis=1, keepdims=True)
    every = product(range(VOCAB), repeat=NUM_TOKENS)
    return np.array([math.prod(chances_VV[a, b] for a, b in zip((0, *t), t, strict=False)) for t in every])


def fits(states: Sequence[GenerationState]) -> bool:
    """Chi-square against the exact probabilities; the bound is Wilson and Hilferty's (1931)."""
    cells = [int(np.polyval(state.tokens[1 : 1 + NUM_TOKENS], VOCAB)) for state in states]
    seen = np.bincount(cells, minlength=VOCAB**NUM_TOKENS)
    expected = probabilities() * len(states)
    order = np.argsort(expected)
    # Texts that are too rare for the approximation count as one.
    num_rare = max(1, int(np.searchsorted(np.cumsum(expected[order]), 10.0)) + 1)
    seen, expected = (np.add.reduceat(x[order], [0, *range(num_rare, len(x))]) for x in (seen, expected))
    freedom = len(seen) - 1
    third = 2 / (9 * freedom)
    bound = freedom * (1 - third + NORMAL_QUANTILE * math.sqrt(third)) ** 3
    return float(((seen - expected) ** 2 / expected).sum()) < bound


def check_guesser(name: str) -> None:
    """Assert that the texts fit, and that guesses were accepted as often as such a guesser's are."""
    states, num_steps = texts(GUESSERS[name])
    assert fits(states)
    share = sum(s.num_accepted for s in states) / sum(s.num_drafted for s in states)
    low, high = {"right": (1.0, 1.0), "wrong": (0.0, 0.0)}.get(name, (0.02, 0.95))
    assert low <= share <= high
    assert name != "right" or num_steps == 2 * NUM_TEXTS // BATCH, "a prompt, and then all at once"


def test_guesses_leave_the_distribution_as_it_is() -> None:
    """Of all four kinds, each request of one; each kind for itself is a slow test."""
    states, _ = texts(Mixed())
    assert fits(states)
    assert {state.num_accepted for state in states} == {0, 1, 2}


def accept_always(
    chances_RV: npt.NDArray[np.float64], guesses_R: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_]:
    return np.ones(len(guesses_R), np.bool_)


def accept_by_chance(
    chances_RV: npt.NDArray[np.float64], guesses_R: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_]:
    """As often as the model would say it; but what is drawn instead ought to leave the guess out."""
    uniform_R = np.random.default_rng(int(guesses_R.sum())).random(len(guesses_R))
    accepted_R: npt.NDArray[np.bool_] = uniform_R < chances_RV[np.arange(len(guesses_R)), guesses_R]
    return accepted_R


@pytest.mark.parametrize("rule", [accept_always, accept_by_chance])
def test_a_wrong_rule_is_seen(
    rule: Callable[..., npt.NDArray[np.bool_]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(logits_LV: F32Array, rows: Sequence[SamplingRow]) -> Sampled:
        sampled = sample(logits_LV, rows)
        guessed = [i for i, row in enumerate(rows) if row.position < len(row.tokens)]
        guesses_R = np.array([rows[i].tokens[rows[i].position] for i in guessed], np.intp)
        powers_RV = np.exp(logits_LV[[rows[i].logits_row for i in guessed]].astype(np.float64) / 0.8)
        accepted_R = rule(powers_RV / powers_RV.sum(axis=1, keepdims=True), guesses_R)
        sampled.token_ids[np.array(guessed, np.intp)[accepted_R]] = guesses_R[accepted_R]
        return sampled

    monkeypatch.setattr(outputs, "sample", wrong)
    assert not fits(texts(GUESSERS["constant"], 5_000)[0]), "seen in fewer texts already"
