"""Taps: reading and changing what a model computes, at named points, for one request.

A tap hands the rows of one point (`blocks.3.hook_resid_post`) to a handler while a step runs. It is either a
read, whose handler returns None, or an edit, whose handler may return other values, with which the model
goes on. An edit changes the keys and values of everything after it, so it has an identity,
`intervention`, that is part of the request's prefix key; requests with other edits, or none, share no cache
with it. A read changes nothing, but sees computed rows only: a prefix hit must end before it.

Where the points of a plan lie and how a step stops there is in `tapping.py`. Attention scores and keys are
not points.

Shape legend: T rows of one request, D width of the point (heads side by side at `attn.hook_z`).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.kernels import F32Array, I32Array

__all__ = [
    "Positions",
    "Recording",
    "Tap",
    "TapHandler",
    "TapRows",
    "ablate",
    "cacheable_prefix",
    "intervention_digest",
    "replace_values",
    "steer",
    "twin_hooks",
]

Positions: TypeAlias = range | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TapRows:
    """Values [T, D] of one point at some positions [T] of a request, in rising order. Both are copies."""

    request_id: str
    point: str
    positions_T: I32Array
    values_TD: F32Array


TapHandler: TypeAlias = Callable[[TapRows], F32Array | None]


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One handler on one point, at `positions` of the sequence (prompt and answer; None: all of them).

    `intervention` None makes it a read, which gets each position once. Text makes it an edit: equal text
    must mean equal behaviour of the handler. An edit sees a position again when it is computed again (after
    a preemption), and not at all when the cache has it.
    """

    point: str
    handler: TapHandler
    positions: Positions | None = None
    intervention: str | None = None

    def __post_init__(self) -> None:
        if self.intervention == "":
            raise UsageError(
                f"the edit of {self.point} has an empty intervention",
                hint="give text that identifies it, or None for a read",
            )
        step = self.positions.step if isinstance(self.positions, range) else 1
        if step < 1 or (self.first_position or 0) < 0:
            raise UsageError(
                f"the tap on {self.point} has positions {self.positions}",
                hint="count from 0 at the first token of the prompt, upwards",
            )

    @property
    def first_position(self) -> int | None:
        """The first position it wants, None if it wants none."""
        if isinstance(self.positions, range):
            return self.positions.start if self.positions else None
        return 0 if self.positions is None else min(self.positions, default=None)

    def selects(self, positions_T: I32Array) -> npt.NDArray[np.bool_]:
        """Which of these positions it wants."""
        if self.positions is None:
            return np.ones(len(positions_T), np.bool_)
        if isinstance(self.positions, tuple):
            return np.isin(positions_T, self.positions)
        start, stop, step = self.positions.start, self.positions.stop, self.positions.step
        wanted_T: npt.NDArray[np.bool_] = (positions_T >= start) & (positions_T < stop)
        wanted_T &= (positions_T - start) % step == 0
        return wanted_T

    def call(self, rows: TapRows) -> F32Array | None:
        """What the handler puts in the place of `rows`, or None; the handler may change its own copies.

        Raises `UsageError` for values that cannot take their place, and whatever the handler raises.
        """
        new = self.handler(rows)
        if new is None:
            return None
        if self.intervention is None:
            raise UsageError(
                f"the read of {self.point} returned values",
                hint="return None, or give the tap an intervention",
            )
        new_TD = np.asarray(new, dtype=np.float32)
        if new_TD.shape != rows.values_TD.shape:
            raise UsageError(
                f"the edit of {self.point} returned shape {new_TD.shape}",
                hint=f"return values of shape {rows.values_TD.shape}",
            )
        if not np.isfinite(new_TD).all():
            raise UsageError(f"the edit of {self.point} returned values that are not finite numbers")
        return new_TD


def intervention_digest(taps: Iterable[Tap]) -> str:
    """SHA-256 of all edits, for the prefix key; empty if there are none."""
    edits = [(tap.point, tap.positions, tap.intervention) for tap in taps if tap.intervention is not None]
    return hashlib.sha256(repr(edits).encode()).hexdigest() if edits else ""


def cacheable_prefix(taps: Iterable[Tap], num_tokens: int) -> int:
    """How many of the first `num_tokens` tokens may come from the cache: those before the first read."""
    reads = [tap.first_position for tap in taps if tap.intervention is None]
    return min([num_tokens, *(first for first in reads if first is not None)])


