"""Line S19: batches over `kill -9`. Every line is answered once and billed once, none is lost.

    python -m benchmarks.reliability.s19 --kills 500 --lines 10000
    python -m benchmarks.reliability.s19 --kills 40 --lines 2000 --guard off

A child runs batches of LINES requests with the server's own store, accounts, gateway, routes and two workers
over a model that answers a text with the text reversed, after a few milliseconds; every hundredth line asks
for what cannot be. It is killed at random times, again and again, and started on what it left. When a batch
has ended its files and the ledger are compared with what was asked. Controls (`--guard off`): the ledger in a
transaction of its own; lines that are taken without a lease. Both must be noticed.

The engine, HTTP and the disk's own lies are not in it: `tests/server/test_batches.py` kills whole servers, and
a loss of power is another line's matter.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

import apsw

from tokenmill.core import Usage, UsageError
from tokenmill.router import Attempt, BackendState, Embedded, Job, Prepared, Spent
from tokenmill.router.config import Price
from tokenmill.server.batch_room import BatchRoom, endpoints_of
from tokenmill.server.batches import BatchConfig, BatchWorker
from tokenmill.server.gateway import Gateway, GatewayConfig
from tokenmill.server.openai_api import OpenAIApi
from tokenmill.server.pricing import PriceList
from tokenmill.store import (
    Accounts,
    Batch,
    Entry,
    Line,
    LineEnd,
    ObjectStore,
    SqliteStore,
    StoredFile,
)
from tokenmill.wire import Begin, Call, Finish, Piece, Prompt, TextPiece, Totals

__all__ = ["GUARDS", "Guard", "Report", "main", "run"]

Guard: TypeAlias = Literal["on", "transaction", "lease"]
GUARDS: Final[tuple[Guard, ...]] = ("on", "transaction", "lease")
"""All on; without one transaction for answer and bill; without leases."""

_MAX_LIFE_S: Final = 0.4
_PATIENCE_S: Final = 60.0
_BAD_EVERY: Final = 100
_PRICE: Final = Price(input_usd=1.0, output_usd=1.0)
_NANO_A_TOKEN: Final = 1000


@dataclass
class Report:
    """What was found. A violation is a line that is lost, repeated, wrong, billed twice or not at all."""

    num_kills: int = 0
    num_batches: int = 0
    num_lines: int = 0
    lost: int = 0
    repeated: int = 0
    wrong: int = 0
    billed_twice: int = 0
    unbilled: int = 0
    num_unpaid_tries: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def violations(self) -> int:
        """All of them."""
        return self.lost + self.repeated + self.wrong + self.billed_twice + self.unbilled + len(self.notes)


class _Reversed:
    """An attempt that reverses its text."""

    def __init__(self, text: str, delay_s: float) -> None:
        self._text = text
        self._delay_s = delay_s
        self._spent: asyncio.Future[Spent] = asyncio.get_running_loop().create_future()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        yield Begin("x", "m", 1)
        await asyncio.sleep(self._delay_s)
        yield TextPiece(self._text[::-1])
        yield Finish("completed")
        self._end(len(self._text))
        yield Totals((await self.spent()).usage)

    def cancel(self) -> None:
        """End it with nothing."""
        self._end(0)

    async def spent(self) -> Spent:
        """What it used: a token a character."""
        return await asyncio.shield(self._spent)

    def _end(self, num_output_tokens: int) -> None:
        if not self._spent.done():
            usage = Usage(num_prompt_tokens=len(self._text), num_output_tokens=num_output_tokens)
            finish: Literal["completed", "cancelled"] = "completed" if num_output_tokens else "cancelled"
            self._spent.set_result(Spent(usage=usage, finish=finish, nanoseconds=1000))


class _Mirror:
    """A backend without an engine."""

    name = "mirror"
    model = "m"
    is_local = True
    state: BackendState = "ready"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    async def prepare(self, call: Call) -> Prepared:
        """Count characters."""
        text = call.prompts[0]
        assert isinstance(text, str)
        if text.startswith("bad"):
            raise UsageError("this cannot be asked")
        return Prepared(call=call, num_prompt_tokens=len(text), max_output_tokens=len(text))

    def start(self, prepared: Prepared, job: Job) -> Attempt:
        """Begin."""
        text = prepared.call.prompts[0]
        assert isinstance(text, str)
        return _Reversed(text, self._random.uniform(0.0, 0.004))

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """There are none."""
        raise UsageError("no embeddings")

    async def drain(self, deadline_s: float) -> None:
        """Nothing to wait for."""

    async def close(self) -> None:
        """Nothing to end."""


class _TwoTransactions(ObjectStore):
    """Control: bills in a transaction of its own, under a name a try."""

    def __init__(self, store: SqliteStore) -> None:
        super().__init__(store)
        self._both = store

    async def close_line(self, line: Line, end: LineEnd, entries: Sequence[Entry]) -> int:
        name = f"{line.request_id}.{line.lease.rpartition('.')[2]}"
        num_new = await self._both.settle([replace(each, request_id=name) for each in entries])
        await super().close_line(line, end, [])
        return num_new


class _NoLease(_TwoTransactions):
    """Control: takes lines without marking them, and closes them whoever has them."""

    async def lease(
        self, batch_id: str, limit: int, until_s: float, *, suspects: bool = False, max_calm_tries: int = 2
    ) -> list[Line]:
        names = ("number", "custom_id", "offset", "length")
        sql = (
            f"SELECT {', '.join(names)} FROM lines WHERE batch_id = ? AND state = 'pending' "
            "ORDER BY number LIMIT ?"
        )
        found = await self._both.read(lambda db: db.execute(sql, (batch_id, limit)).fetchall())
        fixed = {"batch_id": batch_id, "num_tries": 1, "num_failures": 0, "lease": f"{id(found)}.{time.monotonic_ns()}"}
        return [Line(**fixed, **dict(zip(names, row, strict=True))) for row in found]

    async def close_line(self, line: Line, end: LineEnd, entries: Sequence[Entry]) -> int:
        name = f"{line.request_id}.{line.lease.rpartition('.')[2]}"
        sql = "UPDATE lines SET state = 'leased', lease = ? WHERE batch_id = ? AND number = ?"
        values = (line.lease, line.batch_id, line.number)
        await self._both.write(lambda db: db.execute(sql, values).fetchall())
        return await ObjectStore.close_line(
            self, line, end, [replace(each, request_id=name) for each in entries]
        )


async def _serve(folder: Path, batch_id: str, file: StoredFile, guard: Guard, seed: int, ready: int) -> None:
    """The child: run the batch to its end."""
    store = SqliteStore(folder / "server.db")
    accounts = Accounts(store)
    await accounts.start()
    prices = PriceList(prices={"m": {"standard": _PRICE}})
    gateway = Gateway([_Mirror(seed)], accounts, prices, GatewayConfig())
    endpoints = endpoints_of(OpenAIApi(gateway, 0).routes())
    config = BatchConfig(max_in_flight=32, headroom=0, retry_s=0.01, idle_s=0.05)
    rooms = [_room(store, accounts, folder, endpoints, gateway, config, guard) for _ in range(2)]
    rooms[1].worker = _second(rooms, gateway, accounts, config)
    objects = rooms[0].objects
    if not [each for each in await objects.open_batches() if each.id == batch_id]:
        known = await store.read(
            lambda db: db.execute("SELECT count(*) FROM batches WHERE id = ?", (batch_id,)).get
        )
        if not known:
            await objects.add_batch(_new_batch(batch_id, file, accounts.now_s()), 64, file=file)
    await rooms[0].worker.start()
    await rooms[1].worker.start(alone=False)
    os.write(ready, b"r")
    while [each for each in await objects.open_batches() if each.id == batch_id]:
        await asyncio.sleep(0.02)
    for room in rooms:
        await room.worker.stop()
    await store.close()
