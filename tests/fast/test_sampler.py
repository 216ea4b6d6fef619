"""Sampling: distributions by chi-square, seeds and neighbours, coupling, rows without a choice, log-probs."""

import math
from array import array
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tokenmill.core import SamplingParams, TokenLogprobs
from tokenmill.engine.sampler import Sampled, SamplingRow, logprobs_of, sample, top_logprobs
from tokenmill.kernels import F32Array

NUM_DRAWS = 20_000
VOCAB = 300
PROMPT, OUTPUT = (3, 4, 4, 5, 250), (5, 6, 6, 6, 7, 40)
BAD_WORDS = ((9,), (7, 40, 10), (40, 11), (6, 12), (250, 5, 6, 6, 6, 7, 40, 13))
ALLOWED = tuple(range(1, VOCAB, 3))
FORMS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.4},
    "top-k": {"top_k": 5},
    "top-k above the vocabulary": {"top_k": 1 << 20},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "top-k, top-p, min-p": {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.2},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "encouraged": {"repetition_penalty": 0.5, "presence_penalty": -1.0, "frequency_penalty": -0.5},
    "bias": {"logit_bias": ((5, 6.0), (17, 3.5), (18, -100.0), (1 << 31, 50.0))},
    "bad words": {},
    "banned": {},
    "mask": {},
    "everything": {
        **{"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
        **{"presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": ((5, 4.0), (22, 4.0))},
    },
}


def logits(num_rows: int = 1, vocab: int = VOCAB, seed: int = 1, scale: float = 2.0) -> F32Array:
    noise = np.random.default_rng(seed).standard_normal((num_rows, vocab), dtype=np.float32)
    result: F32Array = noise * np.float32(scale)
    return result


def marked_logits() -> F32Array:
    """One row [V] in which the tokens that the forms treat are likely."""
    logits_V: F32Array = logits()[0]
    logits_V[[*PROMPT, *OUTPUT, *(word[-1] for word in BAD_WORDS), 1, 2, 61]] += 2.5
    return logits_V


def make_row(seed: int = 0, position: int = 0, logits_row: int = 0, **params: Any) -> SamplingRow:
    """A row whose history does not matter."""
    made = SamplingParams(**{"temperature": 1.0, **params})
    return SamplingRow(made, seed, position, logits_row, array("i", [0]) * position, 0)


def make_mask(allowed: tuple[int, ...], vocab: int = VOCAB) -> npt.NDArray[np.uint32]:
    mask = np.zeros(-(-vocab // 32), np.uint32)
    for token_id in allowed:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return mask


def form_row(name: str, seed: int) -> SamplingRow:
    """A row of the named form, with history; what stands after its position does not count."""
    tokens = array("i", (*PROMPT, *OUTPUT, 20, 20))
    row = SamplingRow(
        params=SamplingParams(**{"temperature": 1.0, **FORMS[name]}),
        seed=seed,
        position=len(PROMPT) + len(OUTPUT),
        logits_row=0,
        tokens=tokens,
        num_prompt=len(PROMPT),
    )
    if name in ("bad words", "everything"):
        row = row._replace(bad_words=BAD_WORDS)
    if name in ("banned", "everything"):
        row = row._replace(banned=(1, 2, 61, VOCAB + 5))
    return row._replace(mask=make_mask(ALLOWED)) if name in ("mask", "everything") else row


def expected(logits_V: F32Array, name: str) -> npt.NDArray[np.float64]:
    """Probabilities by the definition, one token at a time, in float64."""
    row = form_row(name, 0)
    params, x = row.params, logits_V.astype(np.float64)
    for token_id, bias in params.logit_bias:
        if token_id < VOCAB:
            x[token_id] += bias
    if row.bad_words:
        x[[9, 10, 11, 13]] = -np.inf
    x[[token_id for token_id in row.banned if token_id < VOCAB]] = -np.inf
    for token_id in {*PROMPT, *OUTPUT}:
        repetition = params.repetition_penalty
        x[token_id] = x[token_id] / repetition if x[token_id] > 0 else x[token_id] * repetition
    for token_id in set(OUTPUT):
        x[token_id] -= params.frequency_penalty * OUTPUT.count(token_id) + params.presence_penalty
    if row.mask is not None:
        x[[token_id not in ALLOWED for token_id in range(VOCAB)]] = -np.inf
    return filtered(np.exp((x - x.max()) / params.temperature), params)


def filtered(probs: npt.NDArray[np.float64], params: SamplingParams) -> npt.NDArray[np.float64]:
    order = np.argsort(-probs, kind="stable")
    if params.top_k:
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    if params.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p]] = 0
    probs[probs < params.min_p * probs.max()] = 0
    result: npt.NDArray[np.float64] = probs / probs.sum()
    return result


