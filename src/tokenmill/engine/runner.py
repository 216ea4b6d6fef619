"""From a schedule to logits: makes the flat batch of a step and runs the executor on it.

A step may want the head for more rows than the executor has room for (scoring wants one for every token).
Then the body of the plan runs once, and its head again for each further group of rows, so memory stays
bounded at `max_out_rows` x vocabulary. Rows that want the final norm only (embeddings, taps on it) are
groups of their own, which stop before the vocabulary. Taps split the plan where they lie; a step without
them is one call. What the rows mean is not decided here.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from tokenmill.engine.batch import BatchRows, flat_batch, int32
from tokenmill.engine.schedule import Chunk, Schedule
from tokenmill.engine.sequence import SequenceState
from tokenmill.engine.taps.points import FINAL_NORM, RowSpan, TapCall, TapPoints, tap_calls, tap_points
from tokenmill.kernels import Executor, F32Array, I32Array, StepBatch

__all__ = ["HiddenRows", "OutRow", "OutRows", "Runner", "StepOutput", "TapFailure"]


class OutRow(NamedTuple):
    """Whose row it is, and at which position."""

    sequence: SequenceState
    position: int


@dataclass(frozen=True, kw_only=True)
class OutRows:
    """Logits [L, V] of some rows. They are the executor's live buffer: use them before the next step.

    The executor lends its threads to what is made of them.
    """

    rows: Sequence[OutRow]
    logits_LV: F32Array
    executor: Executor | None = None


@dataclass(frozen=True, kw_only=True)
class HiddenRows:
    """The final norm [L, D], in true units, of rows whose sequences want no logits. The array is a copy."""

    rows: Sequence[OutRow]
    hidden_LD: F32Array


@dataclass(frozen=True, kw_only=True)
class TapFailure:
    """A handler failed its request: nothing the step made of it counts, its blocks least of all."""

    sequence: SequenceState
    error: Exception


StepOutput: TypeAlias = OutRows | HiddenRows | TapFailure

_Wanted: TypeAlias = Literal["logits", "hidden", "tapped"]


class _Group(NamedTuple):
    """Rows that go through the head together, their numbers in the step, and what is wanted of them."""

    wanted: _Wanted
    rows: Sequence[OutRow]
    numbers: I32Array


class Runner:
    """Runs schedules on one executor, whose KV slots are those of the scheduler's pool."""

    def __init__(self, executor: Executor) -> None:
        self.points: TapPoints = tap_points(executor.plan)
        self._executor = executor
        self._head_start = executor.plan.head_start

    def run(self, schedule: Schedule) -> Iterator[StepOutput]:
        """Compute a step, and yield what it wants in groups of at most `max_out_rows`, then the failures.

        Rows of a sequence that has failed are left out. The iterator must be used up: the step runs as it is
        read. The taps of every sequence must have passed `check_taps`.
        """
        chunks = schedule.chunks
        groups = _groups(chunks, self.points, self._executor.max_out_rows)
        batch = _step_batch(chunks, groups[0].numbers if groups else int32(()))
        calls = tap_calls(self.points, _body_spans(chunks), head=False)
        failures: dict[SequenceState, Exception] = {}
        if not groups:
            self._advance(batch, 0, self._head_start, calls, failures)
        first = 0
        for group in groups:
            if first:
                batch = replace(batch, out_rows=group.numbers)
            calls = calls | tap_calls(self.points, _head_spans(group.rows), head=True)
            last = None if group.wanted == "logits" else self.points[FINAL_NORM].stop
            self._advance(batch, first, last, calls, failures)
            first, calls = self._head_start, {}
            yield from self._outputs(group, failures)
        for sequence, error in failures.items():
            yield TapFailure(sequence=sequence, error=error)

    def _advance(
        self,
        batch: StepBatch,
        first: int,
        last: int | None,
        calls: Mapping[int, Sequence[TapCall]],
        failures: dict[SequenceState, Exception],
    ) -> None:
        """Run [first, last) of the plan, stopping for the calls; their stops are within, in order."""
        for stop, here in calls.items():
            self._executor.run(batch, first, stop)
            first = stop
            for call in here:
                if call.sequence in failures:
                    continue
                try:
                    call.run(self._executor)
                except Exception as error:
                    failures[call.sequence] = error
        if first != last:
            self._executor.run(batch, first, last)

    def _outputs(self, group: _Group, failures: Mapping[SequenceState, Exception]) -> Iterator[StepOutput]:
        """What the head has made of a group, without the sequences that failed."""
        kept = [index for index, row in enumerate(group.rows) if row.sequence not in failures]
        if not kept or group.wanted == "tapped":
            return
        rows = [group.rows[index] for index in kept]
        if group.wanted == "hidden":
            hidden_LD = self.points[FINAL_NORM].read(self._executor, np.array(kept, np.intp))
            yield HiddenRows(rows=rows, hidden_LD=hidden_LD)
            return
        logits_LV = self._executor.buffer("logits")[: len(group.rows)]
        kept_LV = logits_LV if len(kept) == len(group.rows) else logits_LV[kept]
        yield OutRows(rows=rows, logits_LV=kept_LV, executor=self._executor)


