"""The step loop's body: expire, guess, schedule, run, sample or score, record. One call is one step.

It knows sequences and token ids, no text sources and no queues of callers; whoever drives it (`LocalEngine`)
submits states, calls `step` while there is work and reads the states. It is not safe to use from two
threads at once.

An exception in a step is nobody's and everybody's: the sequences of that step are run again one by one, so
that the one it belongs to fails alone.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal, NamedTuple, TypeAlias

from tokenmill.core import FinishReason
from tokenmill.costs.power import PowerCounters
from tokenmill.engine.meter import Meter
from tokenmill.engine.outputs import take_hidden, take_logits
from tokenmill.engine.runner import HiddenRows, OutRows, Runner, TapFailure
from tokenmill.engine.schedule import BlockMoves, Chunk, Schedule, StepLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import GenerationState, SequenceState
from tokenmill.engine.speculation.proposers import Proposer
from tokenmill.engine.speculation.speculator import Speculator
from tokenmill.engine.steady import SteadyRun
from tokenmill.engine.step_time import StepTimeModel
from tokenmill.engine.swap import SwapFile, measure_swap
from tokenmill.engine.taps.points import check_taps
from tokenmill.engine.taps.tap import intervention_digest
from tokenmill.kernels import KV_BLOCK, Executor, ExpertCacheStats, expert_cache
from tokenmill.kvcache import BlockPool, PrefixChain, prefix_root

__all__ = ["CoreConfig", "EngineCore", "GuessesFor", "StepResult", "StepStats"]

GuessesFor: TypeAlias = Literal["all", "fast"]
"""Whose tokens are guessed: guesses for fast requests only leave steps without one steady."""

# Deadlines that are kept before those of sequences that have ended are looked for.
_MIN_EXPIRIES = 64

# Of steps that are much alike one in so many is learnt from: that costs as much as the rest of a small one.
_STEADY_PERIOD = 16

# Steps of this length pay for being learnt from each time, until they are what was expected.
_LONG_STEP_S = 2e-3


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Sizes of an engine. `model` names the model's content in prefix keys; None switches the cache off.

    A step lasts about `fast_step_s` seconds at most while requests of the fast tier run, or twice as long as
    it would without prompts; of the others that decode one in `fast_ratio` takes part in a step then.
    Beside other work batch work takes part as far as a step ends within `batch_step_s`. Guesses are made
    for all requests, or for fast ones only.
    """

    num_blocks: int
    max_sequences: int
    max_waiting: int = 1 << 20
    model: str | None = ""
    fast_step_s: float = 0.1
    fast_ratio: float = 1.0
    batch_step_s: float = 0.1
    guesses_for: GuessesFor = "all"


class StepStats(NamedTuple):
    """What one step did, for measuring: rows computed, rows with logits, sequences, wall seconds.

    Of the `num_preempted` sequences `num_swapped` kept what was computed. `experts` is what the cache of
    experts did, None without one.
    """

    num_rows: int
    num_out_rows: int
    num_sequences: int
    num_waiting: int = 0
    num_preempted: int = 0
    seconds: float = 0.0
    num_swapped: int = 0
    experts: ExpertCacheStats | None = None


class StepResult(NamedTuple):
    """A step's figures and the sequences that reached their end in it."""

    stats: StepStats
    finished: tuple[SequenceState, ...]


