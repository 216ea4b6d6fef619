"""Calls to an endpoint, from asyncio: streams whose events carry the time at which their bytes arrived.

One client has one endpoint and one event loop. Nothing is tried again here, and nothing bounds how many
calls are open: a load generator needs both as they are. `RemoteModel` adds the two.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Final, NamedTuple, Protocol

from tokenmill.core import EndpointError, TokenmillError, Usage
from tokenmill.remote.connection import Arrived, Passing
from tokenmill.remote.endpoint import Endpoint
from tokenmill.remote.http import HttpClient, HttpResponse, Progress
from tokenmill.wire import (
    AnthropicReader,
    Call,
    OpenAIReader,
    Piece,
    Prompt,
    Reply,
    SseEvent,
    SseParser,
    error_of,
    quoted,
    read_anthropic_reply,
    read_models,
    read_openai_embeddings,
    read_openai_reply,
    retry_after,
    write_anthropic_call,
    write_openai_call,
    write_openai_embeddings,
)

__all__ = ["RemoteClient", "TimedPiece"]

_MAX_ERROR_BYTES: Final = 64 << 10
_MAX_REPLY_BYTES: Final = 64 << 20
_PASSING: Final = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LINGER_S: Final = 1.0
_JSON: Final = "application/json"
_STREAM: Final = "text/event-stream"


class TimedPiece(NamedTuple):
    """What happened in a stream, and when its bytes arrived, in seconds of `time.monotonic`."""

    at_s: float
    piece: Piece


class _Reader(Protocol):
    is_done: bool

    @property
    def is_complete(self) -> bool: ...

    def read(self, event: SseEvent) -> list[Piece]: ...


class RemoteClient:
    """A client of one endpoint. Use it as `async with`, in one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._http = HttpClient(endpoint)

    async def __aenter__(self) -> "RemoteClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close idle connections; what is open ends with its own caller."""
        await self._http.close()

    async def stream(self, call: Call, progress: Progress | None = None) -> AsyncGenerator[TimedPiece, None]:
        """Answer a call whose `stream` is True, event by event as they arrive; `progress` is kept meanwhile.

        Leave it early with `aclosing`, which closes the connection. Raises UsageError, NotFoundError,
        ResourceError or EndpointError, each naming the endpoint; a stream that is cut raises.
        """
        assert call.stream
        with self.named():
            async with self._answer(call, _STREAM, progress) as response:
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != _STREAM:
                    start = self.endpoint.redact(await response.body(_MAX_ERROR_BYTES))
                    raise EndpointError(
                        f"its answer is {kind or 'of no type'}, not a stream; it begins with {quoted(start)}",
                        hint="check the URL and --api",
                    )
                reader: _Reader = AnthropicReader() if self.endpoint.api == "anthropic" else OpenAIReader()
                async for timed in _timed_pieces(response, reader, self.endpoint):
                    yield timed

    async def post(self, call: Call) -> tuple[Reply, float, float]:
        """Answer a call at once: the reply, and when its first and last bytes arrived. Errors as `stream`."""
        assert not call.stream
        with self.named():
            async with self._answer(call, _JSON) as response:
                body = await response.body(_MAX_REPLY_BYTES)
                last_s = time.monotonic()
                read = read_anthropic_reply if self.endpoint.api == "anthropic" else read_openai_reply
                return read(self.endpoint.redact(body)), response.head_s, last_s

    async def models(self) -> list[str]:
        """The names of the models that it serves."""
        with self.named():
            async with self._passed("GET", f"{self.endpoint.path}/models", b"", _JSON) as response:
                return read_models(self.endpoint.redact(await response.body(_MAX_REPLY_BYTES)))

    async def embed(
        self, texts: Sequence[Prompt], progress: Progress | None = None
    ) -> tuple[tuple[tuple[float, ...], ...], Usage]:
        """The vector of each text, and the tokens that were read. Errors as `stream`."""
        with self.named():
            body = write_openai_embeddings(self.endpoint.model, texts)
            path = f"{self.endpoint.path}/embeddings"
            async with self._passed("POST", path, body, _JSON, progress) as response:
                said = self.endpoint.redact(await response.body(_MAX_REPLY_BYTES))
                return read_openai_embeddings(said, len(texts))

    def _answer(
        self, call: Call, accept: str, progress: Progress | None = None
    ) -> AbstractAsyncContextManager[HttpResponse]:
        endpoint = self.endpoint
        if endpoint.api == "anthropic":
            body = write_anthropic_call(call, with_sampling=endpoint.with_sampling)
            return self._passed("POST", f"{endpoint.path}/messages", body, accept, progress)
        tail = "/chat/completions" if call.is_chat else "/completions"
        body = write_openai_call(
            call, max_tokens_field=endpoint.max_tokens_field, with_sampling=endpoint.with_sampling
        )
        return self._passed("POST", endpoint.path + tail, body, accept, progress)

    @asynccontextmanager
    async def _passed(
        self, method: str, path: str, body: bytes, accept: str, progress: Progress | None = None
    ) -> AsyncIterator[HttpResponse]:
        """The answer to a request that the endpoint took. Raises what it says otherwise."""
        async with self._http.request(method, path, body, accept=accept, progress=progress) as response:
            if response.status != 200:
                said = self.endpoint.redact(await response.body(_MAX_ERROR_BYTES))
                error = error_of(response.status, said, key_name=self.endpoint.key_name)
                if response.status in _PASSING:
                    wait_s = retry_after(response.headers.get("retry-after", ""))
                    raise Passing(error.message, hint=error.hint, wait_s=wait_s)
                raise error
            coding = response.headers.get("content-encoding", "identity").strip().lower()
            if coding != "identity":
                raise EndpointError(f"its answer is {coding[:20]}, which was not asked for")
            yield response

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the endpoint in front of what goes wrong inside, and no key into it."""
        prefix, key = f"{self.endpoint.url}: ", self.endpoint.key
        try:
            yield
        except TokenmillError as error:
            message = error.message.replace(key, "[key]") if key else error.message
            error.message = message if message.startswith(prefix) else prefix + message
            error.args = (error.message,)
            raise


async def _timed_pieces(
    response: HttpResponse, reader: _Reader, endpoint: Endpoint
) -> AsyncIterator[TimedPiece]:
    parser, key = SseParser(), endpoint.key.encode()
    while arrived := await _next(response, reader.is_done):
        for at_s, data in arrived:
            for event in parser.feed(data):
                if key and key in event.data:
                    event = SseEvent(endpoint.redact(event.data), event.name)
                for piece in reader.read(event):
                    yield TimedPiece(at_s, piece)
    if not reader.is_complete:
        raise Passing(
            "the stream ended before its answer did", hint="look at the endpoint's log, or try again"
        )


async def _next(response: HttpResponse, is_done: bool) -> list[Arrived]:
    """What comes next; once everything was said, only for a moment, so that the connection can be kept."""
    if not is_done:
        return await response.next()
    try:
        async with asyncio.timeout(_LINGER_S):
            return await response.next()
    except (TimeoutError, EndpointError):
        return []
