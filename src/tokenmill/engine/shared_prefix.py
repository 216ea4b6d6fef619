"""An order of sequences in which what they have in common is computed once.

Sequences that start in one step cannot find each other's blocks in the prefix cache. So of those that begin
alike one goes ahead, and the others wait until it has computed what they share: first the shots that all
questions begin with, then each question, then its choices. Depth first, so that a beginning is used while it
is in the cache; and only as many at a time as fill the steps. The order changes no result.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tokenmill.engine.sequence import SequenceState
from tokenmill.kernels import KV_BLOCK

__all__ = ["SharedPrefixQueue"]


class _Held(NamedTuple):
    """A sequence that waits for another one to have computed this many tokens."""

    state: SequenceState
    num_shared: int


class SharedPrefixQueue:
    """Sequences to be submitted, in the order that shares most; none may be submitted by somebody else.

    About `num_rows` rows of them are under way at a time, and at least one sequence.
    """

    def __init__(self, states: Iterable[SequenceState], num_rows: int) -> None:
        self._num_rows = num_rows
        self._ready: deque[SequenceState] = deque()
        self._held: dict[SequenceState, list[_Held]] = {}
        self._costs: dict[SequenceState, int] = {}
        self._running: dict[SequenceState, None] = {}
        self._arrange(sorted(states, key=lambda state: _sort_key(state.tokens)))

    def take(self) -> list[SequenceState]:
        """Those to be submitted now."""
        for owner in [state for state in self._running if state in self._held]:
            self._release(owner)
        for state in [state for state in self._running if state.finished]:
            del self._running[state]
        taken: list[SequenceState] = []
        num_rows = sum(self._costs[state] for state in self._running)
        while self._ready and (num_rows < self._num_rows or not self._running):
            state = self._ready.popleft()
            self._running[state] = None
            num_rows += self._costs[state]
            taken.append(state)
        return taken

    def _arrange(self, states: Sequence[SequenceState]) -> None:
        """Find who goes ahead of each sequence. In sorted order those that begin alike are neighbours."""
        owners: list[SequenceState] = []  # of each block of the sequence before, who is first to compute it
        for index, state in enumerate(states):
            num_shared = _num_shared_blocks(states[index - 1], state) if index else 0
            self._costs[state] = state.num_total - num_shared * KV_BLOCK
            if num_shared:
                held = _Held(state, num_shared * KV_BLOCK)
                self._held.setdefault(owners[num_shared - 1], []).append(held)
            else:
                self._ready.append(state)
            del owners[num_shared:]
            owners += [state] * (state.num_total // KV_BLOCK - num_shared)

    def _release(self, owner: SequenceState) -> None:
        """Let those go for whom this one has computed enough; they go next."""
        waiting = self._held.pop(owner)
        num_computed = owner.num_total if owner.finished else owner.num_computed
        if late := [each for each in waiting if each.num_shared > num_computed]:
            self._held[owner] = late
        free = [each.state for each in waiting if each.num_shared <= num_computed]
        self._ready.extendleft(reversed(free))


def _sort_key(tokens: "array[int]") -> bytes:
    """Bytes in the order of the token ids."""
    return np.frombuffer(tokens, np.int32).astype(">i4").tobytes()


def _num_shared_blocks(one: SequenceState, other: SequenceState) -> int:
    """Full blocks with which both begin, as far as the other may find them in the cache."""
    most = min(one.num_total, other.num_skippable) // KV_BLOCK
    for index in range(most):
        span = slice(index * KV_BLOCK, (index + 1) * KV_BLOCK)
        if one.tokens[span] != other.tokens[span]:
            return index
    return most