def draws(logits_V: F32Array, row: SamplingRow) -> npt.NDArray[np.int64]:
    """How often each token is drawn by NUM_DRAWS seeds."""
    result = sample(logits_V[None], [row._replace(seed=seed) for seed in range(NUM_DRAWS)])
    assert result.valid.all()
    return np.bincount(result.token_ids, minlength=len(logits_V))


def is_plausible(counts: npt.NDArray[np.int64], probs: npt.NDArray[np.float64]) -> bool:
    """Pearson's test at one in a thousand (Wilson and Hilferty 1931); rare tokens are pooled."""
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
    return bool(z < 3.09)


@pytest.mark.parametrize("name", FORMS)
def test_draws_follow_the_definition(name: str) -> None:
    logits_V = marked_logits()
    counts = draws(logits_V, form_row(name, 0))
    assert is_plausible(counts, expected(logits_V, name))
    if name not in ("temperature", "top-k above the vocabulary"):
        assert not is_plausible(counts, expected(logits_V, "temperature")), "the test can fail"


def test_a_slightly_wrong_distribution_is_noticed() -> None:
    logits_V: F32Array = logits()[0]
    counts = draws(logits_V, make_row(temperature=1.05))
    assert not is_plausible(counts, expected(logits_V, "temperature"))


def test_positions_are_as_good_as_seeds() -> None:
    logits_V, history = logits()[0], array("i", [0]) * NUM_DRAWS
    rows = [make_row(5)._replace(position=i, tokens=history) for i in range(NUM_DRAWS)]
    counts = np.bincount(sample(logits_V[None], rows).token_ids, minlength=VOCAB)
    assert is_plausible(counts, expected(logits_V, "temperature"))


def test_equal_logits_share_what_is_left() -> None:
    counts = draws(np.zeros(8, np.float32), make_row())
    assert is_plausible(counts, np.full(8, 1 / 8))


def test_filters_keep_the_lowest_ids_of_equals() -> None:
    flat_LV = np.zeros((1, 200), np.float32)
    for form, kept in (({"top_k": 7}, 7), ({"top_p": 0.25}, 50), ({"top_k": 80, "top_p": 0.25}, 20)):
        rows = [make_row(**form)._replace(seed=seed) for seed in range(2_000)]
        assert set(sample(flat_LV, rows).token_ids.tolist()) == set(range(kept))


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-4])
def test_greedy_and_very_cold_take_the_largest(temperature: float) -> None:
    logits_LV = np.round(logits(3), 2)
    logits_LV[1, [7, 9]] = 99.0
    rows = [make_row(5, 1, i, temperature=temperature) for i in (2, 1, 0)]
    result = sample(logits_LV, rows)
    assert result.valid.all() and result.logprobs == (None,) * 3
    assert result.token_ids[[0, 2]].tolist() == logits_LV.argmax(axis=1)[[2, 0]].tolist()
    assert result.token_ids[1] in ((7, 9) if temperature == 1e-4 else (7,))


