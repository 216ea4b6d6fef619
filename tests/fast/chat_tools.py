"""What tests of chat templates share: conversations with everything in them, Jinja2 itself."""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, ext, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scripts.scorecard.user_fields import Chat
from tokenmill.core import Message, ToolCall

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The "weather" of a town\nin °C',
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Name, e.g. 'Zürich' & <b>"},
                "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["town"],
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "The time",
        "parameters": {"type": "object", "properties": {}},
    },
}


def said(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def called(*calls: tuple[str, str, Mapping[str, Any]], content: str | None = None) -> Message:
    tool_calls = tuple(
        ToolCall(id=id, name=name, arguments=json.dumps(arguments, ensure_ascii=False))
        for id, name, arguments in calls
    )
    return Message(role="assistant", content=content, tool_calls=tool_calls)


def result(id: str, name: str, content: str) -> Message:
    return Message(role="tool", content=content, name=name, tool_call_id=id)


_TOWN = {"town": "Zürich", "days": [1, 2], "x": {"z": True, "w": 1.5}}
CHATS: dict[str, Chat] = {
    "one": Chat(messages=[said("user", "Hello")]),
    "system": Chat(messages=[said("system", "Be brief."), said("user", "Hello  ")]),
    "turns": Chat(
        messages=[
            said("system", " You say 'no'. "),
            said("user", 'a\n\nb "q"'),
            said("assistant", "One\ntwo "),
            said("user", "日本 😀 \\n {{ x }} {% y %}"),
            said("assistant", "<think>\nhm\n</think>\n\nYes"),
            said("user", "end"),
        ]
    ),
    "answered": Chat(messages=[said("user", "a"), said("assistant", "b")]),
    "tools": Chat(messages=[said("user", "Weather?")], tools=[WEATHER, CLOCK]),
    "call": Chat(
        messages=[
            said("system", "S"),
            said("user", "Weather?"),
            called(("abcdef123", "get_weather", _TOWN)),
            result("abcdef123", "get_weather", '{"t": 3}'),
            said("assistant", "3 °C"),
            said("user", "thanks"),
        ],
        tools=[WEATHER, CLOCK],
    ),
    "two calls": Chat(
        messages=[
            said("user", "Weather?"),
            called(("abcdef123", "get_weather", {"town": "A"}), ("abcdef124", "now", {}), content="I look."),
            result("abcdef123", "get_weather", "warm"),
            result("abcdef124", "now", "5 o'clock"),
        ],
        tools=[WEATHER, CLOCK],
    ),
    "thinking": Chat(messages=[said("user", "Hi")], variables={"enable_thinking": True}),
    "no thinking": Chat(messages=[said("user", "Hi")], tools=[WEATHER], variables={"enable_thinking": False}),
}


def plain_context(
    chat: Chat, *, text_arguments: bool = False, no_content: str | None = None
) -> dict[str, Any]:
    """What transformers would be given: arguments as objects or text, absent content as None or empty."""
    messages = []
    for message in chat.messages:
        each: dict[str, Any] = {"role": message.role}
        each["content"] = no_content if message.content is None else message.content
        each |= {"name": message.name} if message.name else {}
        each |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
        if message.tool_calls:
            each["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments if text_arguments else json.loads(call.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        messages.append(each)
    return {"messages": messages, "tools": chat.tools or None, **chat.variables}


class _Generation(ext.Extension):
    tags = {"generation"}  # noqa: RUF012 - as the library declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


def jinja2_text(source: str, context: Mapping[str, Any]) -> str:
    """What plain Jinja2 renders, with the settings of transformers, in this process."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source).render(context)
