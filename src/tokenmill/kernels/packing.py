"""How weights lie in memory for the native kernels, and how to get them back.

Every layout is cut into tiles of 16 outputs, so that one 64-byte line holds 4 inputs of 16 outputs in
8 bits (2 inputs in bf16): the operand that VNNI and AMX instructions want. Bytes are stored unsigned
with a zero point, which the kernels take out again exactly.

    i8c   [N/32][K64/64][2][16][16][4]   uint8, value + 128; float32 scale an output
    i8g   [N/16][K/4][16][4]             uint8, value + 128; float16 scale a group
    i4g   [N/16][K/32][4][16][4]         two values a byte: inputs 4 i + j and 16 + 4 i + j of 32
    bf16  [N/32][K32/32][2][16][16][2]   bits

K64 and K32 are K rounded up to 64 and 32; N is rounded up to 16, or 32 where tiles come in pairs. Scales
and minima of groups are [N/16][K/group][16]. A value is scale * (stored - zero) + minimum, zero being
128, 8 (symmetric 4 bits) or 0.
Nothing here chooses a format: that is the business of `models.compile`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.kernels.plan import F32Array, PackedLinear

__all__ = [
    "TILE",
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
        mins=_NO_F16,
    )


def unpack_i8c(packed: PackedLinear) -> tuple[npt.NDArray[np.int8], F32Array]:
    """The 8-bit values [N, K] and the scales [N]."""
    num_in64 = -(-packed.num_in // 64) * 64
    stored = _unpairs(packed.data, 4, num_in64)[: packed.num_out, : packed.num_in]
    return (stored.astype(np.int16) - 128).astype(np.int8), packed.scales[: packed.num_out]


def pack_i8g(values_NK: npt.NDArray[np.int8], scales_NG: npt.NDArray[np.float16]) -> PackedLinear:
    """Pack 8-bit values with a scale a group of inputs."""
    num_out, num_in = values_NK.shape
    group = _check_group(num_in, scales_NG.shape[1])
    stored = _pad(values_NK.astype(np.int16) + 128, TILE, 1, fill=128).astype(np.uint8)
    return PackedLinear(
        kind="i8g",
        num_out=num_out,
        num_in=num_in,
        group=group,
        symmetric=True,
        data=_lines(stored, 4),
        scales=_tile_groups(scales_NG),
        mins=_NO_F16,
    )


def pack_i4g(
    values_NK: npt.NDArray[np.uint8],
    scales_NG: npt.NDArray[np.float16],
    mins_NG: npt.NDArray[np.float16] | None,
) -> PackedLinear:
    """Pack 4-bit values 0..15 with a scale and, unless symmetric (zero point 8), a minimum a group."""
    num_out, num_in = values_NK.shape
    group = _check_group(num_in, scales_NG.shape[1])
    stored = _pad(values_NK, TILE, 1, fill=0).astype(np.uint8)
    low_high = stored.reshape(-1, TILE, num_in // 32, 2, 4, 4)
    nibbles = low_high[:, :, :, 0] | (low_high[:, :, :, 1] << 4)
    return PackedLinear(
        kind="i4g",
        num_out=num_out,
        num_in=num_in,
        group=group,
        symmetric=mins_NG is None,
        data=np.ascontiguousarray(nibbles.transpose(0, 2, 3, 1, 4)).reshape(-1),
        scales=_tile_groups(scales_NG),
        mins=_NO_F16 if mins_NG is None else _tile_groups(mins_NG),
    )


def unpack_groups(
    packed: PackedLinear,
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float16], npt.NDArray[np.float16] | None]:
    """Values [N, K] with the zero point taken out, scales and minima [N, K / group]."""
    if packed.kind == "i4g":
        tiles = packed.data.reshape(-1, packed.num_in // 32, 4, TILE, 4).transpose(0, 3, 1, 2, 4)
        both = np.stack([tiles & 15, tiles >> 4], axis=3)
        stored = both.reshape(-1, packed.num_in)
        zero = 8 if packed.symmetric else 0
    else:
        stored = _unlines(packed.data, 4, packed.num_in)
        zero = 128
    values = stored[: packed.num_out].astype(np.int16) - np.int16(zero)
    mins = None if packed.symmetric else _untile_groups(packed.mins, packed)
    return values, _untile_groups(packed.scales, packed), mins


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
        mins=_NO_F16,
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


def _check_group(num_in: int, num_groups: int) -> int:
    """Inputs in a group; groups are whole multiples of 32 inputs."""
    group = num_in // num_groups
    if group * num_groups != num_in or group % 32:
        raise UsageError(f"{num_groups} groups do not fit {num_in} inputs", hint="groups are multiples of 32")
    return group


def _pad(matrix: npt.NDArray[Any], rows_to: int, cols_to: int, *, fill: int) -> npt.NDArray[Any]:
    rows, cols = matrix.shape
    extra = ((0, -rows % rows_to), (0, -cols % cols_to))
    return np.pad(matrix, extra, constant_values=fill) if extra != ((0, 0), (0, 0)) else matrix


def _lines(matrix: npt.NDArray[Any], inputs: int) -> npt.NDArray[Any]:
    """[N, K] to flat [N/16][K/inputs][16][inputs]."""
    num_out, num_in = matrix.shape
    tiles = matrix.reshape(num_out // TILE, TILE, num_in // inputs, inputs)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(-1)


def _unlines(data: npt.NDArray[Any], inputs: int, num_in: int) -> npt.NDArray[Any]:
    tiles = data.reshape(-1, num_in // inputs, TILE, inputs)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, num_in)


def _pairs(matrix: npt.NDArray[Any], inputs: int) -> npt.NDArray[Any]:
    """[N, K] to flat [N/32][K/(16 inputs)][2][16][16][inputs]: two AMX tiles side by side."""
    num_out, num_in = matrix.shape
    tiles = matrix.reshape(num_out // 32, 2, TILE, num_in // (16 * inputs), 16, inputs)
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 4, 2, 5)).reshape(-1)


def _unpairs(data: npt.NDArray[Any], inputs: int, num_in: int) -> npt.NDArray[Any]:
    tiles = data.reshape(-1, num_in // (16 * inputs), 2, 16, TILE, inputs)
    return tiles.transpose(0, 2, 4, 1, 3, 5).reshape(-1, num_in)


def _tile_groups(scales_NG: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    return _lines(_pad(scales_NG.astype(np.float16, copy=False), TILE, 1, fill=0), 1)


def _untile_groups(flat: npt.NDArray[Any], packed: PackedLinear) -> npt.NDArray[np.float16]:
    return _unlines(flat, 1, packed.num_in // packed.group)[: packed.num_out]
