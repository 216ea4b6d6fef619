"""Which rows of which sequences the next step computes.

There are no phases. A sequence has `num_total` tokens, of which `num_computed` are in the cache, and a step
lets the second number catch up with the first: many rows of a new prompt, one row of a running answer,
all in one flat batch. What does not fit in the step's budget is left for the next, so long prompts are
computed in chunks without a rule for it. Order is first come, first served. When blocks run out, the
sequence that came last gives its blocks back and is computed again later.

Everything is integers. No clock is read here and no tensor is touched, so it runs unchanged in a simulator.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from tokenmill.core import ResourceError
from tokenmill.engine.sequence import SequenceState
from tokenmill.kvcache import BlockPool

__all__ = ["MAX_PREEMPTIONS", "Chunk", "Schedule", "Scheduler", "StepLimits"]

MAX_PREEMPTIONS = 4
"""A sequence is preempted at most so often; then it waits until it can stay."""


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The budget of one step: rows, rows that are sampled, and sequences that hold blocks."""

    max_rows: int
    max_out_rows: int
    max_sequences: int

    def __post_init__(self) -> None:
        assert min(self.max_rows, self.max_out_rows, self.max_sequences) > 0, self


class Chunk(NamedTuple):
    """Rows [start, stop) of one sequence; the last `num_out_rows` of them need logits."""

    sequence: SequenceState
    start: int
    stop: int
    num_out_rows: int

    @property
    def num_rows(self) -> int:
        """Rows of the chunk."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What one step computes, and which sequences lost their blocks for it."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[SequenceState, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @property
    def num_out_rows(self) -> int:
        """Rows whose logits are wanted."""
        return sum(chunk.num_out_rows for chunk in self.chunks)


class Scheduler:
    """Owns the waiting and running sequences and, through their tables, every block in use of the pool.

    Both queues are in order of arrival, and everything running came before everything waiting.
    """

    def __init__(self, pool: BlockPool, limits: StepLimits) -> None:
        self.pool = pool
        self.limits = limits
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        """True if any sequence is not finished."""
        return bool(self._running or self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    def check_fits(self, sequence: SequenceState) -> None:
        """Raise `ResourceError` if even an empty cache could not hold the sequence to its end."""
        if sequence.table.num_missing(sequence.max_computed) > self.pool.num_blocks:
            size = sequence.table.block_size
            raise ResourceError(
                f"{sequence.request_id} may need {sequence.max_computed} tokens of KV cache, "
                f"which holds {self.pool.num_blocks * size}",
                hint="lower max_tokens, shorten the prompt, or raise kv_tokens",
            )

    def submit(self, sequence: SequenceState) -> None:
        """Queue a sequence. Raises `ResourceError` as `check_fits` does."""
        self.check_fits(sequence)
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self._waiting.append(sequence)

    def schedule(self) -> Schedule:
        """Plan a step and allocate its blocks. Never empty while there is work."""
        budget = _Budget(self.limits)
        preempted: list[SequenceState] = []
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            stop = budget.reach(sequence)
            if stop > sequence.table.capacity and not self._make_room(sequence, stop, preempted):
                break
            budget.take(sequence, stop)
            index += 1
        if not preempted:
            self._admit(budget)
        schedule = Schedule(chunks=tuple(budget.chunks), preempted=tuple(preempted))
        self._check(schedule)
        return schedule

    def commit(self, schedule: Schedule) -> None:
        """Record that the rows of a step are in the cache."""
        for chunk in schedule.chunks:
            assert chunk.sequence.num_computed == chunk.start, "a schedule is committed twice"
            chunk.sequence.num_computed = chunk.stop

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence, at any moment between steps, and free its blocks. No-op if it is unknown."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self.pool.free(sequence.table.clear())

    def check_integrity(self) -> None:
        """Assert that the sequences hold exactly the blocks in use, and that the queues are in order."""
        everyone = [*self._running, *self._waiting]
        self.pool.check_integrity(block for sequence in everyone for block in sequence.table.blocks)
        arrivals = [sequence.arrival for sequence in everyone]
        assert arrivals == sorted(set(arrivals)), "the queues are out of order"
        assert all(not s.table.num_blocks and not s.num_computed for s in self._waiting)

    def _make_room(self, sequence: SequenceState, stop: int, preempted: list[SequenceState]) -> bool:
        """Allocate blocks up to `stop`, preempting from the back; False if `sequence` itself had to go."""
        while not self.pool.can_allocate(missing := sequence.table.num_missing(stop)):
            victim = self._running.pop()
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.table.extend(self.pool.allocate(missing))
        return True

    def _preempt(self, victim: SequenceState) -> None:
        """Take all blocks away; the tokens, sampled ones too, are kept and computed again."""
        self.pool.free(victim.table.clear())
        victim.num_computed = 0
        victim.num_preemptions += 1
        self._waiting.appendleft(victim)

    def _admit(self, budget: "_Budget") -> None:
        """Start waiting sequences, in order, as long as the first of them fits."""
        while self._waiting and budget.num_rows > 0 and len(self._running) < self.limits.max_sequences:
            sequence = self._waiting[0]
            stop = budget.reach(sequence)
            if stop == 0 or not self.pool.can_allocate(self._num_wanted(sequence)):
                break
            self._running.append(self._waiting.popleft())
            sequence.table.extend(self.pool.allocate(sequence.table.num_missing(sequence.num_total)))
            budget.take(sequence, stop)

    def _num_wanted(self, sequence: SequenceState) -> int:
        """Free blocks that it takes to start a sequence: room for its tokens, and some to grow.

        One block more for each sequence that runs keeps it from being preempted within a few steps. After
        `MAX_PREEMPTIONS` it starts only when everything before it, and it, can run to the end; and what
        is started later is preempted earlier, so it stays.
        """
        if sequence.num_preemptions < MAX_PREEMPTIONS:
            return sequence.table.num_missing(sequence.num_total) + len(self._running)
        return sum(each.table.num_missing(each.max_computed) for each in [*self._running, sequence])

    def _check(self, schedule: Schedule) -> None:
        assert schedule.num_rows <= self.limits.max_rows, "more rows than a step has"
        assert sum(c.sequence.samples for c in schedule.chunks if c.num_out_rows) <= self.limits.max_out_rows
        assert len(self._running) <= self.limits.max_sequences, "more sequences than allowed"
        assert all(c.num_rows > 0 for c in schedule.chunks), "an empty chunk"
        assert schedule.chunks or not self.has_work, "there is work, and no step"


class _Budget:
    """What is left of a step while it is planned."""

    def __init__(self, limits: StepLimits) -> None:
        self.chunks: list[Chunk] = []
        self.num_rows = limits.max_rows
        self._num_out_rows = limits.max_out_rows

    def reach(self, sequence: SequenceState) -> int:
        """How far `num_computed` of this sequence may come in this step."""
        stop = min(sequence.num_total, sequence.num_computed + self.num_rows)
        if sequence.samples and stop > sequence.first_logits and self._num_out_rows == 0:
            return sequence.first_logits
        return stop

    def take(self, sequence: SequenceState, stop: int) -> None:
        """Spend rows on [num_computed, stop)."""
        start = sequence.num_computed
        if stop == start:
            return
        num_out_rows = max(0, min(stop - sequence.first_logits, stop - start))
        self.chunks.append(Chunk(sequence, start, stop, num_out_rows))
        self.num_rows -= stop - start
        if sequence.samples:
            self._num_out_rows -= num_out_rows
