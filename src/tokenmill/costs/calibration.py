"""Constants of a machine from a few measured steps, and what a prediction with them is worth.

The fit takes the least absolute error of the logarithm of the time, so that one odd measurement counts
once and not by its square; weak priors keep constants that the points say nothing about where they were.
What a prediction is worth is measured by leaving points out: by one, or by all points of one model. A
prediction always has three parts, the bound of the data sheet, the estimate, and an interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.costs.step import (
    Constants,
    Form,
    MachinePeak,
    StepLoad,
    StepTerms,
    bound_seconds,
    step_seconds,
    step_terms,
)

__all__ = [
    "INTERVAL_LEVEL",
    "Calibration",
    "HeldOut",
    "Observation",
    "Prediction",
    "calibrate",
    "fit_constants",
    "held_out_errors",
    "interval_width",
    "predict",
]

INTERVAL_LEVEL: Final = 0.8

# Standard deviations of the priors, of natural logarithms: efficiencies are known within a third, what a
# layer, an exchange or a row costs within a factor of three.
_PRIOR_SPREAD: Final = np.array([0.3, 0.5, 0.5, 1.1, 1.1, 1.1])
_ERROR_SCALE: Final = 0.1
_MIN_ERROR: Final = 1e-3
_MAX_STEPS: Final = 60

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One measured step. `group` names what is left out together, such as the model."""

    load: StepLoad
    peak: MachinePeak
    seconds: float
    group: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Constants, and the logarithmic half-width that held `INTERVAL_LEVEL` of what was left out.

    `median_error` and `p90_error` are of the points left out, relative; `basis` says what all this rests
    on, in words for people.
    """

    constants: Constants
    log_width: float
    num_points: int
    median_error: float
    p90_error: float
    basis: str
    form: Form = "sum"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one step: no less than `bound_s`; `estimate_s`, probably from `low_s` to `high_s`.

    The interval is to hold 80 % of measurements; its low end is not cut at the bound, for data sheets err.
    """

    bound_s: float
    estimate_s: float
    low_s: float
    high_s: float


class HeldOut(NamedTuple):
    """The logarithm of predicted / measured for one observation that the fit had not seen."""

    observation: Observation
    log_error: float


def predict(load: StepLoad, peak: MachinePeak, calibration: Calibration) -> Prediction:
    """Bound, estimate and interval of a step; no end of it is faster than the bound."""
    bound = bound_seconds(load, peak)
    estimate = max(bound, step_seconds(load, peak, calibration.constants, calibration.form))
    factor = math.exp(calibration.log_width)
    low = max(bound, estimate / factor)
    return Prediction(bound_s=bound, estimate_s=estimate, low_s=low, high_s=estimate * factor)


def calibrate(
    observations: Sequence[Observation], prior: Constants, basis: str, form: Form = "sum"
) -> Calibration:
    """Fit all points; errors and interval are of points left out, one group at a time.

    Where there is a single group the points are left out one by one. Raises UsageError for fewer than 3.
    """
    if len(observations) < 3:
        raise UsageError(
            f"{len(observations)} measured points cannot be calibrated on", hint="measure at least 3"
        )
    errors = [held.log_error for held in held_out_errors(observations, prior, form)]
    relative = np.abs(np.expm1(errors))
    return Calibration(
        constants=fit_constants(observations, prior, form),
        log_width=interval_width(errors),
        num_points=len(observations),
        median_error=float(np.median(relative)),
        p90_error=float(np.quantile(relative, 0.9)),
        basis=basis,
        form=form,
    )


def held_out_errors(
    observations: Sequence[Observation], prior: Constants, form: Form = "sum"
) -> list[HeldOut]:
    """Every observation predicted by constants that were fitted without its group."""
    groups = [each.group for each in observations]
    if len(set(groups)) == 1:
        groups = [str(at) for at in range(len(observations))]
    held = []
    for left_out in dict.fromkeys(groups):
        rest = [each for each, group in zip(observations, groups, strict=True) if group != left_out]
        constants = fit_constants(rest, prior, form)
        for each, group in zip(observations, groups, strict=True):
            if group == left_out:
                seconds = step_seconds(each.load, each.peak, constants, form)
                held.append(HeldOut(each, math.log(seconds / each.seconds)))
    return held


