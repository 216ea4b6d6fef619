"""Stand-in for the engine that is driven by submit, abort and step; on top of today's `EngineCore`.

One model in one thread. A step that raises is run again sequence by sequence, so that only the sequence
that makes it raise fails.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from tokenmill.core import Completion, Request, ResourceError, TokenLogprobs, UsageError
from tokenmill.engine.core import EngineCore, StepResult, StepStats
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.llm import ExecutorFactory, LLMConfig
from tokenmill.engine.scheduler import Chunk, Schedule, Scheduler
from tokenmill.engine.sequence import GenerationState
from tokenmill.models.compile import create_executor
from tokenmill.models.directory import ModelDirectory

__all__ = ["Delta", "LocalEngine", "LocalState"]

_MAX_WAITING = 4096


class Delta(NamedTuple):
    """What a generation has made since it was last asked."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


class LocalState(GenerationState):
    """A generation that knows which of its request's completions it is, and why it failed."""

    index = 0
    error = ""
    deadline_s: float | None = None
    _num_taken_tokens = 0

    @property
    def num_output(self) -> int:
        """Tokens sampled so far."""
        return self.num_total - self.num_prompt

    def take(self) -> Delta:
        """What was not taken before."""
        first, self._num_taken_tokens = self._num_taken_tokens, self.num_output
        return Delta(self.take_text(), tuple(self.tokens[self.num_prompt + first :]), ())

    def completion(self) -> Completion:
        """What the request ended with."""
        return replace(super().completion(), index=self.index, error=self.error)


class LocalEngine:
    """Requests in, states out."""

    def __init__(
        self, model: ModelDirectory, config: LLMConfig, *, create: ExecutorFactory = create_executor
    ) -> None:
        self.num_blocks = config.num_blocks(model.architecture)
        executor = create(
            model,
            weights=config.weights,
            max_rows=config.max_rows,
            max_out_rows=config.max_batch,
            num_blocks=self.num_blocks,
            num_threads=config.num_threads,
        )
        self._architecture = model.architecture
        self._tokenizer = model.tokenizer()
        self._core = _IsolatingCore(
            executor,
            num_blocks=self.num_blocks,
            max_sequences=config.max_batch,
            eos_token_ids=model.architecture.eos_token_ids,
        )
        self._states: dict[LocalState, None] = {}

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together, that a request may have."""
        return self._architecture.max_positions

    @property
    def has_work(self) -> bool:
        """True if any state is not finished."""
        return self._core.has_work

    @property
    def num_waiting(self) -> int:
        """States that hold no blocks."""
        return self._core.scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """States that hold blocks."""
        return self._core.scheduler.num_running

    @property
    def num_blocks_in_use(self) -> int:
        """KV blocks that unfinished states hold."""
        return self._core.scheduler.pool.num_in_use

    def submit(self, request: Request) -> tuple[LocalState, ...]:
        """Queue a request. Raises UsageError or ResourceError; then nothing was queued."""
        self._check(request)
        states = tuple(self._state(request, index) for index in range(request.params.n))
        self._core.check_fits(states[0])
        for state in states:
            self._core.submit(state)
            self._states[state] = None
        return states

    def abort(self, state: GenerationState) -> None:
        """Give a state up; no-op if it is finished."""
        assert isinstance(state, LocalState)
        self._core.abort(state)
        self._states.pop(state, None)

    def step(self) -> StepResult:
        """Compute one step."""
        now_s = self._core.clock()
        late = [s for s in self._states if s.deadline_s is not None and now_s >= s.deadline_s]
        for state in late:
            state.finish("expired", now_s=now_s)
            self.abort(state)
        result = self._core.step()
        for each in result.finished:
            assert isinstance(each, LocalState)
            self._states.pop(each, None)
        return replace(result, finished=(*late, *result.finished))

    def check_integrity(self) -> None:
        """Assert that every block is free or held."""
        self._core.check_integrity()

    def _state(self, request: Request, index: int) -> LocalState:
        params = request.params
        seed = secrets.randbelow(1 << 63) if params.seed is None else params.seed + index
        state = LocalState(
            request,
            seed=seed,
            max_total=min(len(request.prompt) + params.max_tokens, self.context_length),
            detokenizer=Detokenizer(self._text_bytes, params.stop),
            submitted_s=self._core.clock(),
        )
        state.index = index
        if request.timeout_s is not None:
            state.deadline_s = state.submitted_s + request.timeout_s
        return state

    def _check(self, request: Request) -> None:
        ids: Sequence[int] = request.prompt
        if not ids or len(ids) >= self.context_length:
            raise UsageError(
                f"a prompt has {len(ids)} tokens; the model's context is {self.context_length}",
                hint="give at least one token, and leave room for an answer",
            )
        if not 0 <= min(ids) <= max(ids) < self._architecture.vocab_size:
            raise UsageError("a prompt has a token id outside the vocabulary")
        if self.num_waiting + request.params.n > _MAX_WAITING:
            raise ResourceError(f"{_MAX_WAITING} requests wait already", hint="try again later")

    def _text_bytes(self, token_id: int) -> bytes:
        return b"" if self._tokenizer.is_special(token_id) else self._tokenizer.token_bytes(token_id)


class _IsolatingCore(EngineCore):
    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    def step(self) -> StepResult:
        try:
            return super().step()
        except Exception:
            return self._step_apart()

    def _step_apart(self) -> StepResult:
        schedule = self._scheduler.schedule()
        for chunk in schedule.chunks:
            try:
                self._run_alone(chunk)
            except Exception as error:
                state = chunk.sequence
                assert isinstance(state, LocalState)
                state.error = f"the step raised {type(error).__name__}: {error}"
                state.finish("failed", now_s=self.clock())
        finished = self._remove_finished(schedule)
        if not self.has_work:
            self.check_integrity()
        stats = StepStats(
            num_rows=schedule.num_rows,
            num_out_rows=schedule.num_out_rows,
            num_sequences=len(schedule.chunks),
            num_waiting=self._scheduler.num_waiting,
            num_preempted=len(schedule.preempted),
            seconds=0.0,
        )
        return StepResult(stats=stats, finished=finished)

    def _run_alone(self, chunk: Chunk) -> None:
        alone = Schedule(chunks=(chunk,), preempted=())
        for out in self._runner.run(alone):
            self._take(out)
        self._scheduler.commit(alone)
