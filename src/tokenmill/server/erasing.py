"""POST /admin/erase: an end user out of captures and ledger, for a key with the scope `admin`.

`{"user": "u-1234", "project": "shop"}` is answered by the proof. Files that were made of captures
are for `tokenmill erase --also`: a server does not know them.
"""

import asyncio

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from tokenmill.server.answering import send_json
from tokenmill.server.edge import Asgi, Receive, Scope_, Send
from tokenmill.store import Store
from tokenmill.wire.fields import decode_request
from tokenmill.workload import Erasure, WorkloadFolder, erase

__all__ = ["EraseApi"]


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    user: str
    project: str = "default"


class EraseApi:
    """The route. Erasing waits for the writer of captures, in a thread."""

    def __init__(self, store: Store, folder: WorkloadFolder) -> None:
        self._store = store
        self._folder = folder

    def routes(self) -> list[Route]:
        """The route."""
        return [Route("/admin/erase", self.erase, methods=["POST"])]

    async def erase(self, request: Request) -> Asgi:
        """POST /admin/erase. A client that leaves does not stop it."""
        asked = decode_request(await request.body(), _Request)
        return _Proof(await asyncio.shield(asyncio.create_task(self._erase(asked))))

    async def _erase(self, asked: _Request) -> Erasure:
        rows = await self._store.erase_end_user(asked.project, asked.user) if asked.user else 0
        return await asyncio.to_thread(
            erase, self._folder, project=asked.project, end_user=asked.user, ledger_rows=rows
        )


class _Proof:
    def __init__(self, erasure: Erasure) -> None:
        self._body = msgspec.json.encode(erasure)

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        await send_json(send, 200, self._body)
