"""The life of one call: which deployment, in which order, until the first token; and what each try used.

Up to the first token a task of its own works, which no client can cancel: money that was set aside for an
attempt is never left without that attempt's record. After it the reader reads the attempt itself, and no
other deployment is asked.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, Protocol, TypeAlias

from tokenmill.core import (
    EndpointError,
    ExpiredError,
    FinishReason,
    TokenmillError,
    Usage,
    UsageError,
)
from tokenmill.router.backend import Attempt, Backend, Job, Prepared, Spent
from tokenmill.router.breaker import Breaker, Permit
from tokenmill.router.budget import RetryBudget
from tokenmill.router.events import OnEvent, RouteEvent, RouteEventKind
from tokenmill.router.upstream import BusyError
from tokenmill.wire import Begin, Call, Piece

__all__ = [
    "NO_USAGE",
    "AttemptRecord",
    "Before",
    "Deployment",
    "Listener",
    "Plan",
    "Routed",
    "blame",
    "no_before",
]

NO_USAGE: Final = Usage(num_prompt_tokens=0, num_cached_tokens=0, num_output_tokens=0)
"""Of an attempt that used nothing, or of which nothing is known."""

Before: TypeAlias = Callable[[int, Backend, Prepared], Awaitable[None]]
"""Awaited to its end before each attempt with its number, from 1. What it raises ends the call."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt, once it has ended. `error` is empty for an answer and for what was given up.

    It is for whoever runs the server: it may name addresses that the client's error does not.
    """

    number: int
    backend: str
    model: str
    is_local: bool
    spent: Spent
    error: str = ""


class Deployment(NamedTuple):
    """A backend and the breaker in front of it."""

    backend: Backend
    breaker: Breaker


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be asked, of whom in this order, and how many attempts there may be together.

    `prepared` is what is known of it already, by the name of the backend.
    """

    route: str
    call: Call
    order: tuple[Deployment, ...]
    max_attempts: int
    max_wait_s: float
    prepared: Mapping[str, Prepared] = field(default_factory=dict)

    def unavailable(self) -> BusyError:
        """The error if none of them takes calls."""
        wait_s = min(each.breaker.wait_s for each in self.order)
        return BusyError(f"no deployment of {self.route} takes calls now", wait_s=wait_s)


@dataclass
class _Try:
    """One attempt. `attempt` is None where it did not begin."""

    number: int
    backend: Backend
    attempt: Attempt | None = None
    finish: FinishReason = "failed"
    error: str = ""

    async def record(self) -> AttemptRecord:
        spent = Spent(usage=NO_USAGE, finish=self.finish, nanoseconds=0)
        if self.attempt is not None:
            spent = await self.attempt.spent()
        backend = self.backend
        return AttemptRecord(
            number=self.number,
            backend=backend.name,
            model=backend.model,
            is_local=backend.is_local,
            spent=spent,
            error=self.error,
        )


class _Won(NamedTuple):
    """An attempt that has said something: what, and where the rest comes from."""

    made: _Try
    permit: Permit
    pieces: list[Piece]
    rest: AsyncIterator[Piece]


class Listener(Protocol):
    """Hears an answer on its way to the client. It must be quick and not raise."""

    def add(self, piece: Piece) -> None:
        """A piece, before the client has it."""
        ...

    def end(self, backend: Backend) -> None:
        """That was all, and it was an answer of this backend."""
        ...


