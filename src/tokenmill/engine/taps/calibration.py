"""What the inputs of a model's linears look like on real text, for methods that compress by data.

Read taps stream over windows of tokens; only sums are kept, so memory does not grow with the text. A
largest magnitude and a mean square a channel cost next to nothing. The second-moment matrix (for GPTQ,
Frantar et al. 2023, and low-rank methods) is 8 bytes times the square of the width, a point. What is done
with the figures, and which text is right, is not decided here.

Shape legend: T rows, K inputs of a linear.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.engine.core import EngineCore
from tokenmill.engine.taps.reading import read_windows
from tokenmill.engine.taps.tap import Tap, TapRows
from tokenmill.kernels import F32Array

__all__ = ["InputStats", "calibrate"]

_F64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class InputStats:
    """One point over `num_rows` tokens, in true units (smoothing undone).

    `abs_max_K` is the largest magnitude and `mean_square_K` the mean of squares of each channel;
    `second_moment_KK`, where it was asked for, is the mean of the rows' outer products.
    """

    num_rows: int
    abs_max_K: F32Array
    mean_square_K: _F64Array
    second_moment_KK: _F64Array | None


def calibrate(
    core: EngineCore,
    windows: Iterable[Sequence[int]],
    points: Sequence[str],
    *,
    second_moment: bool = False,
    max_in_flight: int = 4,
) -> Mapping[str, InputStats]:
    """Run every window of token ids through the engine, and sum up each point over all their tokens.

    `tapping.input_points(plan)` names the points that the linears of a plan read. `windows` is read as it is
    needed, `max_in_flight` at a time. Raises `UsageError` if there is no window, or as the engine does for
    an unknown point, a window that does not fit or a model that fails.
    """
    sums = {point: _Sums(second_moment) for point in points}
    taps = tuple(Tap(point=point, handler=each.add) for point, each in sums.items())
    read_windows(core, windows, taps, max_in_flight=max_in_flight)
    if not all(each.num_rows for each in sums.values()):
        raise UsageError("there is no text to calibrate on", hint="give at least one window of tokens")
    return {point: each.stats() for point, each in sums.items()}


class _Sums:
    """Running sums of one point, in float64."""

    def __init__(self, second_moment: bool) -> None:
        self.num_rows = 0
        self._second_moment = second_moment
        self._abs_max_K: F32Array = np.zeros(1, np.float32)
        self._squares_K: _F64Array = np.zeros(1)
        self._products_KK: _F64Array = np.zeros((1, 1))

    def add(self, rows: TapRows) -> None:
        values_TK = rows.values_TD
        self.num_rows += len(values_TK)
        self._abs_max_K = np.maximum(self._abs_max_K, np.abs(values_TK).max(axis=0))
        self._squares_K = self._squares_K + np.square(values_TK, dtype=np.float64).sum(axis=0)
        if self._second_moment:
            wide_TK = values_TK.astype(np.float64)
            self._products_KK = self._products_KK + wide_TK.T @ wide_TK

    def stats(self) -> InputStats:
        return InputStats(
            num_rows=self.num_rows,
            abs_max_K=self._abs_max_K,
            mean_square_K=self._squares_K / self.num_rows,
            second_moment_KK=self._products_KK / self.num_rows if self._second_moment else None,
        )
