"""How weights lie in memory for the native kernels, and how to get them back.

Every layout is cut into tiles of 16 outputs, so that one 64-byte line holds 4 inputs of 16 outputs in
8 bits (2 inputs in bf16): the operand that VNNI and AMX instructions want. Bytes are stored unsigned
with a zero point, which the kernels take out again exactly.

    i8c   [N/32][K64/64][2][16][16][4]   uint8, value + 128; float32 scale an output
    i8g   [N/32][K/32][block]            block: values [2][8][16][4], value + 128, then scales [2][16]
    i4g   [N/32][K/32][block]            block: values [2][4][16][4], two a byte: inputs 4 i + j and
                                         16 + 4 i + j of 32, then scales [2][16], then minima [2][16]
    bf16  [N/32][K32/32][2][16][16][2]   bits

K64 and K32 are K rounded up to 64 and 32, N to 32. Scales and minima of groups are float16 and lie with
their values, so that one pass over a matrix reads one stream; a group of more than 32 inputs repeats them.
A value is scale * (stored - zero) + minimum, zero being 128, 8 (symmetric 4 bits: no minima) or 0.
Nothing here chooses a format: that is the business of `models.compile`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.kernels.plan import F32Array, LinearKind, PackedLinear

__all__ = [
    "TILE",
    "group_block_bytes",
    "pack_bf16",
    "pack_i4g",
    "pack_i8c",
    "pack_i8g",
    "quantize_groups",
    "unpack_bf16",
    "unpack_groups",
    "unpack_i8c",
]

TILE = 16

_GROUP = 32
_TILE_BYTES = {"i8g": 512, "i4g": 256}
"""Of the values of 16 outputs by 32 inputs."""

_NO_F16 = np.zeros(0, np.float16)


def pack_i8c(weight_NK: F32Array) -> PackedLinear:
    """Quantise to 8 bits with one symmetric scale an output (absmax / 127), and pack."""
    num_out, num_in = weight_NK.shape
    peak_N = np.abs(weight_NK).max(axis=1)
    scale_N = (peak_N / np.float32(127)).astype(np.float32)
    safe_N = np.where(scale_N > 0, scale_N, np.float32(1))
    q_NK = np.rint(weight_NK / safe_N[:, None]).astype(np.int16)
    stored = _pad(q_NK + 128, 2 * TILE, 64, fill=128).astype(np.uint8)
    scales = np.zeros(stored.shape[0], np.float32)
    scales[:num_out] = scale_N
    return PackedLinear(
        kind="i8c",
        num_out=num_out,
        num_in=num_in,
        group=num_in,
        symmetric=True,
        data=_pairs(stored, 4),
        scales=scales,
    )


def unpack_i8c(packed: PackedLinear) -> tuple[npt.NDArray[np.int8], F32Array]:
    """The 8-bit values [N, K] and the scales [N]."""
    num_in64 = -(-packed.num_in // 64) * 64
    stored = _unpairs(packed.data, 4, num_in64)[: packed.num_out, : packed.num_in]
    return (stored.astype(np.int16) - 128).astype(np.int8), packed.scales[: packed.num_out]


def pack_i8g(values_NK: npt.NDArray[np.int8], scales_NG: npt.NDArray[np.float16]) -> PackedLinear:
    """Pack 8-bit values with a scale a group of inputs."""
    stored = _pad(values_NK.astype(np.int16) + 128, 2 * TILE, 1, fill=128).astype(np.uint8)
    return _pack_blocks("i8g", values_NK.shape, _blocks_first(stored), scales_NG, None)


def pack_i4g(
    values_NK: npt.NDArray[np.uint8],
    scales_NG: npt.NDArray[np.float16],
    mins_NG: npt.NDArray[np.float16] | None,
) -> PackedLinear:
    """Pack 4-bit values 0..15 with a scale and, unless symmetric (zero point 8), a minimum a group."""
    tiles = _blocks_first(_pad(values_NK, 2 * TILE, 1, fill=0).astype(np.uint8))
    nibbles = tiles[:, :, :, :4] | (tiles[:, :, :, 4:] << np.uint8(4))
    return _pack_blocks("i4g", values_NK.shape, nibbles, scales_NG, mins_NG)


def unpack_groups(
    packed: PackedLinear,
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float16], npt.NDArray[np.float16] | None]:
    """Values [N, K] with the zero point taken out, scales and minima [N, K / group]."""
    num_out, num_in = packed.num_out, packed.num_in
    blocks = packed.data.reshape(-1, num_in // _GROUP, group_block_bytes(packed.kind, packed.symmetric))
    size = _TILE_BYTES[packed.kind]
    stored = blocks[:, :, : 2 * size].reshape(*blocks.shape[:2], 2, -1, TILE, 4)
    if packed.kind == "i4g":
        stored = np.concatenate([stored & 15, stored >> 4], axis=3)
    values = stored.transpose(0, 2, 4, 1, 3, 5).reshape(-1, num_in)[:num_out].astype(np.int16)
    zero = 128 if packed.kind == "i8g" else 8 if packed.symmetric else 0
    factors = blocks[:, :, 2 * size :].copy().view(np.float16)[:, :: packed.group // _GROUP]
    each = factors.reshape(*factors.shape[:2], -1, 2 * TILE).transpose(2, 0, 3, 1)
    scales, *mins = each.reshape(len(each), -1, num_in // packed.group)[:, :num_out]
    return values - np.int16(zero), scales, mins[0] if mins else None


def group_block_bytes(kind: LinearKind, symmetric: bool) -> int:
    """Bytes of 32 outputs by 32 inputs with their scales and, unless symmetric, minima."""
    return 2 * _TILE_BYTES[kind] + 4 * TILE * (1 if symmetric else 2)


def pack_bf16(bits_NK: npt.NDArray[np.uint16]) -> PackedLinear:
    """Pack bf16 bits as they are."""
    num_out, num_in = bits_NK.shape
    padded = _pad(bits_NK, 2 * TILE, 32, fill=0)
    return PackedLinear(
        kind="bf16",
        num_out=num_out,
        num_in=num_in,
        group=num_in,
        symmetric=True,
        data=_pairs(padded, 2).view(np.uint8),
        scales=_NO_F16,
    )


def unpack_bf16(packed: PackedLinear) -> npt.NDArray[np.uint16]:
    """The bf16 bits [N, K]."""
    num_in32 = -(-packed.num_in // 32) * 32
    bits = _unpairs(packed.data.view(np.uint16), 2, num_in32)
    return bits[: packed.num_out, : packed.num_in]


def quantize_groups(
    weight_NK: F32Array, group: int, *, symmetric: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.float16] | None]:
    """Round to nearest on a 4-bit grid: values 0..15 [N, K], scales and minima [N, K / group]."""
    num_out, num_in = weight_NK.shape
    if num_in % group or group % 32:
        raise UsageError(f"group size {group} does not fit {num_in} inputs", hint="use 32, 64 or 96")
    grouped = weight_NK.reshape(num_out, num_in // group, group)
    if symmetric:
        scales = (np.abs(grouped).max(axis=2) / np.float32(7)).astype(np.float16)
        low = np.zeros_like(scales)
        zero = np.float32(8)
    else:
        low = grouped.min(axis=2).astype(np.float16)
        scales = ((grouped.max(axis=2) - low.astype(np.float32)) / np.float32(15)).astype(np.float16)
        zero = np.float32(0)
    step = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)[:, :, None]
    q = np.rint((grouped - low.astype(np.float32)[:, :, None]) / step) + zero
    values = np.clip(q, 0, 15).astype(np.uint8).reshape(num_out, num_in)
    return values, scales, None if symmetric else low


def _blocks_first(stored_NK: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[N, K] to [N/32][K/32][2][8][16][4]."""
    num_out, num_in = stored_NK.shape
    return stored_NK.reshape(num_out // (2 * TILE), 2, TILE, num_in // _GROUP, 8, 4).transpose(
        0, 3, 1, 4, 2, 5
    )


