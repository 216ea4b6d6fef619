"""How long a step will take: learnt from the steps so far, without reading a clock.

The scheduler uses it to bound a step while urgent requests run, speculation to weigh a draft's rows. The
model is a sum of five costs that are not negative:

    seconds = base + tile * ceil(rows / 16) + row * rows + out_row * out_rows + kv_token * kv_tokens

Weights are read once a step (base). Matrix units work on 16 rows at a time, so a 17th row costs a whole
tile and the 16 before it nearly nothing; a slope in rows alone would call drafts dear where they are free.
Norms, rotation and kernels without tiles cost by the row, logits and sampling by the row that wants them,
attention by the token it reads. The product of rows and context in a long prompt's attention is not
covered: where it dominates, forgetting follows it.

Learning is least squares with exponential forgetting, solved by one round of coordinate descent an
observation (Hildreth 1957), so no cost becomes negative and directions without data keep their prior.
Errors are measured in units of the longer of the two times, the expected and the measured one: none is
above 1, and a hiccup pulls the less the longer it is. When errors are usually large, old steps are
forgotten faster, so a lasting change is followed within some tens of steps.
"""

import math
from bisect import bisect_right
from dataclasses import astuple, dataclass

__all__ = ["ROW_TILE", "StepTimeModel", "StepTimePrior"]

ROW_TILE = 16
"""Rows that a matrix unit computes at once."""

# Steps after which an observation weighs half; fewer where the usual relative error is larger than this.
_HALF_LIFE = 256
_CALM_ERROR = 0.1
_ERROR_RATE = 0.05
_TINY_S = 1e-9
_PATIENCE = 10.0
_PATIENCE_AFTER_LONG = 3.0
_KEEP_LONGEST = 0.99
_SMALL_CONTEXT = 512
_MAX_ROWS = 1 << 16
# (rows, KV tokens, rows with logits) of the steps that stand for the prior, and how little they weigh:
# as steps that took so many times as long.
_DOUBT = 10.0
_TYPICAL = ((1, 0, 1), (16, 0, 16), (17, 0, 1), (512, 0, 1), (64, 0, 64), (1, 16384, 1))


@dataclass(frozen=True, kw_only=True)
class StepTimePrior:
    """Seconds to expect before anything is measured. The defaults are those of a 135M model on two cores."""

    base_s: float = 7e-3
    tile_s: float = 1e-3
    row_s: float = 2.5e-4
    out_row_s: float = 5e-5
    kv_token_s: float = 2e-6


class StepTimeModel:
    """Predicts the seconds of a step from its rows, the KV tokens it reads and its rows with logits."""

    def __init__(self, prior: StepTimePrior | None = None) -> None:
        self._costs: list[float] = list(astuple(prior or StepTimePrior()))
        assert all(cost >= 0.0 for cost in self._costs) and self._costs[0] > 0.0, prior
        size = range(len(self._costs))
        self._gram = [[0.0 for _ in size] for _ in size]
        self._moment = [0.0 for _ in size]
        self._error = 0.0
        self._longest_s = 0.0
        self._most_rows = 0
        self._most_kv_tokens = 0
        for rows, kv_tokens, out_rows in _TYPICAL:
            expected = self.predict(rows, kv_tokens, out_rows)
            self._add(_features(rows, kv_tokens, out_rows), expected, _DOUBT * expected)

    @property
    def costs(self) -> StepTimePrior:
        """The five costs as they are now."""
        base_s, tile_s, row_s, out_row_s, kv_token_s = self._costs
        return StepTimePrior(
            base_s=base_s, tile_s=tile_s, row_s=row_s, out_row_s=out_row_s, kv_token_s=kv_token_s
        )

    @property
    def is_calm(self) -> bool:
        """Whether steps usually take what was expected."""
        return self._error <= _CALM_ERROR

    def predict(self, num_rows: int, num_kv_tokens: int, num_out_rows: int) -> float:
        """Seconds of such a step."""
        base, tile, row, out_row, kv_token = self._costs
        seconds = base + tile * -(-num_rows // ROW_TILE) + row * num_rows
        return max(_TINY_S, seconds + out_row * num_out_rows + kv_token * num_kv_tokens)

    def observe(self, num_rows: int, num_kv_tokens: int, num_out_rows: int, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        expected = self.predict(num_rows, num_kv_tokens, num_out_rows)
        unit = max(expected, seconds)
        self._longest_s = max(seconds, _KEEP_LONGEST * self._longest_s)
        self._most_rows = max(self._most_rows, num_rows)
        self._most_kv_tokens = max(self._most_kv_tokens, num_kv_tokens)
        self._error += _ERROR_RATE * (abs(seconds - expected) / unit - self._error)
        self._add(_features(num_rows, num_kv_tokens, num_out_rows), seconds, unit)
        self._descend()

    def bound(self, num_rows: int, num_kv_tokens: int, num_out_rows: int) -> float:
        """Seconds after which such a step must be hanging; infinite before any step was seen.

        That is ten times what is expected, or three times the longest of the last steps; and more the larger
        it is than all steps so far, for what was learnt from small ones says little about it.
        """
        if not self._most_rows:
            return math.inf
        unseen = max(1.0, num_rows / self._most_rows)
        unseen *= max(1.0, num_kv_tokens / (self._most_kv_tokens + _SMALL_CONTEXT))
        expected_s = _PATIENCE * self.predict(num_rows, num_kv_tokens, num_out_rows)
        return unseen * max(expected_s, _PATIENCE_AFTER_LONG * self._longest_s)

    def rows_within(self, seconds: float, num_kv_tokens: int, num_out_rows: int) -> int:
        """The most rows that a step may have to end in this time; at least 1."""
        rows = range(1, _MAX_ROWS + 1)
        return max(1, bisect_right(rows, seconds, key=lambda n: self.predict(n, num_kv_tokens, num_out_rows)))

    def _add(self, features: tuple[float, ...], seconds: float, unit: float) -> None:
        """Forget a little and add one equation, in units of time."""
        keep = 0.5 ** (max(1.0, self._error / _CALM_ERROR) / _HALF_LIFE)
        scaled = [feature / unit for feature in features]
        self._moment = [keep * a + x * (seconds / unit) for a, x in zip(self._moment, scaled, strict=True)]
        self._gram = [
            [keep * a + x * y for a, y in zip(line, scaled, strict=True)]
            for line, x in zip(self._gram, scaled, strict=True)
        ]

    def _descend(self) -> None:
        """Move each cost in turn to its best value, the others fixed."""
        costs = self._costs
        for i, line in enumerate(self._gram):
            if line[i] > 0.0:
                rest = self._moment[i] - sum([a * cost for a, cost in zip(line, costs, strict=True)])
                costs[i] = max(0.0, costs[i] + rest / line[i])


def _features(num_rows: int, num_kv_tokens: int, num_out_rows: int) -> tuple[float, ...]:
    return (1.0, -(-num_rows // ROW_TILE), num_rows, num_out_rows, num_kv_tokens)
