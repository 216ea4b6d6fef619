"""`LLM`: a model directory, ready to generate and to score, in this process.

The offline form of the engine: calls block until their work is done, and everything submitted shares the
same batches. It implements the `Generator` and `Scorer` protocols of `core`. Serving many callers at
once is not covered: one `LLM` belongs to one thread.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenmill.core import (
    Completion,
    Message,
    ModelFormatError,
    Request,
    SamplingParams,
    Score,
    UsageError,
)
from tokenmill.engine.config import LLMConfig
from tokenmill.engine.core import StepStats
from tokenmill.engine.embedding import Pooling, embeddings
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.sequence import GenerationState, ScoringState, SequenceState
from tokenmill.engine.shared_prefix import SharedPrefixQueue
from tokenmill.engine.taps.calibration import InputStats
from tokenmill.engine.taps.routing import RoutingStats
from tokenmill.engine.taps.tap import Tap
from tokenmill.kernels import ExpertCacheStats, F32Array, StepPlan
from tokenmill.models.packing.compile import ExecutorFactory, create_executor
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["LLM", "Progress", "ProgressCallback"]

# Steps' worth of rows that are under way where the order is chosen here: enough that no step is half empty.
_STEPS_AHEAD = 3


class Progress(NamedTuple):
    """State of a long call after one step: requests done, of how many, and the step's own figures."""

    num_done: int
    num_requests: int
    step: StepStats


ProgressCallback = Callable[[Progress], None]


