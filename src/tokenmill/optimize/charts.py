"""Charts as inline SVG: cost against quality with intervals, and latency under load. Colours are the page's.

They are text and shapes only, so they print and need no script.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Final, NamedTuple

from tokenmill.optimize.choice import usd

__all__ = ["Curve", "Mark", "latency_chart", "pareto_chart"]

_WIDTH: Final = 760
_HEIGHT: Final = 360
_LEFT: Final = 64
_RIGHT: Final = 24
_TOP: Final = 18
_BOTTOM: Final = 48
_LABEL_STEP: Final = 15


class Mark(NamedTuple):
    """A point with intervals: cost in dollars, quality from 0 to 1; `kind` is its class in the page's
    style.
    """

    name: str
    kind: str
    usd: tuple[float, float, float]
    quality: tuple[float, float, float]


class Curve(NamedTuple):
    """Loads of one candidate: (calls a second, p99 in milliseconds, calls at a time)."""

    name: str
    kind: str
    points: Sequence[tuple[float, float, int]]


class _Scale(NamedTuple):
    """Values to places; `is_log` in powers of ten."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def at(self, value: float) -> float:
        low, high, value = (
            (math.log10(each) for each in (self.low, self.high, max(value, 1e-12)))
            if self.is_log
            else (self.low, self.high, value)
        )
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 1)


def pareto_chart(marks: Sequence[Mark], bar: float | None) -> str:
    """Dollars for each passing answer (logarithmic) against quality; `bar` is the least that passes."""
    if not marks:
        return ""
    costs = [each for mark in marks for each in mark.usd if each > 0]
    x = _log_scale(min(costs), max(costs), _LEFT, _WIDTH - _RIGHT)
    lowest = min([mark.quality[1] for mark in marks] + ([bar] if bar is not None else []))
    low = max(0.0, math.floor((lowest - 0.02) * 10) / 10)
    y = _Scale(low, 1.0, _HEIGHT - _BOTTOM, _TOP, False)
    parts = [
        *_log_axis(x, "USD for a million passing answers (logarithmic)", usd),
        *_share_axis(y, "quality"),
    ]
    if bar is not None:
        parts.append(
            f'<line class="bar" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y.at(bar)}" y2="{y.at(bar)}"/>'
        )
        parts.append(
            f'<text class="note" x="{_WIDTH - _RIGHT}" y="{y.at(bar) - 5}" text-anchor="end">bar</text>'
        )
    for mark in marks:
        parts += _mark(mark, x, y)
    parts += _labels([(mark.name, mark.kind, x.at(mark.usd[0]), y.at(mark.quality[0])) for mark in marks])
    names = ", ".join(f"{mark.name}: {usd(mark.usd[0])}, {mark.quality[0]:.1%}" for mark in marks)
    return _svg(parts, f"Cost against quality. {names}")


def latency_chart(curves: Sequence[Curve], limit_ms: float | None) -> str:
    """Calls a second against the p99 of the whole answer, both logarithmic."""
    points = [each for curve in curves for each in curve.points if each[0] > 0 and each[1] > 0]
    if not points:
        return ""
    heights = [each[1] for each in points] + ([limit_ms] if limit_ms else [])
    x = _log_scale(min(p[0] for p in points), max(p[0] for p in points), _LEFT, _WIDTH - _RIGHT)
    y = _log_scale(min(heights), max(heights), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        *_log_axis(x, "calls a second", _plain),
        *_log_axis(y, "p99 of the answer, ms", _plain, is_x=False),
    ]
    if limit_ms:
        at = y.at(limit_ms)
        parts.append(f'<line class="bar" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="note" x="{_LEFT + 6}" y="{at - 5}">limit</text>')
    ends = []
    for curve in curves:
        places = [(x.at(rate), y.at(ms), num) for rate, ms, num in curve.points if rate > 0 and ms > 0]
        if not places:
            continue
        line = " ".join(f"{px},{py}" for px, py, _ in places)
        parts.append(f'<polyline class="curve {curve.kind}" points="{line}"/>')
        for px, py, num in places:
            parts.append(f'<circle class="dot {curve.kind}" cx="{px}" cy="{py}" r="3.5">')
            parts.append(f"<title>{escape(curve.name)}: {num} at a time</title></circle>")
        ends.append((curve.name, curve.kind, places[-1][0], places[-1][1]))
    parts += _labels(ends)
    return _svg(parts, f"Latency under load of {', '.join(curve.name for curve in curves)}")


