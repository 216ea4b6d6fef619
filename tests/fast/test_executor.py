"""Every native kernel against its numpy twin, bit for bit, on every instruction set of this machine.

Run: pytest tests/fast/test_executor.py
"""

import os
from dataclasses import replace

import numpy as np
import pytest

from tests.fast.random_plan import FORMATS, make_batch, make_plan
from tokenmill.kernels import (
    Executor,
    F32Array,
    KvDtype,
    Linear,
    NumpyExecutor,
    StepBatch,
    available_isas,
    create_executor,
)

NATIVE_ISAS = [isa for isa in available_isas() if isa != "numpy"]


def executor(
    plan_seed: int, kind: str, isa: str, threads: int = 2, kv_dtype: KvDtype = "bf16", **sizes: int
) -> Executor:
    plan = make_plan(kind, seed=plan_seed, **sizes)
    if isa == "numpy":
        return NumpyExecutor(
            plan, max_rows=64, max_out_rows=64, num_blocks=24, ordered=True, kv_dtype=kv_dtype
        )
    return create_executor(
        plan, max_rows=64, max_out_rows=64, num_blocks=24, num_threads=threads, isa=isa, kv_dtype=kv_dtype
    )


def logits(ex: Executor, batch: StepBatch) -> F32Array:
    ex.run(batch)
    return ex.buffer("logits")[: len(batch.out_rows)].copy()


def tokens(seed: int, count: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 203, count)]


SIZES = [
    {},
    {"hidden": 96, "heads": 6, "kv_heads": 6, "head_dim": 16, "inner": 96, "vocab": 33},
    {"hidden": 288, "heads": 3, "kv_heads": 1, "head_dim": 64, "inner": 96, "vocab": 50},
]


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sizes", SIZES, ids=["gqa", "mha", "mqa"])
def test_native_equals_numpy(kind: str, isa: str, sizes: dict[str, int]) -> None:
    native, twin = (executor(1, kind, each, kv_dtype="bf16", **sizes) for each in (isa, "numpy"))
    vocab = sizes.get("vocab", 203)
    first = make_batch([([t % vocab for t in tokens(2, 45)], 0, [3, 5]), ([7, 8, 9], 0, [1])])
    second = make_batch([([4], 45, [3, 5]), ([t % vocab for t in tokens(3, 20)], 3, [1])], out_rows=[0, 20])
    for batch in (first, second):
        got, want = logits(native, batch), logits(twin, batch)
        np.testing.assert_array_equal(got, want, err_msg=f"largest gap {np.abs(got - want).max()}")


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("kind", FORMATS)
def test_answer_of_a_row_ignores_neighbours_chunks_and_threads(kind: str, isa: str) -> None:
    prompt = tokens(4, 40)
    alone = logits(executor(1, kind, isa, threads=1), make_batch([(prompt, 0, [0, 1])]))
    crowd = executor(1, kind, isa, threads=2)
    neighbours = make_batch([(tokens(5, 9), 0, [9]), (prompt[:13], 0, [4, 2]), ([1], 0, [8])])
    crowd.run(neighbours)
    rest = make_batch([(prompt[13:], 13, [4, 2]), ([2], 9, [9])])
    np.testing.assert_array_equal(logits(crowd, rest)[:27], alone[13:])


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_long_context_crosses_softmax_spans(isa: str) -> None:
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 32, "inner": 32}
    plan = make_plan("i8c", **sizes)
    long = plan.shape
    repeat = 6
    shape = type(long)(
        **{**vars(long), "cos": np.tile(long.cos, (repeat, 1)), "sin": np.tile(long.sin, (repeat, 1))}
    )
    plan = type(plan)(shape=shape, ops=plan.ops)
    blocks = list(range(40))
    results = []
    for name in (isa, "numpy"):
        ex = create_executor(plan, max_rows=1200, max_out_rows=8, num_blocks=40, num_threads=2, isa=name)
        results.append(
            logits(ex, make_batch([(tokens(6, 1100), 0, blocks)], out_rows=[0, 511, 512, 700, 1099]))
        )
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_a_run_can_stop_and_go_on(isa: str) -> None:
    whole, parts = executor(1, "i8c", isa), executor(1, "i8c", isa)
    batch = make_batch([(tokens(7, 20), 0, [0])])
    want = logits(whole, batch)
    for i in range(len(parts.plan.ops)):
        parts.run(batch, i, i + 1)
    np.testing.assert_array_equal(parts.buffer("logits")[:20], want)
    parts.run(batch, 0, 5)
    parts.buffer("x")[:20] += 1
    parts.run(batch, 5)
    assert not np.array_equal(parts.buffer("logits")[:20], want)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_copied_block_reads_the_same(isa: str) -> None:
    ex = executor(1, "i8c", isa)
    ex.run(make_batch([(tokens(8, 30), 0, [2])]))
    want = logits(ex, make_batch([([5], 30, [2])]))
    ex.run(make_batch([(tokens(8, 30), 0, [2])]))
    ex.copy_blocks([(2, 11)])
    ex.run(make_batch([(tokens(9, 32), 0, [2])]))
    np.testing.assert_array_equal(logits(ex, make_batch([([5], 30, [11])])), want)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", 203, "token id"),
        ("tokens", -1, "token id"),
        ("positions", 256, "position"),
        ("kv_slots", 24 * 32, "KV slot"),
        ("blocks", 24, "KV block"),
        ("out_rows", 3, "output row"),
        ("row_starts", 2, "row_starts"),
    ],
)
def test_a_batch_out_of_bounds_is_refused(field: str, value: int, message: str) -> None:
    ex = executor(1, "i8c", NATIVE_ISAS[0])
    batch = make_batch([([1, 2, 3], 0, [0])])
    getattr(batch, field).reshape(-1)[-1 if field == "row_starts" else 0] = value
    with pytest.raises(ValueError, match=message):
        ex.run(batch)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", ["i8c", "i4g", "bf16"])
