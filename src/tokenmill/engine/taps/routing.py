"""How the tokens of a text are shared among the experts of each routed layer.

A read of `blocks.i.mlp.hook_route` over windows of tokens; only counts and sums are kept. Balance matters
to whoever pays for memory and bandwidth: an expert that few tokens want is read for few, and one that all
want is a bottleneck where experts lie on several machines. What to do about it is not decided here.

Shape legend: T rows, X experts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.engine.core import EngineCore
from tokenmill.engine.taps.reading import read_windows
from tokenmill.engine.taps.tap import Tap, TapRows
from tokenmill.kernels import Route, StepPlan

__all__ = ["RoutingStats", "routing"]


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """One layer over `num_tokens` tokens: each expert's share of all choices, and its mean weight.

    `entropy` of the load is relative to that of an even one: 1 if all experts are chosen alike, 0 if it is
    always the same. `max_violation` is how far the most loaded expert is above the even share, as a part of
    it (MaxVio, Wang et al. 2024): 0 is even. `num_idle` experts were never chosen.
    """

    num_tokens: int
    load_X: npt.NDArray[np.float64]
    weight_X: npt.NDArray[np.float64]

    @property
    def entropy(self) -> float:
        """Entropy of the load over that of an even one; 1 for a single expert."""
        used_X = self.load_X[self.load_X > 0]
        most = np.log(len(self.load_X))
        return float(-(used_X * np.log(used_X)).sum() / most) if most else 1.0

    @property
    def max_violation(self) -> float:
        """Largest load over the even one, less 1."""
        return float(self.load_X.max() * len(self.load_X)) - 1.0

    @property
    def num_idle(self) -> int:
        """Experts that no token was sent to."""
        return int((self.load_X == 0).sum())

    def to_json(self) -> Mapping[str, object]:
        """All figures, as plain numbers and lists."""
        return {
            "num_tokens": self.num_tokens,
            "load": self.load_X.tolist(),
            "weight": self.weight_X.tolist(),
            "entropy": self.entropy,
            "max_violation": self.max_violation,
            "num_idle": self.num_idle,
        }


def routing(core: EngineCore, plan: StepPlan, windows: Iterable[Sequence[int]]) -> Mapping[int, RoutingStats]:
    """Run every window of token ids through the engine, and count who is sent where, by number of layer.

    Raises `UsageError` if the model has no experts or there is no window, or as the engine does.
    """
    names = [op.name for op in plan.ops if isinstance(op, Route)]
    if not names:
        raise UsageError("the model has no experts", hint="use a mixture of experts")
    sums = {name: _Sums(plan.shape.num_experts) for name in names}
    read_windows(core, windows, tuple(Tap(point=name, handler=each.add) for name, each in sums.items()))
    if not all(each.num_tokens for each in sums.values()):
        raise UsageError("there is no text to route", hint="give at least one window of tokens")
    return {_layer(name): each.stats() for name, each in sums.items()}


class _Sums:
    """Running sums of one layer."""

    def __init__(self, num_experts: int) -> None:
        self.num_tokens = 0
        self._chosen_X = np.zeros(num_experts)
        self._weight_X = np.zeros(num_experts)

    def add(self, rows: TapRows) -> None:
        self.num_tokens += len(rows.values_TD)
        self._chosen_X += (rows.values_TD != 0).sum(axis=0)
        self._weight_X += rows.values_TD.sum(axis=0, dtype=np.float64)

    def stats(self) -> RoutingStats:
        return RoutingStats(
            num_tokens=self.num_tokens,
            load_X=self._chosen_X / self._chosen_X.sum(),
            weight_X=self._weight_X / self.num_tokens,
        )


def _layer(point: str) -> int:
    number = re.fullmatch(r"blocks\.(\d+)\..*", point)
    assert number is not None
    return int(number[1])
