"""What keeps a tired deployment from getting more calls the worse it does: a budget for trying again.

A call is sent to each deployment of its route once for nothing. Every further time takes one from a budget
that all calls of a router share: at most a share of the calls so far, and of those that are live at once.
"""

from random import Random
from typing import Final

from tokenmill.router.config import BudgetConfig

__all__ = ["RetryBudget"]

_MOST_SAVED: Final = 100.0
_ONE: Final = 1.0 - 1e-9
"""One, for sums of shares that are not exact."""


class RetryBudget:
    """Counts live calls and what may be tried again. `random` spreads the waits."""

    def __init__(self, config: BudgetConfig, random: Random) -> None:
        self.num_live = 0
        self.num_again = 0
        self._config = config
        self._random = random
        self._credit = float(config.spare)

    def enter(self) -> None:
        """A call begins."""
        self.num_live += 1
        self._credit = min(max(_MOST_SAVED, self._config.spare), self._credit + self._config.share)

    def leave(self) -> None:
        """A call has ended."""
        self.num_live -= 1

    def take(self) -> bool:
        """Whether a call may be tried again now. If so, `give_back` when that try has begun or failed."""
        most = max(self._config.spare, self._config.share * self.num_live)
        if self._credit < _ONE or self.num_again + 1 > most:
            return False
        self._credit -= 1.0
        self.num_again += 1
        return True

    def give_back(self) -> None:
        """A try is over: it is live no more, but stays spent."""
        self.num_again -= 1

    def wait_s(self, number: int) -> float:
        """Seconds to wait before the `number`-th time, from 1."""
        longest_s = min(self._config.cap_s, self._config.base_s * 2.0 ** min(number - 1, 30))
        return self._random.uniform(0.0, longest_s)
