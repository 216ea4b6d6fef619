"""Sampling: distributions by chi-square, seeds, neighbours, and rows that are no numbers."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from tokenmill.core import SamplingParams
from tokenmill.engine.sampler import SamplingRow, logprobs_of, sample
from tokenmill.kernels import F32Array

NUM_DRAWS = 3_000
PARAMS = {
    "temperature": SamplingParams(temperature=1.0),
    "hot": SamplingParams(temperature=2.5),
    "cold": SamplingParams(temperature=0.4),
    "top-k": SamplingParams(temperature=1.0, top_k=5),
    "top-p": SamplingParams(temperature=1.0, top_p=0.7),
    "top-k, top-p": SamplingParams(temperature=1.5, top_k=9, top_p=0.8),
    "top-k above the vocabulary": SamplingParams(temperature=1.0, top_k=1 << 20),
}


def logits(num_rows: int = 1, vocab: int = 300, seed: int = 1, scale: float = 2.0) -> F32Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_rows, vocab)) * scale).astype(np.float32)


def expected(logits_V: F32Array, params: SamplingParams) -> npt.NDArray[np.float64]:
    """Probabilities by the definition: sort everything, in float64."""
    probs = np.exp((logits_V.astype(np.float64) - logits_V.max()) / params.temperature)
    order = np.argsort(-probs, kind="stable")
    if params.top_k:
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    if params.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p]] = 0
    result: npt.NDArray[np.float64] = probs / probs.sum()
    return result


def draws(logits_V: F32Array, params: SamplingParams, num_draws: int = NUM_DRAWS) -> npt.NDArray[np.int64]:
    """How often each token is drawn; half by position, half by seed."""
    rows = [SamplingRow(params, i % 2 * i, (i + 1) % 2 * i) for i in range(num_draws)]
    repeated = np.repeat(logits_V[None], 100, axis=0)
    counts = np.zeros(len(logits_V), np.int64)
    for first in range(0, num_draws, 100):
        np.add.at(counts, sample(repeated, rows[first : first + 100]).token_ids, 1)
    return counts


def chi_square_is_plausible(counts: npt.NDArray[np.int64], probs: npt.NDArray[np.float64]) -> bool:
    """Pearson's test at one in ten million (Wilson and Hilferty 1931); rare tokens are pooled."""
    wanted = probs * counts.sum()
    if counts[wanted == 0].any():
        return False
    common = wanted >= 8
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(wanted[common], wanted[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return bool(z < 5.2)


@pytest.mark.parametrize("name", PARAMS)
def test_draws_follow_the_definition(name: str) -> None:
    logits_V = logits()[0]
    assert chi_square_is_plausible(draws(logits_V, PARAMS[name]), expected(logits_V, PARAMS[name]))


def test_the_distribution_test_can_fail() -> None:
    logits_V = logits()[0]
    counts = draws(logits_V, PARAMS["temperature"])
    assert not chi_square_is_plausible(counts, expected(logits_V, SamplingParams(temperature=1.3)))
    assert not chi_square_is_plausible(counts, expected(logits_V, SamplingParams(temperature=1, top_p=0.9)))


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 255, 257, 5000])
@pytest.mark.parametrize("name", PARAMS)
def test_only_tokens_with_weight_are_drawn_at_any_size(name: str, vocab: int) -> None:
    logits_V = logits(vocab=vocab, seed=vocab)[0]
    logits_V[vocab // 2 + 1 :: 2] = -np.inf
    counts = draws(logits_V, PARAMS[name], 100)
    assert not counts[expected(logits_V, PARAMS[name]) == 0].any()


def test_equal_logits_share_what_is_left() -> None:
    counts = draws(np.zeros(8, np.float32), SamplingParams(temperature=1.0))
    assert chi_square_is_plausible(counts, np.full(8, 1 / 8))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits_LV = logits(3)
    logits_LV[1, [7, 9]] = 99.0
    rows = [SamplingRow(SamplingParams(), 0, 0)] * 3
    result = sample(logits_LV, rows)
    assert result.token_ids.tolist() == np.argmax(logits_LV, axis=1).tolist() and result.valid.all()
    assert result.token_ids[1] == 7


def test_a_request_draws_the_same_whatever_its_neighbours_are() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50)
    logits_LV = logits(6)
    rows = [SamplingRow(params, seed, 10) for seed in range(6)]
    together = sample(logits_LV, rows).token_ids
    for index in (5, 2, 0):
        alone = sample(logits_LV[index : index + 1], rows[index : index + 1]).token_ids
        assert alone[0] == together[index]
    mixed = [SamplingRow(SamplingParams(), 0, 0) if i % 2 else row for i, row in enumerate(rows)]
    assert (sample(logits_LV, mixed).token_ids[::2] == together[::2]).all()


def test_seed_and_position_both_matter() -> None:
    params = SamplingParams(temperature=1.0)
    flat = np.zeros((30, 5000), np.float32)
    by_seed = sample(flat, [SamplingRow(params, i, 0) for i in range(30)]).token_ids
    by_position = sample(flat, [SamplingRow(params, 0, i) for i in range(30)]).token_ids
    assert len(set(by_seed.tolist())) > 25 and len(set(by_position.tolist())) > 25
    largest = sample(flat[:1], [SamplingRow(params, 2**63 - 1, 1 << 20)])
    assert largest.valid.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_row_that_is_no_number_fails_alone(bad: float, everywhere: bool) -> None:
    params = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=3)]
    rows = [SamplingRow(params[i % 3], i, i) for i in range(9)]
    clean = logits(9)
    broken = clean.copy()
    broken[3:6, slice(None) if everywhere else slice(100, 101)] = bad
    before, after = sample(clean, rows), sample(broken, rows)
    others = [0, 1, 2, 6, 7, 8]
    assert (before.token_ids[others] == after.token_ids[others]).all() and after.valid[others].all()
    one_impossible_token = bad == -np.inf and not everywhere
    assert after.valid[3:6].tolist() == [one_impossible_token] * 3


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits_LV = logits(20, vocab=1000, scale=5)
    wide = logits_LV.astype(np.float64)
    exact = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    tokens = list(range(0, 1000, 50))
    got = np.array(logprobs_of(logits_LV, tokens))
    assert np.abs(got - exact[np.arange(20), tokens]).max() < 1e-5
