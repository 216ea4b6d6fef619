"""What the dashboard shows, as texts, curves and tables: the page is made of it, and so are its refreshes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias, get_args

from tokenmill.core import Tier
from tokenmill.costs.prices import Price
from tokenmill.server.dashboard.figures import (
    MISSING,
    area,
    clock,
    count,
    curve,
    money,
    rate,
    seconds,
    share,
)
from tokenmill.server.dashboard.history import SLOT_S, Gauges, History, Slot, percentile
from tokenmill.server.dashboard.today import Today, priced_nano_usd
from tokenmill.server.fleet import Deployed, Fleet
from tokenmill.server.slo import Burn
from tokenmill.store import LedgerSum

__all__ = ["EMPTY", "BatchLine", "Cell", "Sources", "View", "make_view"]


class Cell(NamedTuple):
    """A cell of a table; `kind` is how it looks: text, num, code, good, warn, bad."""

    text: str
    kind: str = "text"


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """A batch: how many of its lines have been answered, and how many of those failed."""

    id: str
    state: str
    num_lines: int
    num_done: int
    num_failed: int
    has_ended: bool = False


class View(NamedTuple):
    """Texts by place, SVG paths by place, rows by table, in the order and words of the page."""

    texts: dict[str, str]
    paths: dict[str, str]
    tables: dict[str, list[list[Cell]]]


EMPTY: Final = View({}, {}, {})


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where figures come from. `by_tier` has calls that wait for their first token, and that have it."""

    history: History
    fleet: Fleet
    today: Today
    burns: Sequence[Burn]
    by_tier: dict[Tier, tuple[int, int]]
    batches: Sequence[BatchLine]
    is_draining: bool
    price: Price | None
    now_s: float


_Row: TypeAlias = list[Cell]
_Slots: TypeAlias = Sequence[Slot | None]
_SHOWN_KEYS: Final = 12
_SHOWN_ERRORS: Final = 10
_SHOWN_BATCHES: Final = 8
_MEASURES: Final = {"ttft": "first token", "tpot": "per token", "e2e": "whole answer"}
_BURN_WARN: Final = 1.0
_BURN_BAD: Final = 6.0
_MILLION: Final = 1e6


def make_view(sources: Sources) -> View:
    """All figures of one moment."""
    slots = sources.history.slots(sources.now_s)
    texts, paths = _curves(slots)
    texts.update(_gauges(sources.history.gauges))
    texts.update(_state(sources))
    texts.update(_money(sources))
    tables = {
        "tiers": _tiers(sources),
        "models": _models(sources),
        "keys": _keys(sources.today),
        "slo": _slo(sources.burns),
        "errors": _errors(sources.history),
        "batches": _batches(sources.batches),
    }
    return View(texts, paths, tables)


def _state(sources: Sources) -> dict[str, str]:
    troubles = [f"{each.deployment}: {each.reason}" for each in sources.fleet.troubles()]
    if sources.is_draining:
        return {"state": "shutting down", "state.kind": "warn", "state.note": "no new calls are taken"}
    if troubles:
        kind = "warn" if sources.fleet.is_ready() else "bad"
        text = "partly ready" if kind == "warn" else "not ready"
        return {"state": text, "state.kind": kind, "state.note": "; ".join(troubles)}
    return {"state": "ready", "state.kind": "good", "state.note": ""}


def _curves(slots: _Slots) -> tuple[dict[str, str], dict[str, str]]:
    """The charts of the last hour; rates without the newest slot, which is not over."""
    texts: dict[str, str] = {}
    paths: dict[str, str] = {}

    def chart(
        name: str, of_slot: Callable[[Slot], float | None], text: Callable[[float], str], newest: int = 1
    ) -> None:
        shown = slots[: len(slots) - 1 + newest]
        values = [None if slot is None else of_slot(slot) for slot in shown]
        top = max((value for value in values if value is not None), default=0.0)
        paths[name] = curve(values, top)
        paths[f"{name}.area"] = area(values, top)
        texts[f"{name}.top"] = f"highest {text(top)}" if top else ""

    chart("output", lambda slot: slot.output_tokens / SLOT_S, rate, newest=0)
    chart("calls", lambda slot: slot.num_calls / SLOT_S, rate, newest=0)
    chart("ttft", lambda slot: percentile(sorted(slot.ttfts_s), 50.0), seconds)
    chart("tpot", lambda slot: percentile(sorted(slot.tpots_s), 50.0), seconds)
    chart("kv", lambda slot: slot.kv_share, share)
    chart("queue", lambda slot: slot.num_waiting, count)
    texts.update(_now(slots))
    return texts, paths


