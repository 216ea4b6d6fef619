"""report.html: the report as one page that needs nothing else: no script, no font, no address.

Figures are those of report.json; here they become words, tables and charts.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

import jinja2
from markupsafe import Markup

from tokenmill.optimize.charts import Curve, Mark, latency_chart, pareto_chart
from tokenmill.optimize.choice import usd, usd_million

__all__ = ["report_page"]

_PACKAGE: Final = "tokenmill.optimize"
_VERDICTS: Final = {"pass": ("pass", "good"), "fail": ("fail", "bad"), "undecided": ("undecided", "warn")}


def report_page(document: Mapping[str, Any]) -> str:
    """The page of a report."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "usd": usd,
        "usd_million": usd_million,
        "range": _range,
        "share": _share,
        "share_range": _share_range,
        "ms": _ms,
        "bytes": _bytes,
        "number": _number,
        "usd_range": _usd_range,
    }
    template = environment.from_string(_text("page.html"))
    return template.render(
        report=document,
        style=Markup(_text("page.css")),
        shown=_shown(document),
        verdicts=_VERDICTS,
        pareto=Markup(_pareto(document)),
        latency=Markup(_latency(document)),
        tiles=_tiles(document),
        losers=_losers(document),
        lineage=_lineage(document),
    )


def _text(name: str) -> str:
    return resources.files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")


def _winner(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    name = document["choice"]["winner"]
    return next((each for each in document["candidates"] if each["name"] == name), None)


def _shown(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The candidate whose slices and disagreements are shown: the winner, or the best that there is."""
    candidates: Sequence[Mapping[str, Any]] = document["candidates"]
    best = max(candidates, key=lambda each: each["figures"]["quality"]["estimate"] or 0.0, default=None)
    return _winner(document) or best


def _tiles(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few figures that a reader takes away."""
    chosen, incumbent = _shown(document), document["incumbent"]
    if chosen is None:
        return []
    figures = chosen["figures"]
    cost = incumbent["usd_per_pass"]
    own = figures["usd_per_pass"]
    saving = document["choice"]["saving"]
    factor = cost["estimate"] / own["estimate"] if cost and cost["estimate"] and own["estimate"] else None
    tiles = [
        {
            "title": "A million passing answers cost",
            "figure": usd_million(own["estimate"]),
            "note": _usd_range(own) + (f"; the incumbent {usd_million(cost['estimate'])}" if cost else ""),
        },
        {
            "title": "Saving" if saving is not None else "Against the incumbent",
            "figure": _saved(saving, factor),
            "note": "at list price, utilisation 1" if factor else "nobody said what the incumbent costs",
        },
        {
            "title": "Quality",
            "figure": _share(figures["quality"]["estimate"]),
            "note": f"{_share_range(figures['quality'])}; the incumbent {_share(incumbent['quality'])}",
        },
        {
            "title": "p99 of the answer",
            "figure": _ms(figures["p99_ms"]["estimate"]),
            "note": f"p50 {_ms(figures['p50_ms']['estimate'])}, {figures['concurrency']} calls at a time",
        },
    ]
    return tiles


def _saved(saving: float | None, factor: float | None) -> str:
    if factor is not None and factor >= 10:
        return f"{factor:,.0f} times less"
    return "unknown" if saving is None else f"{saving:.0%}"


def _pareto(document: Mapping[str, Any]) -> str:
    marks = []
    for each in document["candidates"]:
        cost, quality = each["figures"]["usd_per_pass"], each["figures"]["quality"]
        if not cost["estimate"] or quality["estimate"] is None:
            continue
        marks.append(Mark(each["name"], _kind(document, each), _three(cost, 1e6), _three(quality)))
    incumbent = document["incumbent"]
    cost = incumbent["usd_per_pass"]
    if cost and cost["estimate"]:
        own = incumbent["quality"]
        marks.append(Mark(incumbent["name"], "incumbent", _three(cost, 1e6), (own, own, own)))
    return pareto_chart(marks, _bar(document))


def _bar(document: Mapping[str, Any]) -> float:
    quality = document["workload"]["quality"]
    if isinstance(quality["bar"], str):
        return float(max(0.0, document["incumbent"]["quality"] - quality["margin"]))
    return float(quality["bar"])


def _kind(document: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    if candidate["name"] == document["choice"]["winner"]:
        return "winner"
    return "passing" if candidate["judged"]["outcome"] == "pass" else "losing"


def _three(value: Mapping[str, Any], scale: float = 1.0) -> tuple[float, float, float]:
    estimate = float(value["estimate"])
    low = estimate if value["low"] is None else float(value["low"])
    high = estimate if value["high"] is None else float(value["high"])
    return scale * estimate, scale * low, scale * high


def _latency(document: Mapping[str, Any]) -> str:
    curves = [
        Curve(
            each["name"],
            _kind(document, each),
            [
                (level["requests_per_s"], level["p99_ms"], level["concurrency"])
                for level in each["figures"]["levels"]
                if level["p99_ms"] is not None
            ],
        )
        for each in document["candidates"]
        if each["kind"] != "cascade"
    ]
    return latency_chart(curves, document["workload"]["slo"]["e2e_ms"])


def _losers(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    return sorted(document["choice"]["lost"].items())


def _lineage(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What every candidate comes from, a row each."""
    return [
        {"candidate": each["name"], "num_trained_on": each["artefact"]["num_trained_on"], **source}
        for each in document["candidates"]
        for source in each["artefact"]["lineage"]
    ]


def _range(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    if value is None or value["estimate"] is None:
        return "-"
    return f"{value['estimate']:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _share_range(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{_share(value['low'])} to {_share(value['high'])}"


def _usd_range(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    if value["high"] is None:
        return f"at least {usd_million(value['low'])}"
    return f"{usd_million(value['low'])} to {usd_million(value['high'])}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"
    )


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