def test_greedy_obeys_every_edit() -> None:
    logits_V = np.zeros(VOCAB, np.float32)
    logits_V[[40, 9, 11, 61, 22, 8, 6]] = (9, 8, 7, 6, 5, 4, 3)

    def chosen(name: str, **params: Any) -> int:
        row = form_row(name, 0)._replace(params=SamplingParams(**params))
        return int(sample(logits_V[None], [row]).token_ids[0])

    assert chosen("temperature") == 40
    assert chosen("temperature", repetition_penalty=1.2) == 9
    assert (
        chosen("temperature", presence_penalty=1.1) == 9 and chosen("temperature", frequency_penalty=1.1) == 9
    )
    assert chosen("bad words", logit_bias=((40, -4.0),)) == 61
    assert chosen("banned", logit_bias=((40, -9.0), (9, -9.0), (11, -9.0))) == 22
    assert chosen("mask", logit_bias=((8, 1.0),)) == 40 and chosen("mask", logit_bias=((40, -6.0),)) == 61


def test_a_request_draws_the_same_whatever_its_neighbours_are() -> None:
    names = list(FORMS)
    logits_LV = logits(len(names))
    rows = [form_row(name, 77 + i)._replace(logits_row=i) for i, name in enumerate(names)]
    together = sample(logits_LV, rows).token_ids
    order = np.random.default_rng(3).permutation(len(rows))
    shuffled = sample(logits_LV[order], [rows[i]._replace(logits_row=at) for at, i in enumerate(order)])
    assert shuffled.token_ids.tolist() == together[order].tolist()
    for i, row in enumerate(rows):
        alone = sample(logits_LV[i : i + 1], [row._replace(logits_row=0)]).token_ids
        assert alone[0] == together[i]


def test_rows_may_share_logits() -> None:
    logits_LV = logits(2)
    rows = [make_row(seed, 5, seed % 2) for seed in range(50)]
    apart = sample(
        logits_LV[[i % 2 for i in range(50)]], [row._replace(logits_row=i) for i, row in enumerate(rows)]
    )
    assert sample(logits_LV, rows).token_ids.tolist() == apart.token_ids.tolist()


def test_seed_and_position_both_matter() -> None:
    flat_LV = np.zeros((1, 5000), np.float32)
    by_seed = sample(flat_LV, [make_row(i, 7) for i in range(30)]).token_ids
    by_high_seed = sample(flat_LV, [make_row(i << 40, 7) for i in range(30)]).token_ids
    by_position = sample(flat_LV, [make_row(7, i) for i in range(30)]).token_ids
    for token_ids in (by_seed, by_high_seed, by_position):
        assert len(set(token_ids.tolist())) > 25
    largest = make_row(2**63 - 1)._replace(position=1 << 20, tokens=array("i", [0]) * (1 << 20))
    assert sample(flat_LV, [largest]).valid.all()


def test_close_distributions_mostly_agree() -> None:
    """Two that race with the same noise agree with at least (1 - TVD) / (1 + TVD) (Daliri et al. 2024)."""
    base = logits(scale=1.5)
    for step in (0.05, 0.3, 1.0):
        near = base + logits(seed=2, scale=step)
        rows = [make_row()._replace(seed=seed) for seed in range(8_000)]
        agreement = float((sample(base, rows).token_ids == sample(near, rows).token_ids).mean())
        p, q = (np.exp(x[0].astype(np.float64)) / np.exp(x[0].astype(np.float64)).sum() for x in (base, near))
        distance = 0.5 * float(np.abs(p - q).sum())
        noise = 4 * math.sqrt(0.25 / len(rows))
        assert (1 - distance) / (1 + distance) - noise < agreement < 1 - distance + noise


