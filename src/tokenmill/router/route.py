"""Names that clients ask for, and who answers them.

    plan = await router.prepare(call)           # NotFoundError, UsageError: nothing was spent
    routed = router.start(plan, job, before)    # from here on it costs
    async for piece in routed: ...
    records = await routed.spent()              # one for each attempt, in order

The first deployment is drawn by weight from those that take calls; the others follow in the route's order,
as long as nothing of an answer has come. A deployment's own name is a route to it alone.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from tokenmill.core import UsageError
from tokenmill.router.backend import Backend, Job
from tokenmill.router.breaker import Breaker, BreakerState
from tokenmill.router.budget import RetryBudget
from tokenmill.router.config import BreakerConfig, BudgetConfig, RouteConfig, TargetConfig
from tokenmill.router.events import OnEvent, RouteEvent, RouteEventKind
from tokenmill.router.routed import Before, Deployment, Plan, Routed, no_before
from tokenmill.router.shadow import OnPair, Pair, Shadows, ShadowTarget
from tokenmill.router.vectors import RoutedVectors, ask_vectors
from tokenmill.wire import Call, Prompt, UnknownModelError

__all__ = ["Route", "Router"]

_MOST_NAMED: Final = 20
_KINDS: Final[dict[BreakerState, RouteEventKind]] = {
    "closed": "breaker-closed",
    "open": "breaker-open",
    "half-open": "breaker-half-open",
}


@dataclass(frozen=True, kw_only=True)
class Route:
    """A route whose deployments are found: `targets` are deployment and weight, in the order of fallback."""

    name: str
    targets: tuple[tuple[Deployment, float], ...]
    max_attempts: int
    shadow: ShadowTarget | None = None


async def _no_pair(pair: Pair) -> None:
    """For routers without shadows."""


class Router:
    """All routes and deployments of one server, in one event loop; `random` and `clock` are for tests.

    Raises UsageError for two deployments of a name, or a route to a deployment that is not there.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        routes: Sequence[RouteConfig] = (),
        *,
        breaker: BreakerConfig | None = None,
        budget: BudgetConfig | None = None,
        on_event: OnEvent = lambda event: None,
        on_pair: OnPair = _no_pair,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._random = random or Random()
        self._on_event = on_event
        self._budget_config = budget or BudgetConfig()
        self._budget = RetryBudget(self._budget_config, self._random)
        self._shadows = Shadows(on_pair, on_event, self._random)
        self._live: set[Routed] = set()
        breaker = breaker or BreakerConfig()
        self._deployments: dict[str, Deployment] = {}
        for backend in backends:
            if backend.name in self._deployments:
                raise UsageError(f"two deployments are called {backend.name}", hint="give each its own name")
            state = Breaker(breaker, clock, self._reporter(backend.name))
            self._deployments[backend.name] = Deployment(backend, state)
        self._routes: dict[str, Route] = {}
        for config in routes:
            if config.name in self._routes:
                raise UsageError(f"two routes are called {config.name}", hint="give each its own name")
            self._routes[config.name] = self._route(config)
        for name in self._deployments:
            only = RouteConfig(name=name, targets=(TargetConfig(backend=name),))
            self._routes.setdefault(name, self._route(only))

    @property
    def models(self) -> list[str]:
        """The names that clients can ask for, sorted."""
        return sorted(self._routes)

    @property
    def backends(self) -> list[Backend]:
        """All deployments, in the order in which they were given."""
        return [each.backend for each in self._deployments.values()]

    def breaker_state(self, backend: str) -> BreakerState:
        """The state of a deployment's breaker."""
        return self._deployments[backend].breaker.state

    def resolve(self, model: str) -> Route:
        """The route of a name. Raises NotFoundError with those that there are."""
        route = self._routes.get(model)
        if route is None:
            names = self.models
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            shown = model[:80] if model.isprintable() else "of that name"
            hint = f"known here: {', '.join(names[:_MOST_NAMED])}{more}"
            raise UnknownModelError(f"there is no model {shown}", hint=hint)
        return route

    async def prepare(self, call: Call) -> Plan:
        """Draw the order in which deployments are asked, and let the first that can check the call.

        Raises NotFoundError for an unknown model, UsageError for a call that no deployment of it can answer.
        """
        route = self.resolve(call.model)
        plan = self._plan(route, call)
        refusal: UsageError | None = None
        for deployment in plan.order:
            try:
                prepared = await deployment.backend.prepare(call)
            except UsageError as error:
                refusal = refusal or error
                continue
            return replace(plan, prepared={deployment.backend.name: prepared})
        assert refusal is not None
        raise refusal

    def start(self, plan: Plan, job: Job, before: Before = no_before) -> Routed:
        """Begin to answer. What goes wrong is raised where the pieces are read."""
        target = self.resolve(plan.route).shadow
        copy = None if target is None else self._shadows.drawn(plan.route, target, plan.call, job)
        routed = Routed(plan, job, self._budget, before, self._on_event, copy)
        self._live.add(routed)
        routed.settled.add_done_callback(lambda _: self._live.discard(routed))
        return routed

    async def embed(
        self, model: str, texts: Sequence[Prompt], job: Job, before: Before = no_before
    ) -> RoutedVectors:
        """Vectors of texts from the first deployment that gives them; each is asked once.

        Raises NotFoundError for an unknown model, and what `before` raises. Do not cancel it, for then
        nobody knows what was spent.
        """
        plan = self._plan(self.resolve(model), Call(model=model, prompts=tuple(texts)))
        return await ask_vectors(plan, job, before, self._on_event)

    async def drain(self, deadline_s: float) -> None:
        """Take no more calls; wait for those that are open and their shadows, so long at most."""
        due_s = time.monotonic() + deadline_s
        await asyncio.gather(*(each.drain(deadline_s) for each in self.backends))
        if self._live:
            left_s = max(0.0, due_s - time.monotonic())
            await asyncio.wait([routed.settled for routed in self._live], timeout=left_s)
        await self._shadows.drain(max(0.0, due_s - time.monotonic()))

    async def close(self) -> None:
        """End everything at once."""
        live = list(self._live)
        for routed in live:
            routed.cancel()
        await self._shadows.close()
        await asyncio.gather(*(each.close() for each in self.backends))
        await asyncio.gather(*(routed.settled for routed in live), return_exceptions=True)

    def _route(self, config: RouteConfig) -> Route:
        names = [target.backend for target in config.targets]
        names += [config.shadow.backend] if config.shadow else []
        for name in names:
            if name not in self._deployments:
                known = ", ".join(sorted(self._deployments)) or "none"
                raise UsageError(
                    f"the route {config.name} names the deployment {name}, which is not there",
                    hint=f"known: {known}",
                )
        shadow = config.shadow
        return Route(
            name=config.name,
            targets=tuple((self._deployments[each.backend], each.weight) for each in config.targets),
            max_attempts=config.max_attempts,
            shadow=None
            if shadow is None
            else ShadowTarget(deployment=self._deployments[shadow.backend], config=shadow),
        )

    def _plan(self, route: Route, call: Call) -> Plan:
        """The first drawn by weight from those that take calls, then all others as they stand."""
        weighted = [(each, weight) for each, weight in route.targets if weight > 0.0]
        usable = [(each, weight) for each, weight in weighted if _is_usable(each)] or weighted
        draw = self._random.random() * math.fsum(weight for _, weight in usable)
        first = usable[-1][0]
        for each, weight in usable:
            draw -= weight
            if draw < 0.0:
                first = each
                break
        order = (first, *(each for each, _ in route.targets if each is not first))
        return Plan(
            route=route.name,
            call=call,
            order=order,
            max_attempts=route.max_attempts,
            max_wait_s=self._budget_config.max_wait_s,
        )

    def _reporter(self, name: str) -> Callable[[BreakerState], None]:
        return lambda state: self._report(_KINDS[state], name)

    def _report(self, kind: RouteEventKind, backend: str, route: str = "", error: str = "") -> None:
        self._on_event(RouteEvent(kind=kind, backend=backend, route=route, error=error))


def _is_usable(deployment: Deployment) -> bool:
    breaker = deployment.breaker
    return deployment.backend.state == "ready" and breaker.state != "half-open" and breaker.wait_s <= 0.0