def test_a_broken_request_spoils_neither_neighbours_nor_its_blocks(kind: str, isa: str) -> None:
    ex, clean = executor(1, kind, isa), executor(1, kind, isa)
    prompt = tokens(10, 20)
    want = logits(clean, make_batch([(prompt, 0, [7])]))
    both = make_batch([(tokens(11, 30), 0, [3]), (prompt, 0, [7])])
    ex.run(both, last=3)
    ex.buffer("qkv")[:30] = np.nan
    ex.run(both, first=3)
    got = ex.buffer("logits")[:50]
    assert np.isnan(got[:30]).all()
    np.testing.assert_array_equal(got[30:], want)
    np.testing.assert_array_equal(logits(ex, make_batch([(prompt, 0, [3])])), want)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_infinite_scores_and_activations_end_as_not_a_number(isa: str) -> None:
    for first, last, name in ((0, 3, "qkv"), (0, 9, "h")):
        ex = executor(1, "i8c", isa)
        batch = make_batch([(tokens(12, 8), 0, [0])])
        ex.run(batch, first, last)
        ex.buffer("h" if name == "h" else "qkv")[3, 5] = np.inf
        ex.run(batch, last)
        assert np.isnan(ex.buffer("logits")[3]).all()


def test_a_forked_child_gets_an_error_not_a_hang() -> None:
    ex = executor(1, "i8c", NATIVE_ISAS[0], threads=2)
    batch = make_batch([([1, 2], 0, [0])])
    ex.run(batch)
    child = os.fork()
    if child == 0:
        try:
            ex.run(batch)
        except RuntimeError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    ex.run(batch)


def test_weights_of_another_size_are_refused() -> None:
    plan = make_plan("i8c")
    for i, op in enumerate(plan.ops):
        if isinstance(op, Linear):
            cut = replace(op, weight=replace(op.weight, data=op.weight.data[:-64].copy()))
            wide = replace(op, weight=replace(op.weight, num_out=op.weight.num_out + 32))
            for bad in (cut, wide):
                broken = replace(plan, ops=(*plan.ops[:i], bad, *plan.ops[i + 1 :]))
                with pytest.raises(ValueError, match=r"size of|does not fit"):
                    create_executor(broken, max_rows=4, max_out_rows=4, num_blocks=1, isa=NATIVE_ISAS[0])


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="a pool needs a thread"):
        executor(1, "i8c", NATIVE_ISAS[0], threads=-1)
