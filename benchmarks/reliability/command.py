"""What the lines of the scorecard have in common as commands: arguments, a record, the exit code.

    python -m benchmarks.reliability.s17 --cases 1000 --seed 1
    python -m benchmarks.reliability.s17 --cases 1000 --guard off

Every line has a control: with `--guard off` the same trials run without what the line is about, and must find
violations. The exit code is 0 if the guarded run found none, and if the control found some.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence

from scripts.scorecard import Line
from scripts.scorecard.__main__ import as_json, as_text

__all__ = ["main"]


def main(
    name: str,
    run: Callable[..., Line],
    cases: int,
    doc: str | None,
    arguments: Sequence[str] | None = None,
    **more: int | float,
) -> int:
    """Run a line with `cases`, `seed`, `guard` and those of `more`, which are its own flags with defaults."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.reliability.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    given: Mapping[str, int | float] = {"cases": cases, "seed": 1, **more}
    for word, default in given.items():
        flag = f"--{word.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help="(default: %(default)s)")
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    guard = options.guard == "on"
    line = run(guard=guard, **{word: getattr(options, word) for word in given})
    print(as_json(line, options.seed, guard) if options.json else as_text(line, options.seed, guard))
    return 0 if (line.violations == 0) == guard else 1
