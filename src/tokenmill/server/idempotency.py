"""Idempotency-Key: a client that does not know whether its request arrived sends it again; one thing is made.

The contract is Stripe's. The first answer is kept for 24 hours, in the transaction that makes what it tells
of, and given again for the same body; another body under the same key is refused (422), a request that is
still being carried out as well (409). Nothing is kept of a request that was refused before it did anything.
"""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from tokenmill.core import TokenmillError, UsageError
from tokenmill.server.answering import send_json
from tokenmill.server.caller import Caller
from tokenmill.server.edge import Receive, Scope_, Send
from tokenmill.store import Answered, Store
from tokenmill.wire import write_error

__all__ = ["FirstTime", "Repeated", "once"]

_HEADER = "idempotency-key"


class Repeated(TokenmillError):
    """Not the first time: what is to be answered, at once."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__("this request was made before")
        self.status = status
        self.body = body

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """Send it."""
        await send_json(send, self.status, self.body)


class FirstTime:
    """A request that is to be carried out, under an idempotency key or none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.is_answered = False

    def answered(self, status: int, body: bytes) -> Answered | None:
        """Its answer, to be kept with what it makes; None without a key."""
        self.is_answered = True
        return Answered(self._name, status, body) if self._name else None


@asynccontextmanager
async def once(store: Store, request: Request, digest: bytes, now_s: float) -> AsyncIterator[FirstTime]:
    """For a request whose content has this digest: raises Repeated if it is not the first under its key."""
    caller: Caller = request.scope["tokenmill.caller"]
    name = request.headers.get(_HEADER, "")
    if not name:
        yield FirstTime("")
        return
    project = caller.key.project
    content = hashlib.sha256(request.url.path.encode() + b"\0" + digest).digest()
    found = await store.remember(project, name, content, now_s)
    if found.state == "done":
        raise Repeated(found.status, found.response)
    if found.state != "new":
        is_mismatch = found.state == "mismatch"
        status = 422 if is_mismatch else 409
        message = "this idempotency key was used for another request"
        error = (
            UsageError(message, hint="use a new one")
            if is_mismatch
            else UsageError(
                "a request with this idempotency key is being carried out", hint="ask again later"
            )
        )
        raise Repeated(status, write_error(caller.api, error, status=status, request_id=caller.request_id))
    first = FirstTime(name)
    try:
        yield first
    except BaseException:
        await store.forget(project, name)
        raise
    if not first.is_answered:
        await store.forget(project, name)