class EngineCore:
    """Runs sequences on one executor that has `num_blocks` KV blocks. `clock` returns seconds.

    With a `swap` file preempted sequences keep what was computed; with a `proposer` tokens are guessed; with
    `counters` sequences are charged for energy, too.
    """

    def __init__(
        self,
        executor: Executor,
        config: CoreConfig,
        *,
        swap: SwapFile | None = None,
        proposer: Proposer | None = None,
        clock: Callable[[], float] = time.perf_counter,
        counters: PowerCounters | None = None,
    ) -> None:
        limits = StepLimits(
            max_rows=executor.max_rows,
            max_out_rows=executor.max_out_rows,
            max_sequences=config.max_sequences,
            max_waiting=config.max_waiting,
            fast_ratio=config.fast_ratio,
        )
        self.clock = clock
        self.scheduler = Scheduler(
            BlockPool(config.num_blocks),
            limits,
            swap=None if swap is None else BlockPool(swap.num_slots),
            prefer_swap=self._swap_is_cheaper,
        )
        self.step_time = StepTimeModel()
        self.meter = Meter(self.step_time, self.scheduler.pool, now_s=clock(), counters=counters)
        self._swap = swap
        self._swap_s = 0.0 if swap is None else measure_swap(swap)
        self._speculator = Speculator(
            proposer, self.step_time, clock=clock, for_fast_only=config.guesses_for == "fast"
        )
        self._config = config
        self._executor = executor
        self._runner = Runner(executor)
        self._expiries: list[tuple[float, int, GenerationState]] = []
        self._max_expiries = _MIN_EXPIRIES
        self._suspects: deque[SequenceState] = deque()
        self._guesses = proposer is not None
        self._steady: SteadyRun | None = None
        self.step_bound_s = math.inf

    @property
    def has_work(self) -> bool:
        """True if any submitted sequence is not finished."""
        return self.scheduler.has_work

    def submit(self, sequence: SequenceState) -> None:
        """Queue a sequence. Raises `ResourceError` if the cache could never hold it, or the queue is full,
        and `UsageError` for a tap that the plan does not have.
        """
        check_taps(self._runner.points, sequence.taps)
        self.scheduler.submit(sequence)
        for each in (sequence, *sequence.siblings):
            each.chain = self._chain(each)
        self._watch(sequence)
        self.meter.wake(self.clock())

    def abort(self, sequence: SequenceState, reason: FinishReason = "cancelled") -> None:
        """End a sequence between two steps: its blocks are free at once. No-op if it is finished.

        Before its first token this ends all completions of the request.
        """
        if not sequence.finished:
            self._end(sequence, reason)

    def step(self) -> StepResult:
        """Compute one step. Exceptions of the model fail one request; what is not an `Exception` is raised,
        and then no row counts as computed and every state stays valid.
        """
        began, cached = self.clock(), self.expert_cache
        finished = self._expire(began)
        run = self._steady_run()
        if run is not None:
            if not run.num_steps:
                self.meter.begin(run.chunks)
                self.step_bound_s = self.step_time.bound(len(run.states), run.num_kv_tokens, len(run.states))
            finished += self._step_steadily(run)
            stats = StepStats(
                num_rows=len(run.states), num_out_rows=len(run.states), num_sequences=len(run.states)
            )
        else:
            stats = self._step_planned(finished)
        ended = self.clock()
        self._charge(ended, is_settled=bool(finished) or self._steady is None)
        if not self.has_work:
            self.check_integrity()
        stats = stats._replace(
            num_waiting=len(self.scheduler.waiting),
            seconds=ended - began,
            experts=self._expert_reads(cached),
        )
        return StepResult(stats=stats, finished=tuple(finished))

    def _step_planned(self, finished: list[SequenceState]) -> StepStats:
        """A step of any kind; adds to what has finished."""
        schedule = self._plan()
        self.meter.begin(schedule.chunks, self._speculator.costs)
        self.step_bound_s = self.step_time.bound(
            schedule.num_rows, schedule.num_kv_tokens, schedule.num_out_rows
        )
        # If this fails, blocks are without their content, and nobody can go on.
        self._move(schedule.moves)
        every = [each for c in schedule.chunks for each in (c.sequence, *c.sequence.siblings)]
        touched = [each for each in every if not each.finished]
        before = _made(touched)
        try:
            self._run(schedule)
        except Exception as error:
            self._suspect(schedule.chunks, error)
        finally:
            # Also of those that found no room in the step.
            for sequence in self.scheduler.running:
                sequence.drafts = sequence.drafts[:0]
            self._count(before, _made(touched))
            finished += self._collect(touched)
        return StepStats(
            num_rows=schedule.num_rows,
            num_out_rows=schedule.num_out_rows,
            num_sequences=len(schedule.chunks),
            num_preempted=len(schedule.preempted),
            num_swapped=sum(bool(victim.swap_slots) for victim in schedule.preempted),
        )

    def _steady_run(self) -> SteadyRun | None:
        """What the step goes on with if all it has to do is to decode; guesses are always planned."""
        run, self._steady = self._steady, None
        if self._suspects or (self._guesses and self._speculator.has_askers(self.scheduler)):
            return None
        if run is not None and run.goes_on():
            return run
        # Where not all batch work may take part, who does is planned.
        num_batch_rows = self._max_batch_rows()
        if num_batch_rows is not None and num_batch_rows < _num_batch(self.scheduler.running):
            return None
        return SteadyRun.begin(self.scheduler, self._executor)

    def _step_steadily(self, run: SteadyRun) -> list[SequenceState]:
        """The next step of a run; what has finished."""
        began, num_rows, ended = self.clock(), len(run.states), run.states
        learns = run.num_steps % _STEADY_PERIOD == 0
        try:
            ended = run.step(self.clock)
            self.scheduler.counts.num_output_tokens += num_rows - sum(bool(state.error) for state in ended)
            self._steady = run
        except Exception as error:
            self._suspect(run.chunks, error)
        finally:
            finished = self._collect(ended)
        seconds = self.clock() - began
        if learns or (seconds > _LONG_STEP_S and not self.step_time.is_calm):
            self.step_time.observe(num_rows, run.num_kv_tokens - num_rows, num_rows, seconds)
        return finished

    def _charge(self, now_s: float, *, is_settled: bool) -> None:
        """Charge the step that ends now, at the latest before anybody reads what has ended in it."""
        self.meter.tick(now_s)
        if is_settled:
            self.meter.settle()
        if not self.has_work:
            self.meter.rest()

    @property
    def expert_cache(self) -> ExpertCacheStats | None:
        """What the executor's cache of experts did so far; None without one."""
        return expert_cache(self._executor)

    def _expert_reads(self, before: ExpertCacheStats | None) -> ExpertCacheStats | None:
        now = self.expert_cache
        return None if now is None or before is None else now.since(before)

    def check_integrity(self) -> None:
        """Assert that every KV block is free, cached, or held by a sequence that is not finished."""
        self.scheduler.check_integrity()

    def _chain(self, sequence: SequenceState) -> PrefixChain | None:
        if self._config.model is None:
            return None
        root = prefix_root(
            tenant=sequence.tenant,
            model=self._config.model,
            layout=self._executor.kv_dtype,
            adapter=sequence.adapter.digest,
            intervention=intervention_digest(sequence.taps),
        )
        return PrefixChain(root, KV_BLOCK)

    def _watch(self, sequence: SequenceState) -> None:
        if not isinstance(sequence, GenerationState) or sequence.expires_s is None:
            return
        if len(self._expiries) >= self._max_expiries:
            self._expiries = [each for each in self._expiries if not each[2].finished]
            heapify(self._expiries)
            self._max_expiries = max(_MIN_EXPIRIES, 2 * len(self._expiries))
        heappush(self._expiries, (sequence.expires_s, sequence.arrival, sequence))

    def _expire(self, now_s: float) -> list[SequenceState]:
        """End what has waited or run until its deadline."""
        expired: list[SequenceState] = []
        while self._expiries and self._expiries[0][0] <= now_s:
            state = heappop(self._expiries)[2]
            if not state.finished:
                expired += [each for each in (state, *state.siblings) if not each.finished]
                self._end(state, "expired")
        return expired

    def _end(self, sequence: SequenceState, reason: FinishReason) -> None:
        """End a sequence from outside; with it those that would begin where it was going to."""
        self.meter.settle()
        self._remove(sequence)
        for each in (sequence, *sequence.siblings):
            if isinstance(each, GenerationState) and not each.finished:
                each.finish(reason, now_s=self.clock())
        sequence.siblings = ()

    def _plan(self) -> Schedule:
        while self._suspects:
            suspect = self._suspects.popleft()
            if suspect in self.scheduler.running:
                return self.scheduler.schedule(only=suspect)
        self._speculator.guess(self.scheduler)
        return self.scheduler.schedule(max_rows=self._max_rows(), max_batch_rows=self._max_batch_rows())

    def _max_batch_rows(self) -> int | None:
        """Rows that batch work may have beside others, at least one; None if there is only one kind."""
        running = self.scheduler.running
        num_batch = _num_batch(running)
        if not num_batch or num_batch == len(running):
            return None
        num_kv_tokens = sum(sequence.num_total for sequence in running)
        rows = self.step_time.rows_within(self._config.batch_step_s, num_kv_tokens, len(running))
        return max(1, rows - (len(running) - num_batch))

    def _max_rows(self) -> int | None:
        """Rows that a step may have so that urgent requests do not wait long for the next."""
        running = self.scheduler.running
        if not any(sequence.tier == "fast" for sequence in running):
            return None
        num_kv_tokens = sum(sequence.num_total for sequence in running)
        # Where a step takes that long without any prompt, prompts get as much time again: they must get on.
        num_decodes = sum(sequence.num_pending == 1 for sequence in running)
        least_s = 2.0 * self.step_time.predict(num_decodes, num_kv_tokens, len(running))
        seconds = max(self._config.fast_step_s, least_s)
        return self.step_time.rows_within(seconds, num_kv_tokens, len(running))

    def _swap_is_cheaper(self, num_tokens: int, num_blocks: int) -> bool:
        return num_blocks * self._swap_s < self.step_time.predict(num_tokens, num_tokens, 1)

    def _run(self, schedule: Schedule) -> None:
        began = self.clock()
        if schedule.chunks:
            for out in self._runner.run(schedule):
                match out:
                    case OutRows():
                        take_logits(out, self.clock)
                    case HiddenRows():
                        take_hidden(out)
                    case TapFailure():
                        out.sequence.fail(str(out.error), now_s=self.clock())
        self.scheduler.commit(schedule)
        seconds = self.clock() - began
        if schedule.chunks:
            self.step_time.observe(schedule.num_rows, schedule.num_kv_tokens, schedule.num_out_rows, seconds)
            self._speculator.settle(schedule, seconds)
        for chunk in schedule.chunks:
            if chunk.sequence.siblings:
                self._branch(chunk.sequence)

    def _move(self, moves: BlockMoves) -> None:
        if moves.copies:
            self._executor.copy_blocks(moves.copies)
        if self._swap is not None:
            for block, slot in moves.outs:
                self._swap.put(slot, self._executor.block(block))
            for slot, block in moves.ins:
                self._swap.get(slot, self._executor.block(block))

    def _branch(self, parent: SequenceState) -> None:
        """Start the other completions of a request once their first token is chosen."""
        children = [child for child in parent.siblings if not child.finished]
        if children and not children[0].num_output:
            return
        for child in children:
            self.scheduler.fork(parent, child)
            self._watch(child)
        parent.siblings = ()

    def _suspect(self, chunks: Sequence[Chunk], error: Exception) -> None:
        """One of these sequences made the step fail, or a guess did: next they are run one by one, without
        guesses. What was alone already fails.
        """
        if not chunks:
            raise error
        if len(chunks) == 1 and not chunks[0].num_drafts:
            chunks[0].sequence.fail(f"{type(error).__name__}: {error}", now_s=self.clock())
        else:
            self._suspects = deque(chunk.sequence for chunk in chunks)

    def _count(self, before: "_Made", after: "_Made") -> None:
        counts = self.scheduler.counts
        counts.num_output_tokens += after.num_tokens - before.num_tokens
        counts.num_draft_tokens += after.num_drafted - before.num_drafted
        counts.num_accepted_tokens += after.num_accepted - before.num_accepted

    def _collect(self, touched: Iterable[SequenceState]) -> list[SequenceState]:
        """Remove what has finished, and end what would begin where a failed sequence was going to."""
        touched = list(touched)
        for sequence in touched:
            if sequence.finished and not sequence.error:
                self._branch(sequence)  # the step broke off after its first token
            going_on = tuple(child for child in sequence.siblings if not child.finished)
            sequence.siblings = () if sequence.finished else going_on
            if sequence.finished:
                for child in going_on:
                    child.fail(sequence.error, now_s=self.clock())
        finished = [sequence for sequence in touched if sequence.finished]
        for sequence in finished:
            self._remove(sequence)
        return finished

    def _remove(self, sequence: SequenceState) -> None:
        self.scheduler.remove(sequence, damaged=bool(sequence.error))
        if isinstance(sequence, GenerationState):
            self._speculator.forget(sequence)


def _num_batch(running: Sequence[SequenceState]) -> int:
    return sum(sequence.tier == "batch" for sequence in running)


class _Made(NamedTuple):
    """What some sequences have, together."""

    num_tokens: int
    num_drafted: int
    num_accepted: int


def _made(sequences: Sequence[SequenceState]) -> _Made:
    made = [
        (len(s.tokens), s.num_drafted, s.num_accepted) for s in sequences if isinstance(s, GenerationState)
    ]
    return _Made(*map(sum, zip(*made, strict=True))) if made else _Made(0, 0, 0)
