"""Requests and answers of all logs in one form: a body of chat completions, and a text.

What an answer does not depend on (the model's name, streaming, who asked) is left out of a request, so that
equal questions are equal rows. Pictures and sounds are refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenmill.core import UsageError
from tokenmill.workload.row import canonical_json

__all__ = ["DraftError", "answer_of_message", "answer_of_response", "canonical_calls", "clean_request"]

_LEFT_OUT: Final = frozenset(
    (
        *("model", "stream", "stream_options", "user", "metadata", "store", "n", "logprobs", "top_logprobs"),
        *("service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "prediction"),
        *("api_key", "api_base"),
    )
)
_ROLES: Final = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
_EMPTY: Final[tuple[object, ...]] = (None, [], {})


class DraftError(UsageError):
    """Why a line makes no row."""


def clean_request(body: object, messages: object = None) -> dict[str, Any]:
    """A body without what does not belong to the question; its contents are texts. Raises DraftError."""
    if not isinstance(body, Mapping):
        raise DraftError("the request is no object")
    given = body.get("messages") if messages is None else messages
    if given is None and "prompt" in body:
        raise DraftError("the request completes a raw text: it has a prompt, and no messages")
    if given is None and "input" in body:
        raise DraftError("the request is none for chat completions: it has input, and no messages")
    kept = {name: value for name, value in body.items() if name not in _LEFT_OUT and value not in _EMPTY}
    kept["messages"] = _messages(given)
    if "tools" in kept and not _is_list_of_objects(kept["tools"]):
        raise DraftError("the request's tools are no list of objects")
    return kept


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, Mapping) for each in value)


def _messages(given: object) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise DraftError("the request has no messages")
    messages = [_message(each, at) for at, each in enumerate(given)]
    if all(each["role"] in ("system", "developer") for each in messages):
        raise DraftError("nobody asks: the request has only system messages")
    return messages


def _message(given: object, at: int) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DraftError(f"messages[{at}] is no object")
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise DraftError(
            f"messages[{at}].role is {_shown(role)}, expected one of {', '.join(sorted(_ROLES))}"
        )
    content = _content(given.get("content"), f"messages[{at}].content")
    kept = {
        name: value
        for name, value in given.items()
        if name in ("name", "tool_call_id", "tool_calls", "function_call") and value not in _EMPTY
    }
    if "tool_calls" in kept and not _is_list_of_objects(kept["tool_calls"]):
        raise DraftError(f"messages[{at}].tool_calls is no list of objects")
    if content is None and not kept.keys() & {"tool_calls", "function_call"}:
        raise DraftError(f"messages[{at}] has no content")
    return {"role": role, "content": content, **kept}


def _content(value: object, place: str) -> str | None:
    """The text of a content, whose parts are joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DraftError(f"{place} is {_shown(value)}, expected text")
    texts = []
    for at, part in enumerate(value):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise DraftError(f"{place}[{at}] is {_shown(kind or part)}, and only text can be answered")
        texts.append(text)
    return "".join(texts)


def answer_of_message(message: object) -> str:
    """The text of an assistant's message, or its tool calls. Raises DraftError."""
    if not isinstance(message, Mapping):
        raise DraftError("the answer is no message")
    calls = message.get("tool_calls")
    if not calls and message.get("function_call"):
        calls = [{"function": message["function_call"]}]
    if calls:
        return canonical_calls(calls)
    text = _content(message.get("content"), "the answer's content")
    if message.get("refusal") and not text:
        raise DraftError("the answer is a refusal")
    if not text or not text.strip():
        raise DraftError("the answer is empty")
    return text


def canonical_calls(calls: object) -> str:
    """Tool calls as `[{"arguments":{...},"name":...}]` without their ids. Raises DraftError."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DraftError("the tool calls are no list")
    plain = []
    for each in calls:
        function = each.get("function") if isinstance(each, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DraftError("a tool call has no function with a name")
        plain.append({"name": function["name"], "arguments": _arguments(function.get("arguments"))})
    return canonical_json(plain)


def _arguments(value: object) -> object:
    """The arguments as values; a text that is no JSON stays as it is."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        return value


def answer_of_response(response: object) -> str:
    """The answer in a body of chat completions. Raises DraftError."""
    if isinstance(response, str) and response.strip():
        return response
    if isinstance(response, list):
        raise DraftError("the response is a list of events; put them together first")
    if not isinstance(response, Mapping):
        raise DraftError("there is no response")
    if response.get("error"):
        raise DraftError(f"the response is an error ({_said(response['error'])})")
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise DraftError("the response has no choices")
    choice = choices[0]
    if choice.get("finish_reason") == "content_filter":
        raise DraftError("the answer was held back by a content filter")
    if "message" not in choice and isinstance(choice.get("text"), str):
        return answer_of_message({"content": choice["text"]})
    return answer_of_message(choice.get("message"))


def _said(error: object) -> str:
    said = error.get("message") if isinstance(error, Mapping) else error
    return " ".join(str(said).split())[:120]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
