"""The generated parts of docs/performance.md: between which marks they lie, and their tables.

What the measuring scripts write is the page itself, no file beside it: a table that is there can be read
back, so that one row or one plot can be made again without measuring everything. What is measured is in
the scripts that write it.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tokenmill.costs import bandwidth_at
from tokenmill.engine.bench import machine_rates
from tokenmill.kernels.probe import MachineLimits, measure_machine

__all__ = [
    "PAGE",
    "PLOT",
    "fill",
    "limits_now",
    "machine_line",
    "markdown_table",
    "merge_rows",
    "parse_table",
    "section",
    "today",
]

PAGE = Path(__file__).parents[1] / "docs/performance.md"
PLOT = PAGE.with_name("performance-steps.svg")


def section(page: str, name: str) -> str:
    """What lies between the marks of a part."""
    begin, end = _marks(name)
    _, found, rest = page.partition(begin)
    content, found_end, _ = rest.partition(end)
    if not found or not found_end:
        raise SystemExit(f"the page has no {begin} ... {end}")
    return content.strip("\n")


def fill(page: str, name: str, content: str) -> str:
    """The page with `content` between the marks of a part."""
    section(page, name)
    begin, end = _marks(name)
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_table(text: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the first table in a text; empty lists if there is none."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return (cells[0], cells[2:]) if cells else ([], [])


def merge_rows(old: str, header: Sequence[str], rows: Sequence[Sequence[str]], order: Sequence[str]) -> str:
    """A table in which new rows replace old ones of the same first cell; `order` is that of first cells.

    Old rows are kept only if they have the same columns and are still in `order`.
    """
    old_header, old_rows = parse_table(old)
    known = {row[0]: row for row in old_rows} if old_header == list(header) else {}
    known |= {row[0]: list(row) for row in rows}
    return markdown_table(header, [known[name] for name in order if name in known])


def limits_now(working_sets_mb: Sequence[int] = (1, 32, 135, 270)) -> MachineLimits:
    """The machine's limits as they are this minute, in about two seconds."""
    return measure_machine(working_sets_mb=working_sets_mb, num_runs=5, seconds=0.05)


def machine_line(limits: MachineLimits, working_set: float) -> str:
    """What the machine gave when a part was measured, in words."""
    rates = machine_rates(limits)
    near, far = rates.reads[0].bytes_per_s, bandwidth_at(rates.reads, working_set)
    return (
        f"{today()}, {limits.isa}, {limits.num_threads} threads: {limits.int8_tops:.1f} int8 and "
        f"{limits.bf16_tops:.1f} bf16 TOPS, {far / 1e9:.0f} GB/s for {working_set / 1e6:.0f} MB and "
        f"{near / 1e9:.0f} GB/s for 1 MB, measured in the same minute."
    )


def today() -> str:
    """The date, as it stands in tables."""
    return datetime.now(UTC).date().isoformat()


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
