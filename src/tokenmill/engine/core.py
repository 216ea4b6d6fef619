"""The step loop's body: expire, guess, schedule, run, sample or score, record. One call is one step.

It knows sequences and token ids, no text sources and no queues of callers; whoever drives it (`LocalEngine`)
submits states, calls `step` while there is work and reads the states. It is not safe to use from two
threads at once.

An exception in a step is nobody's and everybody's: the sequences of that step are run again one by one, so
that the one it belongs to fails alone.
"""

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from tokenmill.core import FinishReason
from tokenmill.engine.proposers import Proposer
from tokenmill.engine.runner import OutRows, Runner
from tokenmill.engine.sampler import SamplingRow, logprobs_of, sample, top_logprobs
from tokenmill.engine.scheduler import BlockMoves, Schedule, Scheduler, StepLimits
from tokenmill.engine.sequence import GenerationState, ScoringState, SequenceState
from tokenmill.engine.speculator import Speculator
from tokenmill.engine.step_time import StepTimeModel
from tokenmill.engine.swap import SwapFile, measure_swap
from tokenmill.kernels import KV_BLOCK, Executor, F32Array
from tokenmill.kvcache import BlockPool, PrefixChain, prefix_root

__all__ = ["CoreConfig", "EngineCore", "StepResult", "StepStats"]

