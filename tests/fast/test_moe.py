"""Mixtures of experts: native against numpy, bit for bit, and what routing promises.

Run: pytest tests/fast/test_moe.py
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.fast.random_moe import make_moe_plan, work_ops
from tests.fast.random_plan import FORMATS, make_batch
from tests.fast.random_weights import RandomWeights, tiny_architecture
from tokenmill.engine.taps.points import tap_points
from tokenmill.kernels import (
    Activation,
    Executor,
    F32Array,
    Gather,
    Linear,
    NumpyExecutor,
    PackedAdapter,
    Route,
    StepBatch,
    StepPlan,
    available_isas,
    create_executor,
)
from tokenmill.kernels.lowrank import LowRankPart, pack_low_rank
from tokenmill.kernels.moe_twin import route_rows
from tokenmill.models.architecture import Experts, Layer
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WEIGHT_FORMATS, WeightFormat, pack_model

NATIVE_ISAS = [isa for isa in available_isas() if isa != "numpy"]
ISAS = available_isas()


def executor(plan: StepPlan, isa: str, *, threads: int = 2, max_rows: int = 64) -> Executor:
    if isa == "numpy":
        return NumpyExecutor(plan, max_rows=max_rows, max_out_rows=max_rows, num_blocks=24, ordered=True)
    return create_executor(
        plan, max_rows=max_rows, max_out_rows=max_rows, num_blocks=24, num_threads=threads, isa=isa
    )


def logits(ex: Executor, batch: StepBatch) -> F32Array:
    ex.run(batch)
    return ex.buffer("logits")[: len(batch.out_rows)].copy()


def tokens(seed: int, count: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 203, count)]


def prompt_batch(count: int, seed: int = 2) -> StepBatch:
    return make_batch([(tokens(seed, count), 0, [3, 5])])


@cache
def one_layer(kind: str) -> StepPlan:
    return make_moe_plan(kind, layers=1, renormalise=kind != "i8g")


@cache
def wanted(kind: str, rows: int) -> F32Array:
    return logits(executor(one_layer(kind), "numpy"), prompt_batch(rows))


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("kind", FORMATS)
def test_native_equals_numpy(kind: str, isa: str) -> None:
    for rows in (1, 3, 64):
        got = logits(executor(one_layer(kind), isa), prompt_batch(rows))
        np.testing.assert_array_equal(got, wanted(kind, rows))


SIZES: list[dict[str, Any]] = [
    {"num_experts": 128, "num_active": 8, "expert_size": 32},
    {"num_experts": 3, "num_active": 3, "expert_size": 32},
    {"num_experts": 1, "num_active": 1, "expert_size": 160},
    {"num_experts": 17, "num_active": 1, "expert_size": 64, "hidden": 288},
]


@pytest.mark.parametrize("sizes", SIZES, ids=["more experts than rows", "all active", "one", "a tail"])
def test_sizes(sizes: dict[str, Any]) -> None:
    plan, batch = make_moe_plan("i8c", layers=1, **sizes), prompt_batch(20)
    twin = executor(plan, "numpy")
    want = logits(twin, batch)
    for isa in NATIVE_ISAS:
        native = executor(plan, isa)
        np.testing.assert_array_equal(logits(native, batch), want)
        np.testing.assert_array_equal(native.buffer("route")[:20], twin.buffer("route")[:20])


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("kind", ["i8c", "i4g", "bf16"])
def test_a_row_does_not_depend_on_its_neighbours(isa: str, kind: str) -> None:
    plan = one_layer(kind)
    alone = logits(executor(plan, isa, threads=1), make_batch([(tokens(4, 30), 0, [0])]))
    crowd = [(tokens(5, 33), 0, [9, 8]), (tokens(4, 30), 0, [4])]
    np.testing.assert_array_equal(logits(executor(plan, isa), make_batch(crowd))[33:], alone)


@pytest.mark.parametrize("isa", ISAS)
def test_of_equal_experts_the_first_are_chosen(isa: str) -> None:
    plan = make_moe_plan("i8c", num_experts=6, num_active=3, layers=1)
    (at,) = work_ops(plan, Route)
    route = plan.ops[at]
    assert isinstance(route, Route)
    order = [4, 1, 1, 4, 1, 2]
    equal = replace(route, weight=np.ascontiguousarray(route.weight[order]))
    ex = executor(replace(plan, ops=(*plan.ops[:at], equal, *plan.ops[at + 1 :])), isa)
    ex.run(prompt_batch(40), 0, at + 1)
    route_TX = ex.buffer("route")[:40]
    assert set((route_TX != 0).sum(axis=1).tolist()) == {3}
    # Experts 1, 2 and 4 are the same, as are 0 and 3: a later one never stands without the earlier.
    assert not ((route_TX[:, 4] != 0) & (route_TX[:, 2] == 0)).any()
    assert not ((route_TX[:, 2] != 0) & (route_TX[:, 1] == 0)).any()
    assert not ((route_TX[:, 3] != 0) & (route_TX[:, 0] == 0)).any()


@pytest.mark.parametrize("renormalise", [True, False])
def test_route_is_softmax_of_the_router(renormalise: bool) -> None:
    plan = make_moe_plan("i8c", num_experts=9, num_active=4, layers=1, renormalise=renormalise)
    (at,) = work_ops(plan, Route)
    ex = executor(plan, NATIVE_ISAS[0])
    ex.run(prompt_batch(12), 0, at)
    op, x_TD = plan.ops[at], ex.buffer("x")[:12].astype(np.float64)
    assert isinstance(op, Route)
    normed_TD = x_TD / np.sqrt((x_TD**2).mean(axis=1, keepdims=True) + op.eps) * op.norm
    exps_TX = np.exp(normed_TD @ op.weight.T)
    want_TX = exps_TX / exps_TX.sum(axis=1, keepdims=True)
    want_TX[want_TX < np.sort(want_TX, axis=1)[:, -4][:, None]] = 0
    if renormalise:
        want_TX /= want_TX.sum(axis=1, keepdims=True)
    ex.run(prompt_batch(12), at, at + 1)
    np.testing.assert_allclose(ex.buffer("route")[:12], want_TX, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("value", "kind"), [(np.nan, "i8c"), (np.inf, "i8g"), (-np.inf, "bf16")])
def test_a_broken_row_goes_to_the_first_experts_and_stays_alone(isa: str, value: float, kind: str) -> None:
    plan = one_layer(kind)
    (at,) = work_ops(plan, Route)
    batch = prompt_batch(9)
    clean, ex = executor(plan, isa), executor(plan, isa)
    want = logits(clean, batch)
    ex.run(batch, 0, at - 1)
    ex.buffer("x")[4, 7] = value
    with np.errstate(invalid="ignore"):
        ex.run(batch, at - 1, at + 1)
        assert np.isnan(ex.buffer("route")[4, :2]).all() and not ex.buffer("route")[4, 2:].any()
        ex.run(batch, at + 1)
    got = ex.buffer("logits")[:9]
    assert np.isnan(got[4]).all()
    np.testing.assert_array_equal(np.delete(got, 4, axis=0), np.delete(want, 4, axis=0))


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_huge_logits_keep_their_order(isa: str) -> None:
    plan = make_moe_plan("i8c", layers=1, num_experts=7, num_active=3)
    (at,) = work_ops(plan, Route)
    op = plan.ops[at]
    assert isinstance(op, Route)
    for factor in (1e3, 1e30, 3e38):
        wide = replace(op, weight=np.ascontiguousarray(op.weight * np.float32(factor)))
        ex = executor(replace(plan, ops=(*plan.ops[:at], wide, *plan.ops[at + 1 :])), isa)
        ex.run(prompt_batch(8), 0, at)
        with np.errstate(all="ignore"):
            want_TX = route_rows(wide, ex.buffer("x")[:8], 3)
        ex.run(prompt_batch(8), at, at + 1)
        np.testing.assert_array_equal(ex.buffer("route")[:8], want_TX)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_edited_routes_are_followed(isa: str) -> None:
    plan, batch = make_moe_plan("i4g", layers=1), prompt_batch(20)
    (at,) = work_ops(plan, Gather)
    edited = np.zeros((20, 5), np.float32)
    edited[:17, 3] = np.linspace(-2, 2, 17, dtype=np.float32)  # one of them zero: no expert at all
    edited[0] = [1, 2, 0, 4, 5]
    results = []
    for name in (isa, "numpy"):
        ex = executor(plan, name)
        ex.run(batch, 0, at)
        ex.buffer("route")[:20] = edited
        ex.run(batch, at, at + 5)
        results.append((ex.buffer("x")[:20].copy(), ex.buffer("eo")[:19].copy()))
    for native, twin in zip(*results, strict=True):
        np.testing.assert_array_equal(native, twin)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_all_rows_may_go_to_one_expert(isa: str) -> None:
    plan, batch = one_layer("i8c"), prompt_batch(64)
    (at,) = work_ops(plan, Gather)
    results = []
    for name in (isa, "numpy"):
        ex = executor(plan, name)
        ex.run(batch, 0, at)
        ex.buffer("route")[:] = [0, 0, 0, 0, 0.5]
        ex.run(batch, at)
        results.append(ex.buffer("logits")[:64].copy())
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("isa", ISAS)
def test_more_experts_than_there_is_room_for_are_refused(isa: str) -> None:
    plan, batch = make_moe_plan("i8c", layers=1), prompt_batch(8)
    (at,) = work_ops(plan, Gather)
    ex = executor(plan, isa, max_rows=8)
    ex.run(batch, 0, at)
    ex.buffer("route")[:] = 1
    with pytest.raises(ValueError, match="more experts than there is room for"):
        ex.run(batch, at)
    np.testing.assert_array_equal(logits(ex, batch), logits(executor(plan, isa), batch))


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_a_run_can_stop_anywhere(isa: str) -> None:
    plan, batch = make_moe_plan("i8g"), prompt_batch(20)
    want, ex = logits(executor(plan, isa), batch), executor(plan, isa)
    for i in range(len(plan.ops)):
        ex.run(batch, i, i + 1)
    np.testing.assert_array_equal(ex.buffer("logits")[:20], want)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_an_adapter_of_the_attention_leaves_the_experts_alone(isa: str) -> None:
    plan, batch = one_layer("i8c"), prompt_batch(20)
    batch = replace(batch, adapters=np.zeros(1, np.int32))
    at, *_ = work_ops(plan, Linear)
    op, rng = plan.ops[at], np.random.default_rng(8)
    assert isinstance(op, Linear)
    up, down = rng.standard_normal((96, 4), np.float32), rng.standard_normal((4, 96), np.float32)
    low_rank = pack_low_rank([LowRankPart(outputs=np.arange(96), up=up, down=down)], op.weight, 0.5)
    adapter = PackedAdapter(digest="a", linears={at: low_rank})
    results = []
    for name in (isa, "numpy"):
        ex = create_executor(
            plan, max_rows=64, max_out_rows=64, num_blocks=24, num_threads=2, isa=name, max_adapters=1
        )
        ex.set_adapter(0, adapter)
        results.append(logits(ex, batch))
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], wanted("i8c", 20))


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_a_packed_model_runs_alike_in_both(weights: WeightFormat) -> None:
    layers = (Layer(), Layer(routed=True))
    experts = Experts(num_experts=4, num_active=2, intermediate_size=64, renormalise=True)
    architecture = replace(tiny_architecture(), layers=layers, experts=experts)
    plan = compile_plan(architecture, pack_model(architecture, RandomWeights(architecture), weights))
    batch = make_batch([([t % 100 for t in tokens(6, 20)], 0, [0])])
    want = logits(executor(plan, "numpy"), batch)
    assert np.isfinite(want).all()
    for isa in NATIVE_ISAS:
        np.testing.assert_array_equal(logits(executor(plan, isa), batch), want)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_activations(activation: Activation) -> None:
    plan, batch = make_moe_plan("i8c", layers=1, activation=activation), prompt_batch(20)
    want = logits(executor(plan, "numpy"), batch)
    assert not np.array_equal(want, logits(executor(one_layer("i8c"), "numpy"), batch))
    for isa in NATIVE_ISAS:
        np.testing.assert_array_equal(logits(executor(plan, isa), batch), want)


def test_taps_read_and_edit_routes() -> None:
    points = tap_points(one_layer("i8c"))
    assert points["blocks.0.mlp.hook_route"].buffer == "route"
    assert points["blocks.0.hook_resid_post"].buffer == "x"
