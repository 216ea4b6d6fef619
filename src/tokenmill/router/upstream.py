"""An endpoint elsewhere as a deployment: OpenAI or Anthropic shape in, the same pieces as of an engine out.

What the client said about itself (`user`, `metadata`, its tier) stays here. A key is in no message. Nothing
is tried again here; that is the router's affair.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from tokenmill.core import (
    EndpointError,
    ExpiredError,
    FinishReason,
    NotFoundError,
    ResourceError,
    TokenmillError,
    UsageError,
)
from tokenmill.remote import Passing, Progress, RemoteClient, Timeouts, parse_endpoint
from tokenmill.router.answer import UpstreamAnswer, estimated_tokens
from tokenmill.router.backend import BackendState, Embedded, Job, Prepared, Spent
from tokenmill.router.config import UpstreamConfig
from tokenmill.router.pipe import Pipe
from tokenmill.wire import Begin, Call, Finish, Piece, Prompt, write_anthropic_call, write_openai_call

__all__ = ["BusyError", "UpstreamAttempt", "UpstreamBackend", "prompt_bytes"]

_LINGER_S: Final = 5.0
_SECOND_LOOK_S: Final = 0.02
_DAY_S: Final = 86400.0
_BUSY: Final = (429, 503, 529)
_THEIRS: Final = (0, 200, 400, 413, 422)
"""Statuses with which a UsageError is about the request; 0 is before it was sent, 200 within a stream."""

_EXTRA_TOKENS: Final = 64
_TOOL_TOKENS: Final = 1024
_HINT: Final = "try again, or ask whoever runs this server"


class BusyError(ResourceError):
    """A deployment takes no more for now: come back after `wait_s` seconds, if it says so."""

    def __init__(self, message: str, *, hint: str = "try again later", wait_s: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.wait_s = wait_s


class UpstreamBackend:
    """One model of one endpoint. Make it in the event loop that uses it.

    Raises UsageError for a URL that cannot be read, or a key's variable that is not set.
    """

    def __init__(self, config: UpstreamConfig) -> None:
        # An attempt has its own, finer limits; those of the connection only stand behind them.
        timeouts = Timeouts(
            connect_s=config.connect_s,
            first_byte_s=min(_DAY_S, config.first_token_s + _LINGER_S),
            total_s=min(_DAY_S, config.total_s + 2 * _LINGER_S),
        )
        endpoint = parse_endpoint(
            config.url, config.model, api=config.api, key_env=config.key_env, timeouts=timeouts
        )
        self.config = config
        self.endpoint = replace(endpoint, with_sampling=config.with_sampling)
        self.client = RemoteClient(self.endpoint)
        self._attempts: set[UpstreamAttempt] = set()
        self._is_drained = False

    @property
    def name(self) -> str:
        """As of `Backend`."""
        return self.config.name

    @property
    def model(self) -> str:
        """As of `Backend`."""
        return self.config.model

    @property
    def is_local(self) -> bool:
        """As of `Backend`."""
        return False

    @property
    def state(self) -> BackendState:
        """As of `Backend`. Whether the endpoint is up is what the router's breaker finds out."""
        return "drained" if self._is_drained else "ready"

    async def prepare(self, call: Call) -> Prepared:
        """Check a call and bound its tokens. Raises UsageError for what this API cannot be asked.

        No token has less than a byte, so that the bytes of the whole request are more than its tokens.
        """
        num_bytes = len(self._body(self.outgoing(call)))
        num_prompts = max(1, len(call.prompts))
        return Prepared(
            call=call,
            num_prompt_tokens=num_bytes + _EXTRA_TOKENS + (_TOOL_TOKENS if call.tools else 0),
            max_output_tokens=call.params.max_tokens * call.params.n * num_prompts,
        )

    def start(self, prepared: Prepared, job: Job) -> "UpstreamAttempt":
        """As of `Backend`."""
        if self._is_drained:
            raise ResourceError(f"{self.name} takes no more calls", hint="try again later")
        if len(self._attempts) >= self.config.max_open:
            raise ResourceError(f"{self.name} has {self.config.max_open} calls open", hint="try again later")
        attempt = UpstreamAttempt(self, prepared, job)
        self._attempts.add(attempt)
        attempt.task.add_done_callback(lambda _: self._attempts.discard(attempt))
        return attempt

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """As of `Backend`. Raises EndpointError, BusyError or ResourceError as an attempt does."""
        if self.endpoint.api == "anthropic":
            hint = "use a model that gives embeddings"
            raise UsageError(f"{self.name}: the Anthropic API has no embeddings", hint=hint)
        began_s, progress = time.monotonic(), Progress()
        limit_s = min(self.config.total_s, job.timeout_s or math.inf)
        try:
            async with asyncio.timeout(limit_s):
                vectors, usage = await self.client.embed(texts, progress)
        except TimeoutError:
            raise EndpointError(f"{self.name}: no answer in {limit_s:g} s", hint=_HINT) from None
        except TokenmillError as error:
            raise self.told(error, progress) from error
        nanoseconds = round((time.monotonic() - began_s) * 1e9)
        cost = self.config.price.cost_nano_usd(usage)
        return Embedded(vectors=vectors, usage=usage, nanoseconds=nanoseconds, cost_nano_usd=cost)

    async def drain(self, deadline_s: float) -> None:
        """As of `Backend`."""
        self._is_drained = True
        if self._attempts:
            await asyncio.wait([attempt.task for attempt in self._attempts], timeout=deadline_s)

    async def close(self) -> None:
        """As of `Backend`."""
        self._is_drained = True
        attempts = list(self._attempts)
        for attempt in attempts:
            attempt.cancel()
        if attempts:
            await asyncio.wait([attempt.task for attempt in attempts])
        await self.client.close()

    def outgoing(self, call: Call) -> Call:
        """The call as it leaves: a stream with usage, under the model's name there, without who asks."""
        return replace(
            call,
            model=self.config.model,
            stream=True,
            include_usage=True,
            tier="standard",
            user="",
            metadata={},
        )

    def told(self, error: TokenmillError, progress: Progress) -> TokenmillError:
        """The error as a client of ours may read it: no address, no key, and whose fault it is.

        A request that the upstream cannot take stays a UsageError, BusyError is for what asks to wait; all
        else is an EndpointError, also a key or a model's name that the upstream does not know.
        """
        is_sent = progress.is_sent or isinstance(error, UsageError)
        said = error.message.removeprefix(f"{self.endpoint.url}: ") if is_sent else "no connection"
        message = f"{self.name}: {said}"
        wait_s = error.wait_s if isinstance(error, Passing) else 0.0
        is_busy = isinstance(error, ResourceError) and progress.status == 200
        if progress.status in _BUSY or wait_s > 0.0 or is_busy:
            return BusyError(message, wait_s=wait_s)
        if isinstance(error, UsageError) and progress.status in _THEIRS:
            return UsageError(message, hint="change the request; this model does not take it as it is")
        if isinstance(error, UsageError | NotFoundError):
            message = f"{self.name} refuses this server (HTTP {progress.status})"
        return EndpointError(message, hint=_HINT)

    def _body(self, call: Call) -> bytes:
        if self.endpoint.api == "anthropic":
            return write_anthropic_call(call, with_sampling=self.endpoint.with_sampling)
        return write_openai_call(
            call,
            max_tokens_field=self.endpoint.max_tokens_field,
            with_sampling=self.endpoint.with_sampling,
        )


