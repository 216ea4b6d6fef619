"""The lines of the reliability scorecard: each a program that tries to break one promise and counts."""

from dataclasses import dataclass

__all__ = ["Line"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one line of the scorecard found: cases run, violations among them, seconds, further figures."""

    name: str
    what: str
    cases: int
    violations: int
    seconds: float
    figures: dict[str, float | int | str]