class Recording:
    """A handler that keeps what it reads; one may serve many points and requests. It grows with them."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, str], list[TapRows]] = {}

    def __call__(self, rows: TapRows) -> None:
        """Keep these rows."""
        self._parts.setdefault((rows.request_id, rows.point), []).append(rows)

    def rows(self, request_id: str, point: str) -> TapRows:
        """Everything read of one request at one point, by position. Raises `UsageError` if nothing was."""
        parts = self._parts.get((request_id, point))
        if not parts:
            raise UsageError(f"nothing was read of {request_id} at {point}", hint="tap the point first")
        positions_T = np.concatenate([part.positions_T for part in parts])
        order_T = np.argsort(positions_T, kind="stable")
        values_TD = np.concatenate([part.values_TD for part in parts])
        return TapRows(
            request_id=request_id,
            point=point,
            positions_T=positions_T[order_T],
            values_TD=values_TD[order_T],
        )


def steer(point: str, vector_D: F32Array, *, positions: Positions | None = None) -> Tap:
    """An edit that adds a vector to every row (activation addition, Turner et al. 2023)."""
    vector_D = np.array(vector_D, np.float32)

    def handler(rows: TapRows) -> F32Array:
        added_TD: F32Array = rows.values_TD + vector_D
        return added_TD

    return Tap(point=point, handler=handler, positions=positions, intervention=_content("steer", vector_D))


def ablate(point: str, mean_D: F32Array | None = None, *, positions: Positions | None = None) -> Tap:
    """An edit that puts zeros, or the mean that is given, in the place of every row."""
    constant_D = np.array(0.0 if mean_D is None else mean_D, np.float32)

    def handler(rows: TapRows) -> F32Array:
        return np.broadcast_to(constant_D, rows.values_TD.shape)

    return Tap(point=point, handler=handler, positions=positions, intervention=_content("ablate", constant_D))


def replace_values(point: str, values_TD: F32Array, positions: Positions) -> Tap:
    """An edit that puts given rows in the place of those at `positions`, in that order."""
    values_TD = np.array(values_TD, np.float32)
    if len(values_TD) != len(positions):
        raise UsageError(f"{len(values_TD)} rows for {len(positions)} positions", hint="give one row each")
    row_of = {position: row for row, position in enumerate(positions)}

    def handler(rows: TapRows) -> F32Array:
        return values_TD[[row_of[position] for position in rows.positions_T.tolist()]]

    return Tap(point=point, handler=handler, positions=positions, intervention=_content("replace", values_TD))


def twin_hooks(taps: Sequence[Tap]) -> Mapping[str, Callable[[Any], Any]]:
    """The same taps as hooks of `models.torch_twin.TorchDecoder`; `request_id` is the sequence's number.

    Errors of a handler are raised from the pass. No gradient flows through a tap. Points that the engine can
    only read can be edited here.
    """

    def hook_on(here: Sequence[Tap]) -> Callable[[Any], Any]:
        def hook(value: Any) -> Any:
            flat_BTD = np.array(value.detach().float().cpu().numpy()).reshape(*value.shape[:2], -1)
            changed = [_tap_sequence(here, str(b), values_TD) for b, values_TD in enumerate(flat_BTD)]
            return value.new_tensor(flat_BTD).view(value.shape) if any(changed) else None

        return hook

    return {tap.point: hook_on([each for each in taps if each.point == tap.point]) for tap in taps}


def _tap_sequence(taps: Sequence[Tap], request_id: str, values_TD: F32Array) -> bool:
    """Run taps of one point over a whole sequence, in place; whether anything was replaced."""
    positions_T = np.arange(len(values_TD), dtype=np.int32)
    changed = False
    for tap in taps:
        here_T = positions_T[tap.selects(positions_T)]
        if here_T.size == 0:
            continue
        rows = TapRows(
            request_id=request_id, point=tap.point, positions_T=here_T, values_TD=values_TD[here_T]
        )
        new_TD = tap.call(rows)
        if new_TD is not None:
            values_TD[here_T] = new_TD
            changed = True
    return changed


def _content(kind: str, values: F32Array) -> str:
    """The identity of a built-in edit."""
    return f"{kind} {values.shape} {hashlib.sha256(values.tobytes()).hexdigest()}"
