"""Everything that watches a server, put together: counts, logs, health, objectives, the dashboard.

    observer = Observer(ObserverConfig(slo=...), prices=load_prices())
    gateway = Gateway(..., on_settled=observer.settled)
    observer.watch(gateway, backends, ledger)
    app = create_app(..., more=observer.routes)
    async with observer.looking():                  # once a second
        serve(observer.wrap(app))                   # outside of the edge: sees what that refuses

What watches must not disturb: nothing here raises into a call, waits for a disk, or keeps text of a client.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Protocol, get_args

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tokenmill import __version__
from tokenmill.core import Tier, TokenmillError
from tokenmill.costs.prices import Price
from tokenmill.router import Backend, BreakerState, RouteEvent
from tokenmill.server.caller import NOBODY, Caller
from tokenmill.server.dashboard import (
    BatchLine,
    DashboardPages,
    ErrorLine,
    Gauges,
    History,
    Ledger,
    PageConfig,
    Sources,
    Today,
    View,
    make_view,
)
from tokenmill.server.edge import Asgi, Receive, Scope_, Send
from tokenmill.server.fleet import Fleet, deployed
from tokenmill.server.gateway import Gateway, Settled
from tokenmill.server.health import Health
from tokenmill.server.logs import log_http, log_settled
from tokenmill.server.metrics import Gauge, Metrics
from tokenmill.server.slo import WINDOWS_S, CallTimes, SloConfig, SloTracker
from tokenmill.store import Store
from tokenmill.store.object_records import Batch

__all__ = ["Batches", "Observer", "ObserverConfig", "route_label"]

_LOOK_S: Final = 1.0
_LEDGER_S: Final = 15.0
_WINDOWS: Final = dict(zip(WINDOWS_S, ("5m", "1h", "6h"), strict=True))
_MOST_BATCHES: Final = 100
_LEFT: Final = 499
"""Stands for the status of an answer whose client left before it began."""
_NANO: Final = 1e-9
_REFUSALS: Final = frozenset({"BudgetError", "LimitError", "UsageError", "FieldError", "NotFoundError"})
"""Errors of an attempt that say what was wrong with the call, or that its key may not have it."""
_LOGGED: Final = frozenset({"failure", "breaker-open", "breaker-closed", "shadow-failure"})
_LOG: Final = logging.getLogger("tokenmill.server.router")
_ROUTES: Final = frozenset(
    {
        *("/", "/openapi.json", "/metrics", "/health", "/health/live", "/health/ready", "/health/drained"),
        *("/dashboard/data.json", "/dashboard/style.css", "/dashboard/app.js"),
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"),
        *("/v1/messages", "/v1/messages/count_tokens"),
    }
)
_FAMILIES: Final = ("/v1/messages/batches", "/v1/models", "/v1/files", "/v1/batches", "/v1/responses")


@dataclass(frozen=True, kw_only=True)
class ObserverConfig:
    """`compare_with` is the price that savings are reckoned against at first: `PROVIDER/MODEL[:TIER]`."""

    slo: SloConfig = field(default_factory=SloConfig)
    compare_with: str = "openai/gpt-5-nano"


class Batches(Protocol):
    """Where batches are kept (`store.ObjectStore`)."""

    async def recent_batches(self, limit: int) -> list[Batch]:
        """Batches of all projects, those that have not ended first, then the newest."""
        ...


class Observer:
    """Watches one server, from one event loop."""

    def __init__(self, config: ObserverConfig, *, prices: Sequence[Price] = ()) -> None:
        self.metrics = Metrics(config.slo)
        self._page = PageConfig(version=__version__, prices=prices, compare_with=config.compare_with)
        self._slo = SloTracker(config.slo)
        self._history = History()
        self.routes: list[Route] = []
        self._gateway: Gateway | None = None
        self._fleet = Fleet(())
        self._health: Health | None = None
        self._ledger: Ledger | None = None
        self._batches: Batches | None = None
        self._batch_lines: list[BatchLine] = []

    def settled(self, settled: Settled) -> None:
        """Take a call that has ended (`Gateway(on_settled=...)`)."""
        times, now_s = _times(settled), time.monotonic()
        self.metrics.settled(settled, times)
        log_settled(settled)
        if times is None:
            return
        self._slo.add(times, now_s)
        num_prompt_tokens = settled.entries[-1].num_prompt_tokens if settled.entries else 0
        self._history.add(times, num_prompt_tokens, now_s)
        if not times.is_answered and not times.is_given_up:
            caller = settled.caller
            where = f"{times.model} ({times.tier}), key {caller.key.id}"
            self._history.fail(ErrorLine(time.time(), times.finish, where, caller.request_id))

    def routed(self, event: RouteEvent) -> None:
        """Take what the router did (`Router(on_event=...)`)."""
        self.metrics.routed(event.kind, event.backend)
        if event.kind in _LOGGED:
            fields = {"kind": event.kind, "deployment": event.backend, "route": event.route}
            _LOG.warning("router", extra={**fields, "reason": event.error})

    def watch(
        self,
        gateway: Gateway,
        backends: Sequence[Backend],
        ledger: Ledger | None = None,
        store: Store | None = None,
    ) -> None:
        """Watch these from now on; `routes` are then those of health, metrics and the dashboard."""
        self._gateway, self._ledger = gateway, ledger
        self._fleet = Fleet([deployed(each, _breaker(gateway, each)) for each in backends])
        self._health = Health(gateway, self._fleet)
        self.metrics.watch_fleet(self._fleet)
        self.metrics.watch(self._gauges(gateway, self._health))
        if store is not None:
            self.metrics.watch(
                [_number("tokenmill_store_writable", "1 if it is", lambda: _is_writable(store))]
            )
        pages = DashboardPages(self._page, self.look, lambda: gateway.models)
        scrape = Route("/metrics", self._scrape, methods=["GET"])
        self.routes = [scrape, *self._health.routes(), *pages.routes()]

    def watch_batches(self, batches: Batches) -> None:
        """Show these, too."""
        self._batches = batches

    def wrap(self, app: Asgi) -> Asgi:
        """An application whose every HTTP answer is counted."""
        return _Watched(app, self._answered)

    @contextlib.asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look at the engines once a second until the block ends."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        assert self._health is not None, "watch comes first"
        next_ledger_s = 0.0
        due_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            self._health.tick(now_s - due_s)
            self._fleet.look(now_s)
            self._history.look(self._now(), now_s)
            if now_s >= next_ledger_s:
                next_ledger_s = now_s + _LEDGER_S
                await self._read()
            due_s = time.monotonic() + _LOOK_S
            await asyncio.sleep(_LOOK_S)

    async def look(self, price: Price | None) -> View:
        """What the dashboard shows now."""
        assert self._gateway is not None, "watch comes first"
        await self._read()
        now_s = time.monotonic()
        self._history.look(self._now(), now_s)
        return make_view(
            Sources(
                history=self._history,
                fleet=self._fleet,
                today=Today() if self._ledger is None else self._ledger.today,
                burns=self._slo.burns(now_s),
                by_tier=self._by_tier(),
                batches=self._batch_lines,
                is_draining=self._gateway.is_draining,
                price=price,
                now_s=now_s,
            )
        )

    async def _read(self) -> None:
        """Read what the store has of the day and of batches. Does not raise: what was read last is kept."""
        if self._ledger is not None:
            await self._ledger.refresh()
        if self._batches is not None:
            with contextlib.suppress(TokenmillError):
                found = await self._batches.recent_batches(_MOST_BATCHES)
                self._batch_lines = [_batch_line(each) for each in found]

    async def _scrape(self, request: Request) -> Response:
        text, content_type = self.metrics.scrape(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type, "cache-control": "no-store"})

    def _answered(self, scope: Scope_, status: int, request_id: str, total_s: float) -> None:
        """An HTTP answer has been given."""
        caller: Caller | None = scope.get("tokenmill.caller")
        key_id = NOBODY.id if caller is None else caller.key.id
        route = route_label(scope["path"])
        self.metrics.answered(route, status)
        method = str(scope["method"])[:16]
        log_http(
            method=method, route=route, status=status, request_id=request_id, key_id=key_id, total_s=total_s
        )
        if status >= 400 and status != _LEFT and route.startswith("/v1/"):
            where = f"{route}, key {key_id}"
            self._history.fail(ErrorLine(time.time(), _phrase(status), where, request_id))

    def _open_batches(self) -> list[BatchLine]:
        return [each for each in self._batch_lines if not each.has_ended]

    def _num_open_lines(self) -> float:
        return sum(each.num_lines - each.num_done for each in self._open_batches())

    def _by_tier(self) -> dict[Tier, tuple[int, int]]:
        """Calls that wait for their first token, and that have it, by tier."""
        assert self._gateway is not None
        counts = Counter((each.tier, each.ttft_s is None) for each in self._gateway.answers)
        return {tier: (counts[tier, True], counts[tier, False]) for tier in get_args(Tier)}

    def _now(self) -> Gauges:
        stats = [each.stats() for each in self._fleet.deployments if each.stats is not None]
        num_blocks = sum(each.num_blocks for each in stats)
        in_use = sum(each.num_blocks_in_use for each in stats)
        by_tier = self._by_tier().values()
        return Gauges(
            kv_share=in_use / num_blocks if num_blocks else None,
            num_waiting=sum(waiting for waiting, _ in by_tier),
            num_answering=sum(answering for _, answering in by_tier),
        )

    def _gauges(self, gateway: Gateway, health: Health) -> list[Gauge]:
        def by_tier() -> Iterable[tuple[tuple[str, ...], float]]:
            for tier, (waiting, answering) in self._by_tier().items():
                yield (tier, "waiting"), waiting
                yield (tier, "answering"), answering

        def burns() -> Iterable[tuple[tuple[str, ...], float]]:
            for burn in self._slo.burns(time.monotonic()):
                names = (burn.objective.model or "*", burn.objective.tier or "*", burn.name)
                for window, value in zip(WINDOWS_S, burn.rates, strict=True):
                    yield (*names, _WINDOWS[window]), 0.0 if value is None else value

        def budgets() -> Iterable[tuple[tuple[str, ...], float]]:
            today = Today() if self._ledger is None else self._ledger.today
            for each in today.budgets:
                yield (each.key_id,), each.left_nano_usd * _NANO

        return [
            Gauge(
                name="tokenmill_open_calls",
                help="Calls that wait for their first token, or have it",
                labels=("tier", "state"),
                read=by_tier,
            ),
            Gauge(
                name="tokenmill_slo_burn_rate",
                help="Share of bad calls by the share that may be bad",
                labels=("model", "tier", "objective", "window"),
                read=burns,
            ),
            Gauge(
                name="tokenmill_budget_left_usd",
                help="What is left of a key's budget, by the key's public id",
                labels=("key_id",),
                read=budgets,
            ),
            _number(
                "tokenmill_open_batches", "Batches that have not ended", lambda: len(self._open_batches())
            ),
            _number("tokenmill_open_batch_lines", "Lines that wait in them", self._num_open_lines),
            _number("tokenmill_unsettled_calls", "Not in the ledger yet", lambda: gateway.num_unsettled),
            _number("tokenmill_draining", "1 while the server shuts down", lambda: gateway.is_draining),
            _number("tokenmill_event_loop_lag_seconds", "How late the loop is", lambda: health.lag_s),
        ]


def route_label(path: str) -> str:
    """A path as one of few words, whatever was asked for."""
    if path in _ROUTES:
        return path
    for family in _FAMILIES:
        if path == family or path.startswith(f"{family}/"):
            return family
    return "other"


def _breaker(gateway: Gateway, backend: Backend) -> Callable[[], BreakerState]:
    return lambda: gateway.router.breaker_state(backend.name)


def _times(settled: Settled) -> CallTimes | None:
    """How a call went; None if it was refused before it cost anything, by no fault of the server."""
    if settled.is_refused:
        return None
    model = settled.call.model if settled.call is not None else ""
    if not settled.entries:
        return CallTimes(model, settled.tier, "failed", None, settled.total_s, 0) if model else None
    if settled.records[-1].error in _REFUSALS:
        return None
    last = settled.entries[-1]
    return CallTimes(
        model=last.model,
        tier=last.tier,
        finish=last.finish,
        ttft_s=settled.ttft_s,
        total_s=settled.total_s,
        num_output_tokens=last.num_output_tokens,
    )


class _Watched:
    """Tells how each HTTP request was answered."""

    def __init__(self, app: Asgi, on_answered: Callable[[Scope_, int, str, float], None]) -> None:
        self._app = app
        self._on_answered = on_answered

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, request_id, began_s = _LEFT, "", time.monotonic()

        async def passed_on(message: MutableMapping[str, Any]) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status, request_id = message["status"], _request_id(message)
            await send(message)

        try:
            await self._app(scope, receive, passed_on)
        finally:
            with contextlib.suppress(Exception):
                self._on_answered(scope, status, request_id, time.monotonic() - began_s)


def _request_id(message: MutableMapping[str, Any]) -> str:
    for name, value in message.get("headers", ()):
        if name in (b"x-request-id", b"request-id"):
            return str(value, "latin-1")
    return ""


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase.lower()}"
    except ValueError:
        return str(status)


def _number(name: str, text: str, value: Callable[[], float]) -> Gauge:
    return Gauge(name=name, help=text, read=lambda: [((), float(value()))])


def _is_writable(store: Store) -> bool:
    try:
        store.admit()
    except TokenmillError:
        return False
    return True


def _batch_line(batch: Batch) -> BatchLine:
    num_failed = batch.num_errored + batch.num_expired
    return BatchLine(
        id=batch.id,
        state=batch.outcome if batch.has_ended else batch.status,
        num_lines=batch.num_lines,
        num_done=batch.num_answered + num_failed + batch.num_cancelled,
        num_failed=num_failed,
        has_ended=batch.has_ended,
    )
