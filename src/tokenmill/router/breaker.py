"""A circuit breaker: a deployment that fails is left alone for a time, then tried with one call.

    closed ── failures in a row, too many of the last ones, or "come back later" ──► open
    open ── its time is over, one call is let through ──► half-open
    half-open ── the first token of that call ──► closed;  it fails ──► open

While a call tries it, nobody else is let through, and the next try is not before another interval, also if
that call was given up by its client. Results of calls that began before the last change are not counted.
"""

from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias

from tokenmill.router.config import BreakerConfig

__all__ = ["Breaker", "BreakerState", "Permit"]

BreakerState: TypeAlias = Literal["closed", "open", "half-open"]


class Breaker:
    """The breaker of one deployment. `clock` gives seconds that never go back."""

    def __init__(
        self,
        config: BreakerConfig,
        clock: Callable[[], float],
        on_change: Callable[[BreakerState], None] = lambda state: None,
    ) -> None:
        self.state: BreakerState = "closed"
        self._config = config
        self._clock = clock
        self._on_change = on_change
        self._results: deque[bool] = deque()
        self._num_in_row = self._num_failed = 0
        self._until_s = 0.0
        self._epoch = 0

    @property
    def wait_s(self) -> float:
        """Seconds until a call may be let through; 0 if it may be now."""
        return 0.0 if self.state == "closed" else max(0.0, self._until_s - self._clock())

    def enter(self) -> "Permit | None":
        """Leave for one call, which must end it; None if there is none now."""
        if self.state == "closed":
            return Permit(self, self._epoch, is_probe=False)
        if self.state == "half-open" or self._clock() < self._until_s:
            return None
        self._until_s = self._clock() + self._config.open_s
        self._change("half-open")
        return Permit(self, self._epoch, is_probe=True)

    def close(self, epoch: int) -> int:
        """The call that tried it has a token. Returns the epoch that this call belongs to from now on."""
        if epoch != self._epoch or self.state != "half-open":
            return epoch
        self._results.clear()
        self._num_in_row = self._num_failed = 0
        self._change("closed")
        return self._epoch

    def give_up(self, epoch: int) -> None:
        """The call that tried it was given up: nothing is known."""
        if epoch == self._epoch and self.state == "half-open":
            self._change("open")

    def succeed(self, epoch: int) -> None:
        """A call was answered to its end."""
        if epoch == self._epoch:
            self._add(is_failure=False)
            self._num_in_row = 0

    def fail(self, epoch: int, wait_s: float) -> None:
        """A call failed, and the endpoint asked to be left alone for so long."""
        if wait_s > 0.0:
            self._open(min(wait_s, self._config.max_open_s))
            return
        if epoch != self._epoch:
            return
        self._add(is_failure=True)
        self._num_in_row += 1
        config = self._config
        is_full = len(self._results) == config.window
        is_tired = is_full and self._num_failed >= config.share * config.window
        if self.state == "half-open" or self._num_in_row >= config.failures or is_tired:
            self._open(config.open_s)

    def _add(self, *, is_failure: bool) -> None:
        if len(self._results) == self._config.window:
            self._num_failed -= self._results.popleft()
        self._results.append(is_failure)
        self._num_failed += is_failure

    def _open(self, seconds: float) -> None:
        until_s = self._clock() + seconds
        self._until_s = until_s if self.state == "closed" else max(until_s, self._until_s)
        self._change("open")

    def _change(self, state: BreakerState) -> None:
        if state != self.state:
            self._epoch += 1
            self.state = state
            self._on_change(state)


class Permit:
    """One call's leave. Say how it went with `succeed`, `fail` or `leave`; what follows is ignored."""

    def __init__(self, breaker: Breaker, epoch: int, *, is_probe: bool) -> None:
        self.is_probe = is_probe
        self._breaker = breaker
        self._epoch = epoch
        self._is_open = True

    def first_token(self) -> None:
        """It answers, though nobody knows yet whether to the end."""
        if self._is_open and self.is_probe:
            self._epoch = self._breaker.close(self._epoch)
            self.is_probe = False

    def succeed(self) -> None:
        """It was answered to the end."""
        if self._is_open:
            self.first_token()
            self._is_open = False
            self._breaker.succeed(self._epoch)

    def fail(self, wait_s: float = 0.0) -> None:
        """The deployment failed; `wait_s` if it asked to be left alone for so long."""
        if self._is_open:
            self._is_open = False
            self._breaker.fail(self._epoch, wait_s)

    def leave(self) -> None:
        """It was given up, or its failure was not the deployment's."""
        if self._is_open:
            self._is_open = False
            if self.is_probe:
                self._breaker.give_up(self._epoch)