class Routed:
    """A call on its way: an `Attempt` over all of its attempts. Made by `Router.start`, in an event loop.

    Breaking off the iteration cancels it, and so does `cancel`. `spent` waits for the end of every attempt.
    """

    def __init__(
        self,
        plan: Plan,
        job: Job,
        budget: RetryBudget,
        before: Before,
        on_event: OnEvent,
        listener: Listener | None = None,
    ) -> None:
        self.plan = plan
        self.job = job
        self._budget = budget
        self._before = before
        self._on_event = on_event
        self._listener = listener
        self._tries: list[_Try] = []
        self._last: TokenmillError | None = None
        self._left = asyncio.Event()
        self._due_s = asyncio.get_running_loop().time() + (job.timeout_s or math.inf)
        self._asking = asyncio.create_task(self._ask_all())
        self.settled = asyncio.create_task(self._settle())
        """Ends when all is counted, whoever waits for it."""

    @property
    def backend(self) -> Backend | None:
        """Whose answer it is, from the first piece on."""
        return self._tries[-1].backend if self._tries else None

    def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces of the attempt that answers; the error of the last one if none does. Read it once.

        Raises UsageError for what no deployment can answer, BusyError if none takes calls.
        """
        return self._pieces()

    def cancel(self) -> None:
        """Give it up: the attempt that runs ends, and no other begins."""
        self._left.set()
        if self._tries and self._tries[-1].attempt is not None:
            self._tries[-1].attempt.cancel()

    async def spent(self) -> tuple[AttemptRecord, ...]:
        """Wait for the end, and say what each attempt used, in order. Does not raise."""
        return await asyncio.shield(self.settled)

    async def _settle(self) -> tuple[AttemptRecord, ...]:
        self._budget.enter()
        try:
            await asyncio.wait([self._asking])
            return tuple([await made.record() for made in self._tries])
        finally:
            self._budget.leave()

    async def _pieces(self) -> AsyncIterator[Piece]:
        try:
            won = await asyncio.shield(self._asking)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(won, Exception):
            raise won
        if won is None:
            return
        listener = self._listener
        try:
            for piece in won.pieces:
                if listener is not None:
                    listener.add(piece)
                yield piece
            async for piece in won.rest:
                if listener is not None:
                    listener.add(piece)
                yield piece
            if not self._left.is_set():
                won.permit.succeed()
                if listener is not None:
                    listener.end(won.made.backend)
        except TokenmillError as error:
            self._failed(won.made, won.permit, error)
            raise
        finally:
            self.cancel()
            won.permit.leave()

    async def _ask_all(self) -> "_Won | Exception | None":
        """Ask until one answers. The error if none does, None if the client left: it never raises."""
        try:
            for deployment in self.plan.order:
                if len(self._tries) < self.plan.max_attempts:
                    won = await self._ask(deployment, "fallback" if self._tries else "attempt")
                    if won is not None or self._left.is_set():
                        return won
            while (num_tries := len(self._tries)) and await self._may_ask_again():
                won = await self._ask_again()
                if won is not None or self._left.is_set():
                    return won
                if len(self._tries) == num_tries:
                    break
            return self._last or self.plan.unavailable()
        except Exception as error:  # a task that raises tells nobody; the reader raises it
            return error

    async def _may_ask_again(self) -> bool:
        """Wait for it, if there are budget and time for that; `_ask_again` gives the budget back."""
        order, wait_again_s = self.plan.order, self._budget.wait_s(len(self._tries))
        if len(self._tries) >= self.plan.max_attempts:
            return False
        asked_s = min(each.breaker.wait_s for each in order)
        time_left_s = self._due_s - asyncio.get_running_loop().time()
        if asked_s > self.plan.max_wait_s or asked_s + wait_again_s >= time_left_s:
            return False
        if not self._budget.take():
            self._report("retry-denied", order[0].backend)
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(asked_s + wait_again_s):
                await self._left.wait()
        return True

    async def _ask_again(self) -> "_Won | None":
        try:
            if self._left.is_set():
                return None
            return await self._ask(min(self.plan.order, key=lambda each: each.breaker.wait_s), "retry")
        finally:
            self._budget.give_back()

    async def _ask(self, deployment: Deployment, kind: RouteEventKind) -> "_Won | None":
        """One deployment's answer; None if it is another one's turn. Raises what ends the call."""
        backend = deployment.backend
        permit = deployment.breaker.enter() if backend.state == "ready" else None
        if permit is None:
            self._report("skipped", backend)
            return None
        won = None
        try:
            prepared = await self._prepared(backend)
            if prepared is not None and not self._left.is_set():
                won = await self._attempt(backend, permit, prepared, kind)
        finally:
            if won is None:
                permit.leave()
        return won

    async def _prepared(self, backend: Backend) -> Prepared | None:
        """The call as this backend takes it; None if it cannot, for another one may."""
        try:
            return self.plan.prepared.get(backend.name) or await backend.prepare(self.plan.call)
        except UsageError as error:
            self._last = self._last or error
            return None

    async def _attempt(
        self, backend: Backend, permit: Permit, prepared: Prepared, kind: RouteEventKind
    ) -> "_Won | None":
        number = len(self._tries) + 1
        await self._before(number, backend, prepared)
        made = _Try(number, backend)
        self._tries.append(made)
        if self._left.is_set():
            made.finish = "cancelled"
            return None
        if kind != "attempt":
            self._report(kind, backend)
        self._report("attempt", backend)
        try:
            made.attempt = backend.start(prepared, self._remaining())
            return await self._first(made, made.attempt, permit)
        except TokenmillError as error:
            self._failed(made, permit, error)
            if isinstance(error, UsageError | ExpiredError):
                raise
            self._last = error
            return None

    async def _first(self, made: _Try, attempt: Attempt, permit: Permit) -> "_Won | None":
        """Wait for more than the beginning: as long as only that is known, another one can answer."""
        held: list[Piece] = []
        rest = aiter(attempt)
        async for piece in rest:
            held.append(piece)
            if not isinstance(piece, Begin):
                permit.first_token()
                return _Won(made, permit, held, rest)
        if self._left.is_set():
            return None
        raise EndpointError(f"{made.backend.name}: it ended without an answer", hint="try again")

    def _remaining(self) -> Job:
        """The job with the time that is left of it."""
        if self.job.timeout_s is None:
            return self.job
        left_s = self._due_s - asyncio.get_running_loop().time()
        if left_s <= 0.0:
            raise ExpiredError("the time of this request is over", hint="allow it more time")
        return replace(self.job, timeout_s=left_s)

    def _failed(self, made: _Try, permit: Permit, error: TokenmillError) -> None:
        if self._left.is_set():
            return
        made.error = str(error.__cause__ or error)
        self._report("failure", made.backend, error)
        blame(permit, error)

    def _report(self, kind: RouteEventKind, backend: Backend, error: TokenmillError | None = None) -> None:
        name = "" if error is None else type(error).__name__
        self._on_event(RouteEvent(kind=kind, backend=backend.name, route=self.plan.route, error=name))


def blame(permit: Permit, error: TokenmillError) -> None:
    """What an error says about the deployment: it failed, it works, or nothing.

    An engine here that fails a request fails that one alone, and says itself when it takes no more.
    """
    if isinstance(error, BusyError):
        permit.fail(error.wait_s)
    elif isinstance(error, UsageError):
        permit.succeed()
    elif isinstance(error, EndpointError):
        permit.fail()
    else:
        permit.leave()


async def no_before(number: int, backend: Backend, prepared: Prepared) -> None:
    """A `Before` for those who set nothing aside."""
