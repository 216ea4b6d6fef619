"""One line of a batch, from its bytes to its end: through the same route that a client would ask.

What the line came to, what the ledger says of it and the end of its lease are one transaction, which the
call's settlement writes. A line is paid for only if it was answered: tries that failed, or were given up,
stand in the ledger with what they cost here, under names of their own, at no price.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol, TypeAlias

from starlette.requests import Request

from tokenmill.core import (
    BudgetError,
    ExpiredError,
    ResourceError,
    StorageError,
    TokenmillError,
    UsageError,
)
from tokenmill.server.batch_lines import line_body
from tokenmill.server.edge import Asgi
from tokenmill.server.gateway import LineCaller
from tokenmill.store import Batch, Entry, Key, Line, LineEnd, LineState, ObjectStore, Ticket
from tokenmill.wire import FieldError, status_of, write_error

__all__ = ["Endpoint", "LineAccounts", "LineFate", "LineRun", "LineRunner"]

Endpoint: TypeAlias = Callable[[Request], Awaitable[Asgi]]
"""What answers a route."""

LineFate: TypeAlias = Literal["answered", "refused", "busy", "poor", "failed", "lost"]
"""How it went, for whoever decides what runs next: its two ends; nothing has room; the budget has nothing
left while others hold some; it failed and will be tried again; the disk refused its end."""

_LOG: Final = logging.getLogger(__name__)
_JSON_HEADERS: Final = [(b"content-type", b"application/json")]
_INSUFFICIENT: Final = "insufficient_quota"


class LineAccounts(Protocol):
    """The accounts, as batches need them (`store.Accounts`)."""

    def now_s(self) -> float:
        """The time of a line of the ledger."""
        ...

    async def reserve(
        self, key: Key, request_id: str, attempt: int, nano_usd: int, *, durable: bool
    ) -> Ticket:
        """Set the most that an attempt can come to aside. Raises BudgetError."""
        ...

    async def release(self, ticket: Ticket) -> None:
        """Give it back."""
        ...

    async def settle(
        self, entries: Sequence[Entry], write: Callable[[Sequence[Entry]], Awaitable[int]]
    ) -> int:
        """Count what `write` writes, and give back what was set aside."""
        ...


@dataclass(frozen=True, kw_only=True)
class LineRun:
    """A line that is to run: `read` gives its line of the input, `is_last_of_key` says whether nothing else
    of its key runs, so that no money will come back.
    """

    batch: Batch
    line: Line
    read: Callable[[], Awaitable[bytes]]
    key: Key
    is_last_of_key: Callable[[], bool]


class LineRunner:
    """Runs lines by the routes in `endpoints`, at most `max_failures` times each if they fail."""

    def __init__(
        self,
        objects: ObjectStore,
        accounts: LineAccounts,
        endpoints: Mapping[str, Endpoint],
        *,
        max_failures: int = 3,
    ) -> None:
        self._objects = objects
        self._accounts = accounts
        self._endpoints = endpoints
        self._max_failures = max_failures

    @property
    def endpoints(self) -> Sequence[str]:
        """Paths that a batch may be for."""
        return sorted(self._endpoints)

    async def run(self, run: LineRun, on_cancel: Callable[[], LineState]) -> LineFate:
        """Answer a line and write its end. Cancelled, it writes the end that `on_cancel` names, then."""
        money = _LineMoney(self._accounts, self._objects, run.line)
        try:
            end, fate = await self._end(run, money)
        except asyncio.CancelledError:
            await _to_end(money.close(LineEnd(state=on_cancel())))
            raise
        try:
            await _to_end(money.close(end))
        except StorageError as error:
            _LOG.warning("%s has no end yet: %s", run.line.request_id, error)
            return "lost"
        return fate

    async def refuse(self, batch: Batch, line: Line, error: TokenmillError) -> None:
        """End a line that is not run."""
        await self._objects.close_line(line, _refused(batch, line, error), [])

    async def _end(self, run: LineRun, money: "_LineMoney") -> tuple[LineEnd, LineFate]:
        """Ask, and say what the line comes to."""
        batch, line = run.batch, run.line
        try:
            status, body = await self._ask(run, money)
        except BudgetError as error:
            if run.is_last_of_key():
                return _refused(batch, line, error, code=_INSUFFICIENT), "refused"
            return LineEnd(state="pending"), "poor"
        except (UsageError, ExpiredError) as error:
            return _refused(batch, line, error), "refused"
        except (ResourceError, StorageError):
            return LineEnd(state="pending"), "busy"
        except TokenmillError as error:
            return self._failed(batch, line, error)
        except Exception:
            _LOG.exception("%s failed", line.request_id)
            return self._failed(batch, line, TokenmillError("the server failed", hint="its log says why"))
        if status >= 400:
            return LineEnd(state="errored", status=status, body=body), "refused"
        return LineEnd(state="answered", status=status, body=body), "answered"

    def _failed(self, batch: Batch, line: Line, error: TokenmillError) -> tuple[LineEnd, LineFate]:
        if status_of(error) < 500 or line.num_failures + 1 >= self._max_failures:
            return _refused(batch, line, error), "refused"
        return LineEnd(state="pending", has_failed=True), "failed"

    async def _ask(self, run: LineRun, money: "_LineMoney") -> tuple[int, bytes]:
        """The route's answer to the line's body."""
        batch = run.batch
        if batch.endpoint not in self._endpoints:
            raise FieldError(
                "url", f"{batch.endpoint} is not served", hint=f"use {', '.join(self.endpoints)}"
            )
        caller = LineCaller(
            key=replace(run.key, tiers=("batch",)),
            request_id=run.line.request_id,
            api=batch.api,
            feature=batch.feature,
            money=money,
        )
        exchange = _Exchange(line_body(await run.read()))
        scope = {
            "type": "http",
            "method": "POST",
            "path": batch.endpoint,
            "query_string": b"",
            "headers": _JSON_HEADERS,
            "tokenmill.caller": caller,
        }
        answer = await self._endpoints[batch.endpoint](Request(scope, exchange.receive))
        await answer(scope, exchange.receive, exchange.send)
        return exchange.status, bytes(exchange.answer)


class _LineMoney:
    """The accounts of one line's one try. Whoever runs the line gives its end to `close`."""

    def __init__(self, accounts: LineAccounts, objects: ObjectStore, line: Line) -> None:
        self._accounts = accounts
        self._objects = objects
        self._line = line
        self._has_begun = False
        loop = asyncio.get_running_loop()
        self._end: asyncio.Future[LineEnd] = loop.create_future()
        self._written: asyncio.Future[None] = loop.create_future()

    def begin(self) -> None:
        """`settle` will be called."""
        self._has_begun = True

    def now_s(self) -> float:
        """The accounts' time."""
        return self._accounts.now_s()

    async def reserve(
        self, key: Key, request_id: str, attempt: int, nano_usd: int, *, durable: bool
    ) -> Ticket:
        """Set money aside, in memory: after a crash the line runs again, and is paid for then."""
        del durable
        return await self._accounts.reserve(key, request_id, attempt, nano_usd, durable=False)

    async def release(self, ticket: Ticket) -> None:
        """Give it back."""
        await self._accounts.release(ticket)

    async def settle(self, entries: Sequence[Entry]) -> int:
        """Wait for what the line comes to, and write both."""
        end = await asyncio.shield(self._end)
        is_paid = end.state == "answered"
        priced = [
            replace(each, kind="batch", price_nano_usd=each.price_nano_usd if is_paid else 0)
            for each in entries
        ]

        async def write(stamped: Sequence[Entry]) -> int:
            name = f"{self._line.request_id}.{self._line.lease.rpartition('.')[2]}"
            named = stamped if is_paid else [replace(each, request_id=name) for each in stamped]
            return await self._objects.close_line(self._line, end, named)

        try:
            num_new = await self._accounts.settle(priced, write)
        except BaseException as error:
            self._written.set_exception(error)
            raise
        self._written.set_result(None)
        return num_new

    async def close(self, end: LineEnd) -> None:
        """Write the end of the line: with its settlement, if an answer had begun."""
        if not self._has_begun:
            await self._objects.close_line(self._line, end, [])
            return
        self._end.set_result(end)
        await self._written


class _Exchange:
    """A request and its answer without a connection."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self.status = 500
        self.answer = bytearray()

    async def receive(self) -> MutableMapping[str, Any]:
        """The body, then nothing ever."""
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Take the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.answer += message.get("body", b"")


async def _to_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for work to its end; to be cancelled meanwhile counts only then."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


def _refused(batch: Batch, line: Line, error: TokenmillError, code: str | None = None) -> LineEnd:
    status = status_of(error)
    body = write_error(batch.api, error, status=status, code=code, request_id=line.request_id)
    return LineEnd(state="errored", status=status, body=body)
