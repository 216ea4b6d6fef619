"""How far a model's answers moved from those of the one it was made from, under llama.cpp's names.

Both see the same tokens, and at every position their distributions over the next one are compared: no text
is generated, so nothing is lucky. `Mean KLD` and `99.9% KLD` are of the reference's distribution against the
other's in nats; `RMS delta p` is of the probability of the token that really follows; `Same top p` is the
share of positions at which both find the same token most likely. What a drift costs on a task is not said
by it: that is measured.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.kernels import F32Array

__all__ = ["Drift", "DriftRows", "drift", "row_drift"]

_Rows = npt.NDArray[np.float64]


class DriftRows(NamedTuple):
    """Figures of R positions: KL divergence, change of the next token's probability, the same first choice;
    and what the logits themselves differ by, with the mean of each row taken away.
    """

    kld_R: _Rows
    delta_p_R: _Rows
    same_top_R: npt.NDArray[np.bool_]
    difference_R: _Rows
    size_R: _Rows
    largest_R: _Rows


class Drift(NamedTuple):
    """Figures of a text; in llama.cpp's names Mean KLD, 99.9% KLD, Maximum KLD, RMS delta p, Same top p.

    `relative_error` is the norm of the logits' differences over that of the reference's logits (rows
    centred), `largest_difference` the largest of one logit.
    """

    num_positions: int
    mean_kld: float
    kld_999: float
    max_kld: float
    rms_delta_p: float
    same_top_p: float
    relative_error: float
    largest_difference: float

    def lines(self) -> list[str]:
        """The figures as llama.cpp prints them."""
        return [
            f"Mean    KLD: {self.mean_kld:10.6f}",
            f"99.9%   KLD: {self.kld_999:10.6f}",
            f"Maximum KLD: {self.max_kld:10.6f}",
            f"RMS delta p: {100 * self.rms_delta_p:7.3f} %",
            f"Same top p:  {100 * self.same_top_p:7.3f} %",
        ]


def row_drift(reference_RV: F32Array, other_RV: F32Array, next_R: npt.NDArray[np.int64]) -> DriftRows:
    """The figures of R positions from the logits of both; `next_R` is the token that follows each."""
    p_RV, q_RV = _log_softmax(reference_RV), _log_softmax(other_RV)
    rows = np.arange(len(next_R))
    # Rows are centred: a constant that is added to all logits of a position changes nothing.
    centred_RV = reference_RV.astype(np.float64) - reference_RV.mean(1, keepdims=True, dtype=np.float64)
    moved_RV = other_RV.astype(np.float64) - other_RV.mean(1, keepdims=True, dtype=np.float64) - centred_RV
    return DriftRows(
        kld_R=np.maximum((np.exp(p_RV) * (p_RV - q_RV)).sum(1), 0),
        delta_p_R=np.exp(q_RV[rows, next_R]) - np.exp(p_RV[rows, next_R]),
        same_top_R=reference_RV.argmax(1) == other_RV.argmax(1),
        difference_R=np.square(moved_RV).sum(1),
        size_R=np.square(centred_RV).sum(1),
        largest_R=np.abs(moved_RV).max(1),
    )


def drift(parts: Iterable[DriftRows]) -> Drift:
    """The figures of all positions of `parts`. Raises UsageError if there are none."""
    columns = list(zip(*parts, strict=True))
    if not columns:
        raise UsageError("nothing to compare", hint="give texts of two tokens or more")
    kld_R, delta_R, same_R, difference_R, size_R, largest_R = (np.concatenate(each) for each in columns)
    return Drift(
        num_positions=len(kld_R),
        mean_kld=float(kld_R.mean()),
        kld_999=float(np.quantile(kld_R, 0.999)),
        max_kld=float(kld_R.max()),
        rms_delta_p=float(np.sqrt(np.square(delta_R).mean())),
        same_top_p=float(same_R.mean()),
        relative_error=float(np.sqrt(difference_R.sum() / max(size_R.sum(), np.finfo(np.float64).tiny))),
        largest_difference=float(largest_R.max()),
    )


def _log_softmax(logits_RV: F32Array) -> _Rows:
    wide_RV = logits_RV.astype(np.float64)
    wide_RV -= wide_RV.max(1, keepdims=True)
    wide_RV -= np.log(np.exp(wide_RV).sum(1, keepdims=True))
    return wide_RV