def _pack_blocks(
    kind: LinearKind,
    shape: tuple[int, ...],
    tiles: npt.NDArray[np.uint8],
    scales_NG: npt.NDArray[np.float16],
    mins_NG: npt.NDArray[np.float16] | None,
) -> PackedLinear:
    """Join the values of each block with its scales and minima. Groups are whole multiples of 32 inputs."""
    num_in, num_groups = shape[1], scales_NG.shape[1]
    group = num_in // num_groups
    if group * num_groups != num_in or group % _GROUP:
        raise UsageError(f"{num_groups} groups do not fit {num_in} inputs", hint="groups are multiples of 32")
    parts = [tiles.reshape(*tiles.shape[:2], -1)]
    for factors_NG in (scales_NG, mins_NG):
        if factors_NG is not None:
            padded = np.repeat(
                _pad(factors_NG.astype(np.float16), 2 * TILE, 1, fill=0), group // _GROUP, axis=1
            )
            by_pair = padded.reshape(-1, 2 * TILE, padded.shape[1]).transpose(0, 2, 1)
            parts.append(np.ascontiguousarray(by_pair).view(np.uint8))
    return PackedLinear(
        kind=kind,
        num_out=shape[0],
        num_in=num_in,
        group=group,
        symmetric=mins_NG is None,
        data=np.concatenate(parts, axis=2).reshape(-1),
        scales=_NO_F16,
    )


def _pad(matrix: npt.NDArray[Any], rows_to: int, cols_to: int, *, fill: int) -> npt.NDArray[Any]:
    rows, cols = matrix.shape
    extra = ((0, -rows % rows_to), (0, -cols % cols_to))
    return np.pad(matrix, extra, constant_values=fill) if extra != ((0, 0), (0, 0)) else matrix


def _pairs(matrix: npt.NDArray[Any], inputs: int) -> npt.NDArray[Any]:
    """[N, K] to flat [N/32][K/(16 inputs)][2][16][16][inputs]: two AMX tiles side by side."""
    num_out, num_in = matrix.shape
    tiles = matrix.reshape(num_out // 32, 2, TILE, num_in // (16 * inputs), 16, inputs)
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 4, 2, 5)).reshape(-1)


def _unpairs(data: npt.NDArray[Any], inputs: int, num_in: int) -> npt.NDArray[Any]:
    tiles = data.reshape(-1, num_in // (16 * inputs), 2, 16, TILE, inputs)
    return tiles.transpose(0, 2, 4, 1, 3, 5).reshape(-1, num_in)
