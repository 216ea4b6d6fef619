"""Sequences of different lengths in one row of tokens: where they lie, and how each attends to itself alone.

What is computed token by token sees the row as it is, without padding. Attention alone needs sequences side
by side: they are put into groups of about one length, padded there, and put back. It is torch code, beside
the twin only for its length.

Shape legend: T tokens of the row, P rows with padding between the sequences; within a group B sequences of T
tokens, H query heads, G key-value heads, E head width, N = B * G, R = T * H / G.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["SHORT", "PackedRow", "attend_short", "pad", "unpad"]


class _Group(NamedTuple):
    """Sequences of about one length: `size` of them, each in `length` rows of P from `start` on."""

    start: int
    size: int
    length: int


_GROUP_FILL: Final = 0.6
"""A sequence shorter than this share of its group's longest begins another group."""


SHORT: Final = 512
"""Tokens of a sequence up to which all its scores are kept for the backward pass."""


class PackedRow:
    """How the sequences of one row of tokens lie: one after the other, each from position 0.

    For attention, sequences of about one length are one group, padded to its longest. Padding stands behind
    the tokens, which look back only, so that no mask is needed.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        assert lengths and min(lengths) > 0, lengths
        self.lengths = tuple(lengths)
        self.positions_T = torch.cat([torch.arange(length) for length in lengths])
        starts = [0, *accumulate(lengths)]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups: list[_Group] = []
        places: list[int] = [0] * len(lengths)
        end = 0
        for i in order:
            if not groups or lengths[i] < _GROUP_FILL * groups[-1].length:
                groups.append(_Group(end, 0, lengths[i]))
            group = groups[-1]
            places[i] = end
            groups[-1] = group._replace(size=group.size + 1)
            end += group.length
        self.groups = tuple(groups)
        self.padded_T = torch.cat([torch.arange(n) + place for n, place in zip(lengths, places, strict=True)])
        self.packed_P = torch.zeros(end, dtype=torch.long)
        self.packed_P[self.padded_T] = torch.arange(starts[-1])
        is_padding_P = torch.ones(end, dtype=torch.bool)
        is_padding_P[self.padded_T] = False
        self.padding = is_padding_P.nonzero().flatten()

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.positions_T)


class _Pad(torch.autograd.Function):
    """[T, ...] to [P, ...]; what stands in the padding is finite and read by nobody."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: PackedRow) -> Tensor:
        ctx.row = row
        return x.index_select(0, row.packed_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.row.padded_T), None


class _Unpad(torch.autograd.Function):
    """[P, ...] to [T, ...]; the padding has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: PackedRow) -> Tensor:
        ctx.row = row
        return x.index_select(0, row.padded_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        padded = grads[0].index_select(0, ctx.row.packed_P)
        return padded.index_fill_(0, ctx.row.padding, 0), None


pad: Final[Callable[[Tensor, PackedRow], Tensor]] = _Pad.apply
unpad: Final[Callable[[Tensor, PackedRow], Tensor]] = _Unpad.apply


def attend_short(q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor) -> Tensor:
    """Causal attention [B, T, H, E] by two products over all scores: several times as fast as torch's own
    backward pass where sequences are short. The heads that share keys are rows of one product.
    """
    size, length, num_heads, head_dim = q_BTHE.shape
    num_kv = k_BTGE.shape[2]
    k_NTE, v_NTE = (x.transpose(1, 2).flatten(0, 1) for x in (k_BTGE, v_BTGE))
    q_NRE = (
        q_BTHE.reshape(size, length, num_kv, -1, head_dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(size * num_kv, -1, head_dim)
    )
    hidden_TT = q_BTHE.new_full((length, length), float("-inf")).triu(1)
    hidden_RT = hidden_TT.repeat(num_heads // num_kv, 1)
    scores_NRT = torch.baddbmm(hidden_RT, q_NRE, k_NTE.transpose(1, 2), alpha=head_dim**-0.5)
    z_NRE = torch.bmm(scores_NRT.softmax(-1), v_NTE)
    return z_NRE.view(size, num_heads, length, head_dim).transpose(1, 2)
