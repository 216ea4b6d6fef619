"""Time as the store counts it: a clock that steps of the wall clock do not move, and the periods of budgets.

A step of the wall clock (by a person, NTP, a virtual machine) must neither refill a budget nor lock a key
out. So the wall clock is read once, when the clock is made, and time goes on from there as the machine counts
it, suspension included. A process that was started under a wrong clock keeps it until it is started again.
"""

import datetime
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from tokenmill.store.records import BudgetPeriod

__all__ = ["DAY_S", "Period", "SteadyClock", "period_of"]

DAY_S: Final = 86400
"""Seconds of a day of UTC, as Unix time counts them."""


class Period(NamedTuple):
    """From `begin_s` until before `end_s`, Unix time; None: for ever."""

    begin_s: float
    end_s: float | None

    def __contains__(self, at_s: object) -> bool:
        return (
            isinstance(at_s, int | float)
            and self.begin_s <= at_s
            and (self.end_s is None or at_s < self.end_s)
        )


def period_of(kind: BudgetPeriod, at_s: float) -> Period:
    """The day or month of UTC that a point in time lies in; `total` is one period for all of time."""
    if kind == "total":
        return Period(0.0, None)
    if kind == "day":
        begin = at_s // DAY_S * DAY_S
        return Period(begin, begin + DAY_S)
    day = datetime.datetime.fromtimestamp(at_s, datetime.UTC).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    begin_of_month = day.replace(day=1)
    next_month = (begin_of_month + datetime.timedelta(days=32)).replace(day=1)
    return Period(begin_of_month.timestamp(), next_month.timestamp())


def _since_boot() -> float:
    # Goes on while the machine sleeps, which CLOCK_MONOTONIC does not.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SteadyClock:
    """Unix time that only goes forward: the wall clock of when it was made, and what has passed since."""

    def __init__(
        self, wall: Callable[[], float] = time.time, passed: Callable[[], float] = _since_boot
    ) -> None:
        self._passed = passed
        self._offset_s = wall() - passed()

    def now_s(self) -> float:
        """Seconds of Unix time."""
        return self._offset_s + self._passed()
