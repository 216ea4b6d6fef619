"""What the tests of the router share: a router over scripted backends, in virtual time."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from benchmarks.reliability.scripted_backend import ScriptedBackend
from tokenmill.core import Message
from tokenmill.router import (
    AttemptRecord,
    Before,
    Job,
    RouteConfig,
    RouteEvent,
    Router,
    ShadowConfig,
    TargetConfig,
)
from tokenmill.router.routed import no_before
from tokenmill.wire import Call, Piece, TextPiece

HI = Call(model="alias", messages=(Message(role="user", content="Hi"),))


@dataclass
class Bench:
    """A router whose route `alias` has these backends, and what it reported."""

    backends: Sequence[ScriptedBackend]
    weights: Sequence[float] = ()
    max_attempts: int = 3
    shadow: ShadowConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)
    events: list[RouteEvent] = field(default_factory=list)
    num_calls: int = 0

    def open(self) -> Router:
        """Call it in the event loop."""
        names = [backend.name for backend in self.backends]
        if self.shadow is not None:
            names.remove(self.shadow.backend)
        weights = self.weights or [1.0] + [0.0] * (len(names) - 1)
        targets = tuple(TargetConfig(backend=n, weight=w) for n, w in zip(names, weights, strict=True))
        route = RouteConfig(name="alias", targets=targets, max_attempts=self.max_attempts, shadow=self.shadow)
        options = {"random": Random(1), "clock": asyncio.get_running_loop().time, **self.options}
        self.router = Router(self.backends, [route], on_event=self.events.append, **options)
        return self.router

    @property
    def counts(self) -> Counter[str]:
        return Counter(event.kind for event in self.events)

    async def ask(
        self, call: Call = HI, before: Before = no_before, timeout_s: float | None = None
    ) -> tuple[str, tuple[AttemptRecord, ...]]:
        """The text of an answer, and its attempts."""
        self.num_calls += 1
        plan = await self.router.prepare(call)
        job = Job(request_id=f"r{self.num_calls}", timeout_s=timeout_s)
        routed = self.router.start(plan, job, before)
        self.last = routed
        try:
            pieces = [piece async for piece in routed]
        finally:
            self.records = await routed.spent()
        return text_of(pieces), self.records


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
