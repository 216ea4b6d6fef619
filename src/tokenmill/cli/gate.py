"""`tokenmill gate`: the verdict of a run as an exit code, for whatever builds and deploys."""

import argparse
from pathlib import Path
from typing import Final

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.output import Output

__all__ = ["EXIT_CODES", "add_parser"]

EXIT_CODES: Final = {"pass": 0, "fail": 1, "undecided": 3}
"""A folder that is no finished run is an error of use (2), so that it is never taken for a verdict."""

_DESCRIPTION = """\
Say what a run of `tokenmill optimize` decided: the exit code is 0 if something passes and is to be deployed,
1 if the incumbent is kept because nothing passes or is cheaper, 3 if more rows might decide.

  tokenmill gate run && tokenmill serve run/deployment.yaml
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `gate`."""
    parser = add_command(
        subparsers, "gate", _gate, summary="the verdict of a run as an exit code", description=_DESCRIPTION
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")


def _gate(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.optimize.verify import gate_outcome, read_certificate

    certificate = read_certificate(args.run)
    verdict = gate_outcome(certificate)
    why = certificate["choice"]["why"]
    out.text(f"{verdict}: {why}")
    out.document({"verdict": verdict, "why": why, "winner": certificate["choice"]["winner"]})
    return EXIT_CODES[verdict]
