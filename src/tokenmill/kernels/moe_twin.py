"""The numpy twin of a mixture of experts: which experts a row is sent to, and the sum of what they give.

Every sum has the order of the native kernels (`csrc/moe.h`): 16 lanes and a fixed tree for the router's
logits and its softmax; one expert after the other for the weights that are renormalised, and for the result.
The experts' products are those of any other linear.

Shape legend: T rows, D model width, X experts, P pairs of a row and an expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenmill.kernels.plan import F32Array, PackedExperts, PackedLinear, Route
from tokenmill.kernels.twin import exp2, rms_norm, sum_lanes

__all__ = ["ExpertPairs", "combine", "expert_linear", "route_rows", "sort_pairs"]

_LOG2E = np.float32(1.44269504088896341)
_LOWEST = np.float32(-125)


class ExpertPairs(NamedTuple):
    """Which rows go to which experts, [P] each: in order of expert, then of row."""

    experts_P: npt.NDArray[np.intp]
    rows_P: npt.NDArray[np.intp]


def route_rows(op: Route, x_TD: F32Array, num_active: int) -> F32Array:
    """The weights of each row's experts [T, X], zero for the others; see `Route`."""
    normed_TD = rms_norm(x_TD, op.norm, op.eps)
    logits_TX = np.stack([sum_lanes(normed_TD * weight_D) for weight_D in op.weight], axis=1)
    finite_T = np.asarray(np.isfinite(logits_TX).all(axis=1))
    logits_TX[~finite_T] = 0
    exps_TX = exp2(np.maximum((logits_TX - logits_TX.max(axis=1)[:, None]) * _LOG2E, _LOWEST))
    weights_TX = exps_TX / sum_lanes(exps_TX)[:, None]
    # A stable sort: of equal ones the first stay.
    chosen_TA = np.argsort(-weights_TX, axis=1, kind="stable")[:, :num_active]
    route_TX = np.zeros_like(weights_TX)
    np.put_along_axis(route_TX, chosen_TA, np.take_along_axis(weights_TX, chosen_TA, axis=1), axis=1)
    if op.renormalise:
        total_T = np.zeros(len(route_TX), np.float32)
        for expert in range(route_TX.shape[1]):
            total_T = total_T + route_TX[:, expert]
        route_TX = route_TX / total_T[:, None]
    route_TX[~finite_T] = 0
    route_TX[~finite_T, :num_active] = np.nan
    return route_TX


def sort_pairs(route_TX: F32Array, capacity: int) -> ExpertPairs:
    """The pairs whose weight is not zero. Raises ValueError if there are more than `capacity`."""
    experts_P, rows_P = np.nonzero(route_TX.T)
    if len(rows_P) > capacity:
        raise ValueError("rows are sent to more experts than there is room for")
    return ExpertPairs(experts_P, rows_P)


def expert_linear(
    weight: PackedExperts,
    x_PK: F32Array,
    pairs: ExpertPairs,
    linear: Callable[[PackedLinear, F32Array], F32Array],
) -> F32Array:
    """Each pair's row times the matrix of its expert, [P, K] to [P, N]; `linear` multiplies."""
    out_PN = np.zeros((len(x_PK), weight.linear.num_out), np.float32)
    for expert in np.unique(pairs.experts_P).tolist():
        mine_P = pairs.experts_P == expert
        out_PN[mine_P] = linear(weight.expert(expert), x_PK[mine_P])
    return out_PN


def combine(x_TD: F32Array, route_TX: F32Array, out_PD: F32Array, pairs: ExpertPairs) -> F32Array:
    """x + the sum of weight * output over each row's experts, in their order."""
    sum_TD = np.zeros_like(x_TD)
    weighted_PD = route_TX[pairs.rows_P, pairs.experts_P][:, None] * out_PD
    for expert in np.unique(pairs.experts_P).tolist():
        mine_P = pairs.experts_P == expert
        sum_TD[pairs.rows_P[mine_P]] += weighted_PD[mine_P]
    total_TD: F32Array = x_TD + sum_TD
    return total_TD
