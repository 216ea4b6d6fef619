"""GGUF's tensor types: stored bytes to weights, and weights to stored bytes, bit for bit as ggml does it.

A quantised row is a run of blocks of 32 weights (the K types: 256), each with its own float16 scale. Where
a block is one scale, at most one minimum and small integers that the kernels take (`Grid`), the integers
are handed out as they are: Q4_0, Q4_1, Q5_0, Q8_0. Q5_1 has minima at more than 4 bits, which no kernel
takes; the K types multiply a float16 scale by a 6- or 8-bit one, and that product is no float16. Those have
no grid: they exist as float32 only.

Covers writing of F32, F16, BF16, Q8_0 and Q4_0. It does not cover other types, or files (see `gguf.py`).
Source: ggml-quants.c of the ggml project (dequantize_row_*, quantize_row_q8_0_ref, quantize_row_q4_0_ref).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.models.formats.bfloat16 import F32Array, round_to_bf16, widen_bf16

__all__ = [
    "GRID_TYPES",
    "GROUP",
    "STORED_TYPES",
    "Grid",
    "StoredType",
    "dequantize",
    "exact_grid",
    "quantize",
    "store_grid",
]

_U8Array: TypeAlias = npt.NDArray[np.uint8]

GROUP: Final = 32
"""Weights in one group of a grid."""

_SUPER: Final = 256
"""Weights in one block of a K type."""

_FOUR: Final = np.uint8(4)


@dataclass(frozen=True, kw_only=True)
class StoredType:
    """How ggml numbers a type, and the size of its block. Floats are blocks of one weight."""

    type_id: int
    block_weights: int
    block_bytes: int

    def num_bytes(self, num_weights: int) -> int:
        """Bytes of a row of whole blocks."""
        return num_weights // self.block_weights * self.block_bytes


def _type(type_id: int, block_weights: int, block_bytes: int) -> StoredType:
    return StoredType(type_id=type_id, block_weights=block_weights, block_bytes=block_bytes)


STORED_TYPES: Final[Mapping[str, StoredType]] = {
    "F32": _type(0, 1, 4),
    "F16": _type(1, 1, 2),
    "BF16": _type(30, 1, 2),
    "Q4_0": _type(2, GROUP, 18),
    "Q4_1": _type(3, GROUP, 20),
    "Q5_0": _type(6, GROUP, 22),
    "Q5_1": _type(7, GROUP, 24),
    "Q8_0": _type(8, GROUP, 34),
    "Q4_K": _type(12, _SUPER, 144),
    "Q5_K": _type(13, _SUPER, 176),
    "Q6_K": _type(14, _SUPER, 210),
}
"""Every type that is read, by ggml's name."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A quantised matrix exactly as the file stores it: w[n, k] = scale * value (+ minimum).

    `values` is [N, K], uint8 in 0..15 with minima, else int8 (-8..7 for 4 bits). `scales` and `mins` are
    float16 [N, K/32], one for each group of 32 inputs; `mins` is None for symmetric grids.
    """

    values: npt.NDArray[Any]
    scales: npt.NDArray[np.float16]
    mins: npt.NDArray[np.float16] | None
    bits: int

    def float32(self) -> F32Array:
        """The weights, [N, K]: one float32 product and at most one float32 sum each."""
        num_rows, num_columns = self.values.shape
        out = self.values.reshape(num_rows, -1, GROUP).astype(np.float32)
        with np.errstate(invalid="ignore"):  # a scale that is infinite gives NaN, which conversion refuses
            out *= self.scales.astype(np.float32)[:, :, None]
            if self.mins is not None:
                out += self.mins.astype(np.float32)[:, :, None]
        return out.reshape(num_rows, num_columns)

    def take_rows(self, rows: npt.NDArray[np.intp]) -> "Grid":
        """The same grid with its outputs in another order; stays exact."""
        mins = None if self.mins is None else self.mins[rows]
        return Grid(values=self.values[rows], scales=self.scales[rows], mins=mins, bits=self.bits)


def dequantize(dtype: str, stored: _U8Array) -> F32Array:
    """Stored rows, [N, bytes a row], as weights, [N, K]. Infinite scales give NaN, as in the reference."""
    if dtype in _FLOATS:
        values = stored.view(_FLOATS[dtype])
        return widen_bf16(values) if dtype == "BF16" else values.astype(np.float32)
    grid = exact_grid(dtype, stored)
    if grid is not None:
        return grid.float32()
    with np.errstate(invalid="ignore"):
        weights = _DEQUANTIZE[dtype](stored.reshape(-1, STORED_TYPES[dtype].block_bytes))
    return weights.reshape(len(stored), -1)


def exact_grid(dtype: str, stored: _U8Array) -> Grid | None:
    """Stored rows, [N, bytes a row], as integers and scales; None for a type that has no grid."""
    if dtype not in GRID_TYPES:
        return None
    blocks = stored.reshape(-1, STORED_TYPES[dtype].block_bytes)
    values, mins = _GRID_VALUES[dtype](blocks), None

    def by_group(halves: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
        return halves.reshape(len(stored), -1)

    if dtype == "Q4_1":
        mins = by_group(_halves(blocks, 2))
    return Grid(
        values=values.reshape(len(stored), -1),
        scales=by_group(_halves(blocks, 0)),
        mins=mins,
        bits=4 if dtype in ("Q4_0", "Q4_1") else 8,
    )


def quantize(dtype: str, weights_NK: F32Array) -> _U8Array:
    """Weights as stored rows, [N, bytes a row]: F32, F16, BF16, Q8_0 or Q4_0, rounded as the reference does.

    K must be a multiple of the block. A value or scale beyond float16 becomes infinite.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if dtype in _FLOATS:
            stored = round_to_bf16(weights_NK) if dtype == "BF16" else weights_NK.astype(_FLOATS[dtype])
            return np.ascontiguousarray(stored).view(np.uint8)
        values, scales = _QUANTIZE[dtype](weights_NK.reshape(-1, GROUP))
        return _blocks(dtype, values, scales.astype("<f2")).reshape(len(weights_NK), -1)


