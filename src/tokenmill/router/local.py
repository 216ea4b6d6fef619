"""An engine of this machine as a backend: texts to tokens in a thread, tokens to pieces, exact usage.

The engine runs in a process of its own (`engine.AsyncEngine`). Templates and tokenizers run in threads, for
they may take long on long texts, and the event loop serves everybody; what is too long for the model by its
bytes alone is refused before. Not here: limits of users, prices, what other deployments do.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, Self

from tokenmill.core import (
    Completion,
    ExpiredError,
    FinishReason,
    Request,
    SamplingParams,
    TokenmillError,
    Usage,
    UsageError,
)
from tokenmill.costs.metering import Charge
from tokenmill.engine.embedding import EmbeddingRequest
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.handle import RequestHandle, StreamDelta
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.engine.serving.supervisor import SupervisorConfig
from tokenmill.models.chat.template import ChatTemplate, encode_chat
from tokenmill.models.chat.tool_calls import ToolFormat
from tokenmill.models.chat.tool_reader import ToolReader
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.router.backend import BackendState, Embedded, Job, Prepared, Spent, cost_of_time
from tokenmill.wire import Begin, Call, FieldError, Finish, Piece, Prompt, TextPiece, TokenText, Totals
from tokenmill.wire.fields import named_fields

__all__ = ["LocalAttempt", "LocalBackend", "LocalConfig"]

_MAX_TOKEN_BYTES: Final = 64
"""No prompt of so many bytes a token of the context is tokenized: hardly any token is longer."""
_LONG_CHARS: Final = 64 << 10
"""A call with more text than this waits for others like it, so that two of them do not hold up the rest."""
_ORDER: Final[tuple[FinishReason, ...]] = (
    "completed",
    "stopped",
    "length",
    "cancelled",
    "expired",
    "failed",
)


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """`name` of the deployment, the model's name in answers, what an hour of this machine costs in USD."""

    name: str
    model: str
    usd_per_hour: float = 0.0
    max_requests: int = 1024


