"""Adapters in the executors: native equals numpy to the bit, and rows have no influence on each other.

Run: pytest tests/fast/test_lowrank.py
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.random_plan import FORMATS, LLAMA, Variant, make_batch, make_plan, pack
from tokenmill.kernels import (
    Executor,
    F32Array,
    Linear,
    NumpyExecutor,
    PackedAdapter,
    PackedLowRank,
    StepBatch,
    StepPlan,
    available_isas,
    create_executor,
)
from tokenmill.kernels.lowrank import LowRankPart, low_rank_delta, pack_low_rank
from tokenmill.kernels.twin import bf16_bits, bf16_values

NATIVE_ISAS = [isa for isa in available_isas() if isa != "numpy"]
SIZES = {"hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 32, "inner": 192, "vocab": 50, "layers": 1}
UNEVEN = SIZES | {"head_dim": 24}
"""Queries, keys and values end inside tiles (72, 24, 24), as do the inputs of `out`: not for groups."""
PROMPTS = ([7, 9, 1, 3, 30], [4, 4, 2], [11], [40, 41, 42, 43, 44, 45, 46], [5, 6])


def random_adapter(plan: StepPlan, rank: int, seed: int, *, chance: float = 1.0) -> PackedAdapter:
    """Every fused matrix of every linear below the head has factors, with a probability of `chance`."""
    rng = np.random.default_rng(seed)
    shape = plan.shape
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    linears: dict[int, PackedLowRank] = {}
    for i, op in enumerate(plan.ops):
        if not isinstance(op, Linear) or op.dst == "logits":
            continue
        n, k = op.weight.num_out, op.weight.num_in
        outputs = np.arange(n)
        if op.gated:
            groups = [outputs[outputs // 16 % 2 == half] for half in (0, 1)]
        else:
            groups = np.split(outputs, [q, q + kv]) if op.dst == "qkv" else [outputs]
        parts = [
            LowRankPart(
                outputs=group,
                down=rng.standard_normal((rank, k), np.float32) / np.float32(np.sqrt(k)),
                up=rng.standard_normal((len(group), rank), np.float32),
            )
            for group in groups
            if rng.random() < chance
        ]
        if parts:
            linears[i] = pack_low_rank(parts, op.weight, 0.7)
    return PackedAdapter(digest=f"{seed}", linears=linears)


def executor(plan: StepPlan, isa: str, adapters: dict[int, PackedAdapter], threads: int = 2) -> Executor:
    room: dict[str, Any] = {"max_rows": 32, "max_out_rows": 32, "num_blocks": 8, "max_adapters": 4}
    if isa == "numpy":
        ex: Executor = NumpyExecutor(plan, **room, ordered=True)
    else:
        ex = create_executor(plan, **room, num_threads=threads, isa=isa)
    for slot, adapter in adapters.items():
        ex.set_adapter(slot, adapter)
    return ex


def batch_of(slots: tuple[int, ...]) -> StepBatch:
    """One sequence a slot, each with the prompt of its place."""
    batch = make_batch([(PROMPTS[i], 0, [i]) for i in range(len(slots))])
    return replace(batch, adapters=np.array(slots, np.int32))


def logits(ex: Executor, batch: StepBatch) -> F32Array:
    ex.run(batch)
    return ex.buffer("logits")[: len(batch.out_rows)].copy()


@given(
    kind=st.sampled_from(FORMATS),
    isa=st.sampled_from(NATIVE_ISAS),
    ranks=st.tuples(st.integers(1, 9), st.sampled_from((3, 16))),
    slots=st.lists(st.integers(-1, 1), min_size=1, max_size=5).map(tuple),
    chance=st.sampled_from((1.0, 0.5)),
    threads=st.integers(1, 2),
    variant=st.sampled_from((LLAMA, Variant(bias=True, activation="gelu_tanh", post_norm=True))),
)
@settings(max_examples=40, deadline=None)
def test_native_equals_numpy(
    kind: str,
    isa: str,
    ranks: tuple[int, int],
    slots: tuple[int, ...],
    chance: float,
    threads: int,
    variant: Variant,
) -> None:
    plan = make_plan(kind, variant, **(UNEVEN if kind in ("i8c", "bf16") else SIZES))
    adapters = {slot: random_adapter(plan, rank, slot, chance=chance) for slot, rank in enumerate(ranks)}
    batch = batch_of(slots)
    native, twin = (executor(plan, name, adapters, threads) for name in (isa, "numpy"))
    np.testing.assert_array_equal(logits(native, batch), logits(twin, batch))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", ["i8c", "i4g", "bf16"])
def test_a_row_depends_on_its_own_adapter_only(kind: str, isa: str) -> None:
    plan = make_plan(kind, **SIZES)
    adapters = {0: random_adapter(plan, 5, 0), 3: random_adapter(plan, 16, 1)}
    mixed = batch_of((0, -1, 3, 0, -1))
    got = logits(executor(plan, isa, adapters), mixed)
    plain = logits(executor(plan, isa, {}), replace(mixed, adapters=np.zeros(0, np.int32)))
    for s, slot in enumerate(mixed.adapters.tolist()):
        rows = slice(mixed.row_starts[s], mixed.row_starts[s + 1])
        alone = replace(make_batch([(PROMPTS[s], 0, [6])]), adapters=np.array([slot], np.int32))
        np.testing.assert_array_equal(got[rows], logits(executor(plan, isa, adapters, threads=1), alone))
        assert np.array_equal(got[rows], plain[rows]) == (slot == -1)


def test_the_twin_computes_the_products_of_the_factors() -> None:
    """Matrices that share tiles, with ranks of different size, and outputs that nothing is added to."""
    rng = np.random.default_rng(0)
    linear = pack(np.zeros((90, 50), np.float32), "bf16")
    x = rng.standard_normal((3, 50), np.float32)
    want = np.zeros((3, 90), np.float32)
    parts = []
    for outputs, rank in ((np.arange(24), 5), (np.arange(24, 40), 2), (np.arange(88, 60, -3), 1)):
        down, up = (rng.standard_normal(size, np.float32) for size in ((rank, 50), (len(outputs), rank)))
        parts.append(LowRankPart(outputs=outputs, down=down, up=up))
        want[:, outputs] = near(np.float32(0.3) * (near(x) @ near(down).T)) @ near(up).T
    packed = pack_low_rank(parts, linear, 0.3)
    np.testing.assert_allclose(low_rank_delta(packed, linear, x), want, atol=0.05)
    assert len(packed.up) == 7 + 2 + 1, "a pair of tiles holds the ranks that one of them needs at most"


def near(values: F32Array) -> F32Array:
    return bf16_values(bf16_bits(values))


@pytest.mark.parametrize("isa", available_isas())
def test_a_slot_can_be_filled_again_and_freed(isa: str) -> None:
    plan = make_plan("i8c", **SIZES)
    first, second = random_adapter(plan, 4, 3), random_adapter(plan, 20, 4, chance=0.5)
    ex = executor(plan, isa, {1: first})
    batch = batch_of((1, -1))
    before = logits(ex, batch)
    ex.set_adapter(1, second)
    np.testing.assert_array_equal(logits(ex, batch), logits(executor(plan, isa, {1: second}), batch))
    ex.set_adapter(1, first)
    np.testing.assert_array_equal(logits(ex, batch), before)
    ex.set_adapter(1, None)
    with pytest.raises(ValueError, match="not filled"):
        ex.run(batch)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("slot", [-2, 1, 4])
def test_a_batch_with_a_slot_that_holds_nothing_is_refused(isa: str, slot: int) -> None:
    plan = make_plan("i8c", **SIZES)
    ex = executor(plan, isa, {0: random_adapter(plan, 2, 0)})
    with pytest.raises(ValueError, match="not filled"):
        ex.run(batch_of((0, slot)))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_out_of_range_is_refused(isa: str, slot: int) -> None:
    ex = executor(make_plan("i8c", **SIZES), isa, {})
    with pytest.raises(ValueError, match="out of range"):
        ex.set_adapter(slot, None)


def test_adapters_are_one_a_sequence() -> None:
    plan = make_plan("i8c", **SIZES)
    ex = executor(plan, NATIVE_ISAS[0], {0: random_adapter(plan, 2, 0)})
    with pytest.raises(ValueError, match="one a sequence"):
        ex.run(replace(batch_of((0, 0)), adapters=np.zeros(1, np.int32)))


@pytest.mark.parametrize(
    "change",
    [
        {"down": np.zeros((6, 95, 2), np.uint16)},
        {"down": np.zeros((5, 96, 2), np.uint16)},
        {"up": np.zeros((1, 16, 2), np.uint16)},
        {"pairs": np.zeros((2, 4), np.int32)},
        {"pairs": np.tile(np.array([0, -1, 1, 0], np.int32), (5, 1))},
        {"pairs": np.tile(np.array([0, 0, -1, 0], np.int32), (5, 1))},
        {"pairs": np.tile(np.array([0, 0, 1, -1], np.int32), (5, 1))},
        {"pairs": np.tile(np.array([12, 0, 1, 0], np.int32), (5, 1))},
        {"pairs": np.tile(np.array([0, 2**31 - 1, 1, 0], np.int32), (5, 1))},
    ],
    ids=["narrow", "few ranks", "few rows", "few pairs", "first", "count", "row", "rank", "overflow"],
)
def test_arrays_of_another_size_are_refused_and_change_nothing(change: dict[str, Any]) -> None:
    plan = make_plan("i8c", **SIZES)
    good = random_adapter(plan, 4, 0)
    index = next(i for i, op in enumerate(plan.ops) if isinstance(op, Linear))
    ex = executor(plan, NATIVE_ISAS[0], {0: good})
    before = logits(ex, batch_of((0,)))
    broken = replace(good.linears[index], **change)
    for place in (index, 0, len(plan.ops) - 1, len(plan.ops)):
        with pytest.raises(ValueError, match="adapter"):
            ex.set_adapter(0, PackedAdapter(digest="", linears={**good.linears, place: broken}))
    np.testing.assert_array_equal(logits(ex, batch_of((0,))), before)


def test_a_broken_row_with_an_adapter_spoils_no_neighbour() -> None:
    plan = make_plan("i8c", **SIZES)
    ex = executor(plan, NATIVE_ISAS[0], {0: random_adapter(plan, 4, 0)})
    batch = batch_of((0, 0, -1))
    want = logits(ex, batch)
    ex.run(batch, last=1)
    ex.buffer("x")[0] = np.nan
    ex.run(batch, first=1)
    got = ex.buffer("logits")[: batch.num_rows]
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(got[5:], want[5:])


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_a_run_can_stop_before_and_after_a_linear(isa: str) -> None:
    plan = make_plan("i8c", **SIZES)
    adapters = {0: random_adapter(plan, 4, 0)}
    batch = batch_of((0, -1, 0))
    want = logits(executor(plan, isa, adapters), batch)
    ex = executor(plan, isa, adapters)
    for i in range(len(plan.ops)):
        ex.run(batch, i, i + 1)
    np.testing.assert_array_equal(ex.buffer("logits")[: batch.num_rows], want)
