"""The native sampler and its numpy twin choose the same token, whatever the row; and the noise is noise."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.random_plan import make_plan
from tokenmill.kernels import (
    Choice,
    F32Array,
    available_isas,
    choose_tokens,
    create_executor,
    top_token_ids,
)
from tokenmill.kernels.isa import load_native
from tokenmill.kernels.sampling_twin import noise, philox

NATIVE_ISAS = [isa for isa in available_isas() if isa != "numpy"]
VOCABS = (1, 2, 15, 16, 63, 64, 65, 127, 300, 1024, 1100, 2000)


@st.composite
def logits(draw: st.DrawFn) -> F32Array:
    """Two rows: smooth or with many equal values, some tokens impossible, some rows broken."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    logits_LV = rng.standard_normal((2, draw(st.sampled_from(VOCABS)))) * draw(
        st.sampled_from((0.0, 0.01, 1.0, 3.0, 20.0, 1e30))
    )
    if draw(st.booleans()):
        logits_LV = np.round(logits_LV)
    logits_LV[rng.random(logits_LV.shape) < draw(st.sampled_from((0.0, 0.0, 0.5, 0.99)))] = -np.inf
    if draw(st.integers(0, 9)) == 0:
        at = rng.integers(logits_LV.shape[1])
        logits_LV[0, at] = draw(st.sampled_from((np.nan, np.inf, -np.inf, 3e38, -3e38)))
    return logits_LV.astype(np.float32)