def _now(slots: _Slots) -> dict[str, str]:
    """The figures beside the charts: rates of the last minute, latencies of the last five."""
    minute = [slot for slot in slots[-5:-1] if slot is not None]
    length_s = max(1, len(minute)) * SLOT_S
    five = [slot for slot in slots[-20:] if slot is not None]
    ttfts_s = sorted(value for slot in five for value in slot.ttfts_s)
    tpots_s = sorted(value for slot in five for value in slot.tpots_s)
    num_bad = sum(slot.num_bad for slot in slots if slot is not None)
    return {
        "output": rate(sum(slot.output_tokens for slot in minute) / length_s),
        "output.note": f"{rate(sum(slot.prompt_tokens for slot in minute) / length_s)} prompt tokens/s",
        "calls": rate(sum(slot.num_calls for slot in minute) / length_s),
        "calls.note": f"{count(num_bad)} failed in this hour",
        "ttft": seconds(percentile(ttfts_s, 50.0)),
        "ttft.note": f"{seconds(percentile(ttfts_s, 99.0))} at p99",
        "tpot": seconds(percentile(tpots_s, 50.0)),
        "tpot.note": f"{seconds(percentile(tpots_s, 99.0))} at p99",
    }


def _gauges(gauges: Gauges) -> dict[str, str]:
    return {
        "kv": share(gauges.kv_share),
        "kv.note": "of the blocks of all engines",
        "queue": count(gauges.num_waiting),
        "queue.note": f"{count(gauges.num_answering)} being answered",
    }


def _money(sources: Sources) -> dict[str, str]:
    today = sources.today
    cost = sum(each.cost_nano_usd for each in today.sums)
    price = sum(each.price_nano_usd for each in today.sums)
    tokens_in = sum(each.num_prompt_tokens for each in today.sums)
    tokens_out = sum(each.num_output_tokens for each in today.sums)
    num_calls = sum(each.num_entries for each in today.sums)
    texts = {
        "cost": money(cost) if today.is_read or today.sums else MISSING,
        "cost.note": f"{money(price)} charged, {count(num_calls)} calls",
        "cost.tokens": f"{count(tokens_in)} tokens in, {count(tokens_out)} out",
        "trouble": today.trouble,
    }
    return texts | _saving(sources.price, today.sums, cost)


def _saving(price: Price | None, sums: Sequence[LedgerSum], cost: int) -> dict[str, str]:
    if price is None:
        return {"saving": MISSING, "saving.note": "no price is known", "saving.source": ""}
    there = priced_nano_usd(sums, price)
    name = f"{price.provider} {price.model}" + ("" if price.tier == "standard" else f" ({price.tier})")
    prices = f"${price.input_usd:g} in, ${price.output_usd:g} out per 1M"
    factor = f", {there / cost:.3g} times the cost here" if cost > 0 and there > 0 else ""
    return {
        "saving": money(there - cost),
        "saving.note": f"{money(there)} for the same tokens at {name}{factor}",
        "saving.source": f"{prices}; price of {price.date}, {price.source}",
    }


def _tiers(sources: Sources) -> list[_Row]:
    rows = []
    for tier in get_args(Tier):
        waiting, answering = sources.by_tier.get(tier, (0, 0))
        recent = sources.history.recent(tier, sources.now_s)
        figures = [
            count(waiting),
            count(answering),
            count(recent.num_calls),
            seconds(percentile(recent.ttfts_s, 50.0)),
            seconds(percentile(recent.ttfts_s, 99.0)),
            seconds(percentile(recent.tpots_s, 50.0)),
            seconds(percentile(recent.tpots_s, 99.0)),
            seconds(percentile(recent.totals_s, 99.0)),
        ]
        rows.append([Cell(tier), *(Cell(figure, "num") for figure in figures)])
    return rows


def _models(sources: Sources) -> list[_Row]:
    rows = []
    troubles = {each.deployment: each.reason for each in sources.fleet.troubles()}
    for each in sources.fleet.deployments:
        sums = [line for line in sources.today.sums if line.group[1] == each.name]
        trouble = troubles.get(each.name)
        state = Cell("ready", "good") if trouble is None else Cell(trouble, "bad")
        name = each.name if each.name == each.model else f"{each.model} at {each.name}"
        rows.append([Cell(name), state, *_engine(each), Cell(_cost_of_million(sums), "num")])
    return rows