def interval_width(log_errors: Sequence[float], level: float = INTERVAL_LEVEL) -> float:
    """The half-width that holds `level` of new errors like these: the rank ceil(level (n + 1)), at most n."""
    ranked = sorted(abs(error) for error in log_errors)
    return ranked[min(len(ranked), math.ceil(level * (len(ranked) + 1))) - 1]


def fit_constants(observations: Sequence[Observation], prior: Constants, form: Form = "sum") -> Constants:
    """Minimise Σ |log predicted - log measured| and the priors; without observations the prior itself.

    Iteratively reweighted least squares with damping over the logarithms of the six factors.
    """
    start = _factors(prior)
    if not observations:
        return prior
    terms_NT: _Floats = np.array([step_terms(each.load, each.peak) for each in observations], np.float64)
    fixed_N = np.array([each.load.exchange_s for each in observations], np.float64)
    logs_N: _Floats = np.log(np.array([each.seconds for each in observations], np.float64))
    factors: _Floats = start
    damping = 1e-2
    cost, errors_N, slopes_NT = _state(terms_NT, fixed_N, logs_N, factors, start, form)
    for _ in range(_MAX_STEPS):
        step = _newton_step(errors_N, slopes_NT, factors - start, damping)
        new = _state(terms_NT, fixed_N, logs_N, factors + step, start, form)
        if new[0] < cost:
            factors = np.asarray(factors + step, np.float64)
            damping = max(1e-6, damping / 3)
            done = cost - new[0] < 1e-9 * cost
            cost, errors_N, slopes_NT = new
            if done:
                break
        else:
            damping *= 4
    return _constants(factors)


def _newton_step(errors_N: _Floats, slopes_NT: _Floats, moved: _Floats, damping: float) -> _Floats:
    weights_N = 1 / (_ERROR_SCALE * np.maximum(np.abs(errors_N), _MIN_ERROR))
    precision = np.diag(1 / _PRIOR_SPREAD**2)
    gradient = slopes_NT.T @ (weights_N * errors_N) + precision @ moved
    curvature = slopes_NT.T @ (weights_N[:, None] * slopes_NT) + precision
    curvature += damping * np.diag(np.diag(curvature))
    step = -np.asarray(np.linalg.solve(curvature, gradient), np.float64)
    return np.clip(step, -1.0, 1.0)


def _state(
    terms_NT: _Floats, fixed_N: _Floats, logs_N: _Floats, factors: _Floats, start: _Floats, form: Form
) -> tuple[float, _Floats, _Floats]:
    """Cost, errors, and slopes of the logarithm of the time by the logarithms of the factors."""
    parts_NT = terms_NT * np.exp(factors)
    if form == "max":
        computes = parts_NT[:, 2] > parts_NT[:, 0] + parts_NT[:, 1]
        parts_NT[computes, :2] = 0.0
        parts_NT[~computes, 2] = 0.0
    seconds_N = parts_NT.sum(axis=1) + fixed_N
    errors_N = np.log(seconds_N) - logs_N
    penalty = float((((factors - start) / _PRIOR_SPREAD) ** 2).sum()) / 2
    return float(np.abs(errors_N).sum()) / _ERROR_SCALE + penalty, errors_N, parts_NT / seconds_N[:, None]


def _factors(constants: Constants) -> _Floats:
    """Logarithms of what multiplies each term: an efficiency divides its own."""
    c = constants
    values = StepTerms(1 / c.weights, 1 / c.kv, 1 / c.compute, c.layer_s, c.comm_s, c.row_s)
    return np.asarray(np.log(np.maximum(np.array(values), 1e-9)), np.float64)


def _constants(factors: _Floats) -> Constants:
    weights, kv, compute, layer_s, comm_s, row_s = (float(value) for value in np.exp(factors))
    fields: dict[str, Any] = {"layer_s": layer_s, "comm_s": comm_s, "row_s": row_s}
    return Constants(weights=1 / weights, kv=1 / kv, compute=1 / compute, **fields)
