"""What runs behind the gateway, as health, metrics and the dashboard see it; and whether it gets on.

An engine that is alive but makes no step although it has work is as bad as one that is dead. Its supervisor
kills it in the end; until then this says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tokenmill.engine.serving.async_engine import EngineStats
from tokenmill.router import Backend, BackendState, BreakerState
from tokenmill.router.local import LocalBackend

__all__ = ["STALL_S", "Deployed", "Fleet", "Trouble", "deployed"]

STALL_S: Final = 4.0
"""Seconds that an engine with work may make no step before it counts as stuck."""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """One deployment: its names, and how to ask for its state and its breaker's.

    `stats` is None for an upstream.
    """

    name: str
    model: str
    is_local: bool
    state: Callable[[], BackendState]
    breaker: Callable[[], BreakerState] = lambda: "closed"
    stats: Callable[[], EngineStats] | None = None


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why a deployment answers nothing at the moment, in words for a person."""

    deployment: str
    model: str
    is_local: bool
    reason: str


def deployed(backend: Backend, breaker: Callable[[], BreakerState] = lambda: "closed") -> Deployed:
    """A backend as a deployment, with how to ask for the state of its breaker."""
    stats = (lambda: backend.engine.stats) if isinstance(backend, LocalBackend) else None
    return Deployed(
        name=backend.name,
        model=backend.model,
        is_local=backend.is_local,
        state=lambda: backend.state,
        breaker=breaker,
        stats=stats,
    )


class Fleet:
    """All deployments of a server. `look` at it once a second or so; points in time are monotonic seconds."""

    def __init__(self, deployments: Sequence[Deployed]) -> None:
        self.deployments = tuple(deployments)
        self._progress = {each.name: _Progress() for each in self.deployments}

    def look(self, now_s: float) -> None:
        """See who has made a step since the last time."""
        for each in self.deployments:
            if each.stats is not None:
                self._progress[each.name].look(each.stats(), now_s)

    def troubles(self) -> list[Trouble]:
        """Deployments that answer nothing now; empty if all do."""
        found = []
        for each in self.deployments:
            reason = self._reason(each)
            if reason:
                trouble = Trouble(
                    deployment=each.name, model=each.model, is_local=each.is_local, reason=reason
                )
                found.append(trouble)
        return found

    def is_ready(self) -> bool:
        """Whether calls should come here: every engine of this machine works, or without one any upstream."""
        troubled = self.troubles()
        if any(each.is_local for each in self.deployments):
            return not any(each.is_local for each in troubled)
        return len(troubled) < len(self.deployments)

    def _reason(self, each: Deployed) -> str:
        state = each.state()
        if state == "drained":
            return "it has ended"
        if each.breaker() == "open":
            return "its breaker is open: calls failed"
        stats = None if each.stats is None else each.stats()
        if state == "live":
            return "its engine is being started again" if stats is not None else "it takes no calls"
        stuck_s = self._progress[each.name].stuck_s
        return f"no step for {stuck_s:.0f} s although there is work" if stuck_s >= STALL_S else ""


class _Progress:
    """The last step that an engine was seen to make."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._at_s = 0.0
        self._looked_s = 0.0
        self._has_work = False

    def look(self, stats: EngineStats, now_s: float) -> None:
        seen = (stats.pid, stats.num_steps)
        has_work = stats.num_running + stats.num_waiting > 0
        # A look that comes late says nothing of the engine: this process was stopped itself.
        was_away = now_s - self._looked_s > STALL_S / 2
        if seen != self._seen or not has_work or not self._has_work or was_away:
            self._at_s = now_s
        self._seen, self._has_work, self._looked_s = seen, has_work, now_s

    @property
    def stuck_s(self) -> float:
        """As far as was looked: a probe that comes before the next look knows no more."""
        return self._looked_s - self._at_s if self._has_work else 0.0
