"""Stored types: equal, bit for bit, to the reference package, on random blocks and at the edges."""

from pathlib import Path

import gguf as reference
import numpy as np
import numpy.typing as npt
import pytest

from tests.fast.model_files import Tensor, floats, gguf_bytes, tiny_llama
from tokenmill.kernels.packing import unpack_groups
from tokenmill.models.formats.bfloat16 import F32Array, round_to_bf16
from tokenmill.models.formats.gguf_quants import (
    GRID_TYPES,
    STORED_TYPES,
    dequantize,
    exact_grid,
    quantize,
    store_grid,
)
from tokenmill.models.packing.pack import pack_model
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model

READ = tuple(STORED_TYPES)
QUANTISED = tuple(name for name, each in STORED_TYPES.items() if each.block_weights > 1)
EDGES = (
    0.0,
    -0.0,
    1e-45,
    1e-40,
    3e-39,
    1e-38,
    2**-25,
    6e-8,
    0.49999997,
    0.5,
    1.0,
    65504.0,
    65520.0,
    1e9,
    3e38,
)


def ggml(name: str) -> reference.GGMLQuantizationType:
    return reference.GGMLQuantizationType[name]


def same_bits(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> None:
    """Equal to the bit (so 0 is not -0), except that any NaN equals any other."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if found.dtype == np.float32:
        is_nan = np.isnan(found)
        np.testing.assert_array_equal(is_nan, np.isnan(expected))
        found, expected = found[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32)
    np.testing.assert_array_equal(found, expected)


def random_rows(name: str, num_rows: int, num_blocks: int) -> npt.NDArray[np.uint8]:
    """Rows of random bytes: every bit pattern is a block, scales that are infinite or NaN among them."""
    width = num_blocks * STORED_TYPES[name].block_bytes
    return np.random.default_rng(4).integers(0, 256, (num_rows, width), dtype=np.uint8)


@pytest.mark.parametrize("name", READ)
def test_sizes_are_the_references(name: str) -> None:
    block_weights, block_bytes = reference.GGML_QUANT_SIZES[ggml(name)]
    found = STORED_TYPES[name]
    assert (found.type_id, found.block_weights, found.block_bytes) == (ggml(name), block_weights, block_bytes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the reference's own, on infinite scales
@pytest.mark.parametrize("name", READ)
def test_any_bytes_give_the_references_weights(name: str) -> None:
    stored = random_rows(name, 40, 256 if STORED_TYPES[name].block_weights == 1 else 12)
    same_bits(dequantize(name, stored), reference.quants.dequantize(stored, ggml(name)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("fill", [0, 255, 0x7B, 0x80])
def test_blocks_of_one_byte(name: str, fill: int) -> None:
    stored = np.full_like(random_rows(name, 2, 2), fill)
    same_bits(dequantize(name, stored), reference.quants.dequantize(stored, ggml(name)))


@pytest.mark.parametrize("name", QUANTISED)
def test_grids_are_the_weights_and_only_where_the_kernels_take_them(name: str) -> None:
    stored = random_rows(name, 6, 3)
    grid = exact_grid(name, stored)
    assert (grid is not None) == (name in GRID_TYPES)
    if grid is None:
        return
    same_bits(grid.float32(), dequantize(name, stored))
    assert grid.bits == (4 if name in ("Q4_0", "Q4_1") else 8) and (grid.mins is not None) == (name == "Q4_1")
    low, high = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}[name]
    assert low <= grid.values.min() and grid.values.max() <= high


def edge_weights() -> F32Array:
    """Rows of 64: random ones of many sizes, and all pairs of edge values among small ones."""
    rng = np.random.default_rng(5)
    scales = 10.0 ** rng.integers(-12, 4, (400, 1))
    random = (rng.normal(0, 1, (400, 64)) * scales).astype(np.float32)
    ties = (rng.integers(-255, 256, (50, 64)) / 2).astype(np.float32)  # halves: where roundings differ
    ties[:, 0], ties[:, 32] = 127, -127
    edges = np.array([sign * value for value in EDGES for sign in (1, -1)], np.float32)
    pairs = np.zeros((len(edges) ** 2, 64), np.float32)
    pairs[:, 3] = pairs[:, 40] = np.repeat(edges, len(edges))
    pairs[:, 7] = pairs[:, 63] = np.tile(edges, len(edges))
    return np.concatenate([random, ties, pairs])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_quantising_gives_the_references_bytes(name: str) -> None:
    weights = edge_weights()
    if name in ("Q8_0", "Q4_0"):  # below, 1 / scale overflows and C leaves the result undefined
        groups = np.abs(weights.reshape(len(weights), -1, 32)).max(axis=2)
        weights = weights[((groups == 0) | (groups > 1e-35)).all(axis=1)]
    expected = reference.quants.quantize(weights, ggml(name))
    same_bits(quantize(name, weights), np.ascontiguousarray(expected).view(np.uint8))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_weights_too_small_for_a_scale_are_zero(name: str) -> None:
    weights = np.full((1, 32), 1e-40, np.float32)
    weights[0, 1] = -1e-44
    assert not dequantize(name, quantize(name, weights)).any()


def test_a_symmetric_grid_is_stored_exactly() -> None:
    for name in ("Q4_0", "Q5_0", "Q8_0"):
        grid = exact_grid(name, random_rows(name, 6, 3))
        assert grid is not None
        stored = store_grid("Q8_0", grid)
        assert stored is not None
        same_bits(dequantize("Q8_0", stored), grid.float32())
    for name in ("Q4_0", "Q8_0"):
        rows = random_rows(name, 6, 3)
        grid = exact_grid(name, rows)
        assert grid is not None
        stored = store_grid(name, grid)
        assert stored is not None
        same_bits(stored, rows)


@pytest.mark.parametrize(
    ("grid", "to"), [("Q4_1", "Q8_0"), ("Q5_0", "Q4_0"), ("Q8_0", "Q4_0"), ("Q4_0", "F16")]
)
def test_a_grid_that_does_not_fit_is_not_stored(grid: str, to: str) -> None:
    found = exact_grid(grid, random_rows(grid, 1, 1))
    assert found is not None and store_grid(to, found) is None


@pytest.mark.parametrize("name", [*QUANTISED, "BF16"])
def test_a_model_of_any_type_is_pulled_and_packed(name: str, tmp_path: Path) -> None:
    """Weights are the type's, rounded; the file is kept where it has a grid, which w4a8 then is, exactly."""
    metadata, tensors = tiny_llama()
    rng = np.random.default_rng(8)
    sizes = {"token_embd": 263, "attn_k": 128, "attn_v": 128}
    stored = []
    for tensor in tensors:
        kind = tensor.name.split(".")[-2]
        if "norm" in kind:
            stored.append(floats(rng, tensor.name, (256,)))
            continue
        shape = (sizes.get(kind, 256), 256)
        data = (
            rng.integers(0, 256, (STORED_TYPES[name].num_bytes(shape[0] * shape[1])), dtype=np.uint8) & 0xBB
        )
        type_id = STORED_TYPES[name].type_id
        stored.append(Tensor(name=tensor.name, shape=shape, dtype=name, data=data.tobytes(), type_id=type_id))
    metadata |= {"llama.embedding_length": 256, "llama.feed_forward_length": 256}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata, stored))
    model = import_model(tmp_path / "x.gguf", Library(tmp_path / "home"))
    assert (model.path / "model.gguf").exists() == (name in GRID_TYPES)
    weights = model.weights()
    for hf, gguf_name in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        [found] = [each.data for each in stored if each.name == f"blk.1.{gguf_name}.weight"]
        rows = np.frombuffer(found, np.uint8).reshape(256 if hf == "mlp.down_proj" else 128, -1)
        exact = reference.quants.dequantize(rows, ggml(name))
        np.testing.assert_array_equal(weights.bf16(f"model.layers.1.{hf}.weight"), round_to_bf16(exact))
    packed = pack_model(model.architecture, weights, "w4a8").linears["blocks.1.down"]
    assert (packed.kind, packed.symmetric) == {
        "Q4_0": ("i4g", True),
        "Q5_0": ("i8g", True),
        "Q8_0": ("i8g", True),
    }.get(name, ("i4g", False))
    if name in GRID_TYPES:
        values, scales, mins = unpack_groups(packed)
        grid = weights.grid("model.layers.1.mlp.down_proj.weight")
        assert grid is not None
        np.testing.assert_array_equal(scales, grid.scales)
        np.testing.assert_array_equal(values, grid.values)
        assert (mins is None) == (grid.mins is None)
