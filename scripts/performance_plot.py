"""The stacked bars of docs/performance.md, as SVG made from its tables: no plotting library needed.

Grey text and full colours stand out on a light and on a dark page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from scripts.performance_page import parse_table, section

__all__ = ["plot"]

_COLOURS: Final = {
    "gate and up": "#1f77b4",
    "down": "#4f9bd0",
    "output": "#83bde3",
    "q, k, v": "#2b5c8a",
    "head": "#17becf",
    "attention": "#d62728",
    "rotation, KV write": "#ff7f0e",
    "norms": "#2ca02c",
    "quantising": "#98c34a",
    "embedding, selection": "#bcbd22",
    "native call, threads": "#8c564b",
    "Python": "#9467bd",
}
_GREY: Final = "#808890"
_WIDTH, _LEFT, _BAR, _GAP, _TOP = 860, 110, 34, 26, 16
_SPAN: Final = _WIDTH - _LEFT - 20
_LEGEND_COLUMNS: Final = 4


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """One step: microseconds of its parts, of the whole and of its limit."""

    name: str
    parts: dict[str, float]
    total: float
    limit: float


def plot(page: str, names: Sequence[str]) -> str:
    """The picture of those steps whose tables are in the page."""
    bars = [bar for name in names if (bar := _read(page, name)) is not None]
    height = _TOP + len(bars) * (_BAR + _GAP) + 26 + 20 * -(-len(_COLOURS) // _LEGEND_COLUMNS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-size="12" '
        f'font-family="sans-serif" fill="{_GREY}">',
        "<title>Where the time of a step goes</title>",
    ]
    for index, bar in enumerate(bars):
        lines += _bar_lines(bar, _TOP + index * (_BAR + _GAP))
    lines += _legend(_TOP + len(bars) * (_BAR + _GAP) + 10)
    return "\n".join([*lines, "</svg>", ""])


def _read(page: str, name: str) -> _Bar | None:
    """The bar of one table; phases that have no colour of their own are Python. None if it is empty."""
    header, rows = parse_table(section(page, f"profile-{name}"))
    if not rows:
        return None
    micros, limit = header.index("µs"), header.index("limit, µs")
    values = {row[0]: float(row[micros].replace(",", "")) for row in rows}
    total = values.pop(rows[-1][0])
    parts = dict.fromkeys(_COLOURS, 0.0)
    for part, value in values.items():
        parts[part if part in _COLOURS else "Python"] += value
    return _Bar(name=name, parts=parts, total=total, limit=float(rows[-1][limit].replace(",", "")))


def _bar_lines(bar: _Bar, top: int) -> list[str]:
    # Medians of parts need not add up to the median of the whole.
    scale = _SPAN / max(bar.total, sum(bar.parts.values()))
    lines = [
        f'<text x="0" y="{top + 15}">{escape(bar.name)}</text>',
        f'<text x="0" y="{top + 30}">{bar.total / 1e3:.2f} ms</text>',
    ]
    left = float(_LEFT)
    for part, value in bar.parts.items():
        width = value * scale
        lines.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[part]}">'
            f"<title>{escape(part)}: {value:,.0f} µs</title></rect>"
        )
        left += width
    x = _LEFT + bar.limit * scale
    lines += [
        f'<path d="M{x:.1f} {top - 4}v{_BAR + 8}" stroke="{_GREY}" stroke-width="2"/>',
        f'<text x="{x + 3:.1f}" y="{top + _BAR + 13}">limit {bar.limit / 1e3:.2f} ms</text>',
    ]
    return lines


def _legend(top: int) -> list[str]:
    lines = []
    for index, (part, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + index % _LEGEND_COLUMNS * _SPAN // _LEGEND_COLUMNS
        y = top + 20 * (index // _LEGEND_COLUMNS)
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="{y + 10}">{escape(part)}</text>')
    return lines
