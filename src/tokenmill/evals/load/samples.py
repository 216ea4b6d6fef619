"""What is kept of a request: when it was due, when it was sent, when each piece of its answer came.

Every figure is made of these, so a different question needs no second run. Times are seconds from the start
of the run. A request is counted from the moment when it was due, not from when it was sent: a system or a
client that makes later requests wait must not hide it (coordinated omission).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

__all__ = ["CountedBy", "Origin", "Sample", "Status"]

Status: TypeAlias = Literal["ok", "error", "cancelled"]

Origin: TypeAlias = Literal["due", "sent"]
"""What latencies are counted from. `sent` is for comparison with tools that count so."""

CountedBy: TypeAlias = Literal["system", "pieces"]
"""Who counted output tokens: the system itself, or we, one a piece."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One request. `piece_times_s` has one entry for each piece of text that arrived.

    `due_s` is fixed by the arrivals of an open loop; in a closed loop it is `sent_s`. `is_warmup` samples
    are in no figure. `error` says why it is no `ok`.
    """

    id: str
    is_warmup: bool
    due_s: float
    sent_s: float
    end_s: float
    status: Status
    piece_times_s: tuple[float, ...] = ()
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    counted_by: CountedBy = "pieces"
    finish_reason: str = ""
    error: str = ""

    def ttft_s(self, origin: Origin = "due") -> float | None:
        """To the first piece of text; None if none came."""
        return self.piece_times_s[0] - self.origin_s(origin) if self.piece_times_s else None

    def e2e_s(self, origin: Origin = "due") -> float:
        """To the end of the answer."""
        return self.end_s - self.origin_s(origin)

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, the mean of this request; None for a single token."""
        if self.num_output_tokens < 2 or not self.piece_times_s:
            return None
        return (self.piece_times_s[-1] - self.piece_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between pieces that follow each other."""
        return tuple(later - earlier for earlier, later in pairwise(self.piece_times_s))

    @property
    def late_s(self) -> float:
        """How long after its time it was sent."""
        return self.sent_s - self.due_s

    def origin_s(self, origin: Origin) -> float:
        """The moment that latencies are counted from."""
        return self.due_s if origin == "due" else self.sent_s
