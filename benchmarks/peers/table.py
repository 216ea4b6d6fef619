"""The table of a page: what was compared and measured, between the marks of the page.

It only lays out. A figure that was not measured in all its rounds is a dash, and its system is named below
with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers.compare import AS_GOOD, Measured, ratio, speed
from benchmarks.peers.systems import Row
from tokenmill.costs import Ceiling, MachineRates, ceiling, decode_work, prefill_work
from tokenmill.engine import LLMConfig

__all__ = ["BEGIN", "END", "Report", "document", "fill", "table"]

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
_DASH = "–"


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run.

    `machine` are the fields of `tokenmill doctor`, `rates` the same limits for the roofline; `num_scored` is
    the number of tokens behind a perplexity.
    """

    model: str
    day: str
    machine: Mapping[str, Any]
    rates: MachineRates
    rows: Sequence[Row]
    rounds: int
    num_scored: int
    results: Sequence[Measured]


def table(report: Report) -> str:
    """The machine in one line, a line a system, and the systems that have no figures."""
    machine = report.machine
    head = ["system", "weights", "KV", "perplexity", *(row.title for row in report.rows)]
    lines = [
        f"{report.model}, {report.day}, {machine['cpu_model']}, {machine['num_threads']} threads, "
        f"{machine['isa']}: {machine['int8_tops']:.1f} TOPS int8, {machine['bf16_tops']:.1f} TOPS bf16, "
        f"{machine['read_gb_s']:.0f} GB/s from memory, measured in the same run.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|---|---|{'---:|' * (len(report.rows) + 1)}",
    ]
    lines += [_line(result, report) for result in report.results]
    lines += ["", _legend(report)]
    lines += [
        f"- {result.system.key}: {'stopped' if result.values else 'not run'}: {_plain(result.reason)}"
        for result in report.results
        if result.reason
    ]
    return "\n".join(lines)


def document(report: Report) -> dict[str, Any]:
    """The same for programs, with every round's figure."""
    return {
        "model": report.model,
        "day": report.day,
        "machine": dict(report.machine),
        "rounds": report.rounds,
        "num_scored": report.num_scored,
        "rows": [asdict(row) for row in report.rows],
        "systems": [
            {
                **asdict(result.system),
                "version": result.version,
                "perplexity": result.perplexity,
                "reason": result.reason,
                "tokens_per_s": {row.key: _figures(result, report, row) for row in report.rows},
            }
            for result in report.results
        ],
    }


def fill(page: str, content: str) -> str:
    """The page with `content` between its two marks."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{content}\n{END}{tail}"


def _line(result: Measured, report: Report) -> str:
    system, known = result.system, result.perplexity
    cells = [result.version or system.key, system.weights, system.kv]
    cells += [
        _DASH if known is None else f"{known:.2f}",
        *(_cell(result, report, row) for row in report.rows),
    ]
    return f"| {' | '.join(cells)} |"


def _cell(result: Measured, report: Report, row: Row) -> str:
    values = result.values.get(row.key, [])
    if len(values) != report.rounds:
        return _DASH
    median, low, high = speed(values)
    text = f"{median:,.0f} ({low:,.0f}–{high:,.0f})"
    times = _ratio(result, report, row)
    if times is not None:
        text += f" **{times:.1f}×**"
    top = _limit(result, report, row)
    return text if top is None else f"{text} {median / top.tokens_per_s:.0%}"


def _ratio(result: Measured, report: Report, row: Row) -> float | None:
    return ratio(result, report.results, row.key, report.rounds) if result.system.is_own else None


def _limit(result: Measured, report: Report, row: Row) -> Ceiling | None:
    """The most that the machine could do in this row with our weights; None for a peer."""
    if result.cost is None:
        return None
    run = row.run
    if row.phase == "decode":
        work = decode_work(result.cost, batch=run.batch, prompt=run.prompt, output=run.output)
    else:
        rows_per_step = LLMConfig().max_rows
        work = prefill_work(result.cost, batch=run.batch, prompt=run.prompt, rows_per_step=rows_per_step)
    return ceiling(work, report.rates)


def _figures(result: Measured, report: Report, row: Row) -> dict[str, Any] | None:
    values = result.values.get(row.key)
    if not values:
        return None
    top = _limit(result, report, row)
    return {
        **speed(values)._asdict(),
        "values": values,
        "ratio": _ratio(result, report, row),
        "limit": top and top.limit,
        "limit_tokens_per_s": top and top.tokens_per_s,
    }


def _legend(report: Report) -> str:
    quality = (
        f"Perplexity: WikiText-2 test, {report.num_scored:,} tokens, the same for all. "
        if report.num_scored
        else ""
    )
    rounds = f"{report.rounds} round{'s' if report.rounds > 1 else ''}"
    return (
        f"Tokens a second: median (lowest–highest) of {rounds}, all systems in turns. "
        f"Decode: prompts of 128 tokens, 64 new tokens. {quality}×: against the fastest peer of which the "
        f"perplexity is at most {100 * (AS_GOOD - 1):.0f} % above. %: share of what this machine could do "
        "at most with these weights. How: [docs/peers.md](docs/peers.md)."
    )


def _plain(text: str) -> str:
    """In one line that cannot change the page's layout."""
    return " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())
