"""The numpy twin of every native kernel: the documentation of the arithmetic, to the last bit.

Fused multiply-add only in the polynomial of 2^t and for groups of weights, every sum in the order that the
native kernels use (see `csrc/mill.h`): 16 lanes and a fixed tree for float sums over a row; for bf16
products the order of the AMX instruction TDPBF16PS (Intel SDM, volume 2): chunks of 32 inputs, even and odd
inputs in two chains, then added. The instruction flushes denormal numbers to zero: there bits may differ.
`linear` leaves the order of the bf16 products to the linear algebra library; `linear_bf16_ordered` keeps it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.kernels.packing import unpack_bf16, unpack_groups, unpack_i8c
from tokenmill.kernels.plan import KV_BLOCK, SPAN_BLOCKS, Activation, F32Array, PackedLinear

__all__ = [
    "ACT_GROUP",
    "attend_rows",
    "bf16_bits",
    "bf16_values",
    "dot_bf16_ordered",
    "exp2",
    "exp2_or_zero",
    "fused",
    "gated_unit",
    "linear",
    "linear_bf16_ordered",
    "log_sum_exp_rows",
    "quantize_rows",
    "rms_norm",
    "rope",
    "sum_lanes",
]

ACT_GROUP = 32
"""Inputs that share a scale where the weights have groups."""

_TINY = np.float32(1e-30)
"""Rows below this are zero in 8 bits."""

_LOG2E = np.float32(1.44269504088896341)
_TWICE_GELU_LOG2E = np.float32(2.30220819813849)
"""2 sqrt(2 / pi) log2(e)."""

_LOWEST = np.float32(-125)

# What a normal float32 lacks of the bits of a float64, their middle value, and the least normal float32.
_BELOW_FLOAT32 = (1 << 29) - 1
_HALF_FLOAT32 = 1 << 28
_LEAST_NORMAL = 2.0**-126

_EXP2 = tuple(
    np.float32(c) for c in (1.32647273e-3, 9.67151299e-3, 5.55073358e-2, 2.40222424e-1, 6.93147004e-1, 1.0)
)


def bf16_bits(x: F32Array) -> npt.NDArray[np.uint16]:
    """Bits of bf16, rounded to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )


