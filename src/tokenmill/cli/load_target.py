"""What `load` and `versus` put a load on: an endpoint at a URL, or a local model in a process of its own."""

import argparse
import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tokenmill.cli.arguments import llm_config, open_model
from tokenmill.cli.remote import open_endpoint
from tokenmill.core import Request
from tokenmill.engine.serving import AsyncEngine, EngineSpec
from tokenmill.engine.serving.handle import StreamDelta
from tokenmill.evals.load import Finish, LoadRequest, Piece, StreamEvent, Target
from tokenmill.evals.load.remote_target import RemoteTarget
from tokenmill.remote import RemoteClient, Timeouts, is_url

if TYPE_CHECKING:
    from tokenmill.models.text.tokenizer import Tokenizer

__all__ = ["EngineTarget", "OpenTarget", "opened_target", "stops_at_signals"]

_MAX_REQUESTS = 1 << 16


class EngineTarget:
    """A `Target` in a process of its own on this machine; requests need token ids."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._num_sent = 0

    async def stream(self, request: LoadRequest) -> AsyncIterator[StreamEvent]:
        """Send a request. Raises UsageError or ResourceError if the engine does not take it."""
        loop = asyncio.get_running_loop()
        self._num_sent += 1
        name = f"{request.id}-{self._num_sent}"
        handle = self._engine.submit(
            Request(request_id=name, prompt=request.token_ids, params=request.params)
        )
        async with contextlib.aclosing(handle.__aiter__()) as stream:
            async for news in stream:
                if isinstance(news, StreamDelta):
                    if news.token_ids:
                        yield Piece(loop.time(), len(news.token_ids))
                    continue
                usage = news.usage
                yield Finish(
                    loop.time(),
                    news.finish_reason,
                    usage.num_prompt_tokens,
                    usage.num_cached_tokens,
                    usage.num_output_tokens,
                )


@dataclass(frozen=True, kw_only=True)
class OpenTarget:
    """A target that is ready, and what is known of it. `is_here` says that it runs on this machine."""

    name: str
    target: Target
    tokenizer: "Tokenizer | None"
    context_length: int | None
    ignore_eos: bool
    is_here: bool

    def fields(self) -> dict[str, Any]:
        """For the document."""
        return {
            "name": self.name,
            "context_length": self.context_length,
            "ignore_eos": self.ignore_eos,
            "lengths": "exact" if self.tokenizer else "one common word a token; counts are the endpoint's",
        }


@contextlib.asynccontextmanager
async def opened_target(
    name: str, args: argparse.Namespace, *, model: str = "", key_env: str = ""
) -> AsyncIterator[OpenTarget]:
    """The system of this name, closed at the end. `model` is what an endpoint calls its model, by
    default its only one.
    """
    if is_url(name):
        asked = argparse.Namespace(**{**vars(args), "endpoint_model": model, "key_env": key_env})
        timeouts = Timeouts(first_byte_s=args.timeout, total_s=args.timeout)
        endpoint = replace(await asyncio.to_thread(open_endpoint, name, asked), timeouts=timeouts)
        async with RemoteClient(endpoint) as client:
            yield OpenTarget(
                name=f"{endpoint.model} at {endpoint.url}",
                target=RemoteTarget(client, is_chat=not args.completions),
                tokenizer=open_model(args.tokenizer).tokenizer() if args.tokenizer else None,
                context_length=args.context,
                ignore_eos=args.ignore_eos,
                is_here=endpoint.host in ("localhost", "127.0.0.1", "::1"),
            )
        return
    directory = open_model(name)
    spec = EngineSpec(model=str(directory.path), config=llm_config(args))
    async with await AsyncEngine.start(spec, max_requests=_MAX_REQUESTS) as engine:
        limit = directory.architecture.max_positions
        yield OpenTarget(
            name=f"{directory.name} ({spec.config.weights})",
            target=EngineTarget(engine),
            tokenizer=directory.tokenizer(),
            context_length=min(limit, args.context or limit),
            ignore_eos=True,
            is_here=True,
        )


@contextlib.contextmanager
def stops_at_signals(stop: asyncio.Event, on_stop: Callable[[], None]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM set the event instead of raising, while the block runs; those that came."""
    loop = asyncio.get_running_loop()
    came: list[int] = []

    def handle(number: int) -> None:
        on_stop()
        came.append(number)
        stop.set()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, handle, number)
    try:
        yield came
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
