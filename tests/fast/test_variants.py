"""What blocks have besides those of Llama: biases, other activations, norms of heads and of outputs, windows.

Every native kernel against its numpy twin, bit for bit; and the twin against what the words mean.
Run: pytest tests/fast/test_variants.py
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from tests.fast.random_plan import FORMATS, Variant, make_batch, make_plan
from tests.fast.test_executor import NATIVE_ISAS, logits, tokens
from tokenmill.core import UsageError
from tokenmill.engine.taps.points import check_taps, input_points, tap_points
from tokenmill.engine.taps.tap import ablate
from tokenmill.kernels import (
    KV_DTYPES,
    Activation,
    AddNorm,
    Attend,
    Executor,
    F32Array,
    KvDtype,
    Linear,
    NumpyExecutor,
    Op,
    RopeKv,
    StepBatch,
    StepPlan,
    available_isas,
    create_executor,
)
from tokenmill.kernels.twin import gated_unit, rms_norm

VARIANTS = {
    "bias": Variant(bias=True),
    "gelu": Variant(bias=True, activation="gelu_tanh"),
    "relu": Variant(bias=True, activation="relu"),
    "head norms": Variant(qk_norm="head"),
    "no rotation": Variant(qk_norm="head", rotary=False, window=7),
    "post norm": Variant(qk_norm="all", post_norm=True),
    "all": Variant(bias=True, activation="gelu_tanh", qk_norm="all", post_norm=True, window=20),
}
UNEVEN = {"hidden": 70, "heads": 4, "kv_heads": 2, "head_dim": 20, "inner": 48, "vocab": 33}
"""Outputs and inputs end inside tiles."""
SMALL = {"hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 32, "inner": 32, "vocab": 203}


def long_plan(variant: Variant, positions: int, **sizes: int) -> StepPlan:
    """A small plan for texts of so many tokens."""
    plan = make_plan("i8c", variant, **(SMALL | sizes))
    angles = np.arange(positions)[:, None] / 100.0 ** (np.arange(16) / 16)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return replace(plan, shape=replace(plan.shape, cos=cos, sin=sin))


def executor(plan: StepPlan, isa: str, *, kv_dtype: KvDtype = "bf16", threads: int = 2) -> Executor:
    if isa == "numpy":
        return NumpyExecutor(
            plan, max_rows=64, max_out_rows=64, num_blocks=12, ordered=True, kv_dtype=kv_dtype
        )
    return create_executor(
        plan, max_rows=64, max_out_rows=64, num_blocks=12, num_threads=threads, isa=isa, kv_dtype=kv_dtype
    )


def run_logits(ex: Executor, batches: list[StepBatch]) -> list[F32Array]:
    return [logits(ex, batch) for batch in batches]


def check_equal(want: list[F32Array], ex: Executor, batches: list[StepBatch]) -> None:
    for i, (got, expected) in enumerate(zip(run_logits(ex, batches), want, strict=True)):
        np.testing.assert_array_equal(got, expected, err_msg=f"batch {i}")


def mixed_batches(vocab: int) -> list[StepBatch]:
    """Prefill of two texts, then a token of one beside a chunk of the other."""
    text, more = ([t % vocab for t in tokens(seed, count)] for seed, count in ((2, 37), (3, 9)))
    return [
        make_batch([(text, 0, [3, 5]), ([7, 8, 9], 0, [1])]),
        make_batch([([4], 37, [3, 5]), (more, 3, [1])], out_rows=[0, 9]),
    ]


@pytest.mark.parametrize("kind", FORMATS)
def test_native_equals_numpy_in_every_format(kind: str) -> None:
    plan = make_plan(kind, VARIANTS["all"], seed=1, heads=3, kv_heads=1, inner=96, vocab=50)
    batches = mixed_batches(50)
    want = run_logits(executor(plan, "numpy"), batches)
    for isa in NATIVE_ISAS:
        check_equal(want, executor(plan, isa), batches)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_native_equals_numpy_in_every_variant(name: str, kv_dtype: KvDtype) -> None:
    plan = make_plan("i8c", VARIANTS[name], seed=1, **UNEVEN)
    batches = mixed_batches(33)
    want = run_logits(executor(plan, "numpy", kv_dtype=kv_dtype), batches)
    for isa in NATIVE_ISAS:
        check_equal(want, executor(plan, isa, kv_dtype=kv_dtype), batches)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("kind", ["i8c", "i4g", "bf16"])
def test_answer_of_a_row_ignores_neighbours_chunks_and_threads(kind: str, isa: str) -> None:
    prompt, plan = tokens(4, 40), make_plan(kind, VARIANTS["all"], seed=1)
    alone = logits(executor(plan, isa, threads=1), make_batch([(prompt, 0, [0, 1])]))
    crowd = executor(plan, isa)
    crowd.run(make_batch([(tokens(5, 9), 0, [9]), (prompt[:13], 0, [4, 2]), ([1], 0, [8])]))
    rest = make_batch([(prompt[13:], 13, [4, 2]), ([2], 9, [9])])
    np.testing.assert_array_equal(logits(crowd, rest)[:27], alone[13:])


def windowed_batches() -> list[StepBatch]:
    """A long and two short texts: chunks that end inside blocks, then single tokens together."""
    long, other, ids = tokens(6, 120), tokens(7, 50), [3, 0, 5, 1]
    return [
        make_batch([(long[:50], 0, ids), ([9], 0, [7])]),
        make_batch([(long[50:101], 50, ids), ([8], 1, [7])]),
        make_batch([(long[101:], 101, ids), (other, 0, [8, 9])]),
        make_batch([([4], 120, ids), ([5], 50, [8, 9]), ([6], 2, [7])]),
    ]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [1, 20, 32, 33, 64, 200])
def test_windows_native_equals_numpy_and_chunked_equals_whole(window: int, kv_dtype: KvDtype) -> None:
    plan = long_plan(Variant(window=window), 128)
    room: dict[str, Any] = {"max_rows": 128, "max_out_rows": 128, "num_blocks": 12, "kv_dtype": kv_dtype}
    batches = windowed_batches()
    want = run_logits(create_executor(plan, **room, isa="numpy"), batches)
    long_rows = np.concatenate([want[0][:50], want[1][:51], want[2][:19], want[3][:1]])
    whole = make_batch([([*tokens(6, 120), 4], 0, [2, 4, 6, 8])])
    for isa in NATIVE_ISAS:
        ex = create_executor(plan, **room, isa=isa, num_threads=2)
        check_equal([*want, long_rows], ex, [*batches, whole])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [40, 520])
def test_windows_cross_the_spans_of_the_softmax(window: int, kv_dtype: KvDtype) -> None:
    plan = long_plan(Variant(window=window), 700, layers=1)
    ids = list(range(22))
    batches = [
        make_batch([(tokens(6, 680), 0, ids)], out_rows=[0, 511, 512, 530, 560, 679]),
        make_batch([([7, 8, 9], 680, ids)]),
    ]
    room: dict[str, Any] = {"max_rows": 680, "max_out_rows": 8, "num_blocks": 22, "kv_dtype": kv_dtype}
    want = run_logits(create_executor(plan, **room, isa="numpy"), batches)
    for isa in NATIVE_ISAS:
        check_equal(want, create_executor(plan, **room, isa=isa, num_threads=2), batches)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [5, 32, 40])
def test_a_row_sees_its_window_and_nothing_before_it(window: int, kv_dtype: KvDtype, isa: str) -> None:
    plan = long_plan(Variant(window=window), 128, layers=1)
    ex = create_executor(plan, max_rows=128, max_out_rows=128, num_blocks=4, isa=isa, kv_dtype=kv_dtype)
    text, changed = tokens(6, 100), 30
    want = logits(ex, make_batch([(text, 0, [0, 1, 2, 3])]))
    other = [*text[:changed], text[changed] ^ 1, *text[changed + 1 :]]
    got = logits(ex, make_batch([(other, 0, [0, 1, 2, 3])]))
    differs = (got != want).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(changed, changed + window))


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_blocks_outside_the_window_are_not_read(kv_dtype: KvDtype, isa: str) -> None:
    plan = long_plan(Variant(window=33), 128, layers=1)
    ex = create_executor(plan, max_rows=128, max_out_rows=128, num_blocks=4, isa=isa, kv_dtype=kv_dtype)
    ex.run(make_batch([(tokens(6, 96), 0, [0, 1, 2])]))
    batch = make_batch([([5], 96, [0, 1, 2, 3])])
    want = logits(ex, batch)
    for block in (0, 1):
        ex.block(block)[:] = 255
    np.testing.assert_array_equal(logits(ex, batch), want)
    ex.block(2)[:] = 255
    assert np.isnan(logits(ex, batch)).all(), "position 64 is the first that is seen"


def exact(activation: Activation, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The definitions, in float64."""
    factors: dict[Activation, npt.NDArray[np.float64]] = {
        "relu": (x > 0).astype(np.float64),
        "silu": 1 / (1 + np.exp(-x)),
        "gelu_tanh": 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    }
    return np.asarray(x * factors[activation])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
