"""The commands and flags are a contract: they change on purpose or not at all; and the page shows them."""

import argparse
import difflib
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import cli_page
from tokenmill.cli.main import COMMANDS, build_parser

SURFACE = Path(__file__).with_name("cli_surface.txt")


def surface() -> Iterator[str]:
    """One line an argument: command, names, what it takes, its default."""
    for name, command in cli_page.commands(build_parser()).items():
        for action in command._actions:
            if not isinstance(action, argparse._HelpAction):
                yield f"{name} {describe(action)}"


def describe(action: argparse.Action) -> str:
    names = "/".join(action.option_strings) or str(action.metavar or action.dest)
    choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
    value = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or ''}".rstrip()
    optional = " optional" if action.nargs == "?" else ""
    has_default = action.default is not None and action.default is not False and action.default != []
    default = f" = {action.default}" if has_default else ""
    return f"{names}{choices or value}{optional}{default}"


def test_the_surface_is_frozen() -> None:
    frozen, now = SURFACE.read_text(encoding="utf-8").splitlines(), list(surface())
    difference = difflib.unified_diff(frozen, now, "frozen", "now", lineterm="", n=0)
    assert frozen == now, f"change {SURFACE.name} by hand if this is meant\n" + "\n".join(difference)


def test_every_command_has_help_json_and_debug() -> None:
    commands = cli_page.commands(build_parser())
    assert set(COMMANDS) <= set(commands)
    for name, command in commands.items():
        flags = {flag for action in command._actions for flag in action.option_strings}
        assert {"--help", "--json", "--debug"} <= flags, name
        assert callable(command.get_default("handler")), name
        for action in command._actions:
            assert action.help, f"{name} {action.dest} says nothing"


def test_no_flag_has_an_abbreviation() -> None:
    parser = build_parser()
    assert not any(command.allow_abbrev for command in cli_page.commands(parser).values())


def test_the_page_is_what_help_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    assert cli_page.PAGE.read_text(encoding="utf-8") == cli_page.page(), "run: python -m scripts.cli_page"
