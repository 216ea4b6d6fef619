"""Writes docs/cli.md: what every command's `--help` says, its streams and exit codes.

The text comes from the parser and from the error tree, so it cannot say what the program does not. A test
compares the page in the tree with this one.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenmill.cli import main as cli
from tokenmill.core import errors

PAGE = Path(__file__).parents[1] / "docs/cli.md"

_INTRO = """\
# The command line

Made by `python -m scripts.cli_page` from `--help`; do not edit it by hand.

Every command keeps the same promises:

- The result goes to standard output; notes, warnings and progress go to standard error. Bars are drawn only
  on a terminal.
- With `--json` standard output holds exactly one JSON document and nothing else; what is for people goes to
  standard error.
- An error is one line, `error: cause; next step`, on standard error. With `--json` there is also a document,
  `{"error": {"type": ..., "message": ..., "hint": ..., "exit_code": ...}}`. Only `--debug` shows a traceback.
- A flag that is not given has the default of the Python API, which its help names.
- `MODEL` is a name of `tokenmill models`, or the path of a model directory (with a `/` in it).
- Models are kept in `TOKENMILL_HOME`, else in `tokenmill` under `XDG_DATA_HOME` (`~/.local/share`).
  `TOKENMILL_ISA` forces an instruction set: `amx`, `avx512`, `avxvnni`, `avx2`, `neon`, `portable`, `numpy`.
"""


def page() -> str:
    """The whole page."""
    os.environ["COLUMNS"] = "100"  # argparse folds its text at this width
    parser = cli.build_parser()
    parts = [_INTRO, "## Exit codes\n", "\n".join(_codes()) + "\n", _help("tokenmill", parser)]
    parts += [_help(f"tokenmill {name}", command) for name, command in commands(parser).items()]
    return "\n".join(parts)


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands by name; actions of a command follow it, as `plan estimate`."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found |= {name: command} | {f"{name} {k}": each for k, each in commands(command).items()}
    return found


def _codes() -> Iterator[str]:
    yield "| code | when |"
    yield "|---:|---|"
    rows = {0: "done"}
    for kind in (getattr(errors, name) for name in errors.__all__):
        rows[kind.exit_code] = f"`{kind.__name__}`: {str(kind.__doc__).split('. ')[0].rstrip('.').lower()}"
    rows[cli.UNEXPECTED] = "`TokenmillError`, or a fault in tokenmill itself: any other error"
    rows[cli.INTERRUPTED] = "interrupted (Ctrl-C)"
    rows[cli.BROKEN_PIPE] = "the reader of the output went away, as in `| head`"
    rows[cli.TERMINATED] = "terminated (SIGTERM)"
    yield from (f"| {code} | {text} |" for code, text in sorted(rows.items()))


def _help(title: str, parser: argparse.ArgumentParser) -> str:
    lines = (line.rstrip() for line in parser.format_help().splitlines())
    return f"## {title}\n\n```\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
