"""Attention to blocks that several sequences have in common is done once, and changes no bit."""

from dataclasses import replace

import numpy as np
import pytest

from tests.fast.random_plan import LLAMA, Variant, make_batch, make_plan
from tokenmill.kernels import Executor, F32Array, KvDtype, NumpyExecutor, StepPlan, available_isas
from tokenmill.kernels.executor import NativeExecutor, create_executor

NATIVE_ISAS = [isa for isa in available_isas() if isa != "numpy"]
SPAN = 16
NUM_BLOCKS = 96
Part = tuple[list[int], int, list[int]]


def long_plan(variant: Variant = LLAMA, **sizes: int) -> StepPlan:
    """A plan with room for 1,536 positions."""
    plan = make_plan("i8c", variant, layers=2, **sizes)
    cos, sin = np.tile(plan.shape.cos, (6, 1)), np.tile(plan.shape.sin, (6, 1))
    return StepPlan(shape=replace(plan.shape, cos=cos, sin=sin), ops=plan.ops)


def native(plan: StepPlan, isa: str, kv_dtype: KvDtype = "bf16") -> NativeExecutor:
    made = create_executor(
        plan, max_rows=128, max_out_rows=32, num_blocks=NUM_BLOCKS, num_threads=2, isa=isa, kv_dtype=kv_dtype
    )
    assert isinstance(made, NativeExecutor)
    return made


def tokens(seed: int, count: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 203, count)]


def prefill(ex: Executor, text: list[int], blocks: list[int]) -> None:
    for first in range(0, len(text), 128):
        ex.run(make_batch([(text[first : first + 128], first, blocks)], out_rows=[0]))


def crowd(num_prefix: int) -> tuple[list[tuple[list[int], list[int]]], list[Part]]:
    """Two prefixes to be computed, and a step of sequences with the one, with the other, and with none.

    Sequences of a prefix are not neighbours, and two of them have several rows.
    """
    ours, theirs, size = list(range(num_prefix)), list(range(40, 40 + num_prefix)), 32 * num_prefix
    prefixes = [(tokens(1, size), ours), (tokens(2, size), theirs)]
    parts = [
        ([7], size, [*ours, 80]),
        (tokens(3, 40), 0, [81, 82]),
        ([9], size, [*theirs, 83]),
        (tokens(4, 5), size, [*ours, 84]),
        ([11], size, [*theirs, 85]),
        ([13], size, [*ours, 86]),
        (tokens(5, 33), size, [*ours, 87, 88]),
    ]
    return prefixes, parts


def run(ex: Executor, parts: list[Part]) -> F32Array:
    last = np.cumsum([len(part[0]) for part in parts]) - 1
    ex.run(make_batch(parts, out_rows=last.tolist()))
    return ex.buffer("logits")[: len(parts)].copy()


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("num_prefix", [15, 16, 20, 33])
@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_together_is_as_alone(isa: str, num_prefix: int, kv_dtype: KvDtype) -> None:
    together, alone = (native(long_plan(), isa, kv_dtype) for _ in range(2))
    prefixes, parts = crowd(num_prefix)
    for text, blocks in prefixes:
        prefill(together, text, blocks)
        prefill(alone, text, blocks)
    got = run(together, parts)
    assert together.num_shared_blocks == 6 * (num_prefix // SPAN * SPAN)
    want = []
    for part in parts:
        want.append(run(alone, [part])[0])
        assert alone.num_shared_blocks == 0
    np.testing.assert_array_equal(got, np.stack(want))


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_together_is_as_the_twin(isa: str) -> None:
    plan = long_plan(Variant(window=600), hidden=64, heads=3, kv_heads=1, head_dim=48, inner=64)
    ex = native(plan, isa)
    twin = NumpyExecutor(plan, max_rows=128, max_out_rows=32, num_blocks=NUM_BLOCKS, ordered=True)
    prefixes, parts = crowd(17)
    for text, blocks in prefixes:
        prefill(ex, text, blocks)
        prefill(twin, text, blocks)
    got = run(ex, parts)
    assert ex.num_shared_blocks == 6 * SPAN
    np.testing.assert_array_equal(got, run(twin, parts))


@pytest.mark.parametrize(("column", "change"), [(0, 1), (1, 32), (2, -1)])
def test_blocks_in_common_are_the_same_at_the_same_place_and_full(column: int, change: int) -> None:
    ex = native(long_plan(), NATIVE_ISAS[0])
    prefill(ex, tokens(1, 512), list(range(16)))
    batch = make_batch([([1], 512, [*range(16), 20]), ([2], 512, [*range(16), 21])], out_rows=[0])
    ex.run(batch)
    assert ex.num_shared_blocks == 2 * SPAN
    batch.blocks[[15, 17 + 15] if column == 2 else [17 + 15], column] += change
    ex.run(batch)
    assert ex.num_shared_blocks == 0
