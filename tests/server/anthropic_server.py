"""A server for the tests of the Anthropic API: a mock engine, and backends whose answers are written here.

    python -m tests.server.anthropic_server        # prints its URL; ends on SIGTERM

The models: `mock` computes; `echo` says what it was asked, as JSON; `tools` calls functions; the others end
or fail as their names say. The keys: `tm_good`, and those whose names say what they lack.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from pathlib import Path

from tokenmill.core import (
    EndpointError,
    ExpiredError,
    FinishReason,
    ResourceError,
    TokenmillError,
    Usage,
    UsageError,
)
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockModel, MockScript
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.router import (
    BackendState,
    BreakerConfig,
    BudgetConfig,
    Embedded,
    Job,
    Prepared,
    Router,
    Spent,
)
from tokenmill.router.config import Price
from tokenmill.router.local import LocalBackend, LocalConfig
from tokenmill.server import anthropic_api
from tokenmill.server.app import create_app
from tokenmill.server.config import HttpConfig
from tokenmill.server.edge import EdgeConfig
from tokenmill.server.gateway import Gateway, GatewayConfig
from tokenmill.server.pricing import PriceList
from tokenmill.server.run import bind, serve_until_told
from tokenmill.store import Accounts, Budget, Key, Limits, open_store
from tokenmill.wire import (
    AnthropicHead,
    Begin,
    Call,
    Finish,
    Piece,
    Prompt,
    TextPiece,
    ToolPiece,
    Totals,
    anthropic_answer,
    encode_sse,
)
from tokenmill.wire.fields import encode_json

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content or '' }}{% endfor %}<assistant>"
)
USAGE = Usage(num_prompt_tokens=11, num_cached_tokens=4, num_output_tokens=7)
THREE = "one END two STOP three"
SCRIPT = MockScript(
    answers=(
        (b"<user>Count.<assistant>", THREE.encode()),
        (b"<user>Gr\xc3\xbc\xc3\x9fe.<assistant>", "Grüße, 世界 🌍".encode()),
        (b"<user>Nothing.<assistant>", b""),
    ),
    context_length=1024,
)
ERRORS: dict[str, TokenmillError] = {
    "late": ExpiredError("the request's time was up"),
    "gone": EndpointError("the endpoint is out of reach"),
    "broken": TokenmillError("it broke"),
}


def pieces_of(model: str, call: Call) -> list[Piece]:
    """What a model answers."""
    ends: list[Piece] = [Finish("completed"), Totals(USAGE)]
    if model == "echo":
        return [TextPiece(json.dumps(asdict(call))), *ends]
    if model == "thinker":
        return [TextPiece("Hm", is_thought=True), TextPiece(""), TextPiece("Yes"), *ends]
    if model == "silent":
        return ends
    if model == "bad-arguments":
        return [ToolPiece(0, "call_1", "weather", '{"city"'), *ends]
    if model == "window":
        return [TextPiece("Long"), Finish("length"), Totals(USAGE)]
    if model == "tools":
        return [*tool_pieces(call), *ends]
    return [TextPiece("He"), TextPiece("llo")]


def tool_pieces(call: Call) -> list[Piece]:
    """Calls as the choice has them, in pieces as a reader of a model's text gives them."""
    last = call.messages[-1]
    if last.role == "tool" or call.tool_choice.mode == "none" or not call.tools:
        return [TextPiece(f"It is {last.content}.")]
    name = call.tool_choice.name or str(call.tools[0]["function"]["name"])
    pieces: list[Piece] = [] if call.tool_choice.mode != "auto" else [TextPiece("I look. ")]
    pieces += [
        ToolPiece(0, "call_a1", name),
        ToolPiece(0, arguments='{"city":'),
        ToolPiece(0, arguments=' "Rome"}'),
    ]
    if call.tool_choice.parallel:
        pieces += [ToolPiece(1, "call_b2", name, '{"city": "Oslo"}'), ToolPiece(2, "call_c3", name)]
    return pieces


