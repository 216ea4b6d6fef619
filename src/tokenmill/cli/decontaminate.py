"""`tokenmill decontaminate`: which evaluation rows are in the training data."""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import Subparsers, add_command, positive
from tokenmill.cli.output import Output

if TYPE_CHECKING:
    from tokenmill.evals.decontamination import TextRow

__all__ = ["FOUND", "add_parser"]

FOUND: Final = 1

_SHOWN: Final = 20
_DESCRIPTION = """\
Look for the rows of EVAL in the rows of TRAIN: the same words, a run of words in common, or nearly the same
text. Files are .jsonl, .json, .csv, or .txt with a row a line, also as .gz or .bz2. The text of a row is all
text in it, or the fields of --field.

Each row that is found is named with its file and line, with the training row that has most of it. The exit
code is 0 if there is none, 1 if there are some.

  tokenmill decontaminate train.jsonl eval.jsonl --field prompt
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `decontaminate`."""
    parser = add_command(
        subparsers,
        "decontaminate",
        _decontaminate,
        summary="which evaluation rows are in training data",
        description=_DESCRIPTION,
    )
    parser.add_argument("train", type=Path, metavar="TRAIN", help="training rows, or prompts")
    parser.add_argument("evaluation", type=Path, metavar="EVAL", help="evaluation rows")
    parser.add_argument(
        "--field", nargs="+", default=[], metavar="NAME", help="the fields that hold the text (default: all)"
    )
    parser.add_argument(
        "--ngram",
        type=positive,
        default=13,
        metavar="N",
        help="words in a row that are too many (default: 13)",
    )
    parser.add_argument(
        "--near", type=float, default=0.7, metavar="X", help="likeness that is too much (default: 0.7)"
    )


def _decontaminate(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.evals.decontamination import decontaminate

    found = decontaminate(
        _rows(args.train, args.field), _rows(args.evaluation, args.field), ngram=args.ngram, near=args.near
    )
    kinds = Counter(each.kind for each in found.overlaps)
    out.text(
        f"{len(found.overlaps)} of {found.num_eval_rows} evaluation rows are in the training data: "
        f"{kinds['exact']} exact, {kinds['ngram']} by {args.ngram} words in a row, {kinds['near']} nearly; "
        f"{found.num_train_rows_found} of {found.num_train_rows} training rows have one"
    )
    if found.num_template_grams:
        out.note(f"{found.num_template_grams} runs of words are in many evaluation rows and do not count")
    rows = [
        [each.kind, each.eval_row, each.train_row, f"{each.share:.2f}", each.excerpt[:80]]
        for each in found.overlaps[:_SHOWN]
    ]
    if rows:
        out.table(["kind", "evaluation row", "training row", "share", "text"], rows)
    if len(found.overlaps) > _SHOWN:
        out.text(f"and {len(found.overlaps) - _SHOWN} more; --json lists all")
    out.document(asdict(found) | {"overlaps": [asdict(each) for each in found.overlaps]})
    return FOUND if found.overlaps else 0


def _rows(path: Path, fields: list[str]) -> "Iterator[TextRow]":
    """The rows of a file with their places. Raises UsageError for one without a field that was asked for."""
    from tokenmill.evals.data import read_lines, read_rows
    from tokenmill.evals.decontamination import TextRow

    if ".txt" in path.suffixes[-2:]:
        for place, line in read_lines(path):
            if line.strip():
                yield TextRow(str(place), line)
        return
    for row in read_rows(path):
        missing = [name for name in fields if name not in row.fields]
        if missing:
            row.place.refuse(f"there is no {missing[0]}", f"its fields are {', '.join(row.fields)}")
        values = [row.fields[name] for name in fields] if fields else list(row.fields.values())
        yield TextRow(str(row.place), " ".join(_texts(values)))


def _texts(value: Any) -> Iterator[str]:
    """All text inside a value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
