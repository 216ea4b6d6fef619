"""Shadow calls: a share of the answers of a route is asked for a second time elsewhere, and kept in pairs.

A shadow begins when the answer to the client has ended, as the least urgent work there is. It can neither
delay nor fail that answer: so many at a time run, and those beyond are left out and counted.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Final, TypeAlias

from tokenmill.core import TokenmillError
from tokenmill.router.backend import Backend, Job
from tokenmill.router.budget import RetryBudget
from tokenmill.router.config import BudgetConfig, ShadowConfig
from tokenmill.router.events import OnEvent, RouteEvent, RouteEventKind
from tokenmill.router.routed import AttemptRecord, Deployment, Plan, Routed, no_before
from tokenmill.wire import Call, Piece, Reply, ReplyBuilder

__all__ = ["OnPair", "Pair", "ShadowTarget", "Shadows"]

_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A call that was answered twice. `shadow` is None where that failed; `record` is what it used.

    `record` is None if no attempt was made at all. Its number is 1, whatever the client's attempts were.
    `begun_s` is the Unix time at which the client's call began.
    """

    route: str
    call: Call
    job: Job
    primary_backend: str
    primary: Reply
    shadow_backend: str
    shadow: Reply | None
    record: AttemptRecord | None
    begun_s: float = 0.0


OnPair: TypeAlias = Callable[[Pair], Awaitable[None]]
"""Takes a pair. What it raises is counted as a failure of the shadow and goes no further."""


@dataclass(frozen=True, kw_only=True)
class ShadowTarget:
    """Who answers a second time, and how often."""

    deployment: Deployment
    config: ShadowConfig


class Shadows:
    """The shadow calls of one router that are open now."""

    def __init__(self, on_pair: OnPair, on_event: OnEvent, random: Random) -> None:
        self._on_pair = on_pair
        self._on_event = on_event
        self._random = random
        self._tasks: dict[asyncio.Task[None], str] = {}

    def drawn(self, route: str, target: ShadowTarget, call: Call, job: Job) -> "_Copy | None":
        """What hears the answer to the client, if this call is one of those that are asked twice."""
        if self._random.random() >= target.config.share:
            return None
        return _Copy(self, route, target, call, job)

    def begin(self, copy: "_Copy", backend: Backend, primary: Reply) -> None:
        """Ask again, if few enough are open."""
        name = copy.target.deployment.backend.name
        if list(self._tasks.values()).count(copy.route) >= copy.target.config.max_open:
            self.report("shadow-dropped", copy.route, name)
            return
        self.report("shadow", copy.route, name)
        task = asyncio.create_task(self._run(copy, backend.name, primary))
        self._tasks[task] = copy.route
        task.add_done_callback(self._tasks.pop)

    def report(self, kind: RouteEventKind, route: str, backend: str, error: str = "") -> None:
        """Tell what happened."""
        self._on_event(RouteEvent(kind=kind, backend=backend, route=route, error=error))

    async def drain(self, deadline_s: float) -> None:
        """Wait for those that are open."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=deadline_s)

    async def close(self) -> None:
        """Give up those that are open."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, copy: "_Copy", primary_backend: str, primary: Reply) -> None:
        backend = copy.target.deployment.backend
        try:
            shadow, record = await self._answer(copy)
            pair = Pair(
                route=copy.route,
                call=copy.call,
                job=copy.job,
                primary_backend=primary_backend,
                primary=primary,
                shadow_backend=backend.name,
                shadow=shadow,
                record=record,
                begun_s=copy.begun_s,
            )
            await self._on_pair(pair)
        except Exception as error:  # whatever it is, it is not the client's affair
            self.report("shadow-failure", copy.route, backend.name, type(error).__name__)

    async def _answer(self, copy: "_Copy") -> tuple[Reply | None, AttemptRecord | None]:
        """The second answer: one attempt at one deployment, behind its breaker."""
        plan = Plan(
            route=copy.route,
            call=replace(copy.call, tier="batch"),
            order=(copy.target.deployment,),
            max_attempts=1,
            max_wait_s=0.0,
        )
        timeout_s = copy.job.timeout_s or _TIMEOUT_S
        job = replace(copy.job, request_id=f"{copy.job.request_id}-shadow", tier="batch", timeout_s=timeout_s)
        budget = RetryBudget(BudgetConfig(share=0.0, spare=0), self._random)
        routed = Routed(plan, job, budget, no_before, lambda event: None)
        builder, reply = ReplyBuilder(), None
        try:
            async for piece in routed:
                builder.add((piece,))
            reply = builder.reply()
        except TokenmillError as error:
            name = copy.target.deployment.backend.name
            self.report("shadow-failure", copy.route, name, type(error).__name__)
        finally:
            routed.cancel()
        records = await routed.spent()
        return reply, records[0] if records else None


class _Copy:
    """A copy of one answer, made while the client gets it."""

    def __init__(self, shadows: Shadows, route: str, target: ShadowTarget, call: Call, job: Job) -> None:
        self.route = route
        self.target = target
        self.call = call
        self.job = job
        self.begun_s = time.time()
        self._shadows = shadows
        self._builder: ReplyBuilder | None = ReplyBuilder()

    def add(self, piece: Piece) -> None:
        """As of `Listener`. An answer without measure is not copied."""
        if self._builder is not None:
            try:
                self._builder.add((piece,))
            except TokenmillError:
                self._builder = None

    def end(self, backend: Backend) -> None:
        """As of `Listener`."""
        if self._builder is None:
            return
        try:
            primary = self._builder.reply()
        except TokenmillError:
            return
        self._shadows.begin(self, backend, primary)
