"""Runs lines of the reliability scorecard.

    python -m scripts.scorecard s4 s13 --cases 100000 --seed 1
    python -m scripts.scorecard s13 --cases 1000 --guard off

Every line has a control: with `--guard off` the same trials run without what the line is about, and must
find violations. The exit code is 0 if the guarded run found none, and if the control found some.
"""

import argparse
import datetime
import importlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from scripts.scorecard import Line

LINES = {
    "s4": 10_000_000,
    "s13": 100_000,
    "s14": 10_000,
    "s16": 5_000,
    "s18": 5_000,
    "s21": 100_000,
    "s24": 20_000,
}
"""Each line and how many cases its full form has."""


def main(arguments: list[str] | None = None) -> int:
    """Run the lines that were named and print a record of each."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scorecard", description=__doc__)
    parser.add_argument("lines", nargs="+", choices=sorted(LINES), metavar="LINE", help=", ".join(LINES))
    parser.add_argument("--cases", type=int, help="how many trials; by default those of the full form")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    guard = options.guard == "on"
    good = True
    for name in options.lines:
        module = importlib.import_module(f"scripts.scorecard.{name}")
        line: Line = module.run(cases=options.cases or LINES[name], seed=options.seed, guard=guard)
        good = good and (line.violations == 0) == guard
        print(as_json(line, options.seed, guard) if options.json else as_text(line, options.seed, guard))
    return 0 if good else 1


def as_text(line: Line, seed: int, guard: bool) -> str:
    """One readable record. No failure in N trials bounds the rate by 3/N with 95 % confidence."""
    bound = f", so fewer than {3 / line.cases:.1e} a case (95 %)" if guard and not line.violations else ""
    figures = "".join(f"\n  {name}: {value}" for name, value in line.figures.items())
    return (
        f"{line.name} guard {'on' if guard else 'off'}: {line.violations} violations in {line.cases} cases"
        f"{bound}\n  {line.what}\n  {line.seconds:.1f} s, seed {seed}, {origin()}{figures}"
    )


def as_json(line: Line, seed: int, guard: bool) -> str:
    """The same as one JSON object."""
    return json.dumps({**asdict(line), "seed": seed, "guard": guard, "origin": origin()})


def origin() -> str:
    """Date, commit and machine of a run."""
    folder = Path(__file__).parents[2]
    git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown commit"
    return f"{datetime.date.today()}, {commit}, {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
