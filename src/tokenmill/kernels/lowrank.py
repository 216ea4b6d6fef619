"""What an adapter adds to a linear: packed for the kernels, and its arithmetic in numpy.

An adapter stays apart from the weights, y += up @ (scale * (down @ x)) (LoRA, Hu et al. 2021), so that rows
of many adapters and of none share one step. x are the inputs as the linear sees them; whatever is multiplied
is rounded to bf16, so that products are exact. Matrices that are fused into one linear have ranks of their
own: a pair of tiles of 16 outputs names the ranks that it adds up, so little is multiplied by zeros. Reading
adapters from disk is in `models/adapter.py`.

Shape legend: K and N inputs and outputs of a linear, R ranks (of all its matrices), r ranks of one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenmill.kernels.plan import F32Array, PackedLinear, PackedLowRank
from tokenmill.kernels.twin import ACT_GROUP, bf16_bits, bf16_values, quantize_rows, sum_lanes

__all__ = ["LowRankPart", "low_rank_delta", "pack_low_rank"]

_TILE = 16


@dataclass(frozen=True, kw_only=True)
class LowRankPart:
    """The addition to some outputs of a linear: `outputs` [n] says which, `down` is [r, K], `up` [n, r]."""

    outputs: npt.NDArray[np.intp]
    down: F32Array
    up: F32Array


def pack_low_rank(parts: Sequence[LowRankPart], linear: PackedLinear, scale: float) -> PackedLowRank:
    """Pack the additions to disjoint outputs of one linear; the factors are rounded to bf16."""
    rank = _round_up(sum(len(part.down) for part in parts), 2)
    down_RK = np.zeros((rank, _round_up(linear.num_in, _TILE)), np.float32)
    up_NR = np.zeros((_round_up(linear.num_out, 2 * _TILE), rank), np.float32)
    is_used_NR = np.zeros(up_NR.shape, np.bool_)
    first = 0
    for part in parts:
        ranks = slice(first, first + len(part.down))
        down_RK[ranks, : linear.num_in] = part.down
        up_NR[part.outputs, ranks] = part.up
        is_used_NR[part.outputs, ranks] = True
        first = ranks.stop
    pairs: list[tuple[int, int, int, int]] = []
    rows: list[F32Array] = [np.zeros((0, _TILE, 2), np.float32)]
    num_rows = 0
    for tile in range(0, len(up_NR), 2 * _TILE):
        halves = [slice(tile, tile + _TILE), slice(tile + _TILE, tile + 2 * _TILE)]
        spans = [_span(is_used_NR[half]) for half in halves]
        count = max(stop - start for start, stop in spans)
        first, second = (min(start, rank - count) for start, _ in spans)
        columns = [up_NR[half, at : at + count].T for half, at in zip(halves, (first, second), strict=True)]
        pairs.append((first, second, count, num_rows))
        rows.append(np.stack(columns, axis=2))
        num_rows += count
    return PackedLowRank(
        scale=scale,
        down=bf16_bits(down_RK.reshape(rank // 2, 2, -1).transpose(0, 2, 1)),
        up=bf16_bits(np.concatenate(rows)),
        pairs=np.array(pairs, np.int32),
    )


def low_rank_delta(low_rank: PackedLowRank, linear: PackedLinear, x_TK: F32Array) -> F32Array:
    """What is added to the outputs of `linear` for the inputs x, [T, K] to [T, N].

    `down` is summed in 16 lanes and a fixed tree, `up` rank by rank.
    """
    seen_TK = bf16_values(bf16_bits(_seen_inputs(linear, x_TK)))
    down_RK = bf16_values(low_rank.down).transpose(0, 2, 1).reshape(low_rank.rank, -1)[:, : linear.num_in]
    sums_TR = np.stack([sum_lanes(seen_TK * down_K) for down_K in down_RK], axis=1)
    low_TR = bf16_values(bf16_bits(np.float32(low_rank.scale) * sums_TR))
    up = bf16_values(low_rank.up)
    delta_TN = np.zeros((len(x_TK), len(low_rank.pairs), 2, _TILE), np.float32)
    for i, (first, second, count, row) in enumerate(low_rank.pairs.tolist()):
        for r in range(count):
            delta_TN[:, i, 0] += low_TR[:, first + r, None] * up[row + r, :, 0]
            delta_TN[:, i, 1] += low_TR[:, second + r, None] * up[row + r, :, 1]
    return delta_TN.reshape(len(x_TK), -1)[:, : linear.num_out]


def _seen_inputs(linear: PackedLinear, x_TK: F32Array) -> F32Array:
    """x after rounding to the format that the linear reads, as floats."""
    if linear.act_format == "bf16":
        return bf16_values(bf16_bits(x_TK))
    group = ACT_GROUP if linear.act_format == "int8_groups" else x_TK.shape[1]
    parts = [quantize_rows(x_TK[:, k : k + group]) for k in range(0, x_TK.shape[1], group)]
    return np.concatenate([q.astype(np.float32) * scale_T[:, None] for q, scale_T in parts], axis=1)


def _span(is_used_NR: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """First rank that some outputs use, and the one after the last."""
    used = np.flatnonzero(is_used_NR.any(axis=0))
    return (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)


def _round_up(count: int, to: int) -> int:
    return -(-count // to) * to