def bf16_values(bits: npt.NDArray[np.uint16]) -> F32Array:
    """bf16 bits as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def sum_lanes(x: F32Array) -> F32Array:
    """Sum over the last axis in 16 lanes and a fixed tree."""
    extra = -x.shape[-1] % 16
    if extra:
        x = np.concatenate([x, np.zeros((*x.shape[:-1], extra), np.float32)], axis=-1)
    parts = x.reshape(*x.shape[:-1], -1, 16)
    lanes = np.zeros((*x.shape[:-1], 16), np.float32)
    for i in range(parts.shape[-2]):
        lanes = lanes + parts[..., i, :]
    lanes = lanes[..., :8] + lanes[..., 8:]
    lanes = lanes[..., :4] + lanes[..., 4:]
    total: F32Array = (lanes[..., 0] + lanes[..., 2]) + (lanes[..., 1] + lanes[..., 3])
    return total


def exp2(t: F32Array) -> F32Array:
    """2**t for t in [-125, 125]: a degree-5 polynomial on [-0.5, 0.5], relative error below 2e-7."""
    n = np.rint(t)
    f = t - n
    p = np.full_like(t, _EXP2[0])
    for c in _EXP2[1:]:
        p = fused(p, f, c)
    return (p.view(np.int32) + (n.astype(np.int32) << np.int32(23))).view(np.float32)


def exp2_or_zero(t: F32Array) -> F32Array:
    """2**t for t up to 125, zero below -125."""
    low = t < _LOWEST
    return np.where(low, np.float32(0), exp2(np.where(low, np.float32(0), t)))


def rms_norm(x_TD: F32Array, weight_D: F32Array, eps: float) -> F32Array:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""
    mean_T = sum_lanes(x_TD * x_TD) / np.float32(x_TD.shape[1]) + np.float32(eps)
    inv_T = np.float32(1) / np.sqrt(mean_T)
    normed_TD: F32Array = (x_TD * inv_T[:, None]) * weight_D
    return normed_TD


def quantize_rows(x_TK: F32Array) -> tuple[npt.NDArray[np.int8], F32Array]:
    """8 bits: values [T, K] and scales absmax / 127 [T]; the scale is NaN if a value is not finite."""
    peak_T = np.abs(x_TK).max(axis=1)
    peak_T[~np.isfinite(peak_T)] = np.nan
    inv_T = np.divide(np.float32(127), peak_T, out=np.zeros_like(peak_T), where=peak_T > _TINY)
    scaled_TK = np.where(np.isnan(peak_T)[:, None], np.float32(0), x_TK) * inv_T[:, None]
    return np.rint(scaled_TK).astype(np.int8), peak_T / np.float32(127)


def linear(packed: PackedLinear, x_TK: F32Array) -> F32Array:
    """x @ weight.T with x quantised to what the matrix wants. [T, K] to [T, N]."""
    if packed.kind == "bf16":
        return bf16_values(bf16_bits(x_TK)) @ bf16_values(unpack_bf16(packed)).T
    if packed.kind != "i8c":
        return _linear_groups(packed, x_TK)
    q_TK, scale_T = quantize_rows(x_TK)
    w_NK, scale_N = unpack_i8c(packed)
    dots_TN = _exact_dots(q_TK, w_NK).astype(np.float32)
    return (dots_TN * scale_N) * scale_T[:, None]


def _exact_dots(q_TK: npt.NDArray[np.int8], w_NK: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Integer products through the float library: 1,024 terms of 127 * 127 stay below 2^24."""
    total = np.zeros((q_TK.shape[0], w_NK.shape[0]), np.float64)
    for k in range(0, q_TK.shape[1], 1024):
        part = slice(k, k + 1024)
        total += q_TK[:, part].astype(np.float32) @ w_NK[:, part].astype(np.float32).T
    return total


def _linear_groups(packed: PackedLinear, x_TK: F32Array) -> F32Array:
    """Groups of weights; the inputs are quantised in groups of 32, whatever the weights' group is."""
    values_NK, scales_NG, mins_NG = unpack_groups(packed)
    total_TN: F32Array = np.zeros((x_TK.shape[0], packed.num_out), np.float32)
    for k in range(0, packed.num_in, ACT_GROUP):
        part, group = slice(k, k + ACT_GROUP), k // packed.group
        q_TK, scale_T = quantize_rows(x_TK[:, part])
        dots_TN: F32Array = q_TK.astype(np.float32) @ values_NK[:, part].astype(np.float32).T
        y_TN = scales_NG[:, group].astype(np.float32) * dots_TN
        if mins_NG is not None:
            sums_T = q_TK.sum(axis=1, dtype=np.int32).astype(np.float32)
            y_TN = fused(mins_NG[:, group].astype(np.float32), sums_T[:, None], y_TN)
        total_TN = fused(y_TN, scale_T[:, None], total_TN)
    return total_TN


def fused(a: F32Array, b: F32Array, c: F32Array | np.float32) -> F32Array:
    """a * b + c, rounded once.

    In float64 the product is exact. Rounding its sum with c twice is wrong only where the sum looks like the
    middle of two float32; there it is rounded to odd first (Boldo and Melquiond 2008).
    """
    product = a.astype(np.float64) * b
    with np.errstate(invalid="ignore"):
        total = product + c
    bits = total.view(np.int64)
    small = (np.abs(total) < _LEAST_NORMAL) & (total != 0)
    middle = np.nonzero((bits & _BELOW_FLOAT32 == _HALF_FLOAT32) | small)
    if middle[0].size:
        term, each = np.broadcast_to(c, total.shape)[middle].astype(np.float64), product[middle]
        added = total[middle] - each
        error = (each - (total[middle] - added)) + (term - added)
        short = (error != 0) & (bits[middle] % 2 == 0)
        bits[middle] += np.where(short, np.where((error > 0) == (total[middle] > 0), 1, -1), 0)
    return total.astype(np.float32)


