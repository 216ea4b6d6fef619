"""`tokenmill`: reads the arguments, runs one command, and turns what goes wrong into one line and a code.

The exit codes are those of `tokenmill.core.errors`, and those below for what is no error of ours. What a
command does is in its own module; this file imports nothing heavy, so that `--help` is quick.
"""

import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final, TextIO

from tokenmill import __version__
from tokenmill.cli.arguments import Parser, add_shared_flags
from tokenmill.cli.output import Output
from tokenmill.core import TokenmillError

__all__ = ["BROKEN_PIPE", "COMMANDS", "INTERRUPTED", "TERMINATED", "UNEXPECTED", "build_parser", "main"]

COMMANDS: Final = (
    "init",
    "workload",
    "optimize",
    "verify",
    "gate",
    "run",
    "chat",
    "score",
    "embed",
    "bench",
    "eval",
    "compare",
    "decontaminate",
    "train",
    "distil",
    "serve",
    "load",
    "versus",
    "doctor",
    "models",
    "show",
    "plan",
    "prices",
    "keys",
    "ledger",
    "erase",
    "export",
    "completion",
)
"""Modules of this package that add commands, in the order of `--help`."""

UNEXPECTED: Final = 1
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
TERMINATED: Final = 143

_DESCRIPTION = """\
Small language models on your own machine, and what their tokens cost.

A first answer:

  tokenmill pull smollm2-135m
  tokenmill run smollm2-135m "Explain a hash table in two sentences."
"""


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="tokenmill", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"tokenmill {__version__}")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", parser_class=Parser
    )
    for name in COMMANDS:
        importlib.import_module(f"tokenmill.cli.{name}").add_parser(subparsers)
    for command in subparsers.choices.values():
        add_shared_flags(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The arguments default to the process's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Known before the arguments are parsed, because that may be what fails.
    flags = words[: words.index("--")] if "--" in words else words
    _tolerate_any_text(sys.stdout, sys.stderr)
    out = Output(as_json="--json" in flags)
    try:
        with _quiet_environment(out):
            code = _run(words, out)
            out.flush()
            return code
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail(out, "Interrupted", "interrupted", "", INTERRUPTED)
    except _TerminatedError:
        return _fail(out, "Terminated", "terminated", "", TERMINATED)
    except TokenmillError as error:
        if "--debug" in flags:
            out.stderr.write(traceback.format_exc())
        return _fail(out, _kind(error), error.message, error.hint, error.exit_code)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if "--debug" in flags:
            out.stderr.write(traceback.format_exc())
            return _fail(out, "Unexpected", message, "this is a bug in tokenmill", UNEXPECTED)
        hint = "this is a bug in tokenmill: run the command again with --debug and report what it shows"
        return _fail(out, "Unexpected", message, hint, UNEXPECTED)


def _run(words: Sequence[str], out: Output) -> int:
    parser = build_parser()
    try:
        args = parser.parse_args(words)
    except SystemExit as exit:  # --help and --version
        return int(exit.code or 0)
    if args.command is None:
        parser.error("no command")
    code: int = args.handler(args, out)
    return code


def _kind(error: TokenmillError) -> str:
    """The public name of an error: that of its nearest class in the tree of `core.errors`."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == TokenmillError.__module__)


def _fail(out: Output, kind: str, message: str, hint: str, code: int) -> int:
    """Report; if even that cannot be written, the exit code still tells."""
    try:
        out.failure(kind, message, hint, code)
    except BrokenPipeError:
        _discard_output()
    except TokenmillError:
        pass
    return code


class _TerminatedError(BaseException):
    """SIGTERM arrived: end as an interrupt does, so that children and temporary files go."""


def _on_terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


@contextmanager
def _quiet_environment(out: Output) -> Iterator[None]:
    """Warnings are one line each and SIGTERM is an exception, while a command runs."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        out.warn(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        previous = signal.signal(signal.SIGTERM, _on_terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)


def _tolerate_any_text(*streams: TextIO) -> None:
    """Characters that a stream cannot hold are written as escapes instead of ending the command."""
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Nobody reads any more: what is still buffered must not fail a second time when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