def store_grid(dtype: str, grid: Grid) -> _U8Array | None:
    """The stored rows of a grid, exactly; None where the type cannot say the same (minima, too many bits)."""
    if grid.mins is not None or dtype not in ("Q8_0", "Q4_0") or (dtype == "Q4_0" and grid.bits > 4):
        return None
    return _blocks(dtype, grid.values.reshape(-1, GROUP), grid.scales.reshape(-1, 1)).reshape(
        len(grid.values), -1
    )


def _blocks(dtype: str, values_BG: npt.NDArray[np.int8], scales_B1: npt.NDArray[np.float16]) -> _U8Array:
    """Symmetric blocks of 32: the scale, then the values; 4 bits are stored from 0, low halves first."""
    scales = np.ascontiguousarray(scales_B1).view(np.uint8)
    if dtype == "Q8_0":
        return np.concatenate([scales, np.ascontiguousarray(values_BG).view(np.uint8)], axis=1)
    offset = (values_BG + 8).astype(np.uint8)
    return np.concatenate([scales, offset[:, : GROUP // 2] | offset[:, GROUP // 2 :] << 4], axis=1)


def _to_q8_0(blocks: F32Array) -> tuple[npt.NDArray[np.int8], F32Array]:
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scales)
    whole = np.floor(np.abs(scaled))
    whole += np.abs(scaled) - whole >= 0.5  # to nearest, ties away from zero
    return np.copysign(whole, scaled).astype(np.int8), scales


def _to_q4_0(blocks: F32Array) -> tuple[npt.NDArray[np.int8], F32Array]:
    widest = np.abs(blocks).argmax(axis=1, keepdims=True)
    scales = np.take_along_axis(blocks, widest, axis=1) / np.float32(-8)
    shifted = blocks * _inverse(scales) + np.float32(8.5)
    return np.minimum(shifted.astype(np.int8), 15) - np.int8(8), scales


def _inverse(scales: F32Array) -> F32Array:
    """1 / scale, or 0 where that is no number: such a scale is 0 in float16, and so is its block."""
    inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _from_q5_1(blocks: _U8Array) -> F32Array:
    weights = _five_bits(blocks, 4).astype(np.float32)
    weights *= _scales(blocks, 0)
    weights += _scales(blocks, 2)
    return weights


def _from_q4_k(blocks: _U8Array) -> F32Array:
    return _scaled_k(blocks, _halves_of_32(blocks[:, 16:144]))


def _from_q5_k(blocks: _U8Array) -> F32Array:
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return _scaled_k(blocks, _halves_of_32(blocks[:, 48:176]) | high << _FOUR)


def _from_q6_k(blocks: _U8Array) -> F32Array:
    low = (blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([[0], [4]], np.uint8)) & 15
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    values = (low.reshape(-1, _SUPER) | high.reshape(-1, _SUPER) << 4).astype(np.int8) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _scales(blocks, 208)
    weights = values.reshape(-1, 16, 16).astype(np.float32)
    weights *= scales[:, :, None]
    return weights


def _scaled_k(blocks: _U8Array, values_B8G: _U8Array) -> F32Array:
    """Q4_K and Q5_K: eight groups of 32, each with a 6-bit scale and minimum of the block's float16 ones."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    first, second, high = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = np.concatenate([first & 63, high & 15 | first >> 2 & 48], axis=1)
    mins = np.concatenate([second & 63, high >> 4 | second >> 2 & 48], axis=1)
    weights = values_B8G.astype(np.float32)
    weights *= (scales.astype(np.float32) * _scales(blocks, 0))[:, :, None]
    weights -= (mins.astype(np.float32) * _scales(blocks, 2))[:, :, None]
    return weights


def _halves(blocks: _U8Array, at: int) -> npt.NDArray[np.float16]:
    """The float16 at byte `at` of every block: [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float16)


def _scales(blocks: _U8Array, at: int) -> F32Array:
    return _halves(blocks, at).astype(np.float32)


def _nibbles(packed: _U8Array) -> _U8Array:
    """16 bytes a block to 32 values, low halves first."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _five_bits(blocks: _U8Array, at: int) -> _U8Array:
    """Four bytes of highest bits at `at`, then 16 bytes of low halves: [blocks, 32], 0..31."""
    high = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return _nibbles(blocks[:, at + 4 : at + 20]) | high << _FOUR


def _halves_of_32(packed: _U8Array) -> _U8Array:
    """128 bytes to eight groups of 32: each 32 bytes hold one group's low halves, then the next one's."""
    return ((packed.reshape(-1, 4, 1, 32) >> np.array([[0], [4]], np.uint8)) & np.uint8(15)).reshape(
        -1, 8, 32
    )


_FLOATS: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_GRID_VALUES: Final[Mapping[str, Callable[[_U8Array], npt.NDArray[Any]]]] = {
    "Q4_0": lambda blocks: _nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8),
    "Q4_1": lambda blocks: _nibbles(blocks[:, 4:]),
    "Q5_0": lambda blocks: _five_bits(blocks, 2).view(np.int8) - np.int8(16),
    "Q8_0": lambda blocks: blocks[:, 2:].copy().view(np.int8),
}
GRID_TYPES: Final = frozenset(_GRID_VALUES)
"""Types whose blocks are a `Grid`."""

_DEQUANTIZE: Final[Mapping[str, Callable[[_U8Array], F32Array]]] = {
    "Q5_1": _from_q5_1,
    "Q4_K": _from_q4_k,
    "Q5_K": _from_q5_k,
    "Q6_K": _from_q6_k,
}
_QUANTIZE: Final[Mapping[str, Callable[[F32Array], tuple[npt.NDArray[np.int8], F32Array]]]] = {
    "Q8_0": _to_q8_0,
    "Q4_0": _to_q4_0,
}