@st.composite
def choice(draw: st.DrawFn, vocab: int) -> Choice:
    """Any choice; ids may lie outside the vocabulary."""
    ids = st.integers(-2, vocab + 1) | st.sampled_from((-(1 << 31), (1 << 31) - 1, 1 << 31))
    biases = st.tuples(ids, st.floats(-100, 100))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    tokens = rng.integers(-2, vocab + 2, draw(st.sampled_from((0, 1, 40))))
    tokens[rng.random(len(tokens)) < 0.05] = (1 << 31) - 1
    mask = rng.integers(0, 1 << 32, -(-vocab // 32), dtype=np.uint32)
    return Choice(
        logits_row=draw(st.integers(0, 1)),
        bias=tuple(draw(st.lists(biases, max_size=4))) if draw(st.booleans()) else (),
        banned=draw(st.lists(ids, max_size=4)) if draw(st.booleans()) else (),
        tokens=tokens.astype(np.int32),
        num_prompt=draw(st.integers(0, 50)),
        repetition=draw(st.sampled_from((1.0, 0.01, 1.3, 100.0))),
        frequency=draw(st.floats(-2, 2)),
        presence=draw(st.floats(-2, 2)),
        mask=mask if draw(st.booleans()) else None,
        inverse_temperature=draw(st.sampled_from((0.0, 0.01, 0.7, 1.0, 1.0, 5.0, 1e5))),
        top_k=draw(st.sampled_from((0, 0, 1, 2, 5, 40, 500, 1 << 20))),
        top_p=draw(st.sampled_from((1.0, 1.0, 5e-324, 0.3, 0.9, 0.999999))),
        min_p=draw(st.sampled_from((0.0, 0.0, 5e-324, 0.05, 1.0))),
        seed=draw(st.integers(0, 2**63 - 1)),
        position=draw(st.integers(0, 1 << 21)),
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_native_chooses_what_the_twin_chooses(data: st.DataObject) -> None:
    logits_LV = data.draw(logits())
    before = logits_LV.tobytes()
    choices = data.draw(st.lists(choice(logits_LV.shape[1]), min_size=1, max_size=4))
    want = choose_tokens(logits_LV, choices, "numpy").tolist()
    for isa in NATIVE_ISAS:
        assert choose_tokens(logits_LV, choices, isa).tolist() == want, isa
    assert logits_LV.tobytes() == before


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_native_equals_the_twin_on_a_real_vocabulary(isa: str, scale: float) -> None:
    logits_LV = (np.random.default_rng(5).standard_normal((2, 49_152)) * scale).astype(np.float32)
    forms = [{}, {"top_k": 50}, {"top_k": 5000, "top_p": 0.9}, {"top_p": 0.95}, {"min_p": 0.05}]
    choices = [
        Choice(logits_row=seed % 2, inverse_temperature=1.0, seed=seed, position=seed, **form)  # type: ignore[arg-type]
        for seed in range(4)
        for form in forms
    ]
    want = choose_tokens(logits_LV, choices, "numpy")
    assert choose_tokens(logits_LV, choices, isa).tolist() == want.tolist()


@pytest.mark.parametrize("isa", available_isas())
def test_the_most_likely_are_those_of_a_stable_sort(isa: str) -> None:
    rng = np.random.default_rng(3)
    for vocab in VOCABS:
        logits_LV = np.round(rng.standard_normal((3, vocab)) * 3).astype(np.float32)
        logits_LV[0, rng.random(vocab) < 0.7] = -np.inf
        for num_top in (0, 1, 5, 20):
            want = np.lexsort((np.arange(vocab)[None].repeat(3, 0), -logits_LV), axis=1)[:, :num_top]
            assert top_token_ids(logits_LV, num_top, isa).tolist() == want.tolist()


def test_philox_gives_the_published_words() -> None:
    """The known answer for zeros of Random123 (kat_vectors, philox4x32 10)."""
    words = [int(word[0]) for word in philox(np.zeros(1, np.int64), 0, 0, 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_exponential_and_independent_within_a_group() -> None:
    noise_NV = np.stack([noise(7, position, 6400) for position in range(40)]).reshape(-1, 64)
    flat = np.sort(noise_NV.ravel().astype(np.float64))
    count = len(flat)
    distance = np.abs((np.arange(count) + 0.5) / count + np.expm1(-flat)).max()
    assert distance < 1.95 / np.sqrt(count), "Kolmogorov and Smirnov, one in a thousand"
    assert flat[0] > 0 and flat[-1] < 17 + 17 / 64
    uniform = -np.expm1(-noise_NV.astype(np.float64))
    correlation = np.corrcoef(uniform, rowvar=False)[np.triu_indices(64, 1)]
    assert abs(correlation * np.sqrt(len(uniform))).max() < 4.8 and abs(correlation.mean()) < 2e-3
    owners = np.bincount(noise_NV.argmin(axis=1), minlength=64)
    assert ((owners - owners.mean()) ** 2).sum() / owners.mean() < 63 + 4 * np.sqrt(126)


def test_the_least_noise_is_precise() -> None:
    """The minimum of many is exponential again, far below the step of one 32-bit number."""
    least = (
        np.stack([noise(seed, 0, 64 * 2000).reshape(-1, 64).min(axis=1) for seed in range(4)]).ravel() * 64
    )
    assert len(np.unique(least)) > 0.999 * len(least)
    assert abs(least.mean() - 1) < 4 / np.sqrt(len(least))


@pytest.mark.parametrize("isa", NATIVE_ISAS[:1])
def test_native_code_refuses_what_is_out_of_bounds(isa: str) -> None:
    logits_LV = np.zeros((1, 100), np.float32)
    short = np.zeros(3, np.uint32)
    for bad in (Choice(logits_row=1), Choice(logits_row=-1), Choice(logits_row=0, mask=short)):
        with pytest.raises(ValueError):
            choose_tokens(logits_LV, [bad], isa)
    native = load_native()
    assert native is not None
    for num in (-1, 101):
        with pytest.raises(ValueError):
            native.top_ids(logits_LV, num, isa)
    with pytest.raises(ValueError):
        choose_tokens(np.zeros((1, (1 << 20) + 1), np.float32), [Choice(logits_row=0)], isa)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_the_threads_of_an_executor_choose_the_same(isa: str) -> None:
    executor = create_executor(
        make_plan("i8c"), max_rows=8, max_out_rows=8, num_blocks=2, num_threads=3, isa=isa
    )
    logits_LV = np.random.default_rng(5).standard_normal((7, 20_000)).astype(np.float32)
    logits_LV[3, 9] = np.nan
    forms: list[dict[str, Any]] = [
        {},
        {"inverse_temperature": 1.0},
        {"inverse_temperature": 1.0, "top_p": 0.9},
        {"tokens": np.arange(40, dtype=np.int32), "repetition": 1.3},
    ]
    choices = [
        Choice(logits_row=row, seed=row, position=9, **form)
        for row in range(len(logits_LV))
        for form in forms
    ]
    want = choose_tokens(logits_LV, choices, isa).tolist()
    for _ in range(3):
        assert choose_tokens(logits_LV, choices, isa, executor).tolist() == want
