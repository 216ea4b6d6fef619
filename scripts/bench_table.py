"""Writes the figures of `tokenmill bench --json` between the bench marks of a page.

It only lays out what was measured; a figure that is missing in the input is an error, never a blank.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"


def table(result: dict[str, Any], day: str) -> str:
    """The measured rows as a table, under one line that names the machine."""
    machine = result["machine"]
    lines = [
        f"{result['model']['name']}, {day}, {machine['isa']}: {machine['int8_tops']:.1f} int8 TOPS, "
        f"{machine['read_gb_s']:.0f} GB/s read bandwidth from memory, both measured.",
        "",
        "| phase | weights | batch | prompt | output | tokens/s | of the limit | limit |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        cells = [row["phase"], row["weights"], row["batch"], row["prompt"], row["output"]]
        cells += [f"{row['tokens_per_s']:,.0f}", f"{row['of_limit']:.0%}", row["limit"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def fill(page: str, content: str) -> str:
    """The page with `content` between its two marks."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{content}\n{END}{tail}"


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    today = datetime.now(UTC).date().isoformat()
    content = table(json.loads(source.read_text(encoding="utf-8")), today)
    target.write_text(fill(target.read_text(encoding="utf-8"), content), encoding="utf-8")
