"""Where the named points of a plan lie, and how the taps of a step get their rows and put them back.

A step stops once at each point that any of its rows wants, whoever they belong to. A handler that fails
fails its own request: its rows go on with the values they had, and whoever runs the step drops the request.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.engine.sequence import SequenceState
from tokenmill.engine.taps.tap import Tap, TapRows
from tokenmill.kernels import (
    AddNorm,
    Attend,
    BufferName,
    Combine,
    Embed,
    Executor,
    ExpertLinear,
    F32Array,
    I32Array,
    Linear,
    Norm,
    Op,
    Quantize,
    Route,
    StepPlan,
)
from tokenmill.kernels.twin import rms_norm

__all__ = [
    "FINAL_NORM",
    "RowSpan",
    "TapCall",
    "TapPoint",
    "TapPoints",
    "check_taps",
    "input_points",
    "tap_calls",
    "tap_points",
]

FINAL_NORM = "ln_final.hook_normalized"
"""The name of the input of the head; its rows lie in y."""

_BLOCK_NORMS = {"1.hook_normalized": "hook_resid_mid", "2.hook_normalized": "hook_resid_post"}
"""The ends of the names of a block's norms, and the point after each where it norms an output."""

_Rows: TypeAlias = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class TapPoint:
    """A point's values lie in `buffer` once the operations before `stop` have run.

    `norm` is set where only the norm's input is kept: the values are computed from it, and cannot be
    replaced. `smoothing_D` are the factors by which the plan's own values are smaller than the true ones.
    """

    stop: int
    buffer: BufferName
    norm: Norm | None
    smoothing_D: F32Array | None

    def read(self, executor: Executor, rows: _Rows) -> F32Array:
        """A copy of the true values of these rows of the step, or of the selected rows for y."""
        values_TD = executor.buffer(self.buffer)[rows]
        if self.norm is not None:
            values_TD = rms_norm(values_TD, self.norm.weight, self.norm.eps)
        return values_TD if self.smoothing_D is None else values_TD * self.smoothing_D

    def write(self, executor: Executor, rows: _Rows, old_TD: F32Array, new_TD: F32Array) -> None:
        """Replace what was read as `old_TD`. Values that are the same keep their bits."""
        assert self.norm is None, "a computed point is read only"
        # What overflows here fails the request where its logits are looked at.
        with np.errstate(over="ignore"):
            smoothed_TD = new_TD if self.smoothing_D is None else new_TD / self.smoothing_D
        buffer = executor.buffer(self.buffer)
        buffer[rows] = np.where(new_TD == old_TD, buffer[rows], smoothed_TD)


TapPoints: TypeAlias = Mapping[str, TapPoint]


class RowSpan(NamedTuple):
    """Rows of one sequence: their positions in it, rising, and where they are in the buffer."""

    sequence: SequenceState
    positions_T: I32Array
    rows_T: _Rows


class TapCall(NamedTuple):
    """One tap, its number among those of its sequence, and the rows that it wants now."""

    sequence: SequenceState
    number: int
    tap: Tap
    point: TapPoint
    positions_T: I32Array
    rows_T: _Rows

    def run(self, executor: Executor) -> None:
        """Hand the rows over and put back what comes; raises what `Tap.call` raises."""
        old_TD = self.point.read(executor, self.rows_T)
        rows = TapRows(
            request_id=self.sequence.request_id,
            point=self.tap.point,
            positions_T=self.positions_T.copy(),
            values_TD=old_TD.copy(),
        )
        new_TD = self.tap.call(rows)
        # At once: if the step breaks off later, its rows are computed again, and not to be read twice.
        self.sequence.num_tapped[self.number] = int(self.positions_T[-1]) + 1
        if new_TD is not None:
            self.point.write(executor, self.rows_T, old_TD, new_TD)


def tap_points(plan: StepPlan) -> TapPoints:
    """Every named point of a plan, in the order in which a step reaches them."""
    points: dict[str, TapPoint] = {}
    for index, op in enumerate(plan.ops):
        buffer = _output(op)
        if op.name and buffer is not None:
            computed = op if isinstance(op, Norm) and op.act is not None else None
            smoothing_D = plan.smoothing.get(op.name)
            points[op.name] = TapPoint(stop=index + 1, buffer=buffer, norm=computed, smoothing_D=smoothing_D)
    return points


def input_points(plan: StepPlan) -> tuple[str, ...]:
    """The points that the linears of a plan read, one a linear, in order of `plan.linears`."""
    names: list[str] = []
    last_in: dict[BufferName, str] = {}
    source = ""
    for op in plan.ops:
        if isinstance(op, Quantize):
            source = last_in.get(op.src, "")
        elif isinstance(op, Norm) and op.act is not None:
            source = op.name
        elif isinstance(op, Linear):
            names.append(source)
        buffer = _output(op)
        if op.name and buffer is not None:
            last_in[buffer] = op.name
    return tuple(names)


def check_taps(points: TapPoints, taps: Iterable[Tap]) -> None:
    """Raise `UsageError` for a tap on an unknown point, or an edit of a point that can only be read."""
    for tap in taps:
        point = points.get(tap.point)
        if point is None:
            raise UsageError(f"no point is named {tap.point}", hint=_near_points(points, tap.point))
        if point.norm is not None and tap.intervention is not None:
            raise UsageError(
                f"{tap.point} can only be read: it is quantised as it is computed",
                hint="edit the residual stream before it, or read it",
            )


def tap_calls(points: TapPoints, spans: Iterable[RowSpan], *, head: bool) -> dict[int, list[TapCall]]:
    """What is to be called where the plan stops: by stop, in the order of `spans` and of their taps.

    `head` chooses the points in y, else those in the body of the plan.
    """
    calls: dict[int, list[TapCall]] = {}
    for sequence, positions_T, rows_T in spans:
        for number, tap in enumerate(sequence.taps):
            point = points[tap.point]
            if head != (point.buffer == "y"):
                continue
            wanted_T = tap.selects(positions_T)
            if tap.intervention is None:
                wanted_T &= positions_T >= sequence.num_tapped.get(number, 0)
            if wanted_T.any():
                call = TapCall(sequence, number, tap, point, positions_T[wanted_T], rows_T[wanted_T])
                calls.setdefault(point.stop, []).append(call)
    return dict(sorted(calls.items()))


def _near_points(points: TapPoints, name: str) -> str:
    """What to tap instead of a point that this plan does not have."""
    block, _, norm = name.rpartition(".ln")
    if norm in _BLOCK_NORMS and f"{block}.hook_resid_mid" in points:
        written = f"{block}.{_BLOCK_NORMS[norm]}"
        return f"this model norms what a block writes, not what it reads; {written} is the sum with it"
    close = get_close_matches(name, points, n=3, cutoff=0.3) or list(points)[:3]
    return f"there are {', '.join(close)}, ..."


def _output(op: Op) -> BufferName | None:
    """Where the values of an operation's point are, as far as a buffer has them."""
    match op:
        case Embed() | AddNorm() | Combine():
            return "x"
        case Route():
            return "route"
        case Attend():
            return "z"
        case Norm():
            return op.src
        case Linear() | ExpertLinear():
            return op.dst
        case _:
            return None
