"""Requests of the checks of the Anthropic API: what the server must understand, and what it must refuse."""

import json
import re
from collections.abc import Callable
from typing import Any, Final

from tests.server.anthropic_server import THREE

USER: Final = [{"role": "user", "content": "Count."}]
SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Final = {"name": "weather", "description": "d", "input_schema": SCHEMA}
OTHER: Final = {"name": "time.of-day", "input_schema": {"type": "object"}}
CACHE: Final = {"type": "ephemeral"}
USED: Final = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
LONG_CACHE: Final = {"type": "text", "text": "x", "cache_control": {**CACHE, "ttl": "1h"}}
NOWHERE: Final = ["nowhere", "STOP"]


WHOLE: Final[dict[str, Callable[[Any], bool]]] = {
    "id begins with msg_": lambda m: re.fullmatch(r"msg_[0-9a-f]{24}", m.id) is not None,
    "type is message": lambda m: m.type == "message",
    "role is assistant": lambda m: m.role == "assistant",
    "model is the one asked": lambda m: m.model == "mock",
    "one block": lambda m: len(m.content) == 1,
    "block is text": lambda m: m.content[0].type == "text",
    "text is whole": lambda m: m.content[0].text == THREE,
    "stop reason is end_turn": lambda m: m.stop_reason == "end_turn",
    "no stop sequence": lambda m: m.stop_sequence is None,
    "input tokens are exact": lambda m: input_of(m) == len(b"<user>Count.<assistant>"),
    "output tokens are exact": lambda m: m.usage.output_tokens == len(THREE) + 1,
    "no cache was written": lambda m: m.usage.cache_creation_input_tokens == 0,
    "cache reads are a count": lambda m: m.usage.cache_read_input_tokens >= 0,
    "service tier is standard": lambda m: m.usage.service_tier == "standard",
    "speed is standard": lambda m: m.usage.speed == "standard",
    "request id is at hand": lambda m: m._request_id.startswith("req_"),
    "message and request have one id": lambda m: m.id[4:] == m._request_id[4:],
}


def input_of(message: Any) -> int:
    """All tokens of the prompt."""
    usage = message.usage
    return int(usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens)


ENDS: Final[dict[str, tuple[dict[str, Any], str, str | None, str]]] = {
    "at its end": ({}, "end_turn", None, THREE),
    "at max_tokens": ({"max_tokens": 3}, "max_tokens", None, "one"),
    "at a stop sequence": ({"stop_sequences": ["END"]}, "stop_sequence", "END", "one "),
    "at the first of two": ({"stop_sequences": ["STOP", "END"]}, "stop_sequence", "END", "one "),
    "at the one that comes": ({"stop_sequences": NOWHERE}, "stop_sequence", "STOP", "one END two "),
    "at the longer of two": ({"stop_sequences": ["D", "END"]}, "stop_sequence", "END", "one "),
    "past one that never comes": ({"stop_sequences": ["nowhere"]}, "end_turn", None, THREE),
}  # fmt: skip


