"""S5: clients that leave, at every moment of a call: nothing is left behind, and all of it is in the ledger.

    python -m benchmarks.reliability.s5 [--cases 10000] [--seed 1] [--guard off]

A client leaves while it sends the head, while its call waits for a place, in the middle of a long prompt,
after the first token, in the middle, and at the last token; of a stream and of a whole answer, with one and
with three choices. Checked: every call that the engine ended is settled once, with the engine's own counts;
blocks and places are free again whenever nothing runs; and the engine's steps between the cancellation and
the end of a call, at most 2 (p99; a call that is not cancelled counts from the leaving). Without the guard
a client that leaves does not cancel its call.
"""

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import uvicorn

from benchmarks.reliability import command
from benchmarks.reliability.raw import post
from scripts.scorecard import Line
from tokenmill.core import Completion, Request
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockModel, MockScript
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.engine.serving.supervisor import SupervisorConfig
from tokenmill.router import Router
from tokenmill.router.local import LocalBackend, LocalConfig
from tokenmill.server import answering
from tokenmill.server.app import create_app
from tokenmill.server.edge import EdgeConfig
from tokenmill.server.gateway import Gateway, GatewayConfig
from tokenmill.server.pricing import PriceList
from tokenmill.server.protocol import Connections, HttpLimits, protocol_factory
from tokenmill.store import Entry, Key, Ticket

__all__ = ["PHASES", "main", "run"]

PHASES: Final = ("head", "queued", "prefill", "first", "middle", "last")
_STEP_S: Final = 0.05
_AT_ONCE: Final = 20
_ROUND: Final = 500
_LONG: Final = 3000
_MAX_STEPS: Final = 2


@dataclass
class Money:
    """Accounts that keep everything that they are told."""

    reserved: Counter[tuple[str, int]] = field(default_factory=Counter)
    entries: list[Entry] = field(default_factory=list)

    def now_s(self) -> float:
        """The time."""
        return time.time()

    async def reserve(
        self, key: Key, request_id: str, attempt: int, nano_usd: int, *, durable: bool
    ) -> Ticket:
        """Set aside."""
        self.reserved[request_id, attempt] += 1
        return Ticket(
            request_id=request_id, attempt=attempt, key_id=key.id, nano_usd=0, at_s=0.0, is_durable=durable
        )

    async def settle(self, entries: Sequence[Entry]) -> int:
        """Keep the lines."""
        self.entries += entries
        return len(entries)