class LLM:
    """A model that generates and scores. A call that is interrupted leaves no request and no block behind.

    `draft` is a small model with the same vocabulary that guesses for this one.
    """

    def __init__(
        self,
        model: ModelDirectory,
        config: LLMConfig | None = None,
        *,
        create: ExecutorFactory = create_executor,
        draft: ModelDirectory | None = None,
    ) -> None:
        self._engine = LocalEngine(model, config, create=create, draft=draft)
        self._num_requests = 0

    @property
    def config(self) -> LLMConfig:
        """How the model is run."""
        return self._engine.config

    @property
    def plan(self) -> StepPlan:
        """What the model was compiled to."""
        return self._engine.plan

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self._engine.num_blocks

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together, that a request may have."""
        return self._engine.context_length

    def encode(self, text: str) -> list[int]:
        """The token ids of plain text as a prompt; special tokens in it are text.

        A model that was trained to see a certain token where a text begins gets it in front.
        """
        return self._engine.tokenizer.encode_prompt(text)

    def encode_chat(
        self,
        conversation: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt that the model's chat template makes of a conversation, ready for the answer.

        `tools` are functions that the model may call, in the OpenAI shape; `variables` are what else the
        template asks for, such as `enable_thinking`. Raises `UsageError` if the model has no template, or
        the template refuses the conversation.
        """
        return self._engine.encode_chat(conversation, tools, variables)

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str = "",
        taps: Sequence[Tap] = (),
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """Continue each prompt, in order; `n` completions a prompt, one unless its parameters say more.

        `adapter` names a loaded adapter; `taps` read or change what the model computes for these prompts.
        Raises `UsageError` for a prompt that is empty or leaves no room in the context, and `ResourceError`
        for one that the KV cache could never hold; then nothing was generated.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts is one string", hint="give a list of prompts")
        ids = [self.encode(prompt) for prompt in prompts]
        return self.generate_tokens(ids, params, adapter=adapter, taps=taps, on_progress=on_progress)

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        adapter: str = "",
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """Answer each conversation with the model's chat template; the rest as in `encode_chat`, "
        "`generate`."""
        ids = [self.encode_chat(conversation, tools, variables) for conversation in conversations]
        return self.generate_tokens(ids, params, adapter=adapter, on_progress=on_progress)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str = "",
        taps: Sequence[Tap] = (),
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """Continue prompts given as token ids; the rest as in `generate`."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(
                f"{len(prompts)} prompts and {len(each)} sampling parameters",
                hint="give one set of parameters, or one a prompt",
            )
        families = [self._prepare(ids, one, adapter, taps) for ids, one in zip(prompts, each, strict=True)]
        self._drive([state for family in families for state in family], on_progress)
        return [state.completion() for family in families for state in family]

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams, *, adapter: str = ""
    ) -> Iterator[str | Completion]:
        """Yield the answer's text piece by piece as it is made, and last the whole `Completion`.

        Errors as in `generate`, at the call. Closing the iterator early cancels the request.
        """
        if params.n > 1:
            raise UsageError(f"n is {params.n} in a stream", hint="stream one completion, or use generate")
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        return self._stream(self._prepare(ids, params, adapter)[0])

    def score(
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        *,
        on_progress: ProgressCallback | None = None,
    ) -> list[Score]:
        """Log-probability of each continuation after its context (which may be empty).

        Context and continuation are tokenized apart, so that the border lies where it was given. What pairs
        begin with in common is computed once, and pairs that differ in their last token only are one
        computation. Raises `UsageError` for a pair that is empty or longer than the context of the model.
        """
        if len(contexts) != len(continuations):
            raise UsageError(
                f"{len(contexts)} contexts and {len(continuations)} continuations", hint="give pairs"
            )
        tokenizer = self._engine.tokenizer
        before = {context: self.encode(context) for context in set(contexts)}
        after = {
            (bool(context), continuation): (tokenizer.encode_after if context else tokenizer.encode)(
                continuation
            )
            for context, continuation in zip(contexts, continuations, strict=True)
        }
        pairs = [
            ([*before[context], *after[bool(context), continuation]], len(before[context]))
            for context, continuation in zip(contexts, continuations, strict=True)
        ]
        return self._score(pairs, on_progress)

    def score_text(
        self, text: str, *, window: int = 2048, on_progress: ProgressCallback | None = None
    ) -> list[Score]:
        """As `score_tokens`, for the tokens of a text."""
        return self.score_tokens(self.encode(text), window=window, on_progress=on_progress)

    def score_tokens(
        self,
        token_ids: Sequence[int],
        *,
        window: int = 2048,
        on_progress: ProgressCallback | None = None,
    ) -> list[Score]:
        """Score a long text in windows that do not overlap, as perplexity is measured.

        Nothing is put in front of a window, so its first token is not scored; a last window of one token
        is left out. One `Score` a window.
        """
        if not 2 <= window <= self.context_length:
            raise UsageError(f"window is {window}", hint=f"use a value from 2 to {self.context_length}")
        windows = [token_ids[first : first + window] for first in range(0, len(token_ids), window)]
        return self._score([(ids, 0) for ids in windows if len(ids) > 1], on_progress)

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        on_progress: ProgressCallback | None = None,
    ) -> F32Array:
        """Embeddings [N, D] of texts: the final norm's rows, their mean or the last one.

        `normalize` scales each to length 1. Raises `UsageError` for a text that is empty or longer than the
        model's context.
        """
        ids = [self.encode(text) for text in texts]
        states = [self._engine.prepare_embedding(self._next_id(), each, pooling) for each in ids]
        self._drive(states, on_progress)
        return embeddings(states, hidden_size=self.plan.shape.hidden_size, normalize=normalize)

    def calibrate(
        self, windows: Iterable[Sequence[int]], points: Sequence[str], *, second_moment: bool = False
    ) -> Mapping[str, InputStats]:
        """Statistics of linears' inputs over token windows; see `tokenmill.engine.taps.calibration`."""
        return self._engine.calibrate(windows, points, second_moment=second_moment)

    @property
    def expert_cache(self) -> ExpertCacheStats | None:
        """What the cache of experts did so far; None without a budget, or without experts."""
        return self._engine.expert_cache

    def routing(self, windows: Iterable[Sequence[int]]) -> Mapping[int, RoutingStats]:
        """How the tokens of windows are shared among the experts of each layer, by its number.

        Errors as in `tokenmill.engine.taps.routing`.
        """
        return self._engine.routing(windows)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA adapter in the layout of PEFT under a name. Errors as in `AdapterSlots.load`."""
        self._engine.load_adapter(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self._engine.unload_adapter(name)

    def close(self) -> None:
        """End what runs beside this process. The rest goes with the object."""
        self._engine.close()

    def _score(
        self, pairs: Sequence[tuple[Sequence[int], int]], on_progress: ProgressCallback | None
    ) -> list[Score]:
        """Score pairs of (tokens, number of them that are context)."""
        states: dict[tuple[tuple[int, ...], int], ScoringState] = {}
        # Of each pair the state that scores it, and as which of its endings; None if no token can be scored.
        places: list[tuple[ScoringState, int] | None] = []
        for ids, num_context in pairs:
            self._engine.check_tokens(ids, "text", room=0)
            num_context = max(1, num_context)
            if num_context >= len(ids):
                places.append(None)
            elif (state := states.get(key := (tuple(ids[:-1]), num_context))) is not None:
                places.append((state, state.add_ending(ids[-1])))
            else:
                states[key] = self._engine.prepare_score(self._next_id(), ids, num_context)
                places.append((states[key], 0))
        queue = SharedPrefixQueue(states.values(), _STEPS_AHEAD * self.config.max_rows)
        self._drive(list(states.values()), on_progress, queue.take)
        nothing = Score(token_ids=(), logprobs=())
        return [nothing if place is None else _finite(place[0].score(place[1])) for place in places]

    def _prepare(
        self, ids: Sequence[int], params: SamplingParams, adapter: str, taps: Sequence[Tap] = ()
    ) -> tuple[GenerationState, ...]:
        """The states of a new request, not submitted yet."""
        request = Request(request_id=self._next_id(), prompt=tuple(ids), params=params, adapter=adapter)
        return self._engine.prepare(request, taps)

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"request-{self._num_requests}"

    def _stream(self, state: GenerationState) -> Iterator[str | Completion]:
        try:
            self._engine.submit_state(state)
            while not state.finished:
                self._engine.step()
                if text := state.take().text:
                    yield text
        finally:
            self._engine.abort(state)
        yield state.completion()

    def _drive(
        self,
        states: Sequence[SequenceState],
        on_progress: ProgressCallback | None,
        take: Callable[[], Sequence[SequenceState]] | None = None,
    ) -> None:
        """Step until these sequences are finished. Whatever happens, none of them stays behind.

        `take` says before each step which of them are submitted next; by default all are at once.
        """
        remaining = set(states)
        # The other completions of a request follow from the first.
        first = [s for s in states if not (isinstance(s, GenerationState) and s.index)]
        queue = deque(() if take else first)
        try:
            while remaining:
                queue.extend(take() if take else ())
                self._feed(queue)
                result = self._engine.step()
                remaining.difference_update(result.finished)
                if on_progress is not None:
                    num_done = len(states) - len(remaining)
                    on_progress(Progress(num_done=num_done, num_requests=len(states), step=result.stats))
        finally:
            for state in remaining:
                self._engine.abort(state)

    def _feed(self, queue: deque[SequenceState]) -> None:
        """Submit what the engine's own queue has room for."""
        while queue and self._engine.num_waiting < self.config.max_waiting:
            self._engine.submit_state(queue.popleft())


def _finite(score: Score) -> Score:
    if not all(math.isfinite(logprob) for logprob in score.logprobs):
        raise ModelFormatError(
            "the model's logits are not finite numbers", hint="its weights may be damaged: pull it again"
        )
    return score
