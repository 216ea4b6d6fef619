"""A request as the front end sees it: what has come of it so far, and the caller's grip on it.

The record belongs to the engine's front end, the handle to the caller. Only the handle knows the caller:
when it is dropped, when the reading of it is broken off, the request is cancelled. Nobody needs to read:
what comes is kept once, in the record, and a late reader gets it in one piece.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from tokenmill.core import Completion, FinishReason, Request, TokenLogprobs, TokenmillError, Usage

__all__ = ["RequestHandle", "RequestRecord", "StreamDelta"]


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


@dataclass(eq=False)
class RequestRecord:
    """A request between its submission and its end. Times are seconds of the event loop's clock.

    `sent` says that the present engine process has it; `num_tries` how many have had it.
    """

    key: int
    request: Request
    submitted_s: float
    choices: list[_Choice] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    sent: bool = False
    num_tries: int = 0
    cancelled: bool = False
    refusal: TokenmillError | None = None
    timer: asyncio.TimerHandle | None = None

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


class RequestHandle:
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
        self._record = record
        self._cancel = cancel
        self._loop = loop

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._record.request.request_id

    @property
    def done(self) -> bool:
        """True once every completion has ended."""
        return self._record.done.is_set()

    def cancel(self) -> None:
        """Give the request up. It ends, soon, as `cancelled`, unless it ends by itself before. No-op then."""
        if not self.done:
            self._cancel(self._record.key)

    async def result(self) -> tuple[Completion, ...]:
        """Wait for the end; the completions in order of index, however they ended."""
        try:
            await self._record.done.wait()
        finally:
            self.cancel()
        if self._record.refusal is not None:
            raise self._record.refusal
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

    def __del__(self) -> None:
        if not self.done:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the engine with it
                self._loop.call_soon_threadsafe(self._cancel, self._record.key)
