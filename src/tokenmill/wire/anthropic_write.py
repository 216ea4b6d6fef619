"""Calls to requests of the Anthropic API: messages.

What that API has no place for is an error that names it, and nothing is left out silently.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from tokenmill.core import Message, SamplingParams
from tokenmill.wire.call import Call, ToolChoice
from tokenmill.wire.fields import FieldError, encode_json, schema_of

__all__ = ["write_anthropic_call"]

_PLAIN: Final = SamplingParams()
_KNOWN: Final = frozenset(("max_tokens", "temperature", "top_p", "top_k", "stop", "grammar"))
_MODES: Final = {"auto": "auto", "none": "none", "required": "any", "named": "tool"}
_SYSTEM: Final = ("system", "developer")


def write_anthropic_call(call: Call, *, with_sampling: bool = True) -> bytes:
    """The body of POST /v1/messages. Raises FieldError for what cannot be asked there.

    Without `with_sampling` temperature, `top_p` and `top_k` are left to the model: the newest take none.
    """
    _check(call)
    num_system = next((at for at, m in enumerate(call.messages) if m.role not in _SYSTEM), len(call.messages))
    system = [{"type": "text", "text": message.content} for message in call.messages[:num_system]]
    body: dict[str, Any] = {
        "model": call.model,
        "messages": _turns(call.messages[num_system:], num_system),
        "max_tokens": call.params.max_tokens,
        **_sampling(call.params, with_sampling),
    }
    if system:
        body["system"] = system[0]["text"] if len(system) == 1 else system
    if call.tools:
        body["tools"] = [_tool(tool) for tool in call.tools]
        body |= _choice(call.tool_choice)
    if call.stream:
        body["stream"] = True
    if call.tier == "fast":
        body["speed"] = "fast"
    if call.user:
        body["metadata"] = {"user_id": call.user}
    return encode_json(body)


def _check(call: Call) -> None:
    hint = "the Anthropic API has no such parameter: leave it out"
    if not call.is_chat:
        hint = "give a conversation, or use an endpoint with /v1/completions"
        raise FieldError("prompt", "the Anthropic API continues no plain text", hint=hint)
    for name in SamplingParams.__dataclass_fields__:
        if name not in _KNOWN and getattr(call.params, name) != getattr(_PLAIN, name):
            raise FieldError(name, "cannot be sent", hint=hint)
    for name, value in (("metadata", call.metadata), ("variables", call.variables)):
        if value:
            raise FieldError(name, "cannot be sent", hint=hint)
    if call.tier == "batch":
        raise FieldError("tier", f"the tier {call.tier} cannot be sent", hint=hint)
    if call.params.temperature > 1.0:
        raise FieldError(
            "temperature", f"temperature is {call.params.temperature:g}", hint="use 0 to 1 there"
        )


def _sampling(params: SamplingParams, with_sampling: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"temperature": params.temperature} if with_sampling else {}
    if with_sampling and params.top_p != 1.0:
        body["top_p"] = params.top_p
    if with_sampling and params.top_k:
        body["top_k"] = params.top_k
    if params.stop:
        body["stop_sequences"] = params.stop
    if params.grammar is not None:
        if params.grammar.kind != "json_schema":
            raise FieldError(
                "grammar", f"{params.grammar.kind} cannot be asked for", hint="use a JSON schema"
            )
        format_ = {"type": "json_schema", "schema": schema_of(params.grammar.source)}
        body["output_config"] = {"format": format_}
    return body


def _turns(messages: tuple[Message, ...], first: int) -> list[dict[str, Any]]:
    """Messages by turns of user and assistant; results of functions belong to the user's."""
    turns: list[dict[str, Any]] = []
    for at, message in enumerate(messages, start=first):
        role, content = _turn(message, f"messages[{at}]")
        if turns and turns[-1]["role"] == role == "user" and _has_result(turns[-1]):
            turns[-1]["content"] += content
        else:
            turns.append({"role": role, "content": content})
    for turn in turns:
        (first_block, *others) = turn["content"]
        if not others and first_block["type"] == "text":
            turn["content"] = first_block["text"]
    return turns


def _has_result(turn: Mapping[str, Any]) -> bool:
    """Whether what follows belongs to the same turn: so far it has only results."""
    return all(block["type"] == "tool_result" for block in turn["content"])


def _turn(message: Message, path: str) -> tuple[str, list[dict[str, Any]]]:
    if message.name and message.role != "tool":
        raise FieldError(f"{path}.name", "the Anthropic API has no names of speakers", hint="leave it out")
    text = [] if message.content is None else [{"type": "text", "text": message.content}]
    if message.role == "user":
        return "user", text
    if message.role == "assistant":
        calls = [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
            for call in message.tool_calls
        ]
        return "assistant", ([] if calls and not message.content else text) + calls
    if message.role == "tool":
        result = {"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content}
        return "user", [result]
    hint = "system messages come first; then user, assistant and tool"
    raise FieldError(f"{path}.role", f"role is {message.role[:40]!r}", hint=hint)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    result = {"name": function.get("name"), "input_schema": function.get("parameters", {"type": "object"})}
    for name in ("description", "strict"):
        if function.get(name) is not None:
            result[name] = function[name]
    return result


def _choice(choice: ToolChoice) -> dict[str, Any]:
    if choice == ToolChoice():
        return {}
    body: dict[str, Any] = {"type": _MODES[choice.mode]}
    if choice.name:
        body["name"] = choice.name
    if not choice.parallel:
        body["disable_parallel_tool_use"] = True
    return {"tool_choice": body}
