"""Runs lines of the reliability scorecard that need a running server.

    python -m benchmarks.reliability s1 s2 --cases 1000 --seed 1
    python -m benchmarks.reliability s1 --cases 500 --guard off

Every line has a control: with `--guard off` the same trials run without what the line is about, and must find
violations. The exit code is 0 if the guarded run found none, and if the control found some.
"""

import argparse
import importlib
import sys

from scripts.scorecard import Line
from scripts.scorecard.__main__ import as_json, as_text

LINES = {"s1": 3_000, "s2": 1_000, "s6": 400, "s7": 200, "s8": 1}
"""Each line and how many cases its full form has."""


def main(arguments: list[str] | None = None) -> int:
    """Run the lines that were named and print a record of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("lines", nargs="+", choices=sorted(LINES), metavar="LINE", help=", ".join(LINES))
    parser.add_argument("--cases", type=int, help="how many trials; by default those of the full form")
    parser.add_argument("--minutes", type=float, help="how long, of the lines that hold something")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    guard = options.guard == "on"
    more = {} if options.minutes is None else {"minutes": options.minutes}
    good = True
    for name in options.lines:
        module = importlib.import_module(f"benchmarks.reliability.{name}")
        line: Line = module.run(cases=options.cases or LINES[name], seed=options.seed, guard=guard, **more)
        good = good and (line.violations == 0) == guard
        print(as_json(line, options.seed, guard) if options.json else as_text(line, options.seed, guard))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
