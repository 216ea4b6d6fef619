"""Which candidate wins, and why the others do not.

The cheapest that passes wins, in dollars for each passing answer, so that failed answers are paid for. It
must also be cheaper than the incumbent, proven by their intervals; if none is, the answer is to keep the
incumbent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenmill.optimize.records import Figures, Lost, Range
from tokenmill.optimize.verdict import Judged

__all__ = ["Choice", "choose", "pareto", "usd", "usd_million"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`winner` is empty if the incumbent is kept. `why` says it in a sentence, `lost` of each other one."""

    winner: str
    why: str
    saving: float | None
    lost: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """For the report and the certificate."""
        return {"winner": self.winner, "why": self.why, "saving": self.saving, "lost": dict(self.lost)}


def choose(
    judged: Mapping[str, Judged],
    figures: Mapping[str, Figures],
    incumbent: Range | None,
    dropped: Sequence[Lost] = (),
) -> Choice:
    """The choice among all that were measured. `incumbent` is its cost for each passing answer, if known."""
    lost = {each.candidate: f"{_STAGES[each.stage]}: {each.reason}" for each in dropped}
    for name, each in judged.items():
        if each.outcome != "pass":
            lost[name] = _NOT_PASSED[each.outcome] + "; ".join(each.reasons)
    passing = sorted((name for name in judged if name not in lost), key=lambda name: _key(figures[name]))
    for name in [each for each in passing if not _is_cheaper(figures[each], incumbent)]:
        lost[name] = (
            f"it passes, but is not proven cheaper than the incumbent: {_compared(figures[name], incumbent)}"
        )
    left = [name for name in passing if name not in lost]
    if not left:
        why = "no candidate passes" if not passing else "what passes is not proven cheaper than the incumbent"
        return Choice(winner="", why=f"keep the incumbent: {why}", saving=None, lost=lost)
    winner = left[0]
    for name in left[1:]:
        lost[name] = f"it passes, but costs more: {_compared(figures[name], figures[winner].usd_per_pass)}"
    saving = _saving(figures[winner], incumbent)
    rest = "" if saving is None else f", {_words(saving)} less than the incumbent"
    cost = usd_million(figures[winner].usd_per_pass.estimate)
    why = f"{winner} is the cheapest that passes: {cost} for a million passing answers{rest}"
    return Choice(winner=winner, why=why, saving=saving, lost=lost)


def pareto(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names that nobody beats: of (cost, quality), none is cheaper and at least as good, or better and no
    dearer.
    """
    kept = set()
    for name, (cost, quality) in points.items():
        beaten = any(
            other_cost <= cost and other_quality >= quality and (other_cost, other_quality) != (cost, quality)
            for other_cost, other_quality in points.values()
        )
        if not beaten:
            kept.add(name)
    return kept


def usd(value: float | None) -> str:
    """Dollars with three digits, however small."""
    if value is None:
        return "unknown"
    return f"${value:,.2f}" if value >= 1 else f"${value:.3g}" if value >= 1e-4 else f"${value:.2e}"


def usd_million(value: float | None) -> str:
    """Dollars for a million of what costs so much."""
    return usd(None if value is None else 1e6 * value)


_STAGES = {"plan": "not tried", "make": "could not be made", "explore": "given up early"}
_NOT_PASSED = {"fail": "fails: ", "undecided": "undecided: "}


def _key(figures: Figures) -> tuple[bool, float]:
    cost = figures.usd_per_pass.estimate
    return (cost is None, cost or 0.0)


def _is_cheaper(figures: Figures, incumbent: Range | None) -> bool:
    """Proven where both have intervals; a cost that nobody told cannot be compared, which the report says."""
    if incumbent is None or incumbent.estimate is None:
        return True
    high, cost = figures.usd_per_pass.high, figures.usd_per_pass.estimate
    low = incumbent.estimate if incumbent.low is None else incumbent.low
    return cost is not None and high is not None and high < low


def _compared(figures: Figures, other: Range | None) -> str:
    own = figures.usd_per_pass
    said = f"{usd_million(own.estimate)} (up to {usd_million(own.high)}) for a million passing answers"
    if other is None:
        return said
    return f"{said} against {usd_million(other.estimate)}"


def _words(saving: float) -> str:
    """A share, or where hardly anything is left, how many times less."""
    return f"{saving:.1%}" if saving < 0.95 else f"{1 / max(1 - saving, 1e-9):,.0f} times"


def _saving(figures: Figures, incumbent: Range | None) -> float | None:
    cost = figures.usd_per_pass.estimate
    if incumbent is None or not incumbent.estimate or cost is None:
        return None
    return 1 - cost / incumbent.estimate