class Written:
    """An attempt whose pieces are written above."""

    def __init__(self, model: str, call: Call, job: Job) -> None:
        self._model = model
        self._call = call
        self._id = job.request_id

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        yield Begin(self._id, self._model, int(time.time()))
        if self._model in ERRORS:
            raise ERRORS[self._model]
        for piece in pieces_of(self._model, self._call):
            await asyncio.sleep(0)
            yield piece
        if self._model == "cut":
            raise TokenmillError("it broke in the middle")

    def cancel(self) -> None:
        """Nothing runs."""

    async def spent(self) -> Spent:
        """A little."""
        finish: FinishReason = "failed" if self._model in (*ERRORS, "cut") else "completed"
        return Spent(usage=USAGE, finish=finish, nanoseconds=1)


class WrittenBackend:
    """A backend of written answers."""

    is_local = True
    state: BackendState = "ready"

    def __init__(self, model: str) -> None:
        self.name = self.model = model

    async def prepare(self, call: Call) -> Prepared:
        """Any call will do."""
        return Prepared(call=call, num_prompt_tokens=11, max_output_tokens=call.params.max_tokens)

    def start(self, prepared: Prepared, job: Job) -> Written:
        """Begin, unless it is the one that is full."""
        if self.model == "full":
            raise ResourceError("the queue is full", hint="try again later")
        return Written(self.model, prepared.call, job)

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """It has none."""
        raise UsageError("this model makes no embeddings", hint="ask another one")

    async def drain(self, deadline_s: float) -> None:
        """Nothing runs."""

    async def close(self) -> None:
        """Nothing runs."""


def key(name: str, **more: object) -> Key:
    """A key with all tiers."""
    fields = {"tiers": ("standard", "fast", "batch"), "created_s": 0.0, **more}
    return Key(id=name, name=name, project="p", **fields)  # type: ignore[arg-type]


KEYS = {
    "tm_good": key("good"),
    "tm_scopeless": key("scopeless", scopes=("metrics",)),
    "tm_poor": key("poor", budget=Budget(nano_usd=1)),
    "tm_limited": key("limited", limits=Limits(requests_per_minute=1)),
    "tm_expired": key("expired", expires_s=1.0),
    "tm_slow": key("slow", tiers=("standard",)),
}
WRITTEN = (
    "echo", "tools", "thinker", "silent", "bad-arguments", "window", "full", "cut", *ERRORS,
)  # fmt: skip


async def main(folder: Path) -> None:
    """Serve until told otherwise."""
    local = await LocalBackend.open(
        LocalConfig(name="mock", model="mock"),
        MockModel(SCRIPT, template=TEMPLATE),
        EngineSpec(mock=SCRIPT, config=LLMConfig(max_batch=8, kv_tokens=8192)),
    )
    store = open_store(str(folder / "server.db"))
    accounts = Accounts(store)
    await accounts.start()
    prices = PriceList(prices={"mock": {"standard": Price(output_usd=1.0)}})
    router = Router(
        [local, *map(WrittenBackend, WRITTEN)],
        breaker=BreakerConfig(failures=1000, share=1.0),
        budget=BudgetConfig(base_s=0.0, cap_s=0.0),
    )
    gateway = Gateway(router, accounts, prices, GatewayConfig())
    edge = EdgeConfig(keyless=False, hosts=(), max_body_bytes=1 << 20)

    async def find(secret: str) -> Key | None:
        return KEYS.get(secret)

    config = HttpConfig(port=0, drain_s=1.0)
    app = create_app(gateway, edge, find)
    await serve_until_told(app, gateway, config, bind(config), on_ready=lambda url: print(url, flush=True))
    await local.close()
    await store.close()


def break_shapes() -> None:
    """The control: ids, pings, tiers and the end at the window as the wire has them without the server."""
    anthropic_api._head = lambda answer: AnthropicHead()
    anthropic_answer._event = lambda name, **fields: (
        b"" if name == "ping" else encode_sse(encode_json({"type": name, **fields}), name)
    )


if __name__ == "__main__":
    if "--broken" in sys.argv:
        break_shapes()
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(main(Path(name)))
