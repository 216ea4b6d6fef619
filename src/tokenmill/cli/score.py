"""`tokenmill score`: how likely a text is to a model; perplexity in windows, as it is usually measured."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import (
    Subparsers,
    add_command,
    add_engine_flags,
    add_model_argument,
    llm_config,
    open_model,
    positive,
    text_argument,
)
from tokenmill.cli.inputs import read_stdin, read_text_file, stdin_is_terminal
from tokenmill.cli.output import Output, ProgressBar
from tokenmill.core import Score, UsageError

if TYPE_CHECKING:
    from tokenmill.engine import LLM, Progress
    from tokenmill.models.directory import ModelDirectory

__all__ = ["DEFAULT_WINDOW", "add_parser"]

DEFAULT_WINDOW: Final = 2048

_DESCRIPTION = """\
Log-probability and perplexity of a text. It is cut into windows that do not overlap, each read on its own;
nothing is put in front of a window, so its first token is not scored. With --context the text is scored in
one piece, as the continuation of that context.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `score`."""
    parser = add_command(
        subparsers, "score", _score, summary="perplexity of a text", description=_DESCRIPTION
    )
    add_model_argument(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--file", type=Path, metavar="F", help="a text file, may be .gz; `-`: standard input")
    source.add_argument("--text", type=text_argument, metavar="T", help="the text itself")
    parser.add_argument("--context", type=text_argument, metavar="C", help="score the text as what follows this")
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help=f"tokens in a window (default: {DEFAULT_WINDOW}, or the model's context if that is less)",
    )
    parser.add_argument("--windows", type=positive, metavar="N", help="score the first N windows (default: all)")
    add_engine_flags(parser)


def _score(args: argparse.Namespace, out: Output) -> int:
    if args.context is not None and (args.window or args.windows):
        raise UsageError("--context goes with no windows", hint="leave out --window and --windows")
    text = _text(args)
    model = open_model(args)

    from tokenmill.engine import LLM

    llm = LLM(model, llm_config(args))
    with out.progress("tok") as bar:
        if args.context is not None:
            scores, num_tokens = llm.score([args.context], [text]), 0
            window = 0
        else:
            window = args.window or min(DEFAULT_WINDOW, llm.context_length)
            tokens = _tokens(model, text, window, args.windows)
            num_tokens = len(tokens)
            scores = llm.score_tokens(tokens, window=window, on_progress=_drawer(bar, num_tokens))
    _report(out, model, llm, scores, window)
    return 0


def _text(args: argparse.Namespace) -> str:
    if args.text is not None:
        text = str(args.text)
    elif args.file is not None:
        text = read_text_file(args.file)
    elif stdin_is_terminal():
        raise UsageError("no text", hint="give --file F, --text T, or text through a pipe")
    else:
        text = read_stdin()
    if not text:
        raise UsageError("the text is empty", hint="give a text of at least two tokens")
    return text
