"""What a chat template sees: messages, tools and variables as plain JSON, checked, each text rewritten.

A user's strings are many: contents, names, ids, arguments and their keys, names and descriptions in schemas.
All pass through `rewrite`, but for words of a closed list, on which templates decide what to do:
roles, the words of JSON schema where they stand in their place, and variables that are a single word.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tokenmill.core import Message, ToolCall, UsageError

__all__ = ["ROLES", "template_context"]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_MAX_CHARS: Final = 8 << 20
_VALUE_CHARS: Final = 8
"""What a value counts for besides its characters, so that there are at most a million."""

_MAX_DEPTH: Final = 64
_MAX_TOOLS: Final = 1024
_MAX_VARIABLES: Final = 64
_GIVEN: Final = frozenset({"messages", "tools", "add_generation_prompt"})
_GIVEN_SUFFIX: Final = "_token"
"""Of the names of the model's control tokens."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TYPES: Final = _words("function object array string number integer boolean null")
_SCHEMAS: Final = _words(
    "function parameters items prefixItems contains anyOf oneOf allOf not if then else"
    " additionalProperties propertyNames return returns"
)
"""Keys whose value is a schema, or a list of them."""

_NAMED_SCHEMAS: Final = _words("properties patternProperties dependentSchemas $defs definitions")
_OTHERS: Final = _words(
    "name description strict type required enum const default examples title format pattern nullable $ref"
    " minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength minItems maxItems"
    " uniqueItems minProperties maxProperties deprecated readOnly writeOnly $schema $id"
)
_STRUCTURE: Final = _SCHEMAS | _NAMED_SCHEMAS | _OTHERS
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def template_context(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    rewrite: Callable[[str], str] = str,
) -> dict[str, Any]:
    """The variables of a template. `tools` is None if there are none, content where there is none.

    Raises UsageError naming what cannot be used: an empty conversation, an unknown role, tools or
    variables that are no JSON, text that is no Unicode, and more of it all than a template's budget is for.
    """
    if not messages:
        raise UsageError("the conversation has no messages", hint="give at least one")
    if len(tools) > _MAX_TOOLS:
        raise UsageError(f"there are {len(tools)} tools", hint=f"give at most {_MAX_TOOLS}")
    walk = _Walk(rewrite)
    return {
        **_variables(variables or {}, walk),
        "messages": [_message(each, walk) for each in messages],
        "tools": [_tool(each, f"tools[{at}]", walk) for at, each in enumerate(tools)] or None,
    }


def _never(text: str) -> bool:
    return False


class _Walk:
    """A way through JSON that rewrites its strings, keys too, and gets tired."""

    def __init__(self, rewrite: Callable[[str], str]) -> None:
        self._rewrite = rewrite
        self._left = _MAX_CHARS

    def text(self, text: str) -> str:
        """A string, rewritten."""
        self._spend(len(text))
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                found = text[max(0, error.start - 8) : error.end]
                hint = "give valid Unicode"
                raise UsageError(f"the text {found!r} has half of a surrogate pair", hint=hint) from None
        return self._rewrite(text)

    def json(self, value: object, what: str, depth: int = 0, is_kept: Callable[[str], bool] = _never) -> Any:
        """A JSON value; strings for which `is_kept` holds stay as they are."""
        self._spend(_VALUE_CHARS)
        if isinstance(value, str):
            return value if is_kept(value) else self.text(value)
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        below = _deeper(depth, what)
        if isinstance(value, list | tuple):
            return [self.json(each, what, below, is_kept) for each in value]
        if isinstance(value, Mapping):
            return {
                self.json(_key(key, what), what, below, is_kept): self.json(each, what, below, is_kept)
                for key, each in value.items()
            }
        raise UsageError(f"{what} has a value of type {type(value).__name__}", hint="give JSON values only")

    def schema(self, value: object, what: str, depth: int = 0) -> Any:
        """A JSON schema. Its own words stay where they stand for themselves; all else is a user's text."""
        below = _deeper(depth, what)
        if isinstance(value, list | tuple):
            return [self.schema(each, what, below) for each in value]
        if not isinstance(value, Mapping):
            return self.json(value, what, depth)
        result = {}
        for key, item in value.items():
            new_key = self.json(_key(key, what), what, is_kept=_STRUCTURE.__contains__)
            if key in _NAMED_SCHEMAS and isinstance(item, Mapping):
                result[new_key] = {
                    self.text(_key(name, what)): self.schema(each, what, below) for name, each in item.items()
                }
            elif key in _SCHEMAS:
                result[new_key] = self.schema(item, what, below)
            else:
                is_kept = _TYPES.__contains__ if key == "type" else _never
                result[new_key] = self.json(item, what, below, is_kept)
        return result

    def _spend(self, chars: int) -> None:
        self._left -= chars
        if self._left < 0:
            raise UsageError(f"the messages have over {_MAX_CHARS} characters", hint="shorten them")


def _message(message: Message, walk: _Walk) -> dict[str, Any]:
    """A message in the shape that templates know: arguments are an object, what is empty is left out."""
    if message.role not in ROLES:
        raise UsageError(f"role is {message.role[:40]!r}", hint=f"use one of {', '.join(ROLES)}")
    content = None if message.content is None else walk.text(message.content)
    result: dict[str, Any] = {"role": message.role, "content": content}
    if message.name:
        result["name"] = walk.text(message.name)
    if message.tool_call_id:
        result["tool_call_id"] = walk.text(message.tool_call_id)
    if message.tool_calls:
        result["tool_calls"] = [_call(call, walk) for call in message.tool_calls]
    return result


def _call(call: ToolCall, walk: _Walk) -> dict[str, Any]:
    arguments = walk.json(json.loads(call.arguments), f"arguments of {call.name!r}")
    function = {"name": walk.text(call.name), "arguments": arguments}
    name = {"id": walk.text(call.id)} if call.id else {}
    return {**name, "type": "function", "function": function}


def _tool(tool: object, what: str, walk: _Walk) -> Any:
    """A tool's description: {"type": "function", "function": {...}}, or what is inside it alone."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        hint = 'give {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
        raise UsageError(f"{what} names no function", hint=hint)
    return walk.schema(tool, what)


def _variables(variables: Mapping[str, Any], walk: _Walk) -> dict[str, Any]:
    """Further variables; a single word stays as it is, like a role, so that templates can ask for it."""
    if len(variables) > _MAX_VARIABLES:
        raise UsageError(f"{len(variables)} template variables", hint=f"give at most {_MAX_VARIABLES}")
    for name in variables:
        is_given = _key(name, "variables") in _GIVEN or name.endswith(_GIVEN_SUFFIX)
        if is_given or not name.isidentifier() or len(name) > 64:
            raise UsageError(f"template variable {name[:40]!r} cannot be set", hint="use another name")
    return {name: walk.json(each, f"variable {name}", is_kept=_is_word) for name, each in variables.items()}


def _is_word(text: str) -> bool:
    return bool(_WORD.fullmatch(text))


def _key(key: object, what: str) -> str:
    if not isinstance(key, str):
        raise UsageError(f"{what} has the key {str(key)[:40]!r}", hint="the keys of a JSON object are text")
    return key


def _deeper(depth: int, what: str) -> int:
    if depth >= _MAX_DEPTH:
        raise UsageError(f"{what} is nested deeper than {_MAX_DEPTH} levels", hint="make it flatter")
    return depth + 1
