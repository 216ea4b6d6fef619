"""`tokenmill completion`: completion scripts for shells, made with shtab from the parser itself."""

import argparse
from collections.abc import Iterator
from typing import Any, Final

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.output import Output

__all__ = ["SHELLS", "add_parser"]

SHELLS: Final = ("bash", "zsh")

_DESCRIPTION = """\
Print a completion script; it completes commands, flags, files and the names of models that are here.

  bash: tokenmill completion bash > ~/.local/share/bash-completion/completions/tokenmill
  zsh:  tokenmill completion zsh > _tokenmill, in a folder of $fpath
"""

_LIST_MODELS = (
    'command ls "${TOKENMILL_HOME:-${XDG_DATA_HOME:-$HOME/.local/share}/tokenmill}/models" 2>/dev/null'
)
_PREAMBLES: Final = {
    "bash": f'_tokenmill_models() {{\n  compgen -W "$({_LIST_MODELS})" -- "$1"\n}}\n',
    "zsh": f'_tokenmill_models() {{\n  compadd -- ${{(f)"$({_LIST_MODELS})"}}\n}}\n',
}
_MODELS: Final = dict.fromkeys(SHELLS, "_tokenmill_models")


def add_parser(subparsers: Subparsers) -> None:
    """Add `completion`."""
    parser = add_command(
        subparsers, "completion", _completion, summary="completion for a shell", description=_DESCRIPTION
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def _completion(args: argparse.Namespace, out: Output) -> int:
    import shtab

    from tokenmill.cli.main import build_parser

    parser = build_parser()
    for action in _all_actions(parser):
        if action.metavar == "MODEL" or (action.metavar == "NAME" and not action.option_strings):
            _complete_with(action, _MODELS)
        elif action.metavar in ("F", "NAME|PATH"):
            _complete_with(action, shtab.FILE)
        elif action.metavar == "FOLDER":
            _complete_with(action, shtab.DIRECTORY)
    script = shtab.complete(parser, args.shell, preamble=_PREAMBLES[args.shell])
    if not out.as_json:
        out.text(script)
    out.document({"shell": args.shell, "script": script})
    return 0


def _complete_with(action: Any, functions: Any) -> None:
    """Name the shell functions that complete an argument; shtab reads this attribute."""
    action.complete = functions


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _all_actions(command)