def same(a: Sampled, b: Sampled, rows: list[int]) -> bool:
    """Whether these rows are equal to the last bit."""
    ids = a.token_ids[rows].tobytes() == b.token_ids[rows].tobytes()
    return ids and all(repr(a.logprobs[i]) == repr(b.logprobs[i]) for i in rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_row_that_is_no_number_fails_alone(bad: float, everywhere: bool) -> None:
    forms: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.5, "top_k": 9, "presence_penalty": 1.0},
    ]
    rows = [make_row(i, i, i, logprobs=3, **forms[i % 3]) for i in range(9)]
    clean = logits(9)
    broken = clean.copy()
    broken[3:6, slice(None) if everywhere else slice(100, 101)] = bad
    before, after = sample(clean, rows), sample(broken, rows)
    others = [0, 1, 2, 6, 7, 8]
    assert same(before, after, others) and after.valid[others].all()
    one_impossible_token = bad == -np.inf and not everywhere
    assert after.valid[3:6].tolist() == [one_impossible_token] * 3
    assert [entry is not None for entry in after.logprobs[3:6]] == [one_impossible_token] * 3


def test_a_row_with_nothing_left_fails_alone() -> None:
    logits_LV = logits(1, vocab=40)
    empty = make_row(logprobs=0)._replace(mask=make_mask((), 40))
    beyond = make_row()._replace(mask=np.array([0, 0xFFFFFF00], np.uint32))
    banned = make_row(temperature=0.0)._replace(banned=tuple(range(40)))
    disjoint = make_row()._replace(mask=make_mask((5,), 40), bad_words=((5,),))
    healthy = make_row(3)
    result = sample(logits_LV, [healthy, empty, beyond, banned, disjoint, healthy])
    assert result.valid.tolist() == [True, False, False, False, False, True]
    assert result.token_ids[0] == result.token_ids[5] == sample(logits_LV, [healthy]).token_ids[0]
    assert result.logprobs == (None,) * 6


def test_the_logits_stay_as_they_are() -> None:
    logits_LV = logits(1)
    before = logits_LV.tobytes()
    sample(logits_LV, [form_row(name, 1) for name in FORMS])
    assert logits_LV.tobytes() == before


def exact_logprobs(logits_LV: F32Array) -> npt.NDArray[np.float64]:
    wide = logits_LV.astype(np.float64)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits_LV = logits(20, vocab=1000, scale=5)
    tokens = list(range(0, 1000, 50))
    got = np.array(logprobs_of(logits_LV, tokens))
    assert np.abs(got - exact_logprobs(logits_LV)[np.arange(20), tokens]).max() < 1e-5
    assert got.tolist() == [entry.logprob for entry in top_logprobs(logits_LV, tokens, 0)]


def test_the_most_likely_come_in_order_with_their_log_probabilities() -> None:
    logits_LV = np.round(logits(20, vocab=1000, scale=5))
    logits_LV[:, 5:900] = -np.inf
    exact = exact_logprobs(logits_LV)
    for i, entry in enumerate(top_logprobs(logits_LV, list(range(20)), 20)):
        order = sorted(range(1000), key=lambda token_id: (-exact[i, token_id], token_id))[:20]
        assert entry.token_id == i and [token_id for token_id, _ in entry.top] == order
        assert np.allclose([value for _, value in entry.top], exact[i, order], rtol=0, atol=1e-5)
    assert top_logprobs(logits_LV, [5] * 20, 0)[0].logprob == -math.inf
    assert len(top_logprobs(logits(1, vocab=3), [0], 20)[0].top) == 3


def test_log_probabilities_are_of_the_logits_before_all_edits() -> None:
    logits_LV = logits(2)
    edits: dict[str, Any] = {"temperature": 0.3, "logit_bias": ((5, 100.0),), "top_k": 1}
    rows = [make_row(1, 1, 1, logprobs=2, **edits), make_row(1, 1, 0), make_row(1, 1, 0, logprobs=0)]
    biased, silent, short = sample(logits_LV, rows).logprobs
    assert silent is None and isinstance(biased, TokenLogprobs) and isinstance(short, TokenLogprobs)
    exact = exact_logprobs(logits_LV)
    assert biased.token_id == 5 and abs(biased.logprob - exact[1, 5]) < 1e-5
    assert [token_id for token_id, _ in biased.top] == np.argsort(-logits_LV[1], kind="stable")[:2].tolist()
    assert short.top == () and abs(short.logprob - exact[0, short.token_id]) < 1e-5
