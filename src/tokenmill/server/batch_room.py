"""Everything that files and batches of both APIs share, opened and closed as one.

room = BatchRoom(store, accounts, folder, runner, ...)
routes = [*OpenAIBatches(room).routes(), *AnthropicBatches(room).routes()]
await room.start()
... serve ...
await room.stop()                   # before the gateway drains: lines that run are given back
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.routing import Route

from tokenmill.core import UsageError
from tokenmill.server.answering import send_json
from tokenmill.server.batch_files import BatchFiles
from tokenmill.server.batch_run import Endpoint, LineAccounts, LineRunner
from tokenmill.server.batches import BatchConfig, BatchWorker
from tokenmill.server.caller import ANONYMOUS, Caller
from tokenmill.server.edge import Receive, Scope_, Send
from tokenmill.server.files import FileFolder, FilesConfig
from tokenmill.store import Key, ObjectStore, SqliteStore
from tokenmill.wire import FieldError
from tokenmill.wire.fields import encode_json

__all__ = ["BATCH_PATHS", "BatchRoom", "JsonBody", "caller_of", "endpoints_of", "number_of"]

_LOG: Final = logging.getLogger(__name__)

BATCH_PATHS: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
)
"""What a line of a batch may ask, as far as there is a route."""


class BatchRoom:
    """Files, batches and their worker, of one store and one folder.

    `endpoints` are the routes that lines go through (`endpoints_of`), `num_calls` says how many calls the
    gateway has.
    """

    def __init__(
        self,
        store: SqliteStore,
        accounts: LineAccounts,
        folder: Path,
        endpoints: Mapping[str, Endpoint],
        num_calls: Callable[[], int],
        *,
        config: BatchConfig | None = None,
        files: FilesConfig | None = None,
        find_key: Callable[[str], Awaitable[Key | None]] | None = None,
        objects: ObjectStore | None = None,
    ) -> None:
        self.store = store
        self.config = config or BatchConfig()
        self.now_s = accounts.now_s
        self.objects = objects or ObjectStore(store)
        self.files = BatchFiles(self.objects, FileFolder(folder), files or FilesConfig(), self.now_s)
        self.runner = LineRunner(self.objects, accounts, endpoints)
        self._keys: dict[str, Key] = {}
        self._key_version = -1
        self.worker = BatchWorker(
            self.objects,
            self.files,
            self.runner,
            self.config,
            find_key=find_key or self._key,
            num_calls=num_calls,
            now_s=self.now_s,
        )

    async def start(self) -> None:
        """Free what a dead process held, remove content without a file, and let the worker begin."""
        freed = await self.objects.free_lost(self.now_s())
        removed = await self.files.sweep()
        if freed or removed:
            _LOG.info("batches go on: %d lines freed, %d contents without a file removed", freed, removed)
        self.worker.start()

    async def stop(self) -> None:
        """Give lines that run back, and end the worker."""
        await self.worker.stop()

    def check_tier(self, caller: Caller) -> None:
        """Refuse a key that may not have batches."""
        if "batch" not in caller.key.tiers:
            raise UsageError(f"the key {caller.key.id} has not the tier batch", hint="use one that has it")

    async def _key(self, key_id: str) -> Key | None:
        if key_id == ANONYMOUS.id:
            return ANONYMOUS
        version = await self.store.key_version()
        if version != self._key_version:
            self._keys = {key.id: key for key in await self.store.keys()}
            self._key_version = version
        return self._keys.get(key_id)


def endpoints_of(routes: Sequence[Route]) -> dict[str, Endpoint]:
    """Of these routes those that lines may go through, by their paths."""
    return {each.path: each.endpoint for each in routes if each.path in BATCH_PATHS}


class JsonBody:
    """A value as the whole answer."""

    def __init__(self, value: object) -> None:
        self.body = encode_json(value)

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """Send it."""
        await send_json(send, 200, self.body)


def caller_of(request: Request) -> Caller:
    """Who asks."""
    caller: Caller = request.scope["tokenmill.caller"]
    return caller


def number_of(request: Request, name: str, default: int, highest: int) -> int:
    """A whole number from 1 in the query. Raises FieldError for anything else."""
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= highest:
        raise FieldError(name, f"it is {text[:40]!r}", hint=f"use a whole number from 1 to {highest}")
    return int(text)
