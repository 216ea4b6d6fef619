"""`tokenmill embed`: texts as vectors, one line a text."""

import argparse
import json
from collections.abc import Iterator
from typing import Any, Final

from tokenmill.cli.arguments import (
    Subparsers,
    add_command,
    add_engine_flags,
    add_model_argument,
    open_model,
    opened_llm,
    text_argument,
)
from tokenmill.cli.inputs import STDIN, read_stdin, stdin_is_terminal
from tokenmill.cli.output import Output
from tokenmill.core import UsageError

__all__ = ["POOLINGS", "add_parser"]

POOLINGS: Final = ("mean", "last")
"""The engine's poolings, its default first, known here without importing it; a test compares."""

_GROUP: Final = 256
"""Texts that are computed before their lines are written."""

_DESCRIPTION = """\
Embed texts: the final layer's rows, their mean or the last one, scaled to length 1. Standard output gets one
line of JSON a text, with `text` and `embedding`; with --json it is one document with all of them.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `embed`."""
    parser = add_command(subparsers, "embed", _embed, summary="texts as vectors", description=_DESCRIPTION)
    add_model_argument(parser)
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="*",
        type=text_argument,
        help="the texts; `-`, or none with a pipe: each line of standard input",
    )
    parser.add_argument(
        "--pooling", choices=POOLINGS, default=POOLINGS[0], help="which rows count (default: %(default)s)"
    )
    add_engine_flags(parser)


def _embed(args: argparse.Namespace, out: Output) -> int:
    texts = list(_texts(args.texts))
    model = open_model(args.model)
    entries: list[dict[str, Any]] = []
    with opened_llm(model, args, out) as llm, out.progress("text") as bar:
        for first in range(0, len(texts), _GROUP):
            group = texts[first : first + _GROUP]
            rows_ND = llm.embed(group, pooling=args.pooling)
            # The shortest decimals that give the same float32 again.
            new = [
                {"text": text, "embedding": [float(str(value)) for value in row_D]}
                for text, row_D in zip(group, rows_ND, strict=True)
            ]
            if out.as_json:
                entries += new
            else:
                out.text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in new))
            bar("embed", first + len(group), len(texts))
        out.document(
            {
                "model": model.name,
                "weights": llm.config.weights,
                "pooling": args.pooling,
                "embeddings": entries,
            }
        )
    return 0


def _texts(given: list[str]) -> Iterator[str]:
    """The texts in order, with the lines of standard input in the place of the first `-`."""
    if not given and stdin_is_terminal():
        raise UsageError("no text", hint='give one: tokenmill embed MODEL "text", or lines through a pipe')
    if given.count(STDIN) > 1:
        raise UsageError("standard input is named twice", hint="give `-` once")
    for text in given or [STDIN]:
        if text == STDIN:
            yield from _lines(read_stdin())
        elif text:
            yield text
        else:
            raise UsageError("a text is empty", hint="give at least one character")


def _lines(text: str) -> Iterator[str]:
    if not text:
        raise UsageError("standard input is empty", hint="give one text a line")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if not line:
            raise UsageError(f"line {number} of standard input is empty", hint="leave out empty lines")
        yield line
