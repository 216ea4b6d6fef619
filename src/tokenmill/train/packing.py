"""Many short examples as few long rows: what is multiplied has no padding.

An epoch is a permutation that follows from the seed and its number alone, cut into steps of about equal
tokens; inside a step examples are sorted by length and cut into rows, so that the sequences of a row are
about equally long, which attention likes (`PackedRow`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenmill.models.packed_row import PackedRow
from tokenmill.train.examples import Example

__all__ = ["Targets", "TrainRow", "make_row", "num_steps_of", "plan_epoch", "plan_rows"]


class Targets(NamedTuple):
    """What R rows of logits should have predicted.

    `tokens_R`: the token; `examples_R`: the index of its example in what the trainer was given;
    `positions_R`: its place there.
    """

    tokens_R: Tensor
    examples_R: Tensor
    positions_R: Tensor

    def part(self, rows: slice) -> "Targets":
        """Those of some rows."""
        return Targets(self.tokens_R[rows], self.examples_R[rows], self.positions_R[rows])


class TrainRow(NamedTuple):
    """A row of tokens [1, T], how its sequences lie, and which of its positions predict which targets."""

    tokens_BT: Tensor
    packed: PackedRow
    rows_R: Tensor
    targets: Targets


def num_steps_of(lengths: Sequence[int], tokens_per_step: int) -> int:
    """Steps of an epoch: each has about `tokens_per_step` tokens, none has none."""
    return max(1, min(len(lengths), round(sum(lengths) / tokens_per_step)))


def plan_epoch(
    lengths: Sequence[int], *, tokens_per_step: int, tokens_per_row: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The examples, by index, of each row of each step of an epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    steps = _cut(order, np.asarray(lengths), num_steps_of(lengths, tokens_per_step))
    return [plan_rows(lengths, step, tokens_per_row) for step in steps]


def plan_rows(lengths: Sequence[int], indices: Sequence[int], tokens_per_row: int) -> list[list[int]]:
    """Examples of one step in rows of about equal tokens, the longest first."""
    order = np.array(sorted(indices, key=lambda i: (-lengths[i], i)))
    num_tokens = int(np.asarray(lengths)[order].sum())
    return _cut(order, np.asarray(lengths), min(len(order), -(-num_tokens // tokens_per_row)))


def make_row(examples: Sequence[Example], indices: Sequence[int]) -> TrainRow:
    """The row of these examples, each without what stands after its last target."""
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[tuple[int, int, int]] = []
    lengths = []
    for index in indices:
        example, start = examples[index], len(tokens)
        length = example.num_inputs
        lengths.append(length)
        tokens.extend(example.tokens[:length])
        for at in range(1, length + 1):
            if example.is_target[at]:
                rows.append(start + at - 1)
                targets.append((int(example.tokens[at]), index, at))
    columns = torch.tensor(targets).T.contiguous()
    return TrainRow(
        torch.tensor([tokens]), PackedRow(lengths), torch.tensor(rows), Targets(*columns.unbind(0))
    )


def _cut(
    order: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    lengths: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    parts: int,
) -> list[list[int]]:
    """`order` in at most `parts` runs of about equal sums of lengths; none is empty."""
    ends = np.cumsum(lengths[order])
    # An example belongs to the run in which its middle token is.
    middles = ends - (lengths[order] + 1) // 2
    numbers = middles * parts // ends[-1]
    runs = np.split(order, np.flatnonzero(np.diff(numbers)) + 1)
    return [run.tolist() for run in runs]
