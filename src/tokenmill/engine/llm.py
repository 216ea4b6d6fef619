"""`LLM`: a model directory, ready to generate and to score, in this process.

The offline form of the engine: calls block until their work is done, and everything submitted shares the
same batches. It implements the `Generator` and `Scorer` protocols of `core`. Serving many callers at
once is not covered: one `LLM` belongs to one thread.
"""

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from tokenmill.core import (
    Completion,
    Message,
    ModelFormatError,
    Request,
    SamplingParams,
    Score,
    UsageError,
)
from tokenmill.engine.core import EngineCore, StepStats
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.sequence import GenerationState, ScoringState, SequenceState
from tokenmill.kernels import KV_BLOCK, KV_DTYPES, Executor, KvDtype, StepPlan
from tokenmill.models.architecture import Architecture
from tokenmill.models.chat_template import ChatTemplate, encode_chat
from tokenmill.models.compile import create_executor
from tokenmill.models.directory import ModelDirectory
from tokenmill.models.pack import WEIGHT_FORMATS, WeightFormat

__all__ = ["LLM", "ExecutorFactory", "LLMConfig", "Progress", "ProgressCallback"]

_DEFAULT_KV_BYTES = 2 << 30
_MAX_ROWS = 1 << 16
_MAX_BATCH = 1 << 12


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """How a model is run.

    One step computes at most `max_rows` tokens, of at most `max_batch` sequences. `kv_tokens` is the size
    of the KV cache; by default 2 GiB of it, or less if `max_batch` full contexts need less (memory is
    touched only as it fills); `kv_dtype` int8 about halves its bytes. `num_threads` None leaves the choice to
    the executor.
    """

    weights: WeightFormat = "w8a8"
    max_rows: int = 512
    max_batch: int = 64
    num_threads: int | None = None
    kv_tokens: int | None = None
    kv_dtype: KvDtype = "bf16"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise UsageError(f"weights is {self.weights!r}", hint=f"use one of {', '.join(WEIGHT_FORMATS)}")
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(f"kv_dtype is {self.kv_dtype!r}", hint=f"use one of {', '.join(KV_DTYPES)}")
        _check("max_rows", self.max_rows, 1, _MAX_ROWS)
        _check("max_batch", self.max_batch, 1, _MAX_BATCH)
        if self.num_threads is not None:
            _check("num_threads", self.num_threads, 1, 1024)
        if self.kv_tokens is not None:
            _check("kv_tokens", self.kv_tokens, KV_BLOCK, 1 << 31)

    def num_blocks(self, architecture: Architecture) -> int:
        """KV blocks for a model of this architecture."""
        if self.kv_tokens is not None:
            return -(-self.kv_tokens // KV_BLOCK)
        affordable = _DEFAULT_KV_BYTES // architecture.kv_block_bytes(self.kv_dtype)
        useful = self.max_batch * -(-architecture.max_positions // KV_BLOCK)
        return max(1, min(affordable, useful))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of a long call after one step: requests done, of how many, and the step's own figures."""

    num_done: int
    num_requests: int
    step: StepStats


ProgressCallback = Callable[[Progress], None]


class ExecutorFactory(Protocol):
    """Compiles a model directory to an executor; the default is `tokenmill.models.compile`."""

    def __call__(
        self,
        directory: ModelDirectory,
        *,
        weights: WeightFormat,
        max_rows: int,
        max_out_rows: int,
        num_blocks: int,
        num_threads: int | None,
        kv_dtype: KvDtype,
    ) -> Executor:
        """Compile; the executor has `num_blocks` KV blocks."""
        ...


class LLM:
    """A model that generates and scores. A call that is interrupted leaves no request and no block behind."""

    def __init__(
        self,
        model: ModelDirectory,
        config: LLMConfig | None = None,
        *,
        create: ExecutorFactory = create_executor,
    ) -> None:
        self.config = config or LLMConfig()
        self.num_blocks = self.config.num_blocks(model.architecture)
        executor = create(
            model,
            weights=self.config.weights,
            max_rows=self.config.max_rows,
            max_out_rows=self.config.max_batch,
            num_blocks=self.num_blocks,
            num_threads=self.config.num_threads,
            kv_dtype=self.config.kv_dtype,
        )
        self.plan: StepPlan = executor.plan
        self._model = model
        self._tokenizer = model.tokenizer()
        self._core = EngineCore(
            executor,
            num_blocks=self.num_blocks,
            max_sequences=self.config.max_batch,
            eos_token_ids=model.architecture.eos_token_ids,
        )
        self._num_requests = 0

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together, that a request may have."""
        return self._model.architecture.max_positions

    def encode(self, text: str) -> list[int]:
        """The token ids of plain text; special tokens in it are text."""
        return self._tokenizer.encode(text)

    def encode_chat(self, conversation: Sequence[Message]) -> list[int]:
        """The prompt that the model's chat template makes of a conversation, ready for the answer.

        Raises `UsageError` if the model has no template, or the template refuses the conversation.
        """
        if self._chat_template is None:
            raise UsageError("the model has no chat template", hint="it is a base model: use generate")
        return encode_chat(self._tokenizer, self._chat_template, conversation)

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """Continue each prompt; one completion a prompt, in order.

        Raises `UsageError` for a prompt that is empty or leaves no room in the context, and `ResourceError`
        for one that the KV cache could never hold; then nothing was generated.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts is one string", hint="give a list of prompts")
        ids = [self._tokenizer.encode(prompt) for prompt in prompts]
        return self.generate_tokens(ids, params, on_progress=on_progress)

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """Answer each conversation with the model's chat template; errors as in `generate`."""
        ids = [self.encode_chat(conversation) for conversation in conversations]
        return self.generate_tokens(ids, params, on_progress=on_progress)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """Continue prompts given as token ids; errors as in `generate`."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(
                f"{len(prompts)} prompts and {len(each)} sampling parameters",
                hint="give one set of parameters, or one a prompt",
            )
        states = [self._generation(ids, one) for ids, one in zip(prompts, each, strict=True)]
        self._drive(states, on_progress)
        return [state.completion() for state in states]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[str | Completion]:
        """Yield the answer's text piece by piece as it is made, and last the whole `Completion`.

        Errors as in `generate`, at the call. Closing the iterator early cancels the request.
        """
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self._stream(self._generation(ids, params))

    def score(
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        *,
        on_progress: ProgressCallback | None = None,
    ) -> list[Score]:
        """Log-probability of each continuation after its context (which may be empty).

        Context and continuation are tokenized apart, so that the border lies where it was given. Raises
        `UsageError` for a pair that is empty or longer than the context of the model.
        """
        if len(contexts) != len(continuations):
            raise UsageError(
                f"{len(contexts)} contexts and {len(continuations)} continuations", hint="give pairs"
            )
        encoded = [
            (self._tokenizer.encode(context), self._tokenizer.encode(continuation))
            for context, continuation in zip(contexts, continuations, strict=True)
        ]
        pairs = [([*before, *after], len(before)) for before, after in encoded]
        return self._score(pairs, on_progress)

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
        _check("window", window, 2, self.context_length)
        windows = [token_ids[first : first + window] for first in range(0, len(token_ids), window)]
        return self._score([(ids, 0) for ids in windows if len(ids) > 1], on_progress)

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        return self._model.chat_template()

    def _score(
        self, pairs: Sequence[tuple[Sequence[int], int]], on_progress: ProgressCallback | None
    ) -> list[Score]:
        """Score pairs of (tokens, number of them that are context)."""
        states = [self._scoring(ids, max(1, num_context)) for ids, num_context in pairs]
        self._drive([state for state in states if state is not None], on_progress)
        nothing = Score(token_ids=(), logprobs=())
        return [nothing if state is None else _finite(state.score()) for state in states]

    def _scoring(self, ids: Sequence[int], num_context: int) -> ScoringState | None:
        """The state of a text to be scored, or None if no token of it can be."""
        self._check_tokens(ids, "text", room=0)
        if num_context >= len(ids):
            return None
        state = ScoringState(self._next_id(), ids, num_context)
        self._core.check_fits(state)
        return state

    def _generation(self, ids: Sequence[int], params: SamplingParams) -> GenerationState:
        """The state of a new request, not submitted yet."""
        self._check_tokens(ids, "prompt", room=1)
        seed = secrets.randbelow(1 << 63) if params.seed is None else params.seed
        state = GenerationState(
            Request(request_id=self._next_id(), prompt=tuple(ids), params=params),
            seed=seed,
            max_total=min(len(ids) + params.max_tokens, self.context_length),
            detokenizer=Detokenizer(self._text_bytes, params.stop),
            submitted_s=self._core.clock(),
        )
        self._core.check_fits(state)
        return state

    def _check_tokens(self, ids: Sequence[int], what: str, *, room: int) -> None:
        if not len(ids):
            raise UsageError(f"a {what} is empty", hint="give at least one token of text")
        if len(ids) + room > self.context_length:
            needs = " and needs room for an answer" if room else ""
            raise UsageError(
                f"a {what} has {len(ids)} tokens{needs}; the model's context is {self.context_length}",
                hint=f"shorten the {what}",
            )
        vocab_size = self._model.architecture.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UsageError(f"a {what} has a token id outside the vocabulary of {vocab_size}")

    def _text_bytes(self, token_id: int) -> bytes:
        """The bytes of a token as text; a control token stands for none, as in `Tokenizer.decode`."""
        return b"" if self._tokenizer.is_special(token_id) else self._tokenizer.token_bytes(token_id)

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"request-{self._num_requests}"

    def _stream(self, state: GenerationState) -> Iterator[str | Completion]:
        try:
            self._core.submit(state)
            while not state.finished:
                self._core.step()
                if text := state.take_text():
                    yield text
        finally:
            self._core.abort(state)
        yield state.completion()

    def _drive(self, states: Sequence[SequenceState], on_progress: ProgressCallback | None) -> None:
        """Step until these sequences are finished. Whatever happens, none of them stays behind."""
        remaining = set(states)
        try:
            for state in states:
                self._core.submit(state)
            while remaining:
                result = self._core.step()
                remaining.difference_update(result.finished)
                if on_progress is not None:
                    num_done = len(states) - len(remaining)
                    on_progress(Progress(num_done=num_done, num_requests=len(states), step=result.stats))
        finally:
            for state in remaining:
                self._core.abort(state)


def _finite(score: Score) -> Score:
    if not all(math.isfinite(logprob) for logprob in score.logprobs):
        raise ModelFormatError(
            "the model's logits are not finite numbers", hint="its weights may be damaged: pull it again"
        )
    return score


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}", hint=f"use a value from {low} to {high}")
