"""What a router reports while it works, for metrics and logs. Names only: no text, no client."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["OnEvent", "RouteEvent", "RouteEventKind"]

RouteEventKind: TypeAlias = Literal[
    "attempt",
    "failure",
    "fallback",
    "retry",
    "retry-denied",
    "skipped",
    "breaker-closed",
    "breaker-open",
    "breaker-half-open",
    "shadow",
    "shadow-failure",
    "shadow-dropped",
]
"""An attempt began; it failed; a further deployment was asked; one was asked again; there was no budget for
that; a deployment was passed over, for it takes no calls; its breaker changed; a shadow call began, failed,
or was left out because too many are open."""


@dataclass(frozen=True, kw_only=True)
class RouteEvent:
    """Something that happened at a deployment. Breakers belong to no route; `error` is the error's class."""

    kind: RouteEventKind
    backend: str
    route: str = ""
    error: str = ""


OnEvent: TypeAlias = Callable[[RouteEvent], None]
"""Called at once, in the event loop: it must be quick."""
