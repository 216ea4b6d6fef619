"""Trying again: what may pass is tried again after a growing, random wait, within a budget that all share.

The budget keeps a tired endpoint from getting more requests the worse it does.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from tokenmill.core import UsageError
from tokenmill.remote.connection import Passing

__all__ = ["Retrier", "RetryConfig"]

_T = TypeVar("_T")
_MAX_TRIES: Final = 100


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """How often and how long: waits are random up to `base_s`, doubled each time, at most `cap_s`.

    An endpoint that asks for a longer wait gets it, up to `max_wait_s`; one that asks for more is given up.
    All requests together are tried again `spare` times and once more for each `1 / share` requests.
    """

    max_tries: int = 6
    base_s: float = 0.5
    cap_s: float = 30.0
    max_wait_s: float = 120.0
    spare: int = 20
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.max_tries <= _MAX_TRIES:
            raise UsageError(f"max_tries is {self.max_tries}", hint=f"use 1 to {_MAX_TRIES}")
        if min(self.base_s, self.cap_s, self.max_wait_s, self.spare, self.share) < 0.0:
            raise UsageError("a retry value is below 0", hint="use 0 for none")


class Retrier:
    """The budget of one set of requests."""

    def __init__(self, config: RetryConfig) -> None:
        self._config = config
        self._num_requests = 0
        self._num_retries = 0

    async def run(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """What an attempt gives. Raises what the last one raised."""
        self._num_requests += 1
        config = self._config
        for number in range(1, config.max_tries + 1):
            try:
                return await attempt()
            except Passing as error:
                budget = config.spare + config.share * self._num_requests
                if error.wait_s > config.max_wait_s:
                    hint = f"it asks to wait for {error.wait_s:.0f} s: run it again then"
                    raise Passing(error.message, hint=hint) from error
                if number == config.max_tries or self._num_retries >= budget:
                    raise Passing(f"{error.message} (tried {number} times)", hint=error.hint) from error
                wait_s = error.wait_s
            self._num_retries += 1
            longest_s = min(config.cap_s, config.base_s * 2.0 ** (number - 1))
            await asyncio.sleep(wait_s + random.uniform(0.0, longest_s))
        raise AssertionError("unreachable")
