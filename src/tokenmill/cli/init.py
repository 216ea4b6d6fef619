"""`tokenmill init`: a workload's file, written from what a log looks like."""

import argparse
from pathlib import Path
from typing import Final

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.output import Output
from tokenmill.core import UsageError

__all__ = ["add_column_flag", "add_parser", "columns_of", "show_faults"]

_SHOWN: Final = 5
_DESCRIPTION = """\
Read a log of calls with their answers and write a workload.yaml with what it looks like: the kind of answers,
slices, who answered and at which price. Every field says what it means; read it, and mend what is wrong.

LOG is JSON lines, a JSON list or CSV, also as .gz or .bz2, or a folder of such files: chat completions as for
fine-tuning, requests with responses, inputs and outputs of batches, exports of evals, ShareGPT, Data Flywheel
records, LiteLLM logs, what `tokenmill serve` captured, or rows with a question and an answer.

  tokenmill init calls.jsonl
  tokenmill init questions.csv --column prompt=text answer=category
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `init`."""
    parser = add_command(
        subparsers, "init", _init, summary="a workload.yaml from a log of calls", description=_DESCRIPTION
    )
    parser.add_argument("log", type=Path, metavar="LOG", help="the log, or a folder of logs")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("workload.yaml"),
        metavar="FILE",
        help="where to write; a file that is there is never overwritten (default: workload.yaml)",
    )
    add_column_flag(parser)


def add_column_flag(parser: argparse.ArgumentParser) -> None:
    """`--column`."""
    parser.add_argument(
        "--column",
        nargs="+",
        default=[],
        metavar="WHAT=NAME",
        help="which column of a CSV file has the prompt, answer, reference, system, slice, created, ...",
    )


def columns_of(args: argparse.Namespace) -> dict[str, str]:
    """What `--column` says. Raises UsageError."""
    found = {}
    for each in args.column:
        what, equals, name = each.partition("=")
        if not (what and equals and name):
            raise UsageError(f"--column {each} means nothing", hint="use --column prompt=NAME answer=NAME")
        found[what] = name
    return found


def _init(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.workload import infer_log, write_workload

    if args.out.exists():
        raise UsageError(f"{args.out} is there already", hint="give another name with --out, or move it away")
    with out.busy(f"reading {args.log}"):
        found = infer_log(args.log, columns=columns_of(args))
    write_workload(found, args.out)
    log, config = found.log, found.config
    out.text(f"{len(log.rows)} calls, read as {log.format}")
    for name, reason in found.reasons.items():
        out.text(f"  {name}: {reason}")
    show_faults([str(each) for each in log.faults], out)
    out.text(f"{args.out} is written: read it, then `tokenmill workload check {args.out}`")
    out.document(
        {
            "path": str(args.out),
            "format": log.format,
            "num_rows": len(log.rows),
            "num_faults": len(log.faults),
            "scorer": config.quality.scorer,
            "slice_by": config.slice_by,
            "incumbent": config.incumbent.name,
            "num_labels": len(config.labels),
            "reasons": dict(found.reasons),
        }
    )
    return 0


def show_faults(faults: list[str], out: Output) -> None:
    """The first lines that are no call, as a warning."""
    if not faults:
        return
    out.warn(f"{len(faults)} lines are no call and are left out:")
    for each in faults[:_SHOWN]:
        out.note(f"  line {each}")
    if len(faults) > _SHOWN:
        out.note(f"  and {len(faults) - _SHOWN} more; `tokenmill workload check --rejected FILE` writes all")
