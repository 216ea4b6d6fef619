"""bfloat16 in numpy, which has no such type: 16-bit patterns, rounded to nearest with ties to even."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["F32Array", "U16Array", "round_to_bf16", "widen_bf16"]

F32Array: TypeAlias = npt.NDArray[np.float32]
U16Array: TypeAlias = npt.NDArray[np.uint16]


def round_to_bf16(values: npt.NDArray[np.float32]) -> U16Array:
    """float32 to bfloat16 bits, same shape. NaN stays NaN; a value beyond the range becomes infinite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF)
    rounded += (bits >> 16) & 1
    rounded >>= 16
    out = rounded.astype(np.uint16)
    is_nan = np.isnan(values)
    if is_nan.any():
        out[is_nan] = 0x7FC0
    return out


def widen_bf16(bits: npt.NDArray[Any]) -> F32Array:
    """bfloat16 bits to the float32 of the same value, same shape."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