@dataclass
class _Times:
    """When something last happened in an attempt, in seconds of the loop's clock."""

    began_s: float
    last_s: float
    ended_s: float = 0.0


class _Limit(NamedTuple):
    """A time by which something must have come, and how the attempt ends if it has not."""

    due_s: float
    finish: FinishReason
    error: TokenmillError


class UpstreamAttempt:
    """One call to an upstream, in a task of its own: it ends and is counted whoever stops reading."""

    def __init__(self, backend: UpstreamBackend, prepared: Prepared, job: Job) -> None:
        self._backend = backend
        self._prepared = prepared
        self._job = job
        self._loop = asyncio.get_running_loop()
        now_s = self._loop.time()
        self._times = _Times(now_s, now_s)
        self._progress = Progress()
        call = prepared.call
        self._answer = UpstreamAnswer(
            call.params.n * max(1, len(call.prompts)), Begin(job.request_id, backend.model, int(time.time()))
        )
        self._pipe = Pipe()
        self._late: _Limit | None = None
        self._is_second_look = False
        self._finish: FinishReason = "cancelled"
        self._error: TokenmillError | None = None
        self._timer = self._loop.call_at(now_s, self._watch)
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._ended)

    def __aiter__(self) -> AsyncIterator[Piece]:
        """As of `Attempt`."""
        return self._pieces()

    def cancel(self) -> None:
        """As of `Attempt`."""
        self._pipe.leave()
        if not self._answer.is_complete:
            self.task.cancel()

    async def spent(self) -> Spent:
        """As of `Attempt`."""
        await asyncio.wait([self.task])
        num_prompt = estimated_tokens(prompt_bytes(self._prepared.call))
        is_free = not self._progress.is_sent or self._progress.status not in (0, 200)
        usage, is_exact = self._answer.usage(0 if is_free else num_prompt)
        return Spent(
            usage=usage,
            finish=self._finish,
            nanoseconds=round((self._times.ended_s - self._times.began_s) * 1e9),
            cost_nano_usd=self._backend.config.price.cost_nano_usd(usage),
            is_exact=is_exact or is_free,
        )

    async def _pieces(self) -> AsyncIterator[Piece]:
        try:
            while (piece := await self._pipe.get()) is not None:
                yield piece
        finally:
            self.cancel()

    async def _run(self) -> None:
        try:
            await self._stream()
        except asyncio.CancelledError:
            if self._late is not None:
                self._finish, self._error = self._late.finish, self._late.error
        except TokenmillError as raised:
            self._finish = "failed"
            self._error = self._backend.told(raised, self._progress)
            self._error.__cause__ = raised
        except Exception:
            self._finish = "failed"
            self._error = EndpointError(f"{self._backend.name}: the call broke", hint=_HINT)
            raise

    def _ended(self, _: asyncio.Task[None]) -> None:
        """Called however the task ended, also if it was cancelled before it began."""
        self._timer.cancel()
        self._times.ended_s = self._loop.time()
        self._pipe.end(self._error)

    async def _stream(self) -> None:
        try:
            await self._read()
        except (TokenmillError, asyncio.CancelledError):
            # All was said: what went wrong after it takes nothing from the answer.
            if not self._answer.is_complete:
                raise
        for piece in self._answer.end():
            if isinstance(piece, Finish):
                self._finish = piece.finish_reason
            await self._pipe.put(piece)

    async def _read(self) -> None:
        outgoing = self._backend.outgoing(self._prepared.call)
        async with aclosing(self._backend.client.stream(outgoing, self._progress)) as stream:
            async for _, piece in stream:
                for passed in self._answer.take(piece):
                    await self._pipe.put(passed)
                self._times.last_s = self._loop.time()

    def _watch(self) -> None:
        """End an attempt that is late; look again when it could be next."""
        limit = min(self._limits(), key=lambda each: each.due_s)
        if self._loop.time() < limit.due_s:
            self._is_second_look = False
            self._timer = self._loop.call_at(limit.due_s, self._watch)
        elif not self._is_second_look:
            # A loop that was held up has not read yet what came in time.
            self._is_second_look = True
            self._timer = self._loop.call_later(_SECOND_LOOK_S, self._watch)
        elif not self.task.done():
            self._late = limit
            self.task.cancel()

    def _limits(self) -> Iterator["_Limit"]:
        """When this attempt is late if nothing comes until then."""
        config, times, answer = self._backend.config, self._times, self._answer
        last_s = self._loop.time() if self._pipe.is_full else times.last_s
        if answer.is_complete:
            yield self._limit(last_s + min(_LINGER_S, config.between_s), "its usage did not come")
        elif answer.has_token:
            yield self._limit(last_s + config.between_s, f"nothing came for {config.between_s:g} s")
        else:
            yield self._limit(times.began_s + config.first_token_s, f"no token in {config.first_token_s:g} s")
        yield self._limit(times.began_s + config.total_s, f"no end in {config.total_s:g} s")
        if self._job.timeout_s is not None:
            words = f"the time of this request is over ({self._job.timeout_s:g} s)"
            error = ExpiredError(words, hint="allow it more time, or ask for less")
            yield _Limit(times.began_s + self._job.timeout_s, "expired", error)

    def _limit(self, due_s: float, words: str) -> "_Limit":
        return _Limit(due_s, "failed", EndpointError(f"{self._backend.name}: {words}", hint=_HINT))


def prompt_bytes(call: Call) -> int:
    """The bytes of a call's text; a token that is given as a number counts as four."""
    texts = [message.content or "" for message in call.messages]
    texts += [made.name + made.arguments for message in call.messages for made in message.tool_calls]
    texts += [prompt for prompt in call.prompts if isinstance(prompt, str)]
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    num_bytes += sum(4 * len(prompt) for prompt in call.prompts if not isinstance(prompt, str))
    return num_bytes + sum(len(str(tool)) for tool in call.tools)
