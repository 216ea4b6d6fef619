"""Which deployment answers a call: engines here and endpoints elsewhere, behind one name."""

from tokenmill.router.backend import Attempt, Backend, BackendState, Embedded, Job, Prepared, Spent
from tokenmill.router.breaker import BreakerState
from tokenmill.router.config import (
    BreakerConfig,
    BudgetConfig,
    Price,
    RouteConfig,
    ShadowConfig,
    TargetConfig,
    UpstreamConfig,
)
from tokenmill.router.events import OnEvent, RouteEvent, RouteEventKind
from tokenmill.router.route import Route, Router
from tokenmill.router.routed import AttemptRecord, Before, Plan, Routed
from tokenmill.router.shadow import OnPair, Pair
from tokenmill.router.upstream import BusyError, UpstreamBackend
from tokenmill.router.vectors import RoutedVectors

__all__ = [
    "Attempt",
    "AttemptRecord",
    "Backend",
    "BackendState",
    "Before",
    "BreakerConfig",
    "BreakerState",
    "BudgetConfig",
    "BusyError",
    "Embedded",
    "Job",
    "OnEvent",
    "OnPair",
    "Pair",
    "Plan",
    "Prepared",
    "Price",
    "Route",
    "RouteConfig",
    "RouteEvent",
    "RouteEventKind",
    "Routed",
    "RoutedVectors",
    "Router",
    "ShadowConfig",
    "Spent",
    "TargetConfig",
    "UpstreamBackend",
    "UpstreamConfig",
]