class _Steps:
    """The engine's step when each of its requests was cancelled, and when it ended."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.cancelled: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        tell, end = engine._tell_cancelled, engine._end

        def tell_cancelled(record: Any) -> None:
            self.cancelled.setdefault(record.request.request_id, engine.stats.num_steps)
            tell(record)

        def end_one(record: Any, completion: Completion) -> None:
            self.ended[record.request.request_id] = engine.stats.num_steps
            end(record, completion)

        engine._tell_cancelled = tell_cancelled  # type: ignore[method-assign]
        engine._end = end_one  # type: ignore[method-assign]

    def late(self, left: dict[str, int], names: dict[str, str]) -> list[int]:
        """Steps that each request went on, in order of length; `left` by the name of its client."""
        found = (self.ended[i] - self.cancelled.get(i, left[names[i]]) for i in self.ended)
        return sorted(max(0, steps) for steps in found)


@dataclass
class _Stage:
    """A server in this process, its engine, and what both say."""

    port: int
    backend: LocalBackend
    gateway: Gateway
    connections: Connections
    money: Money
    ends: dict[str, tuple[Completion, ...]]
    steps: "_Steps"

    def left(self) -> list[str]:
        """What there is although nothing runs."""
        stats = self.backend.engine.stats
        counts = {
            "blocks": stats.num_blocks_in_use,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "in flight": stats.num_in_flight,
            "calls": self.gateway.num_calls,
            "connections": len(self.connections),
        }
        return [f"{count} {name}" for name, count in counts.items() if count]


@contextlib.asynccontextmanager
async def _opened() -> AsyncIterator[_Stage]:
    script = MockScript(step_s=_STEP_S, context_length=8192)
    spec = EngineSpec(mock=script, config=LLMConfig(max_batch=12, max_rows=256, kv_tokens=1 << 16))
    backend = await LocalBackend.open(
        LocalConfig(name="mock", model="mock"), MockModel(script), spec, SupervisorConfig(beat_s=0.004)
    )
    ends: dict[str, tuple[Completion, ...]] = {}
    steps = _Steps(backend.engine)
    settle = backend.engine._on_end
    assert settle is not None

    def on_end(request: Request, completions: tuple[Completion, ...], *more: Any) -> None:
        assert request.request_id not in ends, "a request ended twice"
        ends[request.request_id] = completions
        settle(request, completions, *more)

    backend.engine._on_end = on_end
    money = Money()
    gateway = Gateway(Router([backend], ()), money, PriceList(prices={}), GatewayConfig())

    async def find_key(secret: str) -> None:
        return None

    connections = Connections(HttpLimits())
    app = create_app(gateway, EdgeConfig(), find_key)
    config = uvicorn.Config(
        app,
        http=protocol_factory(connections),  # type: ignore[arg-type]
        port=0,
        lifespan="off",
        log_config=None,
        access_log=False,
        ws="none",
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield _Stage(port, backend, gateway, connections, money, ends, steps)
    finally:
        server.should_exit = True
        await serving
        await backend.close()


@dataclass(frozen=True)
class _Trial:
    """One client: when it leaves, and what it asked for."""

    name: str
    phase: str
    stream: bool
    n: int
    wait_s: float

    @classmethod
    def draw(cls, number: int, rng: random.Random) -> "_Trial":
        """The trial with this number: phases and kinds in turn, moments at random."""
        phase = PHASES[number % len(PHASES)]
        steps = {"head": 0.5, "queued": 0.2, "prefill": 6, "first": 2, "middle": 6, "last": 3}[phase]
        kind = number // len(PHASES)
        wait_s = rng.uniform(0.2, 1.0) * steps * _STEP_S
        return cls(f"t{number}", phase, kind % 2 == 0, 3 if kind % 4 > 1 else 1, wait_s)

    @property
    def data(self) -> bytes:
        """The request."""
        body: dict[str, Any] = {"model": "mock", "prompt": f"{self.name} says", "n": self.n}
        body["max_tokens"] = 3 if self.phase == "last" else 40
        if self.phase == "prefill":
            body["prompt"] *= _LONG // len(body["prompt"])
        if self.stream:
            body["stream"] = True
        return post("/v1/completions", json.dumps(body).encode(), f"x-tokenmill-feature: {self.name}\r\n")

    @property
    def num_events(self) -> int:
        """Events that the client of a stream waits for before it leaves."""
        return {"first": 1, "middle": 6 * self.n, "last": 3 * self.n}.get(self.phase, 0)


async def _leave(stage: _Stage, trial: _Trial) -> int:
    """Ask, and leave; the engine's step then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
    data = trial.data
    writer.write(data[: len(data) // 3] if trial.phase == "head" else data)
    if trial.stream and trial.num_events:
        seen = 0
        while seen < trial.num_events and (more := await reader.read(65536)):
            seen += more.count(b"data: ")
    else:
        await asyncio.sleep(trial.wait_s)
    writer.transport.abort()
    return stage.backend.engine.stats.num_steps


async def _storm(cases: int, seed: int) -> tuple[list[str], dict[str, float | int | str]]:
    rng, faults, steps_left = random.Random(seed), list[str](), dict[str, int]()
    async with _opened() as stage:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(trial: _Trial) -> None:
            async with turns:
                steps_left[trial.name] = await _leave(stage, trial)

        for first in range(0, cases, _ROUND):
            trials = [_Trial.draw(at, rng) for at in range(first, min(first + _ROUND, cases))]
            await asyncio.gather(*map(one, trials))
            faults += await _settled(stage)
        faults += _account(stage)
        money = stage.money
        late = stage.steps.late(steps_left, {entry.request_id: entry.feature for entry in money.entries})
    p99 = late[int(0.99 * (len(late) - 1))]
    if p99 > _MAX_STEPS:
        faults.append(f"p99 of steps to the end is {p99}")
    finishes = Counter(entry.finish for entry in money.entries)
    figures: dict[str, float | int | str] = {
        "calls in the ledger": len(money.entries),
        "of them cancelled": finishes["cancelled"],
        "output tokens": sum(entry.num_output_tokens for entry in money.entries),
        "steps from the cancellation to the end, p50 p99 max": f"{late[len(late) // 2]} {p99} {late[-1]}",
    }
    return faults, figures


async def _settled(stage: _Stage) -> list[str]:
    """Wait until nothing runs; what is left of it then."""
    deadline = time.monotonic() + 60.0
    while stage.left() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return stage.left()


def _account(stage: _Stage) -> list[str]:
    """Where ledger and engine differ."""
    faults = []
    entries = {entry.request_id: entry for entry in stage.money.entries}
    if len(entries) != len(stage.money.entries):
        faults.append("a call is in the ledger twice")
    if entries.keys() != stage.ends.keys():
        faults.append(f"{len(entries.keys() ^ stage.ends.keys())} calls are not in both engine and ledger")
    if {request_id for request_id, _ in stage.money.reserved} != entries.keys():
        faults.append("what was set aside was not settled")
    for name, entry in entries.items():
        ends = stage.ends.get(name, ())
        counted = sum(len(end.token_ids) for end in ends)
        if entry.num_output_tokens != counted or (ends and entry.finish not in _finishes(ends)):
            faults.append(f"{name}: {entry.num_output_tokens} tokens in the ledger, {counted} in the engine")
    return faults


def _finishes(ends: tuple[Completion, ...]) -> set[str]:
    return {end.finish_reason for end in ends}


async def _only_wait(answer: Any, receive: Any) -> None:
    """The control: a client that leaves is noticed, and nothing follows from it."""
    while (await receive())["type"] != "http.disconnect":
        pass


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """Let so many clients leave."""
    began = time.monotonic()
    cancel = answering._cancel_when_gone
    if not guard:
        answering._cancel_when_gone = _only_wait
    try:
        faults, figures = asyncio.run(_storm(cases, seed))
    finally:
        answering._cancel_when_gone = cancel
    return Line(
        name="s5",
        what="clients that leave in six phases: blocks, places, steps to the end, ledger against engine",
        cases=cases,
        violations=len(faults),
        seconds=time.monotonic() - began,
        figures={**figures, **{f"fault {at}": fault for at, fault in enumerate(faults[:5])}},
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    return command.main("s5", run, 10_000, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
