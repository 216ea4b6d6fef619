"""The int8 KV cache: equal to its twin to the bit, near bf16, and a broken value stays with its request.

Run: pytest tests/fast/test_kv_int8.py
"""

from dataclasses import replace

import numpy as np
import pytest

from tests.fast.random_plan import make_batch, make_plan
from tests.fast.test_executor import NATIVE_ISAS, SIZES, executor, logits, tokens
from tokenmill.kernels import (
    KV_DTYPES,
    F32Array,
    KvDtype,
    available_isas,
    create_executor,
    kv_block_bytes,
)

ODD_HEAD = {"hidden": 96, "heads": 2, "kv_heads": 1, "head_dim": 70, "inner": 96, "vocab": 33}
QKV_OP = 3
"""Operations up to the first projection; the test plan has 6 query and 2 KV heads of 32 values."""
PARTS = {"query": slice(0, 32), "key": slice(192, 224), "value": slice(256, 288)}


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("sizes", [*SIZES, ODD_HEAD], ids=["gqa", "mha", "mqa", "odd"])
def test_native_equals_numpy(isa: str, sizes: dict[str, int]) -> None:
    native, twin = (executor(1, "i8c", each, kv_dtype="int8", **sizes) for each in (isa, "numpy"))
    vocab = sizes.get("vocab", 203)
    first = make_batch([([t % vocab for t in tokens(2, 45)], 0, [3, 5]), ([7, 8, 9], 0, [1])])
    second = make_batch([([4], 45, [3, 5]), ([t % vocab for t in tokens(3, 20)], 3, [1])], out_rows=[0, 20])
    for batch in (first, second):
        np.testing.assert_array_equal(logits(native, batch), logits(twin, batch))


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_long_context_crosses_softmax_spans(isa: str) -> None:
    plan = make_plan("i8c", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=32, inner=32)
    shape = replace(plan.shape, cos=np.tile(plan.shape.cos, (3, 1)), sin=np.tile(plan.shape.sin, (3, 1)))
    plan = replace(plan, shape=shape)
    batch = make_batch([(tokens(6, 700), 0, list(range(24)))], out_rows=[0, 511, 512, 699])
    got, want = (
        logits(
            create_executor(plan, max_rows=700, max_out_rows=4, num_blocks=24, isa=each, kv_dtype="int8"),
            batch,
        )
        for each in (isa, "numpy")
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_answer_of_a_row_ignores_neighbours_chunks_and_threads(isa: str) -> None:
    prompt = tokens(4, 40)
    alone = logits(executor(1, "i8c", isa, threads=1, kv_dtype="int8"), make_batch([(prompt, 0, [0, 1])]))
    crowd = executor(1, "i8c", isa, threads=2, kv_dtype="int8")
    crowd.run(make_batch([(tokens(5, 9), 0, [9]), (prompt[:13], 0, [4, 2]), ([1], 0, [8])]))
    rest = make_batch([(prompt[13:], 13, [4, 2]), ([2], 9, [9])])
    np.testing.assert_array_equal(logits(crowd, rest)[:27], alone[13:])


def test_int8_is_near_bf16_and_not_the_same() -> None:
    batch = make_batch([(tokens(2, 45), 0, [3, 5])])
    want, got = (logits(executor(1, "i8c", NATIVE_ISAS[0], kv_dtype=dtype), batch) for dtype in KV_DTYPES)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.02, f"relative error {error:.5f}"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("part", PARTS)
def test_a_broken_vector_spoils_who_sees_it_and_nobody_else(
    part: str, bad: float, kv_dtype: KvDtype, isa: str
) -> None:
    ex, clean = (executor(1, "i8c", isa, kv_dtype=kv_dtype) for _ in range(2))
    prompt = tokens(10, 20)
    want = logits(clean, make_batch([(prompt, 0, [7])]))
    both = make_batch([(tokens(11, 30), 0, [3]), (prompt, 0, [7])])
    ex.run(both, last=QKV_OP)
    ex.buffer("qkv")[0, PARTS[part]] = bad
    with np.errstate(invalid="ignore"):  # numpy says so when it rotates infinity
        ex.run(both, first=QKV_OP)
    got = ex.buffer("logits")[:50]
    spoiled = np.asarray(np.isnan(got).all(axis=1))
    assert spoiled[0], "the row that wrote it"
    if part != "query":
        assert spoiled[:30].all(), "the rows that see it"
    np.testing.assert_array_equal(got[30:], want)
    np.testing.assert_array_equal(logits(ex, make_batch([(prompt, 0, [3])])), want)


@pytest.mark.parametrize("isa", available_isas())
def test_a_broken_last_token_leaves_the_earlier_rows_alone(isa: str) -> None:
    """The scale of a key that a row may not see is never used: no wiping of blocks is needed in int8."""
    ex, clean = (executor(1, "i8c", isa, kv_dtype="int8") for _ in range(2))
    batch = make_batch([(tokens(11, 30), 0, [3])])
    want = logits(clean, batch)
    ex.run(batch, last=QKV_OP)
    ex.buffer("qkv")[29] = np.nan
    ex.run(batch, first=QKV_OP)
    got = ex.buffer("logits")[:30]
    np.testing.assert_array_equal(got[:29], want[:29])
    assert np.isnan(got[29]).all()


@pytest.mark.parametrize("isa", available_isas())
def test_zero_and_tiny_vectors_are_zero_not_a_division(isa: str) -> None:
    def z_of(size: float) -> F32Array:
        ex = executor(1, "i8c", isa, kv_dtype="int8")
        batch = make_batch([(tokens(12, 8), 0, [0])])
        ex.run(batch, last=QKV_OP)
        ex.buffer("qkv")[:8] = np.float32(size)
        ex.run(batch, QKV_OP, QKV_OP + 2)
        return ex.buffer("z")[:8].copy()

    for size in (0.0, 1e-33):
        np.testing.assert_array_equal(z_of(size), 0)
    assert np.abs(z_of(1e-20)).min() > 0


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 70])
def test_a_block_has_the_bytes_that_were_planned(head_dim: int, kv_dtype: KvDtype, isa: str) -> None:
    ex = executor(1, "i8c", isa, kv_dtype=kv_dtype, heads=2, kv_heads=2, head_dim=head_dim)
    planned = kv_block_bytes(num_layers=2, num_kv_heads=2, head_dim=head_dim, kv_dtype=kv_dtype)
    assert ex.block(0).shape == (planned,) and ex.kv_dtype == kv_dtype


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_block_copied_as_bytes_or_by_name_reads_the_same(kv_dtype: KvDtype, isa: str) -> None:
    ex = executor(1, "i8c", isa, kv_dtype=kv_dtype)
    ex.run(make_batch([(tokens(8, 30), 0, [2])]))
    next_token = [([5], 30, [2])]
    want = logits(ex, make_batch(next_token))
    saved = ex.block(2).copy()
    ex.copy_blocks([(2, 9)])
    ex.run(make_batch([(tokens(9, 32), 0, [2])]))
    assert not np.array_equal(ex.block(2), saved), "the view is live"
    assert not np.array_equal(logits(ex, make_batch(next_token)), want)
    ex.block(11)[:] = saved
    for block in (9, 11):
        np.testing.assert_array_equal(logits(ex, make_batch([([5], 30, [block])])), want)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("index", [-1, 24])
def test_a_block_that_does_not_exist_is_refused(index: int, isa: str) -> None:
    ex = executor(1, "i8c", isa, kv_dtype="int8")
    for use in (lambda: ex.block(index), lambda: ex.copy_blocks([(0, index)])):
        with pytest.raises(ValueError, match="KV block out of range"):
            use()


def test_a_view_outlives_the_name_of_its_executor() -> None:
    ex = executor(1, "i8c", NATIVE_ISAS[0], kv_dtype="int8")
    view = ex.block(1)
    del ex
    view[:] = 7
    assert int(view.sum(dtype=np.int64)) == 7 * view.size
