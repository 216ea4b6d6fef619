"""The command line that the lines of the scorecard about a running server share."""

import argparse
from typing import Protocol

from scripts.scorecard import Line
from scripts.scorecard.__main__ import as_text

__all__ = ["RunLine", "run_line"]


class RunLine(Protocol):
    """Measures a line; without the guard it must find violations."""

    def __call__(self, *, cases: int, seed: int, guard: bool) -> Line:
        """So many trials."""
        ...


def run_line(name: str, text: str, cases: int, run: RunLine, arguments: list[str] | None) -> int:
    """Run a line and print its record: 0 if it found nothing, or as the control found something."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.reliability.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=cases, help="how many trials (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    options = parser.parse_args(arguments)
    guard = options.guard == "on"
    line = run(cases=options.cases, seed=options.seed, guard=guard)
    print(as_text(line, options.seed, guard))
    return 0 if (line.violations == 0) == guard else 1
