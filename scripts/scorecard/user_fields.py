"""Every place of a conversation that holds a user's text, for the scorecard and for tests of templates."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tokenmill.core import Message, ToolCall

__all__ = ["USER_FIELDS", "Chat"]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Everything that a template is rendered with."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)


def _said(role: str, text: str) -> Chat:
    around = [Message(role="user", content="Hello"), Message(role="assistant", content="Yes?")]
    return Chat(messages=[*around, Message(role=role, content=text), Message(role="user", content="Go on.")])


def _called(name: str = "f", arguments: Mapping[str, Any] | None = None, id: str = "1") -> Chat:
    call = ToolCall(id=id, name=name, arguments=json.dumps(arguments or {}))
    return Chat(messages=[_QUESTION, Message(role="assistant", content=None, tool_calls=(call,))])


def _given(name: str = "f", **function: Any) -> Chat:
    return Chat(messages=[_QUESTION], tools=[{"type": "function", "function": {"name": name, **function}}])


def _property(name: str = "a", **schema: Any) -> Chat:
    return _given(parameters={"type": "object", "properties": {name: schema}})


_QUESTION: Final = Message(role="user", content="Hello")

USER_FIELDS: Final[Mapping[str, Callable[[str], Chat]]] = {
    "content of a system message": lambda text: _said("system", text),
    "content of a developer's message": lambda text: _said("developer", text),
    "content of a user message": lambda text: _said("user", text),
    "content of an answer": lambda text: _said("assistant", text),
    "content of a tool's result": lambda text: _said("tool", text),
    "name of a message": lambda text: Chat(messages=[Message(role="user", content="Hello", name=text)]),
    "tool_call_id": lambda text: Chat(messages=[Message(role="tool", content="3", tool_call_id=text)]),
    "id of a call": lambda text: _called(id=text),
    "name of a call": lambda text: _called(text),
    "value of an argument": lambda text: _called(arguments={"a": [text]}),
    "name of an argument": lambda text: _called(arguments={text: 1}),
    "name of a tool": lambda text: _given(text),
    "description of a tool": lambda text: _given(description=text),
    "name of a property": lambda text: _property(text, type="string"),
    "description of a property": lambda text: _property(type="string", description=text),
    "type of a property": lambda text: _property(type=text),
    "enum of a property": lambda text: _property(enum=[text]),
    "default of a property": lambda text: _property(default={text: [text]}),
    "required property": lambda text: _given(parameters={"required": [text]}),
    "unknown word of a schema": lambda text: _given(parameters={text: {text: text}}),
    "template variable": lambda text: Chat(messages=[_QUESTION], variables={"custom": f"{text} "}),
    "inside a template variable": lambda text: Chat(
        messages=[_QUESTION], variables={"more": {f"{text} ": [f"{text} "]}}
    ),
}
"""Every place where a user's text reaches a template, as a chat that has the given text there."""
