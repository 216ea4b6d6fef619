"""The `input` of the Responses API to messages: texts, turns, function calls and their outputs.

Calls that stand beside each other are one turn of the assistant, with the text before them, as the model made
them. Thoughts of an earlier answer are passed over. Images, files and references to stored items are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from tokenmill.core import Message
from tokenmill.wire.fields import FieldError, named_fields
from tokenmill.wire.openai_parse import told_call
from tokenmill.wire.parts import check_keys

__all__ = ["read_items"]

_ROLES: Final = ("user", "assistant", "system", "developer")
_PARTS: Final = ("input_text", "output_text", "text", "refusal")
_MESSAGE: Final = ("type", "role", "content", "id", "status", "phase")
_CALL: Final = ("type", "call_id", "name", "arguments", "id", "status", "namespace", "caller", "async")
_OUTPUT: Final = ("type", "call_id", "output", "id", "status", "name", "caller")


def read_items(given: str | Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """The messages of a conversation. Raises FieldError."""
    if isinstance(given, str):
        return (Message(role="user", content=given),)
    if not given:
        raise FieldError("input", "is empty", hint="give a text or items")
    messages: list[Message] = []
    names: dict[str, str] = {}
    for at, item in enumerate(given):
        path = f"input[{at}]"
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            messages.append(_message(item, path))
        elif kind == "function_call":
            _add_call(messages, names, item, path)
        elif kind == "function_call_output":
            messages.append(_output(item, names, path))
        elif kind != "reasoning":
            hint = "use message, function_call or function_call_output"
            raise FieldError(f"{path}.type", f"it is {str(kind)[:40]!r}", hint=hint)
    if not messages:
        raise FieldError("input", "has no message", hint="give a text or items")
    return tuple(messages)


def _message(item: Mapping[str, Any], path: str) -> Message:
    check_keys(item, path, _MESSAGE)
    role = item.get("role")
    if role not in _ROLES:
        raise FieldError(f"{path}.role", f"it is {str(role)[:40]!r}", hint=f"use one of {', '.join(_ROLES)}")
    with named_fields({"content": f"{path}.content"}, path):
        return Message(role=role, content=_text(item.get("content"), f"{path}.content"))


def _add_call(messages: list[Message], names: dict[str, str], item: Mapping[str, Any], path: str) -> None:
    check_keys(item, path, _CALL)
    call_id, name, arguments = (_string(item, key, path) for key in ("call_id", "name", "arguments"))
    call = told_call(call_id, name, arguments, {"name": f"{path}.name", "id": f"{path}.call_id"})
    names[call_id] = name
    with named_fields({}, path):
        if messages and messages[-1].role == "assistant":
            last = messages[-1]
            messages[-1] = replace(last, tool_calls=(*last.tool_calls, call))
        else:
            messages.append(Message(role="assistant", tool_calls=(call,)))


def _output(item: Mapping[str, Any], names: Mapping[str, str], path: str) -> Message:
    check_keys(item, path, _OUTPUT)
    call_id = _string(item, "call_id", path)
    if call_id not in names:
        raise FieldError(f"{path}.call_id", f"no call has the id {call_id[:60]!r}", hint="give the call too")
    content = _text(item.get("output"), f"{path}.output")
    with named_fields({}, path):
        return Message(role="tool", content=content, tool_call_id=call_id, name=names[call_id])


def _text(content: object, path: str) -> str:
    """One string, or parts of text put together as they are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError(path, "is no text", hint="give a text, or parts of text")
    return "".join(_part(part, f"{path}[{at}]") for at, part in enumerate(content))


def _part(part: object, path: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PARTS:
        hint = "give input_text; images and files are not supported"
        raise FieldError(f"{path}.type", f"it is {str(kind)[:40]!r}", hint=hint)
    assert isinstance(part, Mapping)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise FieldError(f"{path}.text", "is no text")
    return text


def _string(item: Mapping[str, Any], key: str, path: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise FieldError(f"{path}.{key}", "is missing" if value is None else "is no text")
    return value