ASKED: Final[dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]]] = {
    "system as a string": (
        {"system": "Be kind."},
        lambda c: c["messages"][0]["role"] == "system" and c["messages"][0]["content"] == "Be kind.",
    ),
    "system as blocks": (
        {"system": [{"type": "text", "text": "a", "cache_control": CACHE}, {"type": "text", "text": "b"}]},
        lambda c: c["messages"][0]["content"] == "ab",
    ),
    "content as blocks": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2}]},
        lambda c: c["messages"][0]["content"] == "xx",
    ),
    "turns in order": (
        {"messages": [*USER, {"role": "assistant", "content": "a"}, *USER]},
        lambda c: [m["role"] for m in c["messages"]] == ["user", "assistant", "user"],
    ),
    "two user turns": ({"messages": USER * 2}, lambda c: len(c["messages"]) == 2),
    "cache_control of the request": ({"cache_control": CACHE}, lambda c: c["model"] == "echo"),
    "cache_control with ttl": (
        {"messages": [{"role": "user", "content": [LONG_CACHE]}]},
        lambda c: c["messages"][0]["content"] == "x",
    ),
    "cache_control of a tool": ({"tools": [{**TOOL, "cache_control": CACHE}]}, lambda c: c["tools"] != []),
    "max_tokens": ({"max_tokens": 7}, lambda c: c["params"]["max_tokens"] == 7),
    "temperature": ({"extra_body": {"temperature": 0.25}}, lambda c: c["params"]["temperature"] == 0.25),
    "temperature is 1 if not said": ({}, lambda c: c["params"]["temperature"] == 1.0),
    "top_p": ({"extra_body": {"top_p": 0.5}}, lambda c: c["params"]["top_p"] == 0.5),
    "top_k": ({"extra_body": {"top_k": 3}}, lambda c: c["params"]["top_k"] == 3),
    "stop_sequences": ({"stop_sequences": ["a", "b"]}, lambda c: c["params"]["stop"] == ["a", "b"]),
    "metadata.user_id": ({"metadata": {"user_id": "u-1"}}, lambda c: c["user"] == "u-1"),
    "metadata without a user": ({"metadata": {"user_id": None}}, lambda c: c["user"] == ""),
    "service_tier auto": ({"service_tier": "auto"}, lambda c: c["tier"] is None),
    "service_tier standard_only": ({"service_tier": "standard_only"}, lambda c: c["tier"] is None),
    "speed fast": ({"speed": "fast"}, lambda c: c["tier"] == "fast"),
    "thinking disabled": ({"thinking": {"type": "disabled"}}, lambda c: c["model"] == "echo"),
    "anthropic-beta is passed over": (
        {"extra_headers": {"anthropic-beta": "x-2026-01-01"}},
        lambda c: c["model"] == "echo",
    ),
    "output_config json_schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        lambda c: json.loads(c["params"]["grammar"]["source"]) == SCHEMA,
    ),
    "tool_choice auto": (
        {"tools": [TOOL], "tool_choice": {"type": "auto"}},
        lambda c: c["tool_choice"] == {"mode": "auto", "name": "", "parallel": True},
    ),
    "tool_choice any": (
        {"tools": [TOOL], "tool_choice": {"type": "any"}},
        lambda c: c["tool_choice"]["mode"] == "required",
    ),
    "tool_choice tool": (
        {"tools": [OTHER, TOOL], "tool_choice": {"type": "tool", "name": "weather"}},
        lambda c: c["tool_choice"]["name"] == "weather",
    ),
    "tool_choice none": (
        {"tools": [TOOL], "tool_choice": {"type": "none"}},
        lambda c: c["tool_choice"]["mode"] == "none",
    ),
    "disable_parallel_tool_use": (
        {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        lambda c: c["tool_choice"]["parallel"] is False,
    ),
    "a tool's schema": ({"tools": [TOOL]}, lambda c: c["tools"][0]["function"]["parameters"] == SCHEMA),
    "a tool's description": ({"tools": [TOOL]}, lambda c: c["tools"][0]["function"]["description"] == "d"),
    "a strict custom tool": (
        {"tools": [{**TOOL, "type": "custom", "strict": True}]},
        lambda c: c["tools"][0]["function"]["strict"] is True,
    ),
    "thoughts of earlier answers are left out": (
        {"messages": [*USER, {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"},
            {"type": "redacted_thinking", "data": "d"}, {"type": "text", "text": "a"}]}, *USER]},
        lambda c: c["messages"][1]["content"] == "a",
    ),
    "an error of a tool": (
        {"messages": [*USER,
            {"role": "assistant", "content": [USED]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": "no", "is_error": True}]}]},
        lambda c: c["messages"][2]["content"] == "Error: no" and c["messages"][2]["tool_call_id"] == "t",
    ),
    "a call's input comes back": (
        {"messages": [*USER,
            {"role": "assistant", "content": [USED]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
        lambda c: json.loads(c["messages"][1]["tool_calls"][0]["arguments"]) == {"a": 1},
    ),
}  # fmt: skip


WRONG: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens below": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens above": ({"max_tokens": (1 << 20) + 1}, "max_tokens"),
    "max_tokens beyond 64 bits": ({"max_tokens": 10**30}, "max_tokens"),
    "max_tokens as text": ({"max_tokens": "5"}, "max_tokens"),
    "max_tokens as a fraction": ({"max_tokens": 1.5}, "max_tokens"),
    "max_tokens null": ({"max_tokens": None}, "max_tokens"),
    "temperature above": ({"extra_body": {"temperature": 1.1}}, "temperature"),
    "temperature below": ({"extra_body": {"temperature": -0.1}}, "temperature"),
    "top_p 0": ({"extra_body": {"top_p": 0}}, "top_p"),
    "top_p above": ({"extra_body": {"top_p": 1.1}}, "top_p"),
    "top_k below": ({"extra_body": {"top_k": -1}}, "top_k"),
    "top_k above": ({"extra_body": {"top_k": 1 << 31}}, "top_k"),
    "an empty stop sequence": ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
    "17 stop sequences": ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
    "a long stop sequence": ({"stop_sequences": ["a" * 257]}, "stop_sequences[0]"),
    "no messages": ({"messages": []}, "messages"),
    "an empty content": ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    "a role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    "an answer begun": ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, "messages"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "messages[0].content[0].type",
    ),
    "an unknown field": ({"extra_body": {"mcp_servers": []}}, "mcp_servers"),
    "an unknown field below": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "bold": True}]}]},
        "messages[0].content[0].bold",
    ),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    "a service tier": ({"service_tier": "priority"}, "service_tier"),
    "a speed": ({"extra_body": {"speed": "slow"}}, "speed"),
    "a tool of the provider's": (
        {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        "tools[0]",
    ),
    "a tool's name": ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
    "a tool without a schema": ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    "129 tools": ({"tools": [TOOL] * 129}, "tools"),
    "a choice of a tool that is not there": (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}},
        "tool_choice",
    ),
    "a choice without tools": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "a result after text": (
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "x"}, {"type": "tool_result", "tool_use_id": "t"}]}]},
        "messages[0].content[1]",
    ),
    "a prompt beyond the context": (
        {"messages": [{"role": "user", "content": "x" * 1024}]},
        "messages",
    ),
    "a cache_control": (
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "x", "cache_control": {"type": "for ever"}}]}]},
        "messages[0].content[0].cache_control.type",
    ),
    "a long user_id": ({"metadata": {"user_id": "x" * 513}}, "metadata.user_id"),
    "an empty model": ({"model": ""}, "model"),
}  # fmt: skip


STATUSES: Final[dict[str, tuple[str, str, int, str]]] = {
    "no such key": ("tm_nobody", "mock", 401, "authentication_error"),
    "a key that has expired": ("tm_expired", "mock", 401, "authentication_error"),
    "a key without the scope": ("tm_scopeless", "mock", 403, "permission_error"),
    "a budget that is spent": ("tm_poor", "mock", 402, "billing_error"),
    "a model that is not served": ("tm_good", "nothing", 404, "not_found_error"),
    "a queue that is full": ("tm_good", "full", 529, "overloaded_error"),
    "a time that is up": ("tm_good", "late", 504, "timeout_error"),
    "an upstream that is gone": ("tm_good", "gone", 502, "api_error"),
    "an engine that broke": ("tm_good", "broken", 500, "api_error"),
}
