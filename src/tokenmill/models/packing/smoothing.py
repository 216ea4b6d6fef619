"""Moving the outliers of activations into the weights (SmoothQuant, Xiao et al. 2023), before 8 bits.

A few input channels of a decoder are far larger than the rest, and one scale a token then rounds the
others coarsely. Dividing a channel by s where it is made (a norm's weight, a row of the up projection)
and multiplying the weights that read it by s changes nothing in exact arithmetic and makes the channels
even. s = peak^0.5 / weight_peak^0.5, where the peaks of the activations come from one bf16 pass over random
tokens: outlier channels hardly depend on the text, and so no data has to be shipped or chosen.
The output projection of attention is left as it is: 8-bit rounding of its input costs nothing measurable.
"""

import numpy as np

from tokenmill.kernels import (
    KV_BLOCK,
    Executor,
    F32Array,
    Linear,
    Norm,
    Quantize,
    StepBatch,
    create_executor,
)
from tokenmill.kernels.plan import StepPlan
from tokenmill.kernels.twin import rms_norm

__all__ = ["SMOOTHING_TOKENS", "activation_peaks", "smoothing_factors"]

SMOOTHING_TOKENS = 512
"""Random tokens that the peaks are taken from."""

_SEED = 20260101
_FLOOR = np.float32(1e-5)


def activation_peaks(plan: StepPlan) -> dict[str, F32Array]:
    """Largest magnitude of each channel [K] of what linears read, by the name of the point that makes it."""
    num_tokens = min(SMOOTHING_TOKENS, plan.shape.cos.shape[0])
    num_blocks = -(-num_tokens // KV_BLOCK)
    executor = create_executor(plan, max_rows=num_tokens, max_out_rows=num_tokens, num_blocks=num_blocks)
    batch = _random_batch(plan.shape.vocab_size, num_tokens, num_blocks)
    peaks: dict[str, F32Array] = {}
    point = ""
    for i, op in enumerate(plan.ops):
        point = op.name or point
        # The rows of experts are left out: random tokens do not reach all experts.
        if isinstance(op, Norm | Quantize) and op.act is not None and op.src != "eh":
            peaks[point] = np.abs(_linear_input(executor, op, num_tokens)).max(axis=0)
        if not (isinstance(op, Linear) and op.dst == "logits"):
            executor.run(batch, i, i + 1)
    return peaks


def smoothing_factors(peak_K: F32Array, weight_peak_K: F32Array) -> F32Array:
    """s [K] for the channels that a matrix reads, from its peak of each channel; its geometric mean is 1."""
    s_K = np.sqrt(np.maximum(peak_K, _FLOOR) / np.maximum(weight_peak_K, _FLOOR))
    even_K: F32Array = s_K / np.exp(np.log(s_K).mean())
    return even_K


def _linear_input(executor: Executor, op: Norm | Quantize, num_rows: int) -> F32Array:
    rows = executor.buffer(op.src)[:num_rows]
    return rms_norm(rows, op.weight, op.eps) if isinstance(op, Norm) else rows


def _random_batch(vocab_size: int, num_tokens: int, num_blocks: int) -> StepBatch:
    positions = np.arange(num_tokens, dtype=np.int32)
    starts = np.arange(num_blocks, dtype=np.int32) * KV_BLOCK
    used = np.minimum(num_tokens - starts, KV_BLOCK)
    tokens = np.random.default_rng(_SEED).integers(0, vocab_size, num_tokens)
    return StepBatch(
        tokens=tokens.astype(np.int32),
        positions=positions,
        kv_slots=positions,
        row_starts=np.array([0, num_tokens], np.int32),
        block_starts=np.array([0, num_blocks], np.int32),
        blocks=np.stack([starts // KV_BLOCK, starts, used], axis=1).astype(np.int32),
        out_rows=positions,
    )
