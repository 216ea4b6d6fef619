"""Linears with a scale for every group of inputs: odd shapes on every instruction set against the twin.

Run: pytest tests/fast/test_groups.py
"""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.fast.random_plan import Variant, make_batch, make_plan
from tokenmill.kernels import F32Array, NumpyExecutor, available_isas, create_executor
from tokenmill.kernels.twin import fused

NATIVE_ISAS = [isa for isa in available_isas() if isa != "numpy"]
ROWS = (1, 2, 3, 6, 31, 32, 41, 70)
SIZES = [
    {"hidden": 32, "heads": 1, "kv_heads": 1, "inner": 32, "vocab": 17},
    {"hidden": 64, "heads": 2, "kv_heads": 1, "inner": 96, "vocab": 47},
    {"hidden": 96, "heads": 3, "kv_heads": 1, "inner": 832, "vocab": 18},
]


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("kind", ["i8g", "i4g", "i4g-symmetric"])
@pytest.mark.parametrize("sizes", SIZES, ids=["1-group", "2-and-3-groups", "26-groups"])
def test_any_shape_equals_the_twin(kind: str, isa: str, sizes: dict[str, int]) -> None:
    """Accumulated, gated and with biases; 1 to 26 groups; outputs may end inside a tile."""
    plan = make_plan(kind, Variant(bias=True), seed=3, layers=1, **sizes)
    room: Any = {"max_rows": 96, "max_out_rows": 96, "num_blocks": 3}
    native = create_executor(plan, **room, num_threads=2, isa=isa)
    twin = NumpyExecutor(plan, **room)
    rng = np.random.default_rng(5)
    for rows in ROWS:
        batch = make_batch([([int(t) for t in rng.integers(0, sizes["vocab"], rows)], 0, [0, 1, 2])])
        native.run(batch)
        twin.run(batch)
        np.testing.assert_array_equal(native.buffer("logits")[:rows], twin.buffer("logits")[:rows])


def hard_sums() -> tuple[F32Array, F32Array, F32Array]:
    """Products with a sum that lies near the middle of two float32 numbers, among them tiny and huge ones."""
    rng = np.random.default_rng(7)
    a, b = (rng.standard_normal(3000).astype(np.float32) for _ in range(2))
    c = (rng.standard_normal(3000) * 2.0 ** rng.integers(-40, 40, 3000)).astype(np.float32)
    a[:1000] = np.float32(1) + np.float32(2**-23) * rng.integers(0, 3, 1000).astype(np.float32)
    b[:1000] = np.float32(2.0**-24) * (1 + np.float32(2**-23) * rng.integers(-1, 2, 1000).astype(np.float32))
    c[:1000] = np.float32(1) + np.float32(2**-23) * rng.integers(0, 3, 1000).astype(np.float32)
    a[1000:1100] *= np.float32(1e-38)
    return a, b, c


def test_a_fused_sum_is_rounded_once() -> None:
    a, b, c = hard_sums()
    got = fused(a, b, c)
    for x, y, z, found in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        gaps = [abs(Fraction(float(near)) - exact) for near in neighbours(found)]
        assert abs(Fraction(float(found)) - exact) <= min(gaps)
        if abs(Fraction(float(found)) - exact) == min(gaps):
            assert found.view(np.int32) % 2 == 0, "a tie goes to the even one"
    assert (got[:1000] != a[:1000] * b[:1000] + c[:1000]).any(), "rounding twice gives the same everywhere"


def neighbours(x: np.float32) -> tuple[np.float32, np.float32]:
    return np.nextafter(x, np.float32(-np.inf)), np.nextafter(x, np.float32(np.inf))


def test_a_fused_sum_of_what_is_not_finite_is_not_finite() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    for x in values[:3]:
        for y in values:
            assert not np.isfinite(
                fused(np.full(1, x, np.float32), np.ones(1, np.float32), np.full(1, y, np.float32))
            )
