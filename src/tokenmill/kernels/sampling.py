"""Choosing a token for each row of logits: one native call for a batch, or the numpy twin.

What a choice is and the arithmetic to the last bit are in `sampling_twin`.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from tokenmill.kernels import sampling_twin
from tokenmill.kernels.executor import NativeExecutor
from tokenmill.kernels.isa import NUMPY, choose_isa, load_native
from tokenmill.kernels.plan import Executor, F32Array, I32Array
from tokenmill.kernels.sampling_twin import Choice

__all__ = ["ChoiceTable", "choose_tokens", "top_token_ids"]

_NO_MASK = np.empty(0, np.uint32)
_NO_IDS = np.empty(0, np.int32)
_MAX_ID = (1 << 31) - 1
_NUM_INTEGERS, _NUM_REALS = 8, 6
_POSITION = 2


class ChoiceTable:
    """Choices as the native sampler takes them: made once, good for as many steps as only positions change.

    Ids of biases and bans may lie outside the vocabulary.
    """

    def __init__(self, choices: Sequence[Choice], isa: str | None = None) -> None:
        self._isa = isa or choose_isa()
        self._choices = choices
        # Each step is one further for every choice.
        self._num_steps = 0
        biases = list(chain.from_iterable(c.bias for c in choices))
        edited = any(c.edited for c in choices)
        self._integers = np.array([_integers(c) for c in choices], np.int64).reshape(-1, _NUM_INTEGERS)
        self._positions = self._integers[:, _POSITION]
        self._reals = np.array([_reals(c) for c in choices], np.float64).reshape(-1, _NUM_REALS)
        self._bias_ids = _ids([token_id for token_id, _ in biases])
        self._bias_values = np.array([value for _, value in biases], np.float32)
        self._banned = _ids(list(chain.from_iterable(c.banned for c in choices)))
        self._tokens = [c.tokens for c in choices] if edited else []
        self._masks = [_NO_MASK if c.mask is None else c.mask for c in choices] if edited else []

    def advance(self) -> None:
        """Let every choice be for the next position."""
        self._num_steps += 1
        self._positions += 1

    def choose(self, logits_LV: F32Array, executor: Executor | None = None) -> I32Array:
        """As `choose_tokens`."""
        if self._isa == NUMPY:
            now = [c._replace(position=c.position + self._num_steps) for c in self._choices]
            return sampling_twin.choose_tokens(logits_LV, now)
        native: Any = load_native()
        token_ids: I32Array = native.sample(
            logits_LV,
            self._integers,
            self._reals,
            self._bias_ids,
            self._bias_values,
            self._banned,
            self._tokens,
            self._masks,
            self._isa,
            executor.native if isinstance(executor, NativeExecutor) else None,
        )
        return token_ids


def choose_tokens(
    logits_LV: F32Array,
    choices: Sequence[Choice],
    isa: str | None = None,
    executor: Executor | None = None,
) -> I32Array:
    """A token id for each choice; below 0 where the row has NaN, no finite maximum or no token left.

    The logits are not changed. Several choices may share a row. The threads of a native `executor`, which
    must not be running a step, share the work.
    """
    return ChoiceTable(choices, isa).choose(logits_LV, executor)


def top_token_ids(logits_LV: F32Array, num_top: int, isa: str | None = None) -> I32Array:
    """The ids of the `num_top` largest logits of each row, largest first, of equals the lowest id first.

    There are fewer if the vocabulary is smaller. A row with NaN gives some ids.
    """
    isa = isa or choose_isa()
    num_top = min(num_top, logits_LV.shape[1])
    if isa == NUMPY:
        return sampling_twin.top_token_ids(logits_LV, num_top)
    native: Any = load_native()
    token_ids: I32Array = native.top_ids(logits=logits_LV, num=num_top, isa=isa)
    return token_ids


def _integers(c: Choice) -> tuple[int, ...]:
    sizes = (c.num_prompt, len(c.bias), len(c.banned), c.edited)
    return (c.logits_row, c.seed, c.position, c.top_k, *sizes)


def _reals(c: Choice) -> tuple[float, ...]:
    return (c.inverse_temperature, c.top_p, c.farthest, c.repetition, c.presence, c.frequency)


def _ids(token_ids: Sequence[int]) -> I32Array:
    """As 32 bits; an id that does not fit becomes one outside every vocabulary."""
    if not token_ids:
        return _NO_IDS
    return np.clip(np.array(token_ids, np.int64), -1, _MAX_ID).astype(np.int32)