_NOT_FINITE = "the model's logits are not finite numbers"


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Sizes of an engine. `model` names the model's content in prefix keys; None switches the cache off.

    A step lasts about `fast_step_s` seconds at most while requests of the fast tier run.
    """

    num_blocks: int
    max_sequences: int
    max_waiting: int = 1 << 20
    model: str | None = ""
    fast_step_s: float = 0.1


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
    """Runs sequences on one executor that has `num_blocks` KV blocks. `clock` returns seconds.

    With a `swap` file preempted sequences keep what was computed; with a `proposer` tokens are guessed.
    """

    def __init__(
        self,
        executor: Executor,
        config: CoreConfig,
        *,
        swap: SwapFile | None = None,
        proposer: Proposer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        limits = StepLimits(
            max_rows=executor.max_rows,
            max_out_rows=executor.max_out_rows,
            max_sequences=config.max_sequences,
            max_waiting=config.max_waiting,
        )
        self.clock = clock
        self.scheduler = Scheduler(
            BlockPool(config.num_blocks),
            limits,
            swap=None if swap is None else BlockPool(swap.num_slots),
            prefer_swap=self._swap_is_cheaper,
        )
        self.step_time = StepTimeModel()
        self._swap = swap
        self._swap_s = 0.0 if swap is None else measure_swap(swap)
        self._speculator = None if proposer is None else Speculator(proposer, self.step_time, clock=clock)
        self._config = config
        self._executor = executor
        self._runner = Runner(executor)
        self._expiries: list[tuple[float, int, GenerationState]] = []
        self._suspects: deque[SequenceState] = deque()

    @property
    def has_work(self) -> bool:
        """True if any submitted sequence is not finished."""
        return self.scheduler.has_work

    def submit(self, sequence: SequenceState) -> None:
        """Queue a sequence. Raises `ResourceError` if the cache could never hold it, or the queue is full."""
        self.scheduler.submit(sequence)
        for each in (sequence, *sequence.siblings):
            each.chain = self._chain(each)
        self._watch(sequence)

    def abort(self, sequence: SequenceState) -> None:
        """Give up a sequence between two steps: its blocks are free at once. No-op if it is finished.

        Before its first token this ends all completions of the request.
        """
        if not sequence.finished:
            self._end(sequence, "cancelled")

    def step(self) -> StepResult:
        """Compute one step. Exceptions of the model fail one request; what is not an `Exception` is raised,
        and then no row counts as computed and every state stays valid.
        """
        began = self.clock()
        finished = self._expire(began)
        schedule = self._plan()
        touched = [each for c in schedule.chunks for each in (c.sequence, *c.sequence.siblings)]
        try:
            self._run(schedule)
        except Exception as error:
            self._suspect(schedule, error)
        finally:
            for chunk in schedule.chunks:
                chunk.sequence.drafts = array("i")
            finished += self._collect(touched)
        if not self.has_work:
            self.check_integrity()
        stats = StepStats(
            num_rows=schedule.num_rows,
            num_out_rows=schedule.num_out_rows,
            num_sequences=len(schedule.chunks),
            num_waiting=len(self.scheduler.waiting),
            num_preempted=len(schedule.preempted),
            seconds=self.clock() - began,
        )
        return StepResult(stats=stats, finished=tuple(finished))

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
            adapter="",
            intervention="",
        )
        return PrefixChain(root, KV_BLOCK)

    def _watch(self, sequence: SequenceState) -> None:
        if isinstance(sequence, GenerationState) and sequence.expires_s is not None:
            heappush(self._expiries, (sequence.expires_s, sequence.arrival, sequence))

    def _expire(self, now_s: float) -> list[SequenceState]:
        """End what has waited or run until its deadline."""
        expired: list[SequenceState] = []
        while self._expiries and self._expiries[0][0] <= now_s:
            state = heappop(self._expiries)[2]
            if not state.finished:
                expired += (state, *state.siblings)
                self._end(state, "expired")
        return expired

    def _end(self, sequence: SequenceState, reason: FinishReason) -> None:
        """End a sequence from outside; with it those that would begin where it was going to."""
        self._remove(sequence)
        for each in (sequence, *sequence.siblings):
            if isinstance(each, GenerationState):
                each.finish(reason, now_s=self.clock())
        sequence.siblings = ()

    def _plan(self) -> Schedule:
        while self._suspects:
            suspect = self._suspects.popleft()
            if suspect in self.scheduler.running:
                return self.scheduler.schedule(only=suspect)
        if self._speculator is not None:
            self._speculator.guess(self.scheduler)
        return self.scheduler.schedule(max_rows=self._max_rows())

    def _max_rows(self) -> int | None:
        """Rows that a step may have so that urgent requests do not wait long for the next."""
        running = self.scheduler.running
        if not any(sequence.tier == "fast" for sequence in running):
            return None
        num_kv_tokens = sum(sequence.num_total for sequence in running)
        return self.step_time.rows_within(self._config.fast_step_s, num_kv_tokens, len(running))

    def _swap_is_cheaper(self, num_tokens: int, num_blocks: int) -> bool:
        return num_blocks * self._swap_s < self.step_time.predict(num_tokens, num_tokens, 1)

    def _run(self, schedule: Schedule) -> None:
        began = self.clock()
        self._move(schedule.moves)
        if schedule.chunks:
            for out in self._runner.run(schedule):
                self._take(out)
        self.scheduler.commit(schedule)
        seconds = self.clock() - began
        self.step_time.observe(schedule.num_rows, schedule.num_kv_tokens, schedule.num_out_rows, seconds)
        if self._speculator is not None:
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
        if not (parent.siblings[0].num_output or parent.siblings[0].finished):
            return
        for child in parent.siblings:
            if not child.finished:
                self.scheduler.fork(parent, child)
                self._watch(child)
        parent.siblings = ()

    def _suspect(self, schedule: Schedule, error: Exception) -> None:
        """One of these sequences made the step fail: alone it fails; several are run one by one next."""
        if not schedule.chunks:
            raise error
        if len(schedule.chunks) == 1:
            schedule.chunks[0].sequence.fail(f"{type(error).__name__}: {error}", now_s=self.clock())
        else:
            self._suspects = deque(chunk.sequence for chunk in schedule.chunks)

    def _collect(self, touched: Iterable[SequenceState]) -> list[SequenceState]:
        """Remove what has finished, and end what would begin where a failed sequence was going to."""
        touched = list(touched)
        for sequence in touched:
            if sequence.finished and sequence.siblings:
                for child in sequence.siblings:
                    if not child.finished:
                        child.fail(sequence.error, now_s=self.clock())
                sequence.siblings = ()
        finished = [sequence for sequence in touched if sequence.finished]
        for sequence in finished:
            self._remove(sequence)
        return finished

    def _remove(self, sequence: SequenceState) -> None:
        self.scheduler.remove(sequence, damaged=bool(sequence.error))
        if self._speculator is not None and isinstance(sequence, GenerationState):
            self._speculator.forget(sequence)

    def _take(self, out: OutRows) -> None:
        """Hand each row of logits to its sequence."""
        sampled: list[_Sample] = []
        scored: list[tuple[int, int, ScoringState]] = []
        prompts: list[tuple[int, int, GenerationState]] = []
        for index, (sequence, position) in enumerate(out.rows):
            if isinstance(sequence, ScoringState):
                scored.append((index, position, sequence))
            elif isinstance(sequence, GenerationState) and position < sequence.num_prompt - 1:
                prompts.append((index, position, sequence))
            elif isinstance(sequence, GenerationState):
                sampled += _samples(sequence, position, index)
        if sampled:
            self._sample(out.logits_LV, sampled)
        if scored:
            _score(out.logits_LV, scored)
        if prompts:
            _score_prompts(out.logits_LV, prompts)

    def _sample(self, logits_LV: F32Array, samples: Sequence["_Sample"]) -> None:
        """Choose a token for each row and append those that stand.

        A row stands if every guess before it was right. Rows come in order, so it is enough to look at the
        last: its position must be the sequence's last, and it must have been computed from that token.
        """
        result = sample(logits_LV, [each.row for each in samples])
        now_s = self.clock()
        for each in samples:
            each.state.num_drafted += each.is_draft
        for each, token_id, valid, logprobs in zip(
            samples, result.token_ids.tolist(), result.valid.tolist(), result.logprobs, strict=True
        ):
            state, position = each.state, each.row.position
            if state.finished or position != state.num_total or each.last_token != state.tokens[-1]:
                continue
            if each.is_draft:
                state.num_accepted += 1
            if valid:
                state.append(token_id, logprobs, now_s=now_s)
            else:
                state.fail(_NOT_FINITE, now_s=now_s)


class _Sample(NamedTuple):
    """A row to be sampled, for whom, and the token that it was computed from."""

    row: SamplingRow
    state: GenerationState
    last_token: int
    is_draft: bool


def _samples(state: GenerationState, position: int, logits_row: int) -> Iterator[_Sample]:
    """The samples taken from the logits at one position: one, or where the prompt ends one a completion."""
    # Tokens of an earlier row of this step may be appended already; drafts follow the last computed token.
    known = state.num_computed + 1 if state.drafts else state.num_total
    tokens = state.tokens[:known] + state.drafts if state.drafts else state.tokens
    family = (state, *state.siblings) if position == state.num_prompt - 1 else (state,)
    for each in family:
        row = SamplingRow(
            params=each.params,
            seed=each.seed,
            position=position + 1,
            logits_row=logits_row,
            tokens=tokens,
            num_prompt=each.num_prompt,
            banned=each.banned_at(position + 1),
            bad_words=each.bad_words,
        )
        yield _Sample(row, each, tokens[position], position >= known)


def _score(logits_LV: F32Array, rows: Sequence[tuple[int, int, ScoringState]]) -> None:
    targets = [state.target(position) for _, position, state in rows]
    logprobs = logprobs_of(_select(logits_LV, [index for index, _, _ in rows]), targets)
    for (_, position, state), logprob in zip(rows, logprobs, strict=True):
        state.append(position, logprob)


def _score_prompts(logits_LV: F32Array, rows: Sequence[tuple[int, int, GenerationState]]) -> None:
    for index, position, state in rows:
        num_top = state.params.prompt_logprobs or 0
        target = state.tokens[position + 1]
        state.append_prompt(position, top_logprobs(logits_LV[index : index + 1], [target], num_top)[0])


def _select(logits_LV: F32Array, indices: list[int]) -> F32Array:
    """These rows; the buffer itself, not a copy, where that is all of them."""
    return logits_LV if len(indices) == logits_LV.shape[0] else logits_LV[indices]
