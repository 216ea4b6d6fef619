"""What the dashboard remembers: the last hour in slots of 15 s, recent calls one by one, recent errors.

All of it is bounded and in memory: after a restart the charts begin anew, and what lasts is in the ledger.
Tokens of a call are spread over the time from its first token to its end, for they are known only then; so
the newest slots still grow while long answers are being written.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tokenmill.core import Tier
from tokenmill.server.slo import CallTimes

__all__ = [
    "NUM_SLOTS",
    "RECENT_S",
    "SLOT_S",
    "ErrorLine",
    "Gauges",
    "History",
    "Recent",
    "Slot",
    "percentile",
]

SLOT_S: Final = 15
NUM_SLOTS: Final = 240
RECENT_S: Final = 300.0
"""How far back latencies by tier look."""

_MOST_RECENT: Final = 20_000
_MOST_ERRORS: Final = 50


@dataclass
class Slot:
    """What happened in `SLOT_S` seconds; of `kv_share` and `num_waiting` the highest that was seen."""

    at: int
    num_calls: int = 0
    num_bad: int = 0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    kv_share: float | None = None
    num_waiting: int | None = None
    ttfts_s: list[float] = field(default_factory=list)
    tpots_s: list[float] = field(default_factory=list)


class Gauges(NamedTuple):
    """What the server looks like at one moment."""

    kv_share: float | None
    num_waiting: int
    num_answering: int


class Recent(NamedTuple):
    """Calls of one tier in the last `RECENT_S` seconds: times in seconds, sorted."""

    num_calls: int
    ttfts_s: list[float]
    tpots_s: list[float]
    totals_s: list[float]


@dataclass
class ErrorLine:
    """Something that went wrong `count` times in a row, the last time at `at_s` of Unix time."""

    at_s: float
    what: str
    where: str
    request_id: str
    count: int = 1


class History:
    """The last hour. Points in time are monotonic seconds, those of errors Unix time."""

    def __init__(self) -> None:
        self.gauges = Gauges(None, 0, 0)
        self.errors: deque[ErrorLine] = deque(maxlen=_MOST_ERRORS)
        self._slots: deque[Slot] = deque(maxlen=NUM_SLOTS)
        self._recent: deque[tuple[float, CallTimes]] = deque(maxlen=_MOST_RECENT)

    def add(self, call: CallTimes, num_prompt_tokens: int, now_s: float) -> None:
        """Count a call that has ended."""
        self._recent.append((now_s, call))
        slot = self._slot(now_s)
        slot.num_calls += 1
        slot.num_bad += not call.is_answered and not call.is_given_up
        if call.ttft_s is not None:
            slot.ttfts_s.append(call.ttft_s)
        if call.tpot_s is not None:
            slot.tpots_s.append(call.tpot_s)
        began_s = now_s - call.total_s
        first_s = now_s if call.ttft_s is None else min(now_s, began_s + call.ttft_s)
        self._spread("prompt_tokens", num_prompt_tokens, began_s, first_s)
        self._spread("output_tokens", call.num_output_tokens, first_s, now_s)

    def look(self, gauges: Gauges, now_s: float) -> None:
        """Keep what the server looks like now."""
        slot = self._slot(now_s)
        self.gauges = gauges
        slot.num_waiting = max(gauges.num_waiting, slot.num_waiting or 0)
        if gauges.kv_share is not None:
            slot.kv_share = max(gauges.kv_share, slot.kv_share or 0.0)

    def fail(self, line: ErrorLine) -> None:
        """Keep an error; the same again counts, and a request is listed once."""
        if any(line.request_id and line.request_id == old.request_id for old in self.errors):
            return
        last = self.errors[-1] if self.errors else None
        if last is not None and (last.what, last.where) == (line.what, line.where):
            last.at_s, last.request_id, last.count = line.at_s, line.request_id, last.count + 1
            return
        self.errors.append(line)

    def slots(self, now_s: float) -> list[Slot | None]:
        """The last hour up to now, the oldest first; None where nothing is known."""
        newest = self._slot(now_s).at
        slots: list[Slot | None] = [None] * NUM_SLOTS
        for slot in self._slots:
            if (back := newest - slot.at) < NUM_SLOTS:
                slots[-1 - back] = slot
        return slots

    def recent(self, tier: Tier, now_s: float) -> Recent:
        """Calls of a tier that ended in the last `RECENT_S` seconds."""
        while self._recent and self._recent[0][0] < now_s - RECENT_S:
            self._recent.popleft()
        calls = [call for _, call in self._recent if call.tier == tier and not call.is_given_up]
        return Recent(
            num_calls=len(calls),
            ttfts_s=_known(call.ttft_s for call in calls),
            tpots_s=_known(call.tpot_s for call in calls),
            totals_s=_known(call.total_s for call in calls if call.is_answered),
        )

    def _slot(self, now_s: float) -> Slot:
        """The slot of now; those that were missed are made, too."""
        at = int(now_s // SLOT_S)
        if not self._slots:
            self._slots.append(Slot(at))
        for missed in range(max(self._slots[-1].at + 1, at - NUM_SLOTS), at + 1):
            self._slots.append(Slot(missed))
        return self._slots[-1]

    def _spread(self, name: str, amount: int, begin_s: float, end_s: float) -> None:
        """Add an amount to the slots from `begin_s` to now, in proportion; older time has none."""
        oldest, newest = self._slots[0].at, self._slots[-1].at
        first = max(oldest, int(begin_s // SLOT_S))
        length_s = end_s - begin_s
        for at in range(first, newest + 1):
            inside_s = max(0.0, min(end_s, (at + 1) * SLOT_S) - max(begin_s, at * SLOT_S))
            share = inside_s / length_s if length_s > 0 else float(at == newest)
            slot = self._slots[at - newest - 1]
            setattr(slot, name, getattr(slot, name) + amount * share)


def percentile(values: Sequence[float], per_cent: float) -> float | None:
    """The nearest-rank percentile of sorted values; None of none."""
    if not values:
        return None
    return values[max(0, math.ceil(len(values) * per_cent / 100.0) - 1)]


def _known(values: Iterable[float | None]) -> list[float]:
    return sorted(value for value in values if value is not None)
