"""What a chat template sees: messages, tools and variables as plain JSON, checked, each text rewritten.

A user's strings are many: contents, names, ids, arguments and their keys, names and descriptions in schemas.
All pass through `rewrite`. What does not are words of a closed list, on which templates decide what to do:
roles, the words of JSON schema where they stand in their place, and variables that are a single word.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from tokenmill.core import Message, UsageError

__all__ = ["ROLES", "template_context"]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_MAX_CHARS: Final = 8 << 20
_MAX_DEPTH: Final = 64
_MAX_TOOLS: Final = 1024
_MAX_VARIABLES: Final = 64
_GIVEN: Final = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})

_TYPES: Final = frozenset(["function", "object", "array", "string", "number", "integer", "boolean", "null"])
_SCHEMAS: Final = frozenset(  # keys whose value is a schema, or a list of them
    [
        "function",
        "parameters",
        "items",
        "prefixItems",
        "contains",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "if",
        "then",
        "else",
        "additionalProperties",
        "propertyNames",
        "return",
        "returns",
    ]
)
_NAMED_SCHEMAS: Final = frozenset(
    ["properties", "patternProperties", "dependentSchemas", "$defs", "definitions"]
)
_OTHERS: Final = frozenset(
    [
        "name",
        "description",
        "strict",
        "type",
        "required",
        "enum",
        "const",
        "default",
        "examples",
        "title",
        "format",
        "pattern",
        "nullable",
        "$ref",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "uniqueItems",
        "minProperties",
        "maxProperties",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$id",
    ]
)
_STRUCTURE: Final = _SCHEMAS | _NAMED_SCHEMAS | _OTHERS
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_Rewrite = Callable[[str], str]


def template_context(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    rewrite: _Rewrite = str,
) -> dict[str, Any]:
    """The variables of a template. `tools` is None if there are none, content where there is none.

    Raises UsageError naming what cannot be used: an empty conversation, an unknown role, tools or
    variables that are no JSON, text that is no Unicode or too long.
    """
    if not messages:
        raise UsageError("the conversation has no messages", hint="give at least one")
    if len(tools) > _MAX_TOOLS:
        raise UsageError(f"there are {len(tools)} tools", hint=f"give at most {_MAX_TOOLS}")
    context = {
        **_variables(variables or {}, rewrite),
        "messages": [_message(each, rewrite) for each in messages],
        "tools": [_tool(each, f"tools[{at}]", rewrite) for at, each in enumerate(tools)] or None,
    }
    _check_text(context)
    return context


def _message(message: Message, rewrite: _Rewrite) -> dict[str, Any]:
    """A message in the shape that templates know: arguments are an object, what is empty is left out."""
    if message.role not in ROLES:
        raise UsageError(f"role is {message.role[:40]!r}", hint=f"use one of {', '.join(ROLES)}")
    content = None if message.content is None else rewrite(message.content)
    result: dict[str, Any] = {"role": message.role, "content": content}
    if message.name:
        result["name"] = rewrite(message.name)
    if message.tool_call_id:
        result["tool_call_id"] = rewrite(message.tool_call_id)
    if message.tool_calls:
        result["tool_calls"] = [
            {
                **({"id": rewrite(call.id)} if call.id else {}),
                "type": "function",
                "function": {
                    "name": rewrite(call.name),
                    "arguments": _json(json.loads(call.arguments), f"arguments of {call.name!r}", rewrite),
                },
            }
            for call in message.tool_calls
        ]
    return result


def _tool(tool: object, what: str, rewrite: _Rewrite) -> Any:
    """A tool's description: {"type": "function", "function": {...}}, or what is inside it alone."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        hint = 'give {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
        raise UsageError(f"{what} names no function", hint=hint)
    return _schema(tool, what, rewrite)


def _schema(value: object, what: str, rewrite: _Rewrite, depth: int = 0) -> Any:
    """A JSON schema. Its own words stay where they stand for themselves; all else is a user's text."""
    if isinstance(value, list | tuple):
        return [_schema(each, what, rewrite, _deeper(depth, what)) for each in value]
    if not isinstance(value, Mapping):
        return _json(value, what, rewrite, depth)
    result = {}
    for key, item in value.items():
        new_key = key if key in _STRUCTURE else _json(_key(key, what), what, rewrite)
        below = _deeper(depth, what)
        if key in _NAMED_SCHEMAS and isinstance(item, Mapping):
            result[new_key] = {
                rewrite(_key(name, what)): _schema(each, what, rewrite, below) for name, each in item.items()
            }
        elif key in _SCHEMAS:
            result[new_key] = _schema(item, what, rewrite, below)
        elif key == "type":
            result[new_key] = _json(item, what, lambda text: text if text in _TYPES else rewrite(text), below)
        else:
            result[new_key] = _json(item, what, rewrite, below)
    return result


def _variables(variables: Mapping[str, Any], rewrite: _Rewrite) -> dict[str, Any]:
    """Further variables; a single word stays as it is, like a role, so that templates can ask for it."""
    if len(variables) > _MAX_VARIABLES:
        raise UsageError(f"{len(variables)} template variables", hint=f"give at most {_MAX_VARIABLES}")
    for name in variables:
        if not _key(name, "variables").isidentifier() or len(name) > 64 or name in _GIVEN:
            raise UsageError(f"template variable {name[:40]!r} cannot be set", hint="use another name")

    def unless_word(text: str) -> str:
        return text if _WORD.fullmatch(text) else rewrite(text)

    return {name: _json(each, f"variable {name}", unless_word) for name, each in variables.items()}


def _json(value: object, what: str, rewrite: _Rewrite, depth: int = 0) -> Any:
    """A JSON value with all its strings rewritten, keys too."""
    if isinstance(value, str):
        return rewrite(value)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    below = _deeper(depth, what)
    if isinstance(value, list | tuple):
        return [_json(each, what, rewrite, below) for each in value]
    if isinstance(value, Mapping):
        return {rewrite(_key(key, what)): _json(each, what, rewrite, below) for key, each in value.items()}
    raise UsageError(f"{what} has a value of type {type(value).__name__}", hint="give JSON values only")


def _key(key: object, what: str) -> str:
    if not isinstance(key, str):
        raise UsageError(f"{what} has the key {str(key)[:40]!r}", hint="the keys of a JSON object are text")
    return key


def _deeper(depth: int, what: str) -> int:
    if depth >= _MAX_DEPTH:
        raise UsageError(f"{what} is nested deeper than {_MAX_DEPTH} levels", hint="make it flatter")
    return depth + 1


def _check_text(context: Mapping[str, Any]) -> None:
    """Refuse text that no tokenizer takes, and more of it than the template's budget is made for."""
    total = 0
    for text in _texts(context):
        total += len(text)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"the text {text[max(0, error.start - 8) : error.end]!r} has half of a surrogate pair",
                    hint="give valid Unicode",
                ) from None
    if total > _MAX_CHARS:
        raise UsageError(f"the messages have over {_MAX_CHARS} characters", hint="shorten them")


def _texts(value: object) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
