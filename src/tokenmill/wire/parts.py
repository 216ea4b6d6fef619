"""Parts of messages and tools that both APIs have in their own shapes, read strictly."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final

from tokenmill.core import SamplingParams
from tokenmill.wire.fields import FieldError, encode_json, named_fields

__all__ = ["arguments_text", "block_text", "check_keys", "filled", "text_of", "tool_name", "whole_tool"]

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ALIASES: Final = {
    "a stop string": "stop",
    "a stop token": "stop_token_ids",
    "a bad word": "bad_words",
    "logit_bias": "logit_bias",
    "grammar": "response_format",
}


def filled(
    defaults: SamplingParams, given: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> SamplingParams:
    """The default parameters with those that are given, which are not None.

    `names` are the names of fields on the wire that differ from ours. Raises FieldError.
    """
    wire_names = {field.name: field.name for field in fields(SamplingParams)} | _ALIASES | dict(names or {})
    with named_fields(wire_names):
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def text_of(content: str | Sequence[Mapping[str, Any]] | None, path: str, known: Iterable[str]) -> str:
    """The text of a message's content: one string, or parts of text put together as they are.

    `known` are the fields of a part that may stand there. Raises FieldError for images, audio and files.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block_text(block, f"{path}[{at}]", known) for at, block in enumerate(content))


def block_text(block: Mapping[str, Any], path: str, known: Iterable[str]) -> str:
    """The text of one part. Raises FieldError for one of another kind."""
    kind, text = block.get("type"), block.get("text")
    if kind != "text":
        hint = "give text; images, audio, files and other blocks are not supported"
        raise FieldError(f"{path}.type", f"it is {str(kind)[:40]!r}", hint=hint)
    if not isinstance(text, str):
        raise FieldError(f"{path}.text", "is no text")
    check_keys(block, path, ("type", "text", *known))
    return text


def check_keys(block: Mapping[str, Any], path: str, known: Iterable[str]) -> None:
    """Raise FieldError for a field that is not known."""
    unknown = sorted(set(block) - set(known))
    if unknown:
        raise FieldError(f"{path}.{unknown[0][:40]}", "this field is not known")


def arguments_text(arguments: str | Mapping[str, Any]) -> str:
    """The text of a call's arguments, which some write as an object."""
    return arguments if isinstance(arguments, str) else encode_json(arguments).decode()


def tool_name(name: str, path: str) -> str:
    """A function's name. Raises FieldError for one that is empty, long, or of other characters."""
    if not _TOOL_NAME.fullmatch(name):
        raise FieldError(
            path, f"it is {name[:40]!r}", hint="use letters, digits, '_', '-' and '.', up to 128"
        )
    return name


def whole_tool(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None
) -> dict[str, Any]:
    """A function in the OpenAI shape, without what is not given."""
    given = {"description": description, "parameters": parameters, "strict": strict}
    function = {"name": name, **{key: value for key, value in given.items() if value is not None}}
    return {"type": "function", "function": function}
