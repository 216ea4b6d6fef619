"""Batches in this process: a store, a worker, and a backend that reverses texts."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.mirror import Mirror
from tokenmill.router import BreakerConfig, Price, Router
from tokenmill.server.batch_room import BatchRoom, endpoints_of
from tokenmill.server.batches import BatchConfig
from tokenmill.server.caller import ANONYMOUS
from tokenmill.server.files import new_id
from tokenmill.server.gateway import Gateway, GatewayConfig
from tokenmill.server.openai_api import OpenAIApi
from tokenmill.server.pricing import PriceList
from tokenmill.store import Accounts, Batch, Key, LedgerQuery, SqliteStore, StoredFile

__all__ = ["PATIENT", "Rig", "Served", "open_rig", "request_line"]

PATIENT = BreakerConfig(failures=1000, window=10_000, share=1.0)
_URL = "/v1/completions"
_PATIENCE_S = 60.0


@dataclass
class Served:
    """What became of a batch: its answers, errors and HTTP statuses by custom id, its bills by line."""

    batch: Batch
    answers: dict[str, str]
    errors: dict[str, Any]
    bills: Counter[int]
    unpaid: Counter[int]


@dataclass
class Rig:
    """All parts of a server that batches need."""

    room: BatchRoom
    store: SqliteStore
    accounts: Accounts
    gateway: Gateway
    backend: Mirror
    folder: Path

    async def submit(
        self, lines: Sequence[Any], *, key: Key = ANONYMOUS, window_s: float = 86400.0, endpoint: str = _URL
    ) -> Batch:
        """A batch of these lines (texts become requests that are named after them)."""
        data = b"".join(request_line(each) if isinstance(each, str) else each for each in lines)
        file_id, now_s = new_id("file-"), self.accounts.now_s()
        draft = self.room.files.folder.draft()
        draft.write(data)
        draft.keep(file_id)
        file = StoredFile(
            id=file_id,
            project=key.project,
            purpose="batch",
            filename="x",
            num_bytes=len(data),
            created_s=now_s,
        )
        batch = Batch(
            id=new_id("batch_"),
            project=key.project,
            key_id=key.id,
            api="openai",
            endpoint=endpoint,
            input_file_id=file_id,
            created_s=now_s,
            expires_s=now_s + window_s,
        )
        await self.room.objects.add_batch(batch, 64, file=file)
        self.room.worker.wake()
        return batch

    async def until(self, batch: Batch, is_there: Callable[[Batch], bool]) -> Batch:
        """Wait until something is true of a batch."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            found = await self.room.objects.batch(batch.project, batch.id, batch.api)
            if is_there(found):
                return found
            await asyncio.sleep(0.01)
        raise AssertionError(f"waited in vain: {found}")

    async def served(self, batch: Batch) -> Served:
        """What became of a batch, once it has ended."""
        batch = await self.until(batch, lambda each: each.has_ended)
        served = Served(batch, {}, {}, Counter(), Counter())
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            for text in self.room.files.folder.path(file_id).read_text().splitlines():
                line = json.loads(text)
                name, response = line["custom_id"], line["response"]
                assert name not in served.answers and name not in served.errors, f"{name} is there twice"
                if response is not None and response["status_code"] == 200:
                    served.answers[name] = response["body"]["choices"][0]["text"]
                else:
                    served.errors[name] = line["error"] or response
        async for entry in self.store.entries(LedgerQuery()):
            if entry.request_id.startswith(batch.id):
                number = int(entry.request_id.rpartition("_")[2].partition(".")[0])
                (served.bills if entry.price_nano_usd else served.unpaid)[number] += 1
        return served


def request_line(text: str, **more: Any) -> bytes:
    """An input line that asks for a text, under its name."""
    body = {"model": "m", "prompt": text, **more}
    return json.dumps({"custom_id": text, "method": "POST", "url": _URL, "body": body}).encode() + b"\n"


@asynccontextmanager
async def open_rig(
    folder: Path, backend: Mirror | None = None, *, starts: bool = True, **config: Any
) -> AsyncIterator[Rig]:
    """A rig whose state lies in the folder: open it again to go on."""
    backend = backend or Mirror()
    store = SqliteStore(folder / "server.db")
    accounts = Accounts(store)
    await accounts.start()
    prices = PriceList(prices={"m": {"standard": Price(input_usd=1.0, output_usd=1.0)}})
    gateway = Gateway(Router([backend], breaker=PATIENT), accounts, prices, GatewayConfig())
    endpoints = endpoints_of(OpenAIApi(gateway, 0).routes())
    settings = {"max_in_flight": 8, "headroom": 0, "retry_s": 0.01, "idle_s": 0.02, **config}
    room = BatchRoom(
        store,
        accounts,
        folder / "files",
        endpoints,
        lambda: gateway.num_calls,
        config=BatchConfig(**settings),
    )
    if starts:
        await room.start()
    try:
        yield Rig(room, store, accounts, gateway, backend, folder)
    finally:
        await room.stop()
        await store.close()