def test_gated_units_are_what_their_names_say(activation: Activation) -> None:
    gate, up = np.linspace(-12, 12, 960, dtype=np.float32), np.float32(-3)
    turns = np.stack([gate.reshape(-1, 16), np.full((60, 16), up)], axis=1).reshape(1, -1)
    got = gated_unit(turns, activation)[0]
    np.testing.assert_allclose(got, exact(activation, gate.astype(np.float64)) * up, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
def test_broken_gates_stay_broken_and_large_ones_do_not_break(activation: Activation, isa: str) -> None:
    """Gates come from the bias, so that they are what they are."""
    variant = Variant(bias=True, activation=activation)
    plan = make_plan("i8c", variant, **SMALL)
    at = next(i for i, op in enumerate(plan.ops) if isinstance(op, Linear) and op.gated)
    op = plan.ops[at]
    assert isinstance(op, Linear)
    gates = np.array([np.nan, 1e20, -1e20, 1e30, *[0.5] * 12], np.float32)
    bias = np.tile(np.stack([gates, np.full(16, 2, np.float32)]).reshape(-1), 2)
    plan = replace(plan, ops=(*plan.ops[:at], replace(op, bias=bias), *plan.ops[at + 1 :]))
    ex = create_executor(plan, max_rows=4, max_out_rows=4, num_blocks=1, isa=isa)
    batch = make_batch([([5], 0, [0])])
    ex.run(batch, last=at)
    ex.buffer("x")[:1] = 0
    ex.run(batch, at - 1, at + 1)
    h = ex.buffer("h")[0, :4]
    assert np.isnan(h[0])
    np.testing.assert_allclose(h[[1, 3]], [2e20, 2e30], rtol=1e-6)
    assert abs(float(h[2])) < 1e-10


@pytest.mark.parametrize("isa", available_isas())
def test_a_bias_is_added_after_the_product(isa: str) -> None:
    plan = make_plan("bf16", Variant(bias=True), **SMALL)
    op = plan.ops[2]
    assert isinstance(op, Linear) and op.bias is not None
    plain = replace(plan, ops=(*plan.ops[:2], replace(op, bias=None), *plan.ops[3:]))
    batch = make_batch([(tokens(8, 5), 0, [0])])
    qkv: list[F32Array] = []
    for each in (plan, plain):
        ex = create_executor(each, max_rows=8, max_out_rows=8, num_blocks=1, isa=isa)
        ex.run(batch, last=3)
        qkv.append(ex.buffer("qkv")[:5].copy())
    np.testing.assert_array_equal(qkv[0], qkv[1] + op.bias)


@pytest.mark.parametrize("isa", available_isas())
def test_the_norm_of_an_output_is_added(isa: str) -> None:
    plan = make_plan("i8c", Variant(post_norm=True), **SMALL)
    at, op = next((i, op) for i, op in enumerate(plan.ops) if isinstance(op, AddNorm))
    ex = create_executor(plan, max_rows=8, max_out_rows=8, num_blocks=1, isa=isa)
    batch = make_batch([(tokens(8, 5), 0, [0])])
    ex.run(batch, last=at)
    want = ex.buffer("x")[:5] + rms_norm(ex.buffer("o")[:5], op.weight, op.eps)
    ex.run(batch, at, at + 1)
    np.testing.assert_array_equal(ex.buffer("x")[:5], want)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("heads_at_once", [False, True])
def test_norms_of_heads_take_a_head_or_all_of_them(heads_at_once: bool, isa: str) -> None:
    """Queries and keys normed by hand, then attention without norms, give the same."""
    variant = Variant(qk_norm="all" if heads_at_once else "head", rotary=False)
    sizes = SMALL | {"heads": 4, "kv_heads": 2, "head_dim": 20}
    plan = make_plan("i8c", variant, **sizes)
    op = plan.ops[3]
    assert isinstance(op, RopeKv) and op.q_norm is not None and op.k_norm is not None
    assert (len(op.q_norm), len(op.k_norm)) == ((80, 40) if heads_at_once else (20, 20))
    plain = replace(plan, ops=(*plan.ops[:3], replace(op, q_norm=None, k_norm=None), *plan.ops[4:]))
    batch = make_batch([(tokens(8, 5), 0, [0])])
    z: list[F32Array] = []
    for each in (plan, plain):
        ex = create_executor(each, max_rows=8, max_out_rows=8, num_blocks=1, isa=isa)
        ex.run(batch, last=3)
        if each is plain:
            qkv = ex.buffer("qkv")
            for part, weight in ((slice(0, 80), op.q_norm), (slice(80, 120), op.k_norm)):
                rows = qkv[:5, part].reshape(-1, len(weight))
                qkv[:5, part] = rms_norm(rows, weight, op.eps).reshape(5, -1)
        ex.run(batch, 3, 5)
        z.append(ex.buffer("z")[:5].copy())
    np.testing.assert_array_equal(z[0], z[1])


def replaced(plan: StepPlan, index: int, **change: Any) -> StepPlan:
    return replace(plan, ops=(*plan.ops[:index], replace(plan.ops[index], **change), *plan.ops[index + 1 :]))


def test_parts_of_another_size_are_refused() -> None:
    plan = make_plan("i8c", Variant(qk_norm="head", post_norm=True), **SMALL)
    at = next(i for i, op in enumerate(plan.ops) if isinstance(op, Attend))
    post = next(i for i, op in enumerate(plan.ops) if isinstance(op, AddNorm))
    odd = np.ones(31, np.float32)
    broken = [
        (replaced(plan, at - 1, q_norm=odd), "norm of heads"),
        (replaced(plan, at - 1, k_norm=odd), "norm of heads"),
        (replaced(plan, at, window=0), "window"),
        (replaced(plan, post, weight=odd), "norm weight"),
        (replaced(plan, 2, gated="tanh"), "unknown activation"),
    ]
    for bad, message in broken:
        with pytest.raises(ValueError, match=message):
            create_executor(bad, max_rows=4, max_out_rows=4, num_blocks=1, isa=NATIVE_ISAS[0])
    short = replaced(plan, 2, bias=odd)
    with pytest.raises(AssertionError):
        create_executor(short, max_rows=4, max_out_rows=4, num_blocks=1, isa=NATIVE_ISAS[0])


def test_an_unknown_operation_is_no_selection() -> None:
    plan = make_plan("i8c", **SMALL)
    plan = replace(plan, ops=(*plan.ops, cast(Op, "new")))
    batch = make_batch([([1], 0, [0])])
    with pytest.raises(AssertionError, match="no native kernel for str"):
        create_executor(plan, max_rows=4, max_out_rows=4, num_blocks=1, isa=NATIVE_ISAS[0])
    ex = create_executor(plan, max_rows=4, max_out_rows=4, num_blocks=1, isa="numpy")
    with pytest.raises(AssertionError, match="no twin of str"):
        ex.run(batch)


def test_points_of_a_model_that_norms_outputs() -> None:
    plan = make_plan("i8c", Variant(post_norm=True), **SMALL)
    points = tap_points(plan)
    assert [name for name in points if points[name].buffer == "x"] == [
        "hook_embed",
        *(f"blocks.{i}.hook_resid_{at}" for i in (0, 1) for at in ("mid", "post")),
    ]
    reads = ["hook_resid_mid", "mlp.hook_post", "hook_resid_post", "attn.hook_z"]
    mid, mlp, post, z = (f"blocks.0.{name}" for name in reads)
    assert input_points(plan)[:5] == ("hook_embed", z, mid, mlp, post)
    with pytest.raises(UsageError, match=r"norms what a block writes.*blocks\.0\.hook_resid_post"):
        check_taps(points, [ablate("blocks.0.ln2.hook_normalized")])
    with pytest.raises(UsageError, match="there are"):
        check_taps(points, [ablate("blocks.7.ln2.hook_normalized")])
