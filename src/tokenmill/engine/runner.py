"""From a schedule to logits: makes the flat batch of a step and runs the executor on it.

A step may want logits of more rows than the executor has room for (scoring wants one for every token).
Then the body of the plan runs once, and its head again for each further group of rows, so memory stays
bounded at `max_out_rows` x vocabulary. What the logits mean is not decided here.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tokenmill.engine.scheduler import Chunk, Schedule
from tokenmill.engine.sequence import SequenceState
from tokenmill.kernels import Executor, F32Array, I32Array, StepBatch

__all__ = ["OutRow", "OutRows", "Runner"]


class OutRow(NamedTuple):
    """Whose row it is, and at which position."""

    sequence: SequenceState
    position: int


@dataclass(frozen=True, kw_only=True)
class OutRows:
    """Logits [L, V] of some rows. They are the executor's live buffer: use them before the next step."""

    rows: Sequence[OutRow]
    logits_LV: F32Array


class Runner:
    """Runs schedules on one executor, whose KV slots are those of the scheduler's pool."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._head_start = executor.plan.head_start

    def run(self, schedule: Schedule) -> Iterator[OutRows]:
        """Compute a step, and yield the logits that it wants in groups of at most `max_out_rows`.

        The iterator must be used up: the step runs as it is read.
        """
        rows, out_rows = _out_rows(schedule.chunks)
        batch = _step_batch(schedule.chunks, out_rows[: self._executor.max_out_rows])
        if not rows:
            self._executor.run(batch, last=self._head_start)
            return
        self._executor.run(batch)
        for first in range(0, len(rows), self._executor.max_out_rows):
            group = rows[first : first + self._executor.max_out_rows]
            if first:
                group_rows = _int32(out_rows[first : first + len(group)])
                self._executor.run(replace(batch, out_rows=group_rows), first=self._head_start)
            yield OutRows(rows=group, logits_LV=self._executor.buffer("logits")[: len(group)])


def _out_rows(chunks: Sequence[Chunk]) -> tuple[list[OutRow], "array[int]"]:
    """The rows that need logits, and their numbers in the step."""
    rows: list[OutRow] = []
    numbers = array("i")
    end = 0
    for chunk in chunks:
        end += chunk.num_rows
        numbers.extend(range(end - chunk.num_out_rows, end))
        rows += [
            OutRow(chunk.sequence, position)
            for position in range(chunk.stop - chunk.num_out_rows, chunk.stop)
        ]
    return rows, numbers


def _step_batch(chunks: Sequence[Chunk], out_rows: "array[int]") -> StepBatch:
    """The flat inputs of a step: the rows of all chunks one after the other."""
    tokens, positions, slots, blocks = array("i"), array("i"), array("i"), array("i")
    row_starts, block_starts = array("i", [0]), array("i", [0])
    for chunk in chunks:
        table = chunk.sequence.table
        tokens.extend(chunk.sequence.rows(chunk.start, chunk.stop))
        positions.extend(range(chunk.start, chunk.stop))
        slots.extend(table.slots(chunk.start, chunk.stop))
        blocks.extend(table.spans(chunk.stop))
        row_starts.append(len(tokens))
        block_starts.append(len(blocks) // 3)
    return StepBatch(
        tokens=_int32(tokens),
        positions=_int32(positions),
        kv_slots=_int32(slots),
        row_starts=_int32(row_starts),
        block_starts=_int32(block_starts),
        blocks=_int32(blocks).reshape(-1, 3),
        out_rows=_int32(out_rows),
    )


def _int32(values: "array[int]") -> I32Array:
    return np.array(values, dtype=np.int32)
