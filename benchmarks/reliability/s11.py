"""Line S11: the official `anthropic` client against a running server, check by check.

    python -m benchmarks.reliability.s11
    python -m benchmarks.reliability.s11 --guard off

The checks are those of tests/server/test_anthropic_client.py: messages, the order of events, pings, tools,
ends, counts, models, errors. With `--guard off` the server leaves out pings, ids of its own, the tier and the
end at the context window: the checks must notice each.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import pytest

from scripts.scorecard import Line
from scripts.scorecard.__main__ import as_json, as_text

__all__ = ["main", "run"]

_CHECKS = Path(__file__).parents[2] / "tests" / "server" / "test_anthropic_client.py"
_CONTROL = "TOKENMILL_S11_CONTROL"


class _Counts:
    """Counts what pytest reports."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []
        self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for each phase of each check."""
        if report.failed:
            self.failed.append(report.nodeid.rpartition("::")[2])
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1


def run(guard: bool = True) -> Line:
    """Run all checks. One that is skipped counts as a violation."""
    begun_s = time.monotonic()
    counts = _Counts()
    os.environ.pop(_CONTROL, None)
    if not guard:
        os.environ[_CONTROL] = "1"
    options = ["-q", "--tb=no", "--no-header", "-p", "no:cacheprovider"]
    pytest.main([*options, str(_CHECKS)], plugins=[counts])
    os.environ.pop(_CONTROL, None)
    figures: dict[str, float | int | str] = {"passed": counts.passed, "skipped": counts.skipped}
    if counts.failed:
        figures["failed"] = ", ".join(counts.failed[:12])
    return Line(
        name="S11",
        what="checks of the official anthropic client on a running server",
        cases=counts.passed + len(counts.failed) + counts.skipped,
        violations=len(counts.failed) + counts.skipped + (counts.passed == 0),
        seconds=time.monotonic() - begun_s,
        figures=figures,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run and print; 0 if the guarded run found nothing, or the control something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.s11", description=__doc__)
    parser.add_argument("--guard", choices=("on", "off"), default="on")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    guard = options.guard == "on"
    line = run(guard)
    print(as_json(line, 0, guard) if options.json else as_text(line, 0, guard))
    return 0 if (line.violations == 0) == guard else 1


if __name__ == "__main__":
    sys.exit(main())
