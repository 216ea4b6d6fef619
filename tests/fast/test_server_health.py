"""Probes: 200 or 503 with the reason, also for an engine that lives and does not get on."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from starlette.requests import Request
from starlette.responses import Response

from tests.fast.server_fakes import FakeGateway, deployment, stats
from tokenmill.server.fleet import STALL_S, Deployed, Fleet
from tokenmill.server.gateway import Gateway
from tokenmill.server.health import Health


def probe(answer: Callable[[Request], Awaitable[Response]]) -> tuple[int, dict[str, Any]]:
    response = asyncio.run(cast(Any, answer(Request({"type": "http"}))))
    return response.status_code, json.loads(bytes(response.body))


def health(*deployments: Deployed, **gateway: Any) -> Health:
    return Health(cast(Gateway, FakeGateway(**gateway)), Fleet(deployments or (deployment(),)))


def test_a_server_that_works_is_live_and_ready_and_not_drained() -> None:
    assert probe(health().live)[0] == 200
    status, body = probe(health().ready)
    assert (status, body["status"], body["deployments"]) == (200, "ready", {"mock": "ready"})
    status, body = probe(health().drained)
    assert status == 503 and body["reasons"] == ["the server takes calls"]


def test_draining_is_not_ready_at_once_and_drained_at_the_end() -> None:
    status, body = probe(health(is_draining=True, num_calls=2).ready)
    assert status == 503 and body["reasons"] == ["the server is shutting down"]
    status, body = probe(health(is_draining=True, num_calls=2, num_unsettled=3).drained)
    assert status == 503
    assert body["reasons"] == ["2 calls are being answered", "3 calls are not in the ledger yet"]
    assert probe(health(is_draining=True).drained)[0] == 200


def test_a_loop_that_turns_late_is_not_live() -> None:
    late = health()
    late.tick(6.0)
    status, body = probe(late.live)
    assert status == 503 and "6.0 s late" in body["reasons"][0]
    late.tick(0.01)
    assert probe(late.live)[0] == 200


@pytest.mark.parametrize("state", ["live", "drained"])
def test_an_engine_that_does_not_run_is_not_ready(state: Any) -> None:
    status, body = probe(health(deployment("a"), deployment("b", state=state)).ready)
    assert status == 503 and len(body["reasons"]) == 1 and body["reasons"][0].startswith("b: ")


def test_an_upstream_that_fails_does_not_take_the_engines_away() -> None:
    upstream = deployment("far", is_local=False, breaker="open")
    status, body = probe(health(deployment(), upstream).ready)
    assert status == 200 and body["reasons"] == ["far: its breaker is open: calls failed"]
    assert probe(health(upstream).ready)[0] == 503
    assert probe(health(upstream, deployment("near", is_local=False)).ready)[0] == 200


class Engine:
    """An engine whose steps and work are set by hand, looked at every second."""

    def __init__(self) -> None:
        self.num_steps, self.num_running, self.now_s = 0, 0, 100.0
        names = {"name": "mock", "model": "mock", "is_local": True}
        self.fleet = Fleet([Deployed(**names, state=lambda: "ready", stats=self._stats)])  # type: ignore[arg-type]

    def _stats(self) -> Any:
        return stats(num_steps=self.num_steps, num_running=self.num_running)

    def go(self, seconds: float, *, steps_each: int = 0) -> bool:
        for _ in range(int(seconds)):
            self.now_s += 1.0
            self.num_steps += steps_each
            self.fleet.look(self.now_s)
        return self.fleet.is_ready()


def test_work_without_a_step_is_found_within_five_seconds() -> None:
    engine = Engine()
    assert engine.go(60)  # idle: no step is right
    engine.num_running = 3
    assert engine.go(60, steps_each=1)
    assert engine.go(2) and not engine.go(STALL_S - 1)
    assert "although there is work" in engine.fleet.troubles()[0].reason
    assert engine.go(1, steps_each=1)


def test_a_front_end_that_was_stopped_does_not_blame_the_engine() -> None:
    engine = Engine()
    engine.num_running = 1
    engine.go(5, steps_each=1)
    engine.now_s += 60.0
    engine.fleet.look(engine.now_s)
    assert engine.fleet.is_ready()
