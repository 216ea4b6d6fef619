"""The step loop's body: schedule, run, sample or score, record. One call is one step.

It knows sequences and token ids, no text sources and no queues of callers; whoever drives it (the offline
`LLM`) submits states, calls `step` while there is work and reads the states. It is not safe to use from
two threads at once.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tokenmill.engine.embedding import EmbeddingState
from tokenmill.engine.runner import HiddenRows, OutRows, Runner, TapFailure
from tokenmill.engine.sampler import SamplingRow, logprobs_of, sample
from tokenmill.engine.scheduler import Schedule, Scheduler, StepLimits
from tokenmill.engine.sequence import GenerationState, ScoringState, SequenceState
from tokenmill.engine.tapping import check_taps
from tokenmill.kernels import Executor, F32Array
from tokenmill.kvcache import BlockPool

__all__ = ["EngineCore", "StepResult", "StepStats"]


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one step did, for measuring: rows computed, rows with logits, sequences, wall seconds."""

    num_rows: int
    num_out_rows: int
    num_sequences: int
    num_waiting: int
    num_preempted: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A step's figures and the sequences that reached their end in it."""

    stats: StepStats
    finished: tuple[SequenceState, ...]


class EngineCore:
    """Runs sequences on one executor that has `num_blocks` KV blocks. `clock` returns seconds."""

    def __init__(
        self,
        executor: Executor,
        *,
        num_blocks: int,
        max_sequences: int,
        eos_token_ids: Collection[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        limits = StepLimits(
            max_rows=executor.max_rows, max_out_rows=executor.max_out_rows, max_sequences=max_sequences
        )
        self.clock = clock
        self._scheduler = Scheduler(BlockPool(num_blocks), limits)
        self._runner = Runner(executor)
        self._eos_token_ids = frozenset(eos_token_ids)

    @property
    def has_work(self) -> bool:
        """True if any submitted sequence is not finished."""
        return self._scheduler.has_work

    def check_fits(self, sequence: SequenceState) -> None:
        """Raise `ResourceError` if the KV cache could never hold the sequence."""
        self._scheduler.check_fits(sequence)

    def submit(self, sequence: SequenceState) -> None:
        """Queue a sequence. Raises `UsageError` for taps that cannot be, `ResourceError` as `check_fits`."""
        check_taps(self._runner.points, sequence.taps)
        self._scheduler.submit(sequence)

    def abort(self, sequence: SequenceState) -> None:
        """Give up a sequence between two steps: its blocks are free at once. No-op if it is finished."""
        self._scheduler.remove(sequence)
        if isinstance(sequence, GenerationState) and not sequence.finished:
            sequence.finish("cancelled", now_s=self.clock())

    def step(self) -> StepResult:
        """Compute one step. If the executor raises, no row counts as computed and every state stays valid."""
        began = self.clock()
        schedule = self._scheduler.schedule()
        try:
            for out in self._runner.run(schedule):
                match out:
                    case OutRows():
                        self._take(out)
                    case HiddenRows():
                        self._pool(out)
                    case TapFailure():
                        self._fail(out)
            self._scheduler.commit(schedule)
        finally:
            finished = self._remove_finished(schedule)
        if not self.has_work:
            self.check_integrity()
        stats = StepStats(
            num_rows=schedule.num_rows,
            num_out_rows=schedule.num_out_rows,
            num_sequences=len(schedule.chunks),
            num_waiting=self._scheduler.num_waiting,
            num_preempted=len(schedule.preempted),
            seconds=self.clock() - began,
        )
        return StepResult(stats=stats, finished=finished)

    def check_integrity(self) -> None:
        """Assert that every KV block is free or held by a sequence that is not finished."""
        self._scheduler.check_integrity()

    def _remove_finished(self, schedule: Schedule) -> tuple[SequenceState, ...]:
        finished = tuple(chunk.sequence for chunk in schedule.chunks if chunk.sequence.finished)
        for sequence in finished:
            self._scheduler.remove(sequence)
        return finished

    def _pool(self, out: HiddenRows) -> None:
        """Hand each row of the final norm to its sequence."""
        for row, hidden_D in zip(out.rows, out.hidden_LD, strict=True):
            assert isinstance(row.sequence, EmbeddingState)
            row.sequence.append(row.position, hidden_D)

    def _fail(self, failure: TapFailure) -> None:
        """End a request whose tap failed; one that is not generating raises its error."""
        if not isinstance(failure.sequence, GenerationState):
            raise failure.error
        failure.sequence.finish("failed", now_s=self.clock())

    def _take(self, out: OutRows) -> None:
        """Hand each row of logits to its sequence."""
        sampled: list[tuple[int, GenerationState]] = []
        scored: list[tuple[int, int, ScoringState]] = []
        for index, row in enumerate(out.rows):
            if isinstance(row.sequence, GenerationState):
                sampled.append((index, row.sequence))
            elif isinstance(row.sequence, ScoringState):
                scored.append((index, row.position, row.sequence))
        if sampled:
            logits_LV = _select(out.logits_LV, [index for index, _ in sampled])
            self._sample(logits_LV, [state for _, state in sampled])
        if scored:
            logits_LV = _select(out.logits_LV, [index for index, _, _ in scored])
            targets = [state.target(position) for _, position, state in scored]
            for (_, position, state), logprob in zip(scored, logprobs_of(logits_LV, targets), strict=True):
                state.append(position, logprob)

    def _sample(self, logits_LV: F32Array, states: list[GenerationState]) -> None:
        """Choose and append one token a sequence. A row without finite logits fails its own sequence only."""
        rows = [SamplingRow(s.params, s.seed, s.num_total) for s in states]
        result = sample(logits_LV, rows)
        now_s = self.clock()
        chosen = zip(states, result.token_ids.tolist(), result.valid.tolist(), strict=True)
        for state, token_id, valid in chosen:
            if valid:
                state.append(token_id, is_eos=token_id in self._eos_token_ids, now_s=now_s)
            else:
                state.finish("failed", now_s=now_s)


def _select(logits_LV: F32Array, indices: list[int]) -> F32Array:
    """These rows; the buffer itself, not a copy, where that is all of them."""
    return logits_LV if len(indices) == logits_LV.shape[0] else logits_LV[indices]
