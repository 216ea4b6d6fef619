"""What the checks of the official `openai` client share: requests in a word, and the errors they raise."""

import functools
import json
from typing import Any, Final

import openai
import pytest

from tests.server.openai_server import ANSWERS

SCHEMA: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Final = {
    "type": "function",
    "function": {"name": "weather", "description": "How it is", "parameters": SCHEMA},
}


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def ask(client: Any, text: str, *, before: Any = (), **fields: Any) -> Any:
    """A chat answer."""
    return client.chat.completions.create(**{"model": "mock", "messages": [*before, *user(text)], **fields})


def text_of(answer: Any) -> str:
    """The text of the first choice."""
    text: str = answer.choices[0].message.content
    return text


def stream(client: Any, text: str, **fields: Any) -> list[Any]:
    """The chunks of a streamed chat answer."""
    if text in ANSWERS:
        return _streamed(client, text, json.dumps(fields))
    return list(ask(client, text, stream=True, **fields))


@functools.cache
def _streamed(client: Any, text: str, fields: str) -> list[Any]:
    """Several checks look at one stream, for what the mock says to this is always the same."""
    return list(ask(client, text, stream=True, **json.loads(fields)))


def complete(client: Any, prompt: Any, **fields: Any) -> Any:
    """A continued text."""
    return client.completions.create(**{"model": "mock", "prompt": prompt, **fields})


def error(client: Any, **fields: Any) -> Any:
    """The error that a chat request raises. Fields are sent as they are, whatever the client's types say."""
    body = {"messages": user("Hi"), **fields}
    extra = {**body.pop("extra_body", {}), **body}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=extra.pop("model", "mock"), messages=[], extra_body=extra)
    return caught.value