def dot_bf16_ordered(a_RK: F32Array, b_CK: F32Array) -> F32Array:
    """a @ b.T over the last axis for bf16 values, summed as TDPBF16PS does. [..., R, K], [..., C, K]."""
    extra = -a_RK.shape[-1] % 32
    if extra:
        a_RK = np.concatenate([a_RK, np.zeros((*a_RK.shape[:-1], extra), np.float32)], axis=-1)
        b_CK = np.concatenate([b_CK, np.zeros((*b_CK.shape[:-1], extra), np.float32)], axis=-1)
    a, b = a_RK[..., :, None, :], b_CK[..., None, :, :]
    total = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1], np.float32)
    for chunk in range(0, a.shape[-1], 32):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        for k in range(chunk, chunk + 32, 2):
            even = even + a[..., k] * b[..., k]
            odd = odd + a[..., k + 1] * b[..., k + 1]
        total = total + (even + odd)
    return total


def linear_bf16_ordered(packed: PackedLinear, x_TK: F32Array) -> F32Array:
    """The bf16 linear in the exact order of the native kernels: thousands of times slower than `linear`."""
    num_in32 = -(-packed.num_in // 32) * 32
    x_KT = np.zeros((num_in32, x_TK.shape[0]), np.float32)
    w_KN = np.zeros((num_in32, packed.num_out), np.float32)
    x_KT[: packed.num_in] = bf16_values(bf16_bits(x_TK)).T
    w_KN[: packed.num_in] = bf16_values(unpack_bf16(packed)).T
    out_TN = np.empty((x_TK.shape[0], packed.num_out), np.float32)
    # Blocks whose sums stay in the nearest cache.
    for t in range(0, x_TK.shape[0], 64):
        for n in range(0, packed.num_out, 256):
            x_KR, w_KC = x_KT[:, t : t + 64, None], w_KN[:, None, n : n + 256]
            out_TN[t : t + 64, n : n + 256] = _ordered_block(x_KR, w_KC)
    return out_TN


def _ordered_block(x_KR: F32Array, w_KC: F32Array) -> F32Array:
    """Sums of one block, [R, C]; x is [K, R, 1] and w is [K, 1, C]."""
    total, even, odd, product = (np.zeros((x_KR.shape[1], w_KC.shape[2]), np.float32) for _ in range(4))
    for chunk in range(0, x_KR.shape[0], 32):
        even[:], odd[:] = 0, 0
        for k in range(chunk, chunk + 32, 2):
            even += np.multiply(x_KR[k], w_KC[k], out=product)
            odd += np.multiply(x_KR[k + 1], w_KC[k + 1], out=product)
        total += np.add(even, odd, out=product)
    return total


def rope(x_THE: F32Array, cos_TE: F32Array, sin_TE: F32Array) -> F32Array:
    """Rotate pairs (i, i + E/2) by position (Su et al. 2021), rounded to bf16. cos, sin: [T, E/2]."""
    half = x_THE.shape[-1] // 2
    a, b = x_THE[..., :half], x_THE[..., half:]
    c, s = cos_TE[:, None, :], sin_TE[:, None, :]
    turned = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    return bf16_values(bf16_bits(turned))


def gated_unit(gate_up_TF: F32Array, activation: Activation) -> F32Array:
    """activation(gate) * up (Shazeer 2020) of outputs that come in turns of 16 gates and 16 ups.

    silu(x) is x times the logistic function of x; so is GELU by way of tanh (Hendrycks and Gimpel 2016), of
    2 sqrt(2 / pi) (x + 0.044715 x^3). relu(x) is x where it is not a number.
    """
    turns = gate_up_TF.reshape(gate_up_TF.shape[0], -1, 2, 16)
    gate_TF, up_TF = (turns[:, :, i].reshape(gate_up_TF.shape[0], -1) for i in (0, 1))
    if activation == "relu":
        return np.where(gate_TF < 0, np.float32(0), gate_TF) * up_TF
    inner_TF, factor = gate_TF, -_LOG2E
    if activation == "gelu_tanh":
        with np.errstate(over="ignore"):
            inner_TF = gate_TF + ((gate_TF * gate_TF) * gate_TF) * np.float32(0.044715)
        factor = -_TWICE_GELU_LOG2E
    t = np.minimum(np.fmax(inner_TF * factor, _LOWEST), -_LOWEST)
    return (gate_TF / (np.float32(1) + exp2(t))) * up_TF


def attend_rows(
    q_HTE: F32Array,
    k_SE: F32Array,
    v_SE: F32Array,
    seen_TS: npt.NDArray[np.bool_],
    softmax_scale: float,
    kv_scales_2S: F32Array | None = None,
) -> F32Array:
    """Attention of the query heads that share one key-value head, [H, T, E], over S listed keys.

    `seen_TS` says which key a row may see. Online softmax over spans of 16 blocks: [H, T, E]. A row that sees
    nothing is zero; one with a score that is not finite is not a number. `kv_scales_2S` belongs to int8 keys
    and values: a key's scale multiplies its scores, a value's the probabilities before they are rounded.
    """
    scale = np.float32(softmax_scale) * _LOG2E
    span = SPAN_BLOCKS * KV_BLOCK
    top = np.full(q_HTE.shape[:2], -np.inf, np.float32)
    total = np.zeros(q_HTE.shape[:2], np.float32)
    acc = np.zeros(q_HTE.shape, np.float32)
    for start in range(0, k_SE.shape[0], span):
        part = slice(start, start + span)
        scores = dot_bf16_ordered(q_HTE, k_SE[part])
        if kv_scales_2S is not None:
            scores = scores * kv_scales_2S[0, part]
        scores = np.where(seen_TS[:, part], scores, np.float32(-np.inf))
        broken = ~(np.isfinite(scores) | np.isneginf(scores)).all(axis=-1)
        scores[broken] = 0
        top_now = np.maximum(top, scores.max(axis=-1))
        base = np.where(np.isneginf(top_now), np.float32(0), top_now)
        exps = exp2_or_zero((scores - base[..., None]) * scale)
        scaled = exps
        if kv_scales_2S is not None:
            scaled = np.where(exps == 0, np.float32(0), exps * kv_scales_2S[1, part])
        probs = bf16_values(bf16_bits(scaled))
        alpha = exp2_or_zero((top - base) * scale)
        total = total * alpha + sum_lanes(exps)
        total[broken] = np.nan
        is_seen_S = np.asarray(seen_TS[:, part].any(axis=0))
        v_seen_SE = np.where(is_seen_S[:, None], v_SE[part], np.float32(0))
        acc = acc * alpha[..., None] + dot_bf16_ordered(probs, v_seen_SE.T)
        top = top_now
    inv = np.divide(np.float32(1), total, out=np.zeros_like(total), where=total != 0)
    return acc * inv[..., None]


def log_sum_exp_rows(logits_LV: F32Array) -> npt.NDArray[np.float64]:
    """log(sum(exp(row))) of each row, in float64; NaN where a value is not finite."""
    finite_L = np.asarray(np.isfinite(logits_LV).all(axis=1))
    logits_LV = np.where(finite_L[:, None], logits_LV, np.float32(0))
    peak_L = logits_LV.max(axis=1).astype(np.float64)
    result: npt.NDArray[np.float64] = peak_L + np.log(np.exp(logits_LV - peak_L[:, None]).sum(axis=1))
    result[~finite_L] = np.nan
    return result
