"""Numbers as people read them, and curves as SVG paths."""

from collections.abc import Sequence
from typing import Final

__all__ = [
    "CHART_HEIGHT",
    "CHART_WIDTH",
    "MISSING",
    "area",
    "clock",
    "count",
    "curve",
    "money",
    "rate",
    "seconds",
    "share",
]

CHART_WIDTH: Final = 240
CHART_HEIGHT: Final = 48
MISSING: Final = "–"

_PAD: Final = 2
_UNITS: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_WHOLE: Final = 9999.5
"""Below it numbers are written out."""
_NANO: Final = 1_000_000_000


def count(value: float) -> str:
    """`9,876`, `12.3 k`, `4.56 M`."""
    for size, unit in _UNITS:
        scaled = value / size
        if value >= _WHOLE and scaled >= 0.9995:
            return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"
    return f"{value:,.0f}"


def rate(value: float) -> str:
    """A number a second, with digits where it is small."""
    return f"{value:.2f}" if 0 < value < 9.95 else count(value)


def seconds(value: float | None) -> str:
    """`0.42 ms`, `12 ms`, `1.25 s`, `95 s`."""
    if value is None:
        return MISSING
    if value < 0.9995:
        milliseconds = value * 1e3
        return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.2g} ms"
    return f"{value:.2f} s" if value < 9.995 else f"{value:.0f} s"


def share(value: float | None) -> str:
    """`42 %`; one more digit below ten."""
    if value is None:
        return MISSING
    per_cent = value * 100.0
    return f"{per_cent:.1f} %" if 0 < per_cent < 9.95 else f"{per_cent:.0f} %"


def money(nano_usd: int) -> str:
    """Dollars with as many digits as it takes to see something: `$12.34`, `$0.0042`, `$0`."""
    usd = abs(nano_usd) / _NANO
    sign = "−" if nano_usd < 0 else ""
    if usd >= 1:
        return f"{sign}${usd:,.2f}"
    if not nano_usd:
        return "$0"
    digits = 3 if usd >= 0.1 else 4 if usd >= 0.01 else 6 if usd >= 1e-4 else 9
    return f"{sign}${usd:.{digits}f}"


def clock(at_s: float) -> str:
    """Time of day in UTC."""
    whole = int(at_s) % 86400
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def curve(values: Sequence[float | None], top: float) -> str:
    """The path of a line through values from 0 to `top`, in pieces where some are missing."""
    return "".join("M" + "L".join(points) for points in _pieces(values, top))


def area(values: Sequence[float | None], top: float) -> str:
    """The path of the area below such a line."""
    paths = []
    for points in _pieces(values, top):
        begin, end = points[0].partition(",")[0], points[-1].partition(",")[0]
        paths.append(f"M{begin},{CHART_HEIGHT}L" + "L".join(points) + f"L{end},{CHART_HEIGHT}Z")
    return "".join(paths)


def _pieces(values: Sequence[float | None], top: float) -> list[list[str]]:
    """Points `x,y` of each run of values without a gap; a lone one is a short dash."""
    pieces: list[list[str]] = [[]]
    step = CHART_WIDTH / max(1, len(values) - 1)
    scale = (CHART_HEIGHT - 2 * _PAD) / top if top > 0 else 0.0
    for at, value in enumerate(values):
        if value is None:
            pieces.append([])
            continue
        y = CHART_HEIGHT - _PAD - min(value, top) * scale
        pieces[-1].append(f"{at * step:.1f},{y:.1f}")
    for piece in pieces:
        if len(piece) == 1:
            x, _, y_text = piece[0].partition(",")
            piece.append(f"{float(x) + step / 2:.1f},{y_text}")
    return [piece for piece in pieces if piece]
