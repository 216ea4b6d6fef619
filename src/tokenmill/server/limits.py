"""Requests and tokens a minute, and requests at once, of each key: kept in memory, exact on one host.

Tokens are taken for the worst case when a call begins, and what it did not use is given back at its end. Time
is monotonic, so a step of the wall clock neither locks anybody out nor fills a bucket.
"""

import time
from collections.abc import Callable
from typing import Final

from tokenmill.core import ResourceError, UsageError
from tokenmill.store import Key

__all__ = ["KeyLimits", "LimitError", "Permit"]

_MINUTE_S: Final = 60.0


class LimitError(ResourceError):
    """A limit of a key was reached; after `wait_s` seconds there is room, as far as is known now."""

    def __init__(self, message: str, *, wait_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.wait_s = wait_s


class _Bucket:
    """A token bucket that holds a minute's worth."""

    def __init__(self, size: int, now_s: float) -> None:
        self.size = size
        self.level = float(size)
        self._at_s = now_s

    def fill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._at_s)
        self._at_s = max(self._at_s, now_s)
        self.level = min(float(self.size), self.level + elapsed_s * self.size / _MINUTE_S)

    def wait_s(self, amount: float) -> float:
        """Seconds until this much is there; 0 if it is."""
        return max(0.0, (amount - self.level) * _MINUTE_S / self.size)


class _State:
    """What one key has taken."""

    def __init__(self) -> None:
        self.requests: _Bucket | None = None
        self.tokens: _Bucket | None = None
        self.num_open = 0


class Permit:
    """A call's place within its key's limits. `leave` it once."""

    def __init__(self, state: _State, num_tokens: int) -> None:
        self._state: _State | None = state
        self._num_tokens = num_tokens

    def leave(self, num_used_tokens: int) -> None:
        """Give the place back, and the tokens that were not used. No-op after the first time."""
        state, self._state = self._state, None
        if state is None:
            return
        state.num_open -= 1
        if state.tokens is not None:
            unused = max(0, self._num_tokens - num_used_tokens)
            state.tokens.level = min(float(state.tokens.size), state.tokens.level + unused)


class KeyLimits:
    """The limits of all keys. It belongs to one event loop; `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}

    def enter(self, key: Key, num_tokens: int) -> Permit:
        """Take a place for a call of at most so many tokens.

        Raises LimitError, and takes nothing then; UsageError for a call that never fits.
        """
        limits, now_s = key.limits, self._clock()
        state = self._states.setdefault(key.id, _State())
        state.requests = _bucket(state.requests, limits.requests_per_minute, now_s)
        state.tokens = _bucket(state.tokens, limits.tokens_per_minute, now_s)
        if limits.concurrency is not None and state.num_open >= limits.concurrency:
            raise LimitError(
                f"the key {key.id} has {state.num_open} calls open, its limit",
                wait_s=1.0,
                hint="wait for one",
            )
        if state.tokens is not None and num_tokens > state.tokens.size:
            raise UsageError(
                f"the call may come to {num_tokens} tokens, the key's limit is {state.tokens.size} a minute",
                hint="lower max_tokens",
            )
        for bucket, amount, what in ((state.requests, 1, "requests"), (state.tokens, num_tokens, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s(amount)) > 0:
                message = f"the key {key.id} has reached its limit of {bucket.size} {what} a minute"
                raise LimitError(message, wait_s=wait_s, hint=f"try again in {wait_s:.1f} s")
        if state.requests is not None:
            state.requests.level -= 1
        if state.tokens is not None:
            state.tokens.level -= num_tokens
        state.num_open += 1
        return Permit(state, num_tokens)


def _bucket(bucket: _Bucket | None, size: int | None, now_s: float) -> _Bucket | None:
    """The bucket of this size, filled up to now; a new one where the limit has changed."""
    if size is None:
        return None
    if bucket is None or bucket.size != size:
        return _Bucket(size, now_s)
    bucket.fill(now_s)
    return bucket
