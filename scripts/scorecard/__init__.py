"""Reliability as numbers: each line of docs/reliability.md comes from one command here."""

from dataclasses import dataclass

__all__ = ["Line"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one line of the scorecard measured: `violations` in `cases` trials, and further figures."""

    name: str
    what: str
    cases: int
    violations: int
    seconds: float
    figures: dict[str, float | int | str]