def _groups(chunks: Sequence[Chunk], points: TapPoints, size: int) -> list[_Group]:
    """The rows that go through the head, in groups of at most `size` that want the same."""
    # A tap that fails must be known before its sequence can end by what is sampled.
    rows: dict[_Wanted, list[OutRow]] = {"tapped": [], "hidden": [], "logits": []}
    numbers: dict[_Wanted, array[int]] = {wanted: array("i") for wanted in rows}

    def add(wanted: _Wanted, chunk: Chunk, end: int, positions: Sequence[int]) -> None:
        rows[wanted] += [OutRow(chunk.sequence, position) for position in positions]
        numbers[wanted].extend([end - chunk.stop + position for position in positions])

    end = 0
    for chunk in chunks:
        end += chunk.num_rows
        first_out = chunk.stop - chunk.num_out_rows
        add("logits" if chunk.sequence.wants_logits else "hidden", chunk, end, range(first_out, chunk.stop))
        if chunk.sequence.taps:
            add("tapped", chunk, end, _only_tapped(chunk, points, first_out))
    return [
        _Group(wanted, rows[wanted][first : first + size], int32(numbers[wanted][first : first + size]))
        for wanted in rows
        for first in range(0, len(rows[wanted]), size)
    ]


def _only_tapped(chunk: Chunk, points: TapPoints, first_out: int) -> list[int]:
    """Positions of a chunk before `first_out` at which the head's own point is tapped."""
    positions_T = np.arange(chunk.start, first_out, dtype=np.int32)
    span = RowSpan(chunk.sequence, positions_T, positions_T.astype(np.intp))
    calls = [call for here in tap_calls(points, [span], head=True).values() for call in here]
    return sorted({position for call in calls for position in call.positions_T.tolist()})


def _body_spans(chunks: Sequence[Chunk]) -> Iterator[RowSpan]:
    """The rows of each tapped chunk in the step."""
    end = 0
    for chunk in chunks:
        end += chunk.num_rows
        if chunk.sequence.taps:
            positions_T = np.arange(chunk.start, chunk.stop, dtype=np.int32)
            yield RowSpan(chunk.sequence, positions_T, np.arange(end - chunk.num_rows, end))


def _head_spans(rows: Sequence[OutRow]) -> Iterator[RowSpan]:
    """The rows of each tapped sequence in a group."""
    for sequence, numbered in groupby(enumerate(rows), key=lambda each: each[1].sequence):
        if sequence.taps:
            mine = list(numbered)
            positions_T = np.array([row.position for _, row in mine], np.int32)
            yield RowSpan(sequence, positions_T, np.array([index for index, _ in mine], np.intp))


def _step_batch(chunks: Sequence[Chunk], out_rows: I32Array) -> StepBatch:
    """The flat inputs of a step."""
    parts = [BatchRows(c.sequence.rows(c.start, c.stop), c.start, c.sequence.table) for c in chunks]
    return flat_batch(parts, out_rows, [chunk.sequence.adapter.number for chunk in chunks])
