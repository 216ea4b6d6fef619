"""A whole server on the mock model, with files and batches, as a process that a test can kill.

    python -m tests.server.batch_server FOLDER [--answers N] ...      # prints its URL once it listens

The store is FOLDER/server.db, contents lie in FOLDER/files. Answers of the mock: a prompt `x` is answered by
`<x>`.
"""

import argparse
import asyncio
import hashlib
import json
from pathlib import Path

from tokenmill.core import Tier
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockFault, MockModel, MockScript
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.router import Router
from tokenmill.router.config import BreakerConfig, Price
from tokenmill.router.local import LocalBackend, LocalConfig
from tokenmill.server.anthropic_api import AnthropicApi
from tokenmill.server.anthropic_batches import AnthropicBatches
from tokenmill.server.app import create_app
from tokenmill.server.batch_room import BatchRoom, endpoints_of
from tokenmill.server.batches import BatchConfig
from tokenmill.server.config import HttpConfig
from tokenmill.server.edge import EdgeConfig
from tokenmill.server.files import FilesConfig
from tokenmill.server.gateway import Gateway, GatewayConfig
from tokenmill.server.openai_api import OpenAIApi
from tokenmill.server.openai_batches import OpenAIBatches
from tokenmill.server.pricing import PriceList
from tokenmill.server.run import bind, serve_until_told
from tokenmill.store import Accounts, Key, SqliteStore

__all__ = ["EXIT_MARK", "POISON", "TEMPLATE", "prompt_of", "settings"]

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}="
POISON = "poison"
"""A prompt whose rows make the step fail."""
EXIT_MARK = "exit"
"""A prompt that ends the engine process."""


def prompt_of(number: int) -> str:
    """The prompt of a line; the mock answers it with `a` and the number."""
    return f"q{number}"


def settings(num_answers: int, step_s: float) -> MockScript:
    """The mock's script."""
    answers = tuple((f"q{at}=".encode(), f"a{at}".encode()) for at in range(num_answers))
    faults = (
        MockFault(kind="raise", marker=tuple(POISON.encode())),
        MockFault(kind="exit", marker=tuple(EXIT_MARK.encode())),
    )
    return MockScript(answers=answers, step_s=step_s, faults=faults)


async def main(args: argparse.Namespace) -> None:
    """Serve until told."""
    folder = Path(args.folder)
    store = SqliteStore(folder / "server.db")
    accounts = Accounts(store)
    await accounts.start()
    script = settings(args.answers, args.step_s)
    model = MockModel(script, template=TEMPLATE)
    spec = EngineSpec(mock=script, config=LLMConfig(max_batch=32))
    config = LocalConfig(name="mock", model="mock", usd_per_hour=0.1)
    backend = await LocalBackend.open(config, model, spec)
    price: dict[Tier, Price] = {
        "standard": Price(input_usd=0.2, output_usd=0.8),
        "batch": Price(input_usd=0.1, output_usd=0.4),
    }
    gateway = Gateway(
        Router([backend], breaker=BreakerConfig(failures=1000, window=10_000, share=1.0)),
        accounts,
        PriceList(prices={"mock": price}),
        GatewayConfig(),
    )
    routes = [*OpenAIApi(gateway, 0).routes(), *AnthropicApi(gateway).routes()]
    room = BatchRoom(
        store,
        accounts,
        folder / "files",
        endpoints_of(routes),
        lambda: gateway.num_calls,
        config=BatchConfig(window_s=args.window_s, retry_s=0.05),
        files=FilesConfig(max_project_bytes=args.max_project_bytes),
    )

    async def find_key(secret: str) -> Key | None:
        return await store.find_key(hashlib.sha256(secret.encode()).digest())

    more = [*OpenAIBatches(room).routes(), *AnthropicBatches(room).routes()]
    app = create_app(gateway, EdgeConfig(keyless=not args.keys), find_key, more)
    http = HttpConfig(port=0, drain_s=5.0)
    listener = bind(http)
    await room.start()
    try:
        ready = json.dumps
        await serve_until_told(
            app, gateway, http, listener, on_ready=lambda url: print(ready({"url": url}), flush=True)
        )
    finally:
        await room.stop()
        await backend.close()
        await store.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--window-s", type=float, default=86400.0)
    parser.add_argument("--max-project-bytes", type=int, default=1 << 30)
    parser.add_argument("--keys", action="store_true")
    asyncio.run(main(parser.parse_args()))
