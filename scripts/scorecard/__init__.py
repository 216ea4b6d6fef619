"""Lines of the reliability scorecard: each tries to break one guard, many times, and counts what broke."""

from dataclasses import dataclass

__all__ = ["Line"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one line of the scorecard found."""

    name: str
    what: str
    cases: int
    violations: int
    seconds: float
    figures: dict[str, float | int | str]
