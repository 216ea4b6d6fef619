"""A request as the front end sees it: what has come of it so far, and the caller's grip on it.

The record belongs to the engine's front end, the handle to the caller. Only the handle knows the caller:
when it is dropped, when the reading of it is broken off, the request is cancelled. Nobody needs to read:
what comes is kept once, in the record, and a late reader gets it in one piece.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import numpy as np

from tokenmill.core import Completion, FinishReason, Request, TokenLogprobs, TokenmillError, Usage
from tokenmill.costs.metering import Charge
from tokenmill.engine.embedding import EmbeddingRequest
from tokenmill.kernels import F32Array

__all__ = ["Embedding", "EmbeddingHandle", "EmbeddingRecord", "RequestHandle", "RequestRecord", "StreamDelta"]


@dataclass(frozen=True, kw_only=True)
class StreamDelta:
    """What completion `index` of a request gained since the last delta: text, and the tokens computed.

    Text may lag behind its tokens (half a character, a possible stop string). `logprobs` has one entry a
    token if they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class _Choice:
    """One of a request's `n` completions while it is made."""

    def __init__(self) -> None:
        self.completion: Completion | None = None
        self.token_ids: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._taken = (0, 0)
        self._end_taken = False

    def add(self, text: str, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        self._pieces.append(text)
        self.token_ids += token_ids
        self._logprobs += logprobs

    def take(self, index: int) -> list[StreamDelta | Completion]:
        """What was not taken before: at most one delta, and the completion after it."""
        news: list[StreamDelta | Completion] = []
        pieces, first = self._taken
        if len(self._pieces) > pieces:
            news.append(
                StreamDelta(
                    index=index,
                    text="".join(self._pieces[pieces:]),
                    token_ids=tuple(self.token_ids[first:]),
                    logprobs=tuple(self._logprobs[first:]),
                )
            )
            self._taken = len(self._pieces), len(self.token_ids)
        if self.completion is not None and not self._end_taken:
            news.append(self.completion)
            self._end_taken = True
        return news

    def so_far(self, record: "RequestRecord", reason: FinishReason, error: str, now_s: float) -> Completion:
        """The completion that the front end writes when the engine cannot."""
        request = record.request
        elapsed_s = now_s - record.submitted_s
        return Completion(
            request_id=request.request_id,
            index=record.choices.index(self),
            text="".join(self._pieces),
            token_ids=tuple(self.token_ids),
            finish_reason=reason,
            usage=Usage(
                num_prompt_tokens=len(request.prompt),
                num_cached_tokens=0,
                num_output_tokens=len(self.token_ids),
            ),
            ttft_s=elapsed_s,
            total_s=elapsed_s,
            logprobs=None if request.params.logprobs is None else tuple(self._logprobs),
            error=error,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """What a request for embeddings ended with: `vectors_ND`, a row for each text, if it is `completed`.

    `charge` is what it took, as far as the engine could say; `error` why it `failed`.
    """

    request_id: str
    vectors_ND: F32Array
    finish_reason: FinishReason
    usage: Usage
    charge: Charge = field(default_factory=Charge)
    error: str = ""


@dataclass(eq=False, kw_only=True)
class _Record:
    """Anything between its submission and its end. Times are seconds of the event loop's clock.

    `sent` says that the present engine process has it; `num_tries` how many have had it.
    """

    key: int
    submitted_s: float
    done: asyncio.Event = field(default_factory=asyncio.Event)
    sent: bool = False
    num_tries: int = 0
    cancelled: bool = False
    refusal: TokenmillError | None = None
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False, kw_only=True)
class EmbeddingRecord(_Record):
    """A request for embeddings."""

    request: EmbeddingRequest
    embedding: Embedding | None = None

    @property
    def has_output(self) -> bool:
        """False: nobody sees a part of it."""
        return False

    def ended(
        self,
        reason: FinishReason,
        *,
        vectors_ND: F32Array | None = None,
        num_cached: int = 0,
        charge: Charge | None = None,
        error: str = "",
    ) -> Embedding:
        """Its terminal state."""
        num_tokens = sum(map(len, self.request.prompts))
        return Embedding(
            request_id=self.request.request_id,
            vectors_ND=np.zeros((0, 0), np.float32) if vectors_ND is None else vectors_ND,
            finish_reason=reason,
            usage=Usage(num_prompt_tokens=num_tokens, num_cached_tokens=num_cached, num_output_tokens=0),
            charge=charge or Charge(),
            error=error,
        )


@dataclass(eq=False, kw_only=True)
class RequestRecord(_Record):
    """A request for completions. `charge` is what those took that have ended."""

    request: Request
    choices: list[_Choice] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    charge: Charge = field(default_factory=Charge)

    def __post_init__(self) -> None:
        self.choices = [_Choice() for _ in range(self.request.params.n)]

    @property
    def has_output(self) -> bool:
        """True once a token or an end has come, so that the request cannot be computed anew unseen."""
        return any(choice.token_ids or choice.completion is not None for choice in self.choices)

    def take(self) -> list[StreamDelta | Completion]:
        """What the reader has not seen."""
        return [news for index, choice in enumerate(self.choices) for news in choice.take(index)]

    def completions(self) -> tuple[Completion, ...]:
        """The completions, once all are there."""
        return tuple(choice.completion for choice in self.choices if choice.completion is not None)


class _Handle:
    """The caller's grip: what is dropped before its end is cancelled."""

    def __init__(
        self,
        record: RequestRecord | EmbeddingRecord,
        cancel: Callable[[int], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._handled = record
        self._cancel = cancel
        self._loop = loop

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._handled.request.request_id

    @property
    def done(self) -> bool:
        """True once all of it has ended."""
        return self._handled.done.is_set()

    def cancel(self) -> None:
        """Give the request up. It ends, soon, as `cancelled`, unless it ends by itself before. No-op then."""
        if not self.done:
            self._cancel(self._handled.key)

    def __del__(self) -> None:
        if not self.done:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the engine with it
                self._loop.call_soon_threadsafe(self._cancel, self._handled.key)

    async def _end(self) -> None:
        """Wait for it; who no longer waits has given it up. Raises what the engine refused it with."""
        try:
            await self._handled.done.wait()
        finally:
            self.cancel()
        if self._handled.refusal is not None:
            raise self._handled.refusal


class EmbeddingHandle(_Handle):
    """A submitted request for embeddings. Keep it: a handle that is dropped cancels its request."""

    def __init__(
        self, record: EmbeddingRecord, cancel: Callable[[int], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(record, cancel, loop)
        self._record = record

    async def result(self) -> Embedding:
        """Wait for the end, whatever it is. Raises the UsageError or ResourceError of what is refused."""
        await self._end()
        assert self._record.embedding is not None
        return self._record.embedding


class RequestHandle(_Handle):
    """A submitted request. Keep it: a handle that is dropped cancels its request.

        async for news in handle:                    # StreamDelta ..., then the Completion of each choice
        completions = await handle.result()          # or only these, in order of index

    One reader at a time. Breaking off the loop, closing its generator, or cancelling the task that waits in
    it or in `result`, cancels the request. A request that the engine refuses (too long for the context, say)
    raises that UsageError or ResourceError here; any other end is a `Completion` with its finish reason.
    """

    def __init__(
        self, record: RequestRecord, cancel: Callable[[int], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(record, cancel, loop)
        self._record = record

    @property
    def charge(self) -> Charge:
        """What it took of the engine's time and energy: once it is `done` all of it, as far as the engine
        could say. What a process computed that died then is not in it.
        """
        return self._record.charge

    async def result(self) -> tuple[Completion, ...]:
        """Wait for the end; the completions in order of index, however they ended."""
        await self._end()
        return self._record.completions()

    async def __aiter__(self) -> AsyncGenerator[StreamDelta | Completion, None]:
        record = self._record
        try:
            while True:
                record.changed.clear()
                is_done = self.done
                for news in record.take():
                    if record.refusal is None:
                        yield news
                if is_done:
                    break
                await record.changed.wait()
        finally:
            self.cancel()
        if record.refusal is not None:
            raise record.refusal
