"""What the lines of the scorecard have in common as commands: arguments, a record, the exit code.

python -m benchmarks.reliability.s17 --cases 1000 --seed 1
python -m benchmarks.reliability.s17 --cases 1000 --guard off
"""

import argparse
from collections.abc import Callable, Sequence

from scripts.scorecard import Line
from scripts.scorecard.__main__ import as_json, as_text

__all__ = ["main"]


def main(
    name: str,
    run: Callable[[int, int, bool], Line],
    cases: int,
    doc: str | None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a line with (cases, seed, guard) and print its record.

    Returns 0 if the guarded run found no violation, and if the control found some.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.reliability.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=cases, help=f"how many trials (default: {cases})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    guard = options.guard == "on"
    line = run(options.cases, options.seed, guard)
    print(as_json(line, options.seed, guard) if options.json else as_text(line, options.seed, guard))
    return 0 if (line.violations == 0) == guard else 1
