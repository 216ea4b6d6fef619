"""A first answer to waiting and capacity, in closed form. A simulation of the scheduler is not here.

An engine with B requests in flight serves each in s(B) seconds, so by Little B = rate x s(B). What cannot
start waits as in a queue with c servers (Kingman; Whitt's exponent). Burstiness must come from a trace.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from tokenmill.core import ResourceError

__all__ = ["Capacity", "in_flight", "max_rate", "waiting_p99", "waiting_seconds"]

_MAX_STEPS = 100_000


class Capacity(NamedTuple):
    """The most requests a second, and the number in flight that reaches it."""

    rate: float
    batch: int


def max_rate(service: Callable[[int], float], max_batch: int) -> Capacity:
    """The most requests a second: the largest B / s(B) over powers of two and what memory holds.

    Of equal ones the smallest B.
    """
    batches = {1 << power for power in range(max_batch.bit_length())} | {max_batch}
    return max((Capacity(batch / service(batch), batch) for batch in batches), key=_rate)


def in_flight(rate: float, service: Callable[[float], float], max_batch: float) -> float:
    """Requests in flight at `rate` a second: the least fixed point of B = rate x s(B).

    Raises ResourceError if there is none up to `max_batch`: the queue would grow for ever.
    """
    batch = 0.0
    for _ in range(_MAX_STEPS):
        new = rate * service(max(1.0, batch))
        if math.isclose(new, batch, rel_tol=1e-9):
            return new
        batch = new
        if batch > max_batch:
            break
    raise ResourceError(
        f"{rate:.3g} requests a second are more than one machine serves",
        hint="use more machines, a smaller model or fewer bits",
    )


def waiting_seconds(
    load: float, service: float, *, servers: int = 1, arrival_cv2: float = 1.0, service_cv2: float = 1.0
) -> float:
    """Mean wait for one of `servers`, each busy `load` of the time: exact for one with Poisson arrivals."""
    assert 0 <= load < 1, "a queue that grows for ever"
    spread = (arrival_cv2 + service_cv2) / 2
    return float(spread * load ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - load)) * service)


def waiting_p99(load: float, service: float, *, arrival_cv2: float = 1.0, service_cv2: float = 1.0) -> float:
    """The wait that one in a hundred exceeds, with an exponential tail; 0 below a load of 1 %."""
    assert 0 <= load < 1, "a queue that grows for ever"
    if load <= 0.01:
        return 0.0
    return service * (arrival_cv2 + service_cv2) / 2 * math.log(100 * load) / (1 - load)


def _rate(capacity: Capacity) -> tuple[float, int]:
    return capacity.rate, -capacity.batch
