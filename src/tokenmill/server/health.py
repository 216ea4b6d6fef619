"""`/health/live`, `/health/ready` and `/health/drained`: three answers, 200 or 503, with reasons.

live: this process turns its event loop, seen by the answer itself and by how late its clock is. ready: calls
should come here, because engines work and nothing is being shut down. drained: everything that was admitted
has ended and is in the ledger, so the process may be ended. A probe needs no key, and learns no more than
names.
"""

import time
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tokenmill.server.fleet import Fleet
from tokenmill.server.gateway import Gateway

__all__ = ["Health"]

_LATE_S: Final = 5.0
"""A loop that turns this late is as good as stopped."""
_HEADERS: Final = {"cache-control": "no-store"}


class Health:
    """Answers probes. `tick` is to be called every second or so, by the loop that answers."""

    def __init__(self, gateway: Gateway, fleet: Fleet) -> None:
        self._gateway = gateway
        self._fleet = fleet
        self._started_s = time.monotonic()
        self.lag_s = 0.0

    def tick(self, lag_s: float) -> None:
        """The loop turned, this much later than it was asked to."""
        self.lag_s = max(0.0, lag_s)

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/health", self.ready, methods=["GET"]),
            Route("/health/live", self.live, methods=["GET"]),
            Route("/health/ready", self.ready, methods=["GET"]),
            Route("/health/drained", self.drained, methods=["GET"]),
        ]

    async def live(self, request: Request) -> Response:
        """GET /health/live."""
        late = [f"the event loop is {self.lag_s:.1f} s late"] if self.lag_s >= _LATE_S else []
        uptime_s = round(time.monotonic() - self._started_s, 1)
        return _answer("live", not late, late, {"uptime_s": uptime_s, "loop_lag_s": round(self.lag_s, 4)})

    async def ready(self, request: Request) -> Response:
        """GET /health/ready."""
        reasons = [f"{each.deployment}: {each.reason}" for each in self._fleet.troubles()]
        if self._gateway.is_draining:
            reasons.insert(0, "the server is shutting down")
        is_ready = not self._gateway.is_draining and self._fleet.is_ready()
        states = {each.name: each.state() for each in self._fleet.deployments}
        return _answer("ready", is_ready, reasons, {"deployments": states})

    async def drained(self, request: Request) -> Response:
        """GET /health/drained."""
        num_open, num_unsettled = self._gateway.num_calls, self._gateway.num_unsettled
        reasons = [] if self._gateway.is_draining else ["the server takes calls"]
        if num_open:
            reasons.append(f"{num_open} calls are being answered")
        if num_unsettled:
            reasons.append(f"{num_unsettled} calls are not in the ledger yet")
        return _answer("drained", not reasons, reasons, {"open": num_open, "unsettled": num_unsettled})


def _answer(name: str, is_so: bool, reasons: list[str], more: dict[str, object]) -> Response:
    body = {"status": name if is_so else f"not {name}", "reasons": reasons, **more}
    return JSONResponse(body, status_code=200 if is_so else 503, headers=_HEADERS)
