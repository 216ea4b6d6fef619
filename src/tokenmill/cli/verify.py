"""`tokenmill verify`: a finished run checked again, as far as that needs no model."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.output import Output

__all__ = ["add_parser"]

_FAILED: Final = 1
_DESCRIPTION = """\
Check a run of `tokenmill optimize`: the seal of its certificate, the hashes of its files, the rows of the log
split again, the verdicts, costs and choice from the answers that were written down, and the winner's files.

What does not hold is named, and the exit code is 1. Answers are not asked again: that is another run.

  tokenmill verify run
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `verify`."""
    parser = add_command(
        subparsers, "verify", _verify, summary="check a run of optimize again", description=_DESCRIPTION
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")


def _verify(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.optimize.verify import verify

    with out.busy(f"checking {args.run}"):
        checks = verify(args.run)
    out.table(["", "", ""], [[each.outcome, each.name, each.words] for each in checks])
    out.document({"run": str(args.run), "checks": [asdict(each) for each in checks]})
    return _FAILED if any(each.outcome == "does not hold" for each in checks) else 0
