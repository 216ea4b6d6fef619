"""The flag `--tools`: functions that a model is told about. What it answers is shown as it wrote it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.cli.arguments import Parser
from tokenmill.cli.inputs import STDIN, read_text_file
from tokenmill.core import Message, UsageError

if TYPE_CHECKING:
    from tokenmill.models.store.directory import ModelDirectory

__all__ = ["add_tools_flag", "tools"]


def add_tools_flag(parser: Parser) -> None:
    """`--tools`."""
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="F",
        help="functions that the model may call, a JSON list as in OpenAI's API; calls are shown, not made",
    )


def tools(args: argparse.Namespace, model: "ModelDirectory") -> list[dict[str, Any]]:
    """The tools of the file, if one is given. Raises UsageError for tools that a prompt cannot hold."""
    if args.tools is None:
        return []
    from tokenmill.models.chat.conversation import template_context

    if str(args.tools) == STDIN:
        raise UsageError("tools do not come from standard input", hint="give the path of a file")
    text = read_text_file(args.tools)
    try:
        found = json.loads(text)
        if not isinstance(found, list):
            raise UsageError("is no list", hint='give [{"type": "function", ...}, ...]')
        template_context([Message(role="user", content="x")], found)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{args.tools} is not JSON ({error})", hint="give a list of tools") from error
    except UsageError as error:
        raise UsageError(f"{args.tools}: {error.message}", hint=error.hint) from error
    template = None if getattr(args, "raw", False) else model.chat_template()
    if template is None or not template.knows_tools:
        why = "a raw prompt" if template is None else f"the chat template of {model.name}"
        raise UsageError(f"{why} has no place for tools", hint="leave out --tools")
    return found
