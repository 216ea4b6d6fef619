"""A server for the tests of the OpenAI API: mock engines, and backends whose answers are written down.

    python -m tests.server.openai_server        # prints its URL; ends on SIGTERM

The models: `mock` has a template with tools (Hermes), `plain` one without; the others are those of the tests
of Anthropic's API. `ANSWERS` are what the mocks say to the last words of a conversation.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.server.anthropic_server import KEYS as OTHER_KEYS
from tests.server.anthropic_server import WrittenBackend, key
from tokenmill.core import FinishReason, Usage
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockFault, MockModel, MockScript
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.models.chat.tool_calls import ToolFormat
from tokenmill.router import Router
from tokenmill.router.config import Price
from tokenmill.router.local import LocalBackend, LocalConfig
from tokenmill.server.app import create_app
from tokenmill.server.config import HttpConfig
from tokenmill.server.edge import EdgeConfig
from tokenmill.server.gateway import Gateway, GatewayConfig
from tokenmill.server.pricing import PriceList
from tokenmill.server.run import bind, serve_until_told
from tokenmill.store import Accounts, Key, Limits, open_store
from tokenmill.wire import openai_answer

_TURNS = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}<assistant>"
)
TEMPLATE = "{% if tools %}<tools>{{ tools | tojson }}{% endif %}" + _TURNS
PLAIN_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
)

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ANSWERS = {
    "Hi": "Hello there",
    "Count.": "one END two STOP three",
    "Grüße": "Grüße, 世界 🌍",
    "Nothing": "",
    "JSON": '{"city": "Rome"}',
    "Weather?": CALL,
    "Two?": f"I look.\n{CALL}\n{SECOND}",
    "Broken?": '<tool_call>\n{"name": "weather", "arguments": {"city": ',
    "No call": "<tool_call>I would not.</tool_call>",
    "Plain?": '{"name": "weather", "arguments": {"city": "Rome"}}',
    "18 degrees": "It is 18 degrees.",
}
FAULT = "fault!"
SCRIPT = MockScript(
    endings=tuple((f"{asked}<assistant>".encode(), said.encode()) for asked, said in ANSWERS.items()),
    answers=((b"Once upon", b" a time"),),
    faults=(MockFault(kind="nan", marker=tuple(FAULT.encode())),),
    context_length=2048,
    row_s=0.0,
    step_s=0.001,
    template=TEMPLATE,
)
KEYS: dict[str, Key] = {
    **OTHER_KEYS,
    "tm_one": key("one", limits=Limits(concurrency=1)),
    "tm_batch": key("batch", tiers=("batch",)),
}
WRITTEN = ("thinker", "window", "full", "cut", "late", "gone", "broken")


async def _local(name: str, template: str) -> LocalBackend:
    return await LocalBackend.open(
        LocalConfig(name=name, model=name),
        MockModel(SCRIPT, template=template),
        EngineSpec(mock=SCRIPT, config=LLMConfig(max_batch=8, kv_tokens=16384)),
    )


async def main(folder: Path) -> None:
    """Serve until told otherwise."""
    locals_ = await asyncio.gather(_local("mock", TEMPLATE), _local("plain", PLAIN_TEMPLATE))
    store = open_store(str(folder / "server.db"))
    accounts = Accounts(store)
    await accounts.start()
    price = {"standard": Price(input_usd=1.0, output_usd=1.0)}
    prices = PriceList(prices={"mock": price})  # type: ignore[dict-item]
    router = Router([*locals_, *map(WrittenBackend, WRITTEN)])
    gateway = Gateway(router, accounts, prices, GatewayConfig())
    edge = EdgeConfig(keyless=False, hosts=(), max_body_bytes=1 << 20)

    async def find(secret: str) -> Key | None:
        return KEYS.get(secret)

    config = HttpConfig(port=0, drain_s=1.0)
    app = create_app(gateway, edge, find)
    await serve_until_told(app, gateway, config, bind(config), on_ready=lambda url: print(url, flush=True))
    for each in locals_:
        await each.close()
    await store.close()


def break_shapes() -> None:
    """The control: no tier but the default, no usage, no end `tool_calls`, no grammar for required calls."""

    def no_usage(usage: Usage) -> dict[str, int]:
        return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    def no_end(reason: FinishReason, *, has_calls: bool) -> str:
        return "stop"

    openai_answer._usage = no_usage
    openai_answer._finish = no_end
    openai_answer.OPENAI_TIERS.update({"fast": "default", "batch": "default"})
    ToolFormat.grammar = lambda self, tools, choice, answer: answer  # type: ignore[method-assign]


if __name__ == "__main__":
    if "--broken" in sys.argv:
        break_shapes()
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(main(Path(name)))