def _engine(each: Deployed) -> list[Cell]:
    if each.stats is None:
        return [Cell(MISSING, "num")] * 4
    stats = each.stats()
    kv = stats.num_blocks_in_use / stats.num_blocks if stats.num_blocks else None
    figures = (count(stats.num_running), count(stats.num_waiting), share(kv), count(stats.num_restarts))
    return [Cell(figure, "num") for figure in figures]


def _cost_of_million(sums: Sequence[LedgerSum]) -> str:
    """What 10^6 tokens out have cost today, with what was read for them."""
    num_tokens = sum(each.num_output_tokens for each in sums)
    cost = sum(each.cost_nano_usd for each in sums)
    return money(round(cost * _MILLION / num_tokens)) if num_tokens else MISSING


def _keys(today: Today) -> list[_Row]:
    by_key: dict[str, list[LedgerSum]] = {}
    for each in today.sums:
        by_key.setdefault(each.group[0], []).append(each)
    budgets = {each.key_id: each for each in today.budgets}
    for key_id in budgets:
        by_key.setdefault(key_id, [])
    order = sorted(by_key, key=lambda key_id: -sum(each.price_nano_usd for each in by_key[key_id]))
    rows = []
    for key_id in order[:_SHOWN_KEYS]:
        sums = by_key[key_id]
        budget = budgets.get(key_id)
        left = Cell("none", "num")
        if budget is not None:
            is_low = budget.left_nano_usd * 10 < budget.nano_usd
            left = Cell(money(budget.left_nano_usd), "num bad" if is_low else "num")
        figures = (
            count(sum(each.num_entries for each in sums)),
            count(sum(each.num_prompt_tokens for each in sums)),
            count(sum(each.num_output_tokens for each in sums)),
            money(sum(each.cost_nano_usd for each in sums)),
            money(sum(each.price_nano_usd for each in sums)),
        )
        rows.append([Cell(key_id, "code"), *(Cell(figure, "num") for figure in figures), left])
    if len(order) > _SHOWN_KEYS:
        rows.append([Cell(f"and {len(order) - _SHOWN_KEYS} more"), *[Cell("")] * 6])
    return rows


def _slo(burns: Sequence[Burn]) -> list[_Row]:
    rows = []
    for burn in burns:
        wanted = burn.objective
        what = f"{wanted.model or 'every model'}, {wanted.tier or 'every tier'}"
        cells = [_burn_cell(value) for value in burn.rates]
        rows.append([Cell(what), Cell(_promise(burn)), *cells, Cell(count(burn.num_calls[-1]), "num")])
    return rows


def _promise(burn: Burn) -> str:
    limit = burn.objective.limit(burn.measure)
    if limit is None or burn.measure == "availability":
        return f"answered, {limit:g} % of calls"
    return f"{_MEASURES[burn.measure]} ≤ {seconds(limit / 1e3)}, {burn.objective.percentile:g} %"


def _burn_cell(value: float | None) -> Cell:
    if value is None:
        return Cell(MISSING, "num")
    kind = "good" if value <= _BURN_WARN else "warn" if value < _BURN_BAD else "bad"
    return Cell(f"{value:.2f}" if value < 9.995 else f"{value:.0f}", f"num {kind}")


def _errors(history: History) -> list[_Row]:
    rows = []
    for line in list(reversed(history.errors))[:_SHOWN_ERRORS]:
        times = f" ({line.count} times)" if line.count > 1 else ""
        rows.append(
            [
                Cell(clock(line.at_s), "code"),
                Cell(line.what + times, "bad"),
                Cell(line.where),
                Cell(line.request_id, "code"),
            ]
        )
    return rows


def _batches(batches: Sequence[BatchLine]) -> list[_Row]:
    rows = []
    for each in batches[:_SHOWN_BATCHES]:
        done = each.num_done / each.num_lines if each.num_lines else None
        failed = Cell(count(each.num_failed), "num bad" if each.num_failed else "num")
        progress = Cell(f"{count(each.num_done)} of {count(each.num_lines)}", "num")
        rows.append([Cell(each.id, "code"), Cell(each.state), progress, Cell(share(done), "num"), failed])
    return rows
