"""When requests are sent: at times fixed in advance (open loop), or as answers come back (closed loop).

Users do not wait for each other, so an open loop is what a service meets; a closed loop finds what a system
does with a given number of streams. Times of an open loop are made before the run and do not depend on it.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from tokenmill.core import UsageError

__all__ = ["ARRIVALS", "ArrivalKind", "Arrivals", "ClosedLoop", "OpenLoop", "at_rate"]

ArrivalKind: TypeAlias = Literal["poisson", "constant"]

ARRIVALS: tuple[ArrivalKind, ...] = get_args(ArrivalKind)

_MAX_RATE = 1e6


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """Requests are due at `times_s`, in order, seconds from the start.

    More than `max_in_flight` at once are not sent, but wait, and are counted from the time when they were
    due.
    """

    times_s: tuple[float, ...]
    max_in_flight: int = 1024

    def __post_init__(self) -> None:
        times = np.asarray(self.times_s, float)
        if times.size and (not np.isfinite(times).all() or times[0] < 0 or (np.diff(times) < 0).any()):
            raise UsageError("times of arrival are not in order", hint="give seconds from 0 that do not fall")
        _check_count("max_in_flight", self.max_in_flight)


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """`concurrency` requests at a time: one is sent when one has ended."""

    concurrency: int

    def __post_init__(self) -> None:
        _check_count("concurrency", self.concurrency)


Arrivals: TypeAlias = OpenLoop | ClosedLoop


def at_rate(rate: float, num_requests: int, *, kind: ArrivalKind, seed: int) -> tuple[float, ...]:
    """Arrival times at a mean rate a second: a Poisson process, or one each 1/rate. Raises UsageError."""
    if not 0.0 < rate <= _MAX_RATE or not math.isfinite(rate):
        raise UsageError(f"rate is {rate}", hint=f"use requests a second above 0, up to {_MAX_RATE:g}")
    if kind == "constant":
        return tuple((np.arange(num_requests) / rate).tolist())
    gaps = np.random.default_rng([seed, 0xA221]).exponential(1.0 / rate, num_requests)
    return tuple(np.cumsum(gaps).tolist())


def _check_count(name: str, value: int) -> None:
    if not 1 <= value <= 1 << 16:
        raise UsageError(f"{name} is {value}", hint="use a value from 1 to 65536")
