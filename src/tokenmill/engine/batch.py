"""The flat inputs of a step, from rows of sequences and the tables that say where their blocks lie."""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tokenmill.kernels import I32Array, StepBatch
from tokenmill.kvcache import BlockTable

__all__ = ["BatchRows", "flat_batch", "int32"]


class BatchRows(NamedTuple):
    """The tokens of one sequence from position `start` on; `table` has room for them."""

    tokens: "array[int]"
    start: int
    table: BlockTable


def flat_batch(parts: Iterable[BatchRows], out_rows: I32Array, adapters: Sequence[int] = ()) -> StepBatch:
    """The rows of all parts one after the other. `adapters`, a slot a part, are left out where all are -1."""
    tokens, positions, slots, blocks = array("i"), array("i"), array("i"), array("i")
    row_starts, block_starts = array("i", [0]), array("i", [0])
    for part in parts:
        stop = part.start + len(part.tokens)
        tokens.extend(part.tokens)
        positions.extend(range(part.start, stop))
        slots.extend(part.table.slots(part.start, stop))
        blocks.extend(part.table.spans(stop))
        row_starts.append(len(tokens))
        block_starts.append(len(blocks) // 3)
    return StepBatch(
        tokens=int32(tokens),
        positions=int32(positions),
        kv_slots=int32(slots),
        row_starts=int32(row_starts),
        block_starts=int32(block_starts),
        blocks=int32(blocks).reshape(-1, 3),
        out_rows=out_rows,
        adapters=int32(adapters if max(adapters, default=-1) >= 0 else ()),
    )


def int32(values: Sequence[int]) -> I32Array:
    """As the executors take integers."""
    return np.array(values, dtype=np.int32)