def _mark(mark: Mark, x: _Scale, y: _Scale) -> list[str]:
    """A point and the cross of its intervals."""
    px, py = x.at(mark.usd[0]), y.at(mark.quality[0])
    left, right = (x.at(each) for each in mark.usd[1:])
    down, up = (y.at(each) for each in mark.quality[1:])
    return [
        f'<line class="reach {mark.kind}" x1="{left}" x2="{right}" y1="{py}" y2="{py}"/>',
        f'<line class="reach {mark.kind}" x1="{px}" x2="{px}" y1="{down}" y2="{up}"/>',
        f'<circle class="dot {mark.kind}" cx="{px}" cy="{py}" r="5">',
        f"<title>{escape(mark.name)}</title></circle>",
    ]


def _labels(places: Sequence[tuple[str, str, float, float]]) -> list[str]:
    """Names beside their points, moved down where they would cover one another."""
    found: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for name, kind, px, py in sorted(places, key=lambda each: (each[3], each[2])):
        shown = name if len(name) <= 44 else f"{name[:43]}…"
        width = 6.4 * len(shown)
        is_left = px + width + 12 > _WIDTH
        start = px - width - 9 if is_left else px + 9
        at = py - 8
        while any(
            abs(at - y) < _LABEL_STEP and start < right and left < start + width for left, right, y in taken
        ):
            at += _LABEL_STEP
        taken.append((start, start + width, at))
        anchor = "end" if is_left else "start"
        x = px - 9 if is_left else px + 9
        found.append(f'<text class="label {kind}" x="{x:g}" y="{at:g}" text-anchor="{anchor}">')
        found.append(f"{escape(shown)}</text>")
    return found


def _log_scale(low: float, high: float, start: float, end: float) -> _Scale:
    """With room at both ends, a third of a power of ten at least."""
    middle = math.sqrt(low * high)
    low, high = min(low, middle / 1.5) / 1.3, max(high, middle * 1.5) * 1.3
    return _Scale(low, high, start, end, True)


def _log_axis(scale: _Scale, title: str, words: Callable[[float], str], *, is_x: bool = True) -> list[str]:
    parts: list[str] = []
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    steps = (1.0,) if len(powers) > 4 else (1.0, 2.0, 5.0)
    for value in (step * 10.0**power for power in powers for step in steps):
        if scale.low <= value <= scale.high:
            parts += _tick(scale.at(value), words(value), is_x)
    return [*parts, _title(title, is_x)]


def _share_axis(scale: _Scale, title: str) -> list[str]:
    step = 0.1 if scale.high - scale.low > 0.3 else 0.05
    num = round((scale.high - scale.low) / step)
    values = [scale.low + step * at for at in range(num + 1)]
    ticks = [part for value in values for part in _tick(scale.at(value), f"{value:.0%}", False)]
    return [*ticks, _title(title, False)]


def _tick(place: float, text: str, is_x: bool) -> list[str]:
    bottom, right, shown = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, escape(text)
    if is_x:
        return [
            f'<line class="grid" x1="{place}" x2="{place}" y1="{_TOP}" y2="{bottom}"/>',
            f'<text class="tick" x="{place}" y="{bottom + 17}" text-anchor="middle">{shown}</text>',
        ]
    return [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}"/>',
        f'<text class="tick" x="{_LEFT - 8}" y="{place + 4}" text-anchor="end">{shown}</text>',
    ]


def _title(text: str, is_x: bool) -> str:
    if is_x:
        where = f'x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}"'
    else:
        where = f'transform="translate(14 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)"'
    return f'<text class="axis" {where} text-anchor="middle">{escape(text)}</text>'


def _svg(parts: Sequence[str], words: str) -> str:
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(words)}">'
    return "".join([head, *parts, "</svg>"])


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
