"""`RemoteModel`: an endpoint as a `Generator` and, where it allows that, as a `Scorer`.

Calls block until all of their requests are done, of which a bounded number are open at a time. Token ids do
not go over the wire, so completions and scores have none, and log-probabilities of an answer cannot be had.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar

from tokenmill.core import (
    Completion,
    EndpointError,
    Message,
    NotFoundError,
    SamplingParams,
    Score,
    Usage,
    UsageError,
)
from tokenmill.remote.client import RemoteClient
from tokenmill.remote.endpoint import Endpoint
from tokenmill.remote.retry import Retrier, RetryConfig
from tokenmill.wire import Call, Reply, ReplyBuilder, TextPiece, ToolPiece

__all__ = ["RemoteConfig", "RemoteModel", "served_models"]

_T = TypeVar("_T")
_R = TypeVar("_R")
_MAX_CONCURRENCY: Final = 1024
_NO_SCORES: Final = "use a task that generates, or an endpoint whose /v1/completions has echo and logprobs"


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How many requests are open at a time, and when one is tried again."""

    concurrency: int = 16
    retry: RetryConfig = field(default_factory=RetryConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= _MAX_CONCURRENCY:
            hint = f"use a value from 1 to {_MAX_CONCURRENCY}"
            raise UsageError(f"concurrency is {self.concurrency}", hint=hint)


class RemoteModel:
    """A model behind an endpoint. Holds no connection between two calls."""

    def __init__(self, endpoint: Endpoint, config: RemoteConfig | None = None) -> None:
        self.endpoint = endpoint
        self.config = config or RemoteConfig()

    def generate(
        self, prompts: Sequence[str], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Continue each prompt, in order; `n` completions a prompt, each a request of its own.

        Raises UsageError for what the endpoint cannot be asked, NotFoundError for an unknown path or model,
        ResourceError when time is up, EndpointError when it failed again and again. Then all is given up.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts is one string", hint="give a list of prompts")
        calls = [Call(model=self.endpoint.model, prompts=(prompt,)) for prompt in prompts]
        return self._complete(calls, params)

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Answer each conversation, in order; the rest as of `generate`."""
        calls = [Call(model=self.endpoint.model, messages=tuple(each)) for each in conversations]
        return self._complete(calls, params)

    def complete(self, calls: Sequence[Call]) -> list[Completion]:
        """Answer calls that say all themselves, such as tools; one completion each. Errors of `generate`."""
        numbered = [(f"remote-{at}", 0, call) for at, call in enumerate(calls)]
        return self._run(numbered, self._completion)

    def score(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """Log-probability of each continuation after its context (which may be empty).

        The endpoint makes tokens of context and continuation together; those of the continuation are what
        it has more than the context alone, so each different context costs a request, too. Raises UsageError
        where the endpoint does not give log-probabilities of a prompt; the rest as of `generate`.
        """
        if len(contexts) != len(continuations):
            raise UsageError(
                f"{len(contexts)} contexts and {len(continuations)} continuations", hint="give pairs"
            )
        if not all(continuations):
            raise UsageError("a continuation is empty", hint="give at least one token of text")
        if self.endpoint.api == "anthropic":
            raise UsageError(f"{self.endpoint.url}: the Anthropic API scores no text", hint=_NO_SCORES)
        unique = [context for context in dict.fromkeys(contexts) if context]
        try:
            counts = dict(zip(unique, self._run(unique, self._num_tokens), strict=True))
            pairs = [
                (context + text, counts.get(context, 0))
                for context, text in zip(contexts, continuations, strict=True)
            ]
            return self._run(pairs, self._score)
        except NotFoundError as error:
            raise NotFoundError(error.message, hint=_NO_SCORES) from error

    def _complete(
        self, calls: Sequence[Call], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        each = [params] * len(calls) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(calls):
            raise UsageError(f"{len(each)} parameters for {len(calls)} prompts", hint="give one a prompt")
        numbered = [
            (f"remote-{at}", index, replace(call, params=_single(given, index)))
            for at, (call, given) in enumerate(zip(calls, each, strict=True))
            for index in range(given.n)
        ]
        return self._run(numbered, self._completion)

    async def _completion(self, client: RemoteClient, item: tuple[str, int, Call]) -> Completion:
        request_id, index, given = item
        if given.params.logprobs is not None or given.params.prompt_logprobs is not None:
            raise UsageError("an endpoint gives no log-probabilities by token id", hint="leave out logprobs")
        call = replace(given, stream=True, include_usage=True)
        builder = ReplyBuilder()
        began_s = time.monotonic()
        first_s = last_s = 0.0
        async for at_s, piece in client.stream(call):
            builder.add((piece,))
            last_s = at_s
            if not first_s and isinstance(piece, TextPiece | ToolPiece):
                first_s = at_s
        reply = builder.reply()
        completion = reply.completion(
            request_id, ttft_s=(first_s or last_s) - began_s, total_s=last_s - began_s
        )
        return replace(completion, index=index)

    async def _num_tokens(self, client: RemoteClient, text: str) -> int:
        """How many tokens a prompt has."""
        reply = await _posted(client, text, SamplingParams(max_tokens=1))
        return _usage(reply).num_prompt_tokens

    async def _score(self, client: RemoteClient, pair: tuple[str, int]) -> Score:
        text, num_context = pair
        reply = await _posted(client, text, SamplingParams(max_tokens=1, logprobs=1), echo=True)
        usage = _usage(reply)
        num_prompt, num_output = usage.num_prompt_tokens, usage.num_output_tokens
        found = reply.choices[0].logprobs or ()
        if len(found) != num_prompt + num_output or not num_prompt:
            message = f"it gives no log-probabilities of a prompt ({len(found)} of {num_prompt} tokens)"
            raise UsageError(message, hint=_NO_SCORES)
        values = [token.logprob for token in found[num_context:num_prompt]]
        if not num_context and values[0] is None:
            del values[0]
        logprobs = tuple(value for value in values if value is not None)
        if len(logprobs) < len(values) or (num_context and not logprobs):
            message = f"the continuation has no tokens of its own: {num_context} of {num_prompt} are context"
            raise UsageError(message, hint="begin the continuation where a token begins, such as at a space")
        return Score(token_ids=(), logprobs=logprobs)

    def _run(self, items: Sequence[_T], one: Callable[[RemoteClient, _T], Awaitable[_R]]) -> list[_R]:
        """One request an item, in order, so many at a time; the first error that stays ends all."""
        return _blocking(self._gather(items, one)) if items else []

    async def _gather(
        self, items: Sequence[_T], one: Callable[[RemoteClient, _T], Awaitable[_R]]
    ) -> list[_R]:
        results: dict[int, _R] = {}
        waiting = iter(enumerate(items))
        retrier = Retrier(self.config.retry)
        async with RemoteClient(self.endpoint) as client:

            async def work() -> None:
                for at, item in waiting:
                    with client.named():
                        results[at] = await retrier.run(partial(one, client, item))

            tasks = [asyncio.create_task(work()) for _ in range(min(self.config.concurrency, len(items)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [results[at] for at in range(len(items))]


def served_models(endpoint: Endpoint) -> list[str]:
    """The names of the models that an endpoint serves, as its /v1/models says. Errors as of `generate`."""

    async def ask() -> list[str]:
        async with RemoteClient(endpoint) as client:
            return await client.models()

    return _blocking(ask())


def _single(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one of `n` completions; each has a seed of its own."""
    seed = None if params.seed is None else (params.seed + index) % (1 << 63)
    return replace(params, n=1, seed=seed)


async def _posted(client: RemoteClient, text: str, params: SamplingParams, *, echo: bool = False) -> Reply:
    """A prompt continued."""
    call = Call(model=client.endpoint.model, prompts=(text,), params=params, echo=echo)
    return (await client.post(call))[0]


def _usage(reply: Reply) -> Usage:
    if reply.usage is None:
        raise EndpointError("it does not say how many tokens a prompt has", hint=_NO_SCORES)
    return reply.usage


def _blocking(work: Coroutine[Any, Any, _T]) -> _T:
    """What it returns. In a thread of its own where this one runs an event loop, as notebooks do."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