class LocalBackend:
    """A model on this machine. Make it with `open`; it belongs to one event loop."""

    def __init__(self, config: LocalConfig, directory: ModelDirectory) -> None:
        self._config = config
        self._architecture = directory.architecture
        self._tokenizer = directory.tokenizer()
        self._template: ChatTemplate | None = directory.chat_template()
        self._tools = ToolFormat.of(self._template) if self._template else None
        self.fingerprint = f"fp_{directory.digest[:12]}"
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prompts")
        self._long_threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="long-prompts")
        self._attempts: dict[str, LocalAttempt] = {}
        self._engine: AsyncEngine | None = None

    @classmethod
    async def open(
        cls,
        config: LocalConfig,
        directory: ModelDirectory,
        spec: EngineSpec,
        supervisor: SupervisorConfig | None = None,
    ) -> Self:
        """Start the engine and wait until its model is open. `directory` is the model that `spec` names.

        Errors as of `ModelDirectory.open` and `AsyncEngine.start`.
        """
        backend = cls(config, directory)
        backend._engine = await AsyncEngine.start(
            spec, supervisor, max_requests=config.max_requests, on_end=backend._settle
        )
        return backend

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self._config.name

    @property
    def model(self) -> str:
        """The model's name in answers."""
        return self._config.model

    @property
    def is_local(self) -> bool:
        """True."""
        return True

    @property
    def engine(self) -> AsyncEngine:
        """The engine, for its counts."""
        assert self._engine is not None
        return self._engine

    @property
    def state(self) -> BackendState:
        """The engine's state."""
        return self.engine.state

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self._architecture.max_positions

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens with which the model ends an answer."""
        return frozenset(self._architecture.eos_token_ids)

    def token_text(self, token_id: int) -> str:
        """A token as text; bytes that are no character are lone surrogates (`surrogateescape`)."""
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "surrogateescape")

    async def prepare(self, call: Call) -> Prepared:
        """Tokens of the call's prompts. Raises UsageError for a call that this model cannot answer."""
        self._check_size(call)
        loop = asyncio.get_running_loop()
        threads = self._long_threads if _num_chars(call) > _LONG_CHARS else self._threads
        prompts = await loop.run_in_executor(threads, self._prompts, call)
        if not all(prompts):
            field = "messages" if call.is_chat else "prompt"
            raise FieldError(field, "has no tokens", hint="give some text")
        longest = max(map(len, prompts))
        if longest >= self.context_length:
            raise FieldError(
                "messages" if call.is_chat else "prompt",
                f"{longest} tokens need room for an answer; the model's context is {self.context_length}",
                hint="shorten it",
                code="context_length_exceeded",
            )
        call = self._with_grammar(call)
        params = call.params
        room = sum(min(params.max_tokens, self.context_length - len(prompt)) for prompt in prompts)
        return Prepared(
            call=call,
            num_prompt_tokens=sum(map(len, prompts)),
            max_output_tokens=room * params.n,
            prompts=prompts,
        )

    def start(self, prepared: Prepared, job: Job) -> "LocalAttempt":
        """Submit a request for each prompt. Raises ResourceError if the engine is full or drains."""
        attempt = LocalAttempt(self, prepared, job)
        handles: list[RequestHandle] = []
        for request in attempt.requests:
            self._attempts[request.request_id] = attempt
            try:
                handles.append(self.engine.submit(request))
            except TokenmillError:
                for each in attempt.requests:
                    self._attempts.pop(each.request_id, None)
                for handle in handles:
                    handle.cancel()
                raise
        attempt.handles = tuple(handles)
        return attempt

    def tool_reader(self, call: Call, index: int) -> ToolReader | None:
        """What reads the calls in a completion; None if there are no tools, or none may be called."""
        if not call.tools or call.tool_choice.mode == "none" or self._tools is None:
            return None
        return self._tools.reader(call.tools, index=index, parallel=call.tool_choice.parallel)

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """Vectors of texts: the mean of the last layer's rows, of length 1.

        Raises FieldError for a text that the model cannot read.
        """
        loop = asyncio.get_running_loop()
        threads = self._long_threads if sum(map(len, texts)) > _LONG_CHARS else self._threads
        prompts = await loop.run_in_executor(threads, self._texts, texts)
        handle = self.engine.embed(
            EmbeddingRequest(
                request_id=job.request_id,
                prompts=prompts,
                tier=job.tier,
                tenant=job.tenant,
                timeout_s=job.timeout_s,
            )
        )
        found = await handle.result()
        if found.finish_reason != "completed":
            raise _no_answer(found.finish_reason, found.error)
        nanoseconds, nanojoules = found.charge.total()[:2]
        rows = await loop.run_in_executor(self._threads, found.vectors_ND.tolist)
        return Embedded(
            vectors=tuple(map(tuple, rows)),
            usage=found.usage,
            nanoseconds=nanoseconds,
            nanojoules=nanojoules,
            cost_nano_usd=self.cost_of(nanoseconds),
        )

    async def drain(self, deadline_s: float) -> None:
        """Take no more; wait for those that there are."""
        await self.engine.drain(deadline_s)

    async def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            await self._engine.close()
        for threads in (self._threads, self._long_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _settle(self, request: Request, completions: tuple[Completion, ...]) -> None:
        attempt = self._attempts.pop(request.request_id, None)
        if attempt is not None:
            attempt.ended(request, completions)

    def cost_of(self, nanoseconds: int) -> int:
        """Nanodollars of so much time of this machine, rounded up."""
        return cost_of_time(nanoseconds, self._config.usd_per_hour)

    def _check_size(self, call: Call) -> None:
        num_bytes = _num_chars(call)
        if num_bytes > _MAX_TOKEN_BYTES * self.context_length:
            raise FieldError(
                "messages" if call.is_chat else "prompt",
                f"{num_bytes} characters are too many for a context of {self.context_length} tokens",
                hint="shorten it",
            )

    def _prompts(self, call: Call) -> tuple[tuple[int, ...], ...]:
        """In a thread: the tokens of each prompt."""
        if not call.is_chat:
            return tuple(self._prompt(each) for each in call.prompts)
        if self._template is None:
            raise UsageError(
                f"the model {self.model} has no chat template", hint="it is a base model: use /v1/completions"
            )
        assert self._tools is not None
        given = () if call.tool_choice.mode == "none" else call.tools
        messages, tools = self._tools.conversation(call.messages, given, call.tool_choice)
        with named_fields({"variable": "chat_template_kwargs", "tools": "tools"}, "messages"):
            ids = encode_chat(
                self._tokenizer, self._template, messages, tools=tools, variables=call.variables
            )
        return (tuple(ids),)

    def _prompt(self, prompt: Prompt, field: str = "prompt") -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode_prompt(prompt)) if isinstance(prompt, str) else prompt
        vocab_size = self._architecture.vocab_size
        if not ids:
            raise FieldError(field, "has no tokens", hint="give some text")
        if max(ids) >= vocab_size:
            raise FieldError(field, f"token {max(ids)} is outside the vocabulary of {vocab_size}")
        return ids

    def _texts(self, texts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
        """In a thread: the tokens of each text to be embedded."""
        prompts = []
        for at, text in enumerate(texts):
            field = f"input[{at}]" if len(texts) > 1 else "input"
            too_long = len(text) > _MAX_TOKEN_BYTES * self.context_length
            ids = () if too_long else self._prompt(text, field)
            if too_long or len(ids) > self.context_length:
                message = f"is longer than the model's context of {self.context_length} tokens"
                raise FieldError(field, message, hint="shorten it", code="context_length_exceeded")
            prompts.append(ids)
        return tuple(prompts)

    def _with_grammar(self, call: Call) -> Call:
        """The call with the grammar that its tools ask for."""
        if not call.tools or self._tools is None:
            return call
        with named_fields({}, "tools"):
            grammar = self._tools.grammar(call.tools, call.tool_choice, call.params.grammar)
        return replace(call, params=replace(call.params, grammar=grammar))


class LocalAttempt:
    """A call that the engine answers: one request a prompt, their completions numbered through."""

    def __init__(self, backend: LocalBackend, prepared: Prepared, job: Job) -> None:
        call = prepared.call
        self._backend = backend
        self._call = call
        self._created = int(time.time())
        self._id = job.request_id
        self.requests = tuple(
            Request(
                request_id=f"{job.request_id}/{at}" if at else job.request_id,
                prompt=prompt,
                params=call.params if at == 0 else _reseeded(call, at),
                tier=job.tier,
                tenant=job.tenant,
                timeout_s=job.timeout_s,
            )
            for at, prompt in enumerate(prepared.prompts)
        )
        self.handles: tuple[RequestHandle, ...] = ()
        self._ends: dict[str, tuple[Completion, ...]] = {}
        self._spent: asyncio.Future[Spent] = asyncio.get_running_loop().create_future()

    def ended(self, request: Request, completions: tuple[Completion, ...]) -> None:
        """Take the end of one of the requests; called once for each, also if nobody reads."""
        self._ends[request.request_id] = completions
        if len(self._ends) == len(self.requests) and not self._spent.done():
            self._spent.set_result(self._sum())

    def cancel(self) -> None:
        """Give all its requests up."""
        for handle in self.handles:
            handle.cancel()

    async def spent(self) -> Spent:
        """What it used, once all its requests have ended."""
        return await asyncio.shield(self._spent)

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        yield Begin(self._id, self._backend.model, self._created, self._backend.fingerprint)
        news = self._one(0) if len(self.handles) == 1 else self._all()
        async with contextlib.aclosing(news):
            async for piece in news:
                yield piece
        yield Totals((await self.spent()).usage)

    async def _one(self, at: int) -> AsyncGenerator[Piece, None]:
        """The pieces of one of the requests."""
        first = at * self._call.params.n
        readers: dict[int, ToolReader | None] = {}
        reader = self.handles[at].__aiter__()
        async with contextlib.aclosing(reader):
            with _named_errors(self._call):
                async for news in reader:
                    index = first + news.index
                    if index not in readers:
                        readers[index] = self._backend.tool_reader(self._call, index)
                    for piece in self._pieces(news, index, readers[index]):
                        yield piece

    def _pieces(
        self, news: StreamDelta | Completion, index: int, tools: ToolReader | None
    ) -> Iterator[Piece]:
        """What one piece of news says; `tools` reads the text if there may be calls in it."""
        if isinstance(news, StreamDelta):
            logprobs = tuple(self._token_texts(news))
            if tools is None:
                if news.text or logprobs:
                    yield TextPiece(news.text, index, logprobs=logprobs)
                return
            if logprobs:
                yield TextPiece("", index, logprobs=logprobs)
            yield from tools.feed(news.text)
            return
        end = _finish(news, index)
        if tools is not None:
            yield from tools.end()
        yield end

    async def _all(self) -> AsyncGenerator[Piece, None]:
        """The pieces of all the requests as they come, in one stream."""
        queue: asyncio.Queue[Piece | TokenmillError | None] = asyncio.Queue()

        async def pump(at: int) -> None:
            try:
                async for piece in self._one(at):
                    queue.put_nowait(piece)
                queue.put_nowait(None)
            except TokenmillError as error:
                queue.put_nowait(error)

        pumps = [asyncio.create_task(pump(at)) for at in range(len(self.handles))]
        try:
            num_open = len(pumps)
            while num_open:
                piece = await queue.get()
                if isinstance(piece, TokenmillError):
                    raise piece
                if piece is None:
                    num_open -= 1
                else:
                    yield piece
        finally:
            for each in pumps:
                each.cancel()

    def _token_texts(self, delta: StreamDelta) -> list[TokenText]:
        """The tokens that are part of the text: not the one that ends it."""
        texts, ends = self._backend.token_text, self._backend.end_tokens
        return [
            TokenText(
                texts(each.token_id),
                each.logprob,
                tuple((texts(token), logprob) for token, logprob in each.top),
            )
            for each in delta.logprobs
            if each.token_id not in ends
        ]

    def _sum(self) -> Spent:
        ends = [end for request in self.requests for end in self._ends[request.request_id]]
        firsts = [self._ends[request.request_id][0].usage for request in self.requests]
        charge = sum((handle.charge for handle in self.handles), Charge()).total()
        return Spent(
            usage=Usage(
                num_prompt_tokens=sum(usage.num_prompt_tokens for usage in firsts),
                num_cached_tokens=sum(usage.num_cached_tokens for usage in firsts),
                num_output_tokens=sum(end.usage.num_output_tokens for end in ends),
                num_draft_tokens=sum(end.usage.num_draft_tokens for end in ends),
                num_accepted_tokens=sum(end.usage.num_accepted_tokens for end in ends),
            ),
            finish=_worst(end.finish_reason for end in ends),
            nanoseconds=charge[0],
            nanojoules=charge[1],
            cost_nano_usd=self._backend.cost_of(charge[0]),
        )


def _num_chars(call: Call) -> int:
    """The characters of its texts, and the tokens of prompts that are tokens."""
    return sum(len(each.content or "") for each in call.messages) + sum(map(len, call.prompts))


def _reseeded(call: Call, at: int) -> SamplingParams:
    """The parameters of the prompt number `at`: its completions draw with seeds of their own."""
    params = call.params
    return params if params.seed is None else replace(params, seed=(params.seed + at) % (1 << 62))


def _finish(end: Completion, index: int) -> Finish:
    """The end of an answer. Raises for an end that is none."""
    if end.finish_reason in ("expired", "failed", "cancelled"):
        raise _no_answer(end.finish_reason, end.error)
    return Finish(end.finish_reason, index, end.stop)


def _no_answer(reason: FinishReason, error: str) -> TokenmillError:
    """Why there is none."""
    if reason == "expired":
        return ExpiredError("the request's time was up", hint="ask for fewer tokens, or again later")
    what = "failed" if reason == "failed" else "was cancelled"
    return TokenmillError(f"the request {what}" + (f": {error}" if error else ""), hint="try again")


@contextlib.contextmanager
def _named_errors(call: Call) -> Iterator[None]:
    """Names the field of what the engine refuses for the model's sake."""
    try:
        yield
    except UsageError as error:
        if isinstance(error, FieldError):
            raise
        if error.message.startswith("the grammar"):
            is_tools = call.tools and call.tool_choice.mode in ("required", "named")
            field = "tools" if is_tools else "response_format"
        elif "outside the vocabulary" in error.message:
            field = "logit_bias" if call.params.logit_bias else "stop_token_ids"
        else:
            field = ""
        raise FieldError(field, error.message, hint=error.hint) from None


def _worst(reasons: Iterable[FinishReason]) -> FinishReason:
    """One reason for several completions: the one that is least of an answer."""
    return max(reasons, key=_ORDER.index)
