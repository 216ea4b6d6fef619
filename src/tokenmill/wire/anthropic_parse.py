"""Requests of the Anthropic API to calls: messages, read strictly.

The API's newest models take no `temperature`, `top_p` and `top_k`; here they are taken, as older ones did.
`cache_control` is accepted and means nothing: prefixes are cached anyway. A tool's result that `is_error`
says so in its text. Blocks that are no text, tool use or tool result are a `FieldError`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from tokenmill.core import Grammar, Message, SamplingParams, ToolCall
from tokenmill.wire.call import Call, ToolChoice
from tokenmill.wire.fields import FieldError, decode_request, encode_json, named_fields
from tokenmill.wire.parts import block_text, check_keys, filled, text_of, tool_name, whole_tool

__all__ = ["parse_anthropic_call"]

_CACHE: Final = ("cache_control",)
_NAMES: Final = {"stop": "stop_sequences", "a stop string": "stop_sequences", "grammar": "output_config"}
_ERROR_PREFIX: Final = "Error: "


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Message(_Strict, kw_only=True):
    role: str
    content: str | list[dict[str, Any]]


class _Tool(_Strict, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: str | None = None
    cache_control: dict[str, Any] | None = None


class _Choice(_Strict, kw_only=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Metadata(_Strict, kw_only=True):
    user_id: str | None = None


class _Format(_Strict, kw_only=True):
    type: str
    schema: dict[str, Any]


class _OutputConfig(_Strict, kw_only=True):
    format: _Format | None = None


class _Thinking(_Strict, kw_only=True):
    type: str


class _Request(_Strict, kw_only=True):
    model: str
    messages: list[_Message]
    max_tokens: int
    system: str | list[dict[str, Any]] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: _Metadata | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    output_config: _OutputConfig | None = None
    service_tier: str | None = None
    speed: str | None = None
    thinking: _Thinking | None = None
    cache_control: dict[str, Any] | None = None


def parse_anthropic_call(body: bytes, defaults: SamplingParams) -> Call:
    """The call in the body of POST /v1/messages. Raises FieldError.

    `defaults` are the parameters of a request that says nothing.
    """
    request = decode_request(body, _Request)
    if request.service_tier not in (None, "auto", "standard_only"):
        raise FieldError("service_tier", f"it is {request.service_tier[:40]!r}", hint="use auto")
    if request.speed not in (None, "standard", "fast"):
        raise FieldError("speed", f"it is {request.speed[:40]!r}", hint="use standard or fast")
    if request.thinking is not None and request.thinking.type != "disabled":
        raise FieldError("thinking.type", f"it is {request.thinking.type[:40]!r}", hint="use disabled")
    if request.temperature is not None and not 0.0 <= request.temperature <= 1.0:
        raise FieldError("temperature", f"it is {request.temperature:g}", hint="use a value from 0 to 1")
    if not request.messages:
        raise FieldError("messages", "is empty", hint="give at least one")
    given = {
        **{name: getattr(request, name) for name in ("max_tokens", "temperature", "top_p", "top_k")},
        "stop": None if request.stop_sequences is None else tuple(request.stop_sequences),
        "grammar": _grammar(request.output_config),
    }
    params = filled(defaults, given, _NAMES)
    tools = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(request.tools or ())]
    with named_fields({"model": "model", "tool_choice": "tool_choice"}):
        return Call(
            model=request.model,
            messages=tuple(_messages(request)),
            params=params,
            tools=tuple(tools),
            tool_choice=_choice(request.tool_choice, {tool["function"]["name"] for tool in tools}),
            stream=bool(request.stream),
            include_usage=bool(request.stream),
            tier="fast" if request.speed == "fast" else "standard",
            user=(request.metadata and request.metadata.user_id) or "",
        )


def _grammar(config: _OutputConfig | None) -> Grammar | None:
    if config is None or config.format is None:
        return None
    if config.format.type != "json_schema":
        hint = "use json_schema"
        raise FieldError("output_config.format.type", f"it is {config.format.type[:40]!r}", hint=hint)
    with named_fields({}, "output_config.format.schema"):
        return Grammar(kind="json_schema", source=encode_json(config.format.schema).decode())


def _messages(request: _Request) -> Iterator[Message]:
    if request.system:
        yield Message(role="system", content=text_of(request.system, "system", _CACHE))
    for at, message in enumerate(request.messages):
        path = f"messages[{at}]"
        content = message.content
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not blocks:
            raise FieldError(f"{path}.content", "is empty", hint="give at least one block")
        with named_fields({}, path):
            if message.role == "user":
                yield from _user(blocks, f"{path}.content")
            elif message.role == "assistant":
                yield _assistant(blocks, f"{path}.content")
            else:
                hint = "use user or assistant; `system` is a field of its own"
                raise FieldError(f"{path}.role", f"it is {message.role[:40]!r}", hint=hint)


def _user(blocks: list[dict[str, Any]], path: str) -> Iterator[Message]:
    """Results of functions, each a message of its own, and then what the user says."""
    texts: list[str] = []
    for at, block in enumerate(blocks):
        here = f"{path}[{at}]"
        if block.get("type") != "tool_result":
            texts.append(block_text(block, here, _CACHE))
        elif texts:
            raise FieldError(here, "a tool_result stands after text", hint="put all results first")
        else:
            yield _result(block, here)
    if texts:
        yield Message(role="user", content="".join(texts))


def _result(block: Mapping[str, Any], path: str) -> Message:
    check_keys(block, path, ("type", "tool_use_id", "content", "is_error", *_CACHE))
    name, content, is_error = block.get("tool_use_id"), block.get("content"), block.get("is_error")
    if not isinstance(name, str) or not name:
        raise FieldError(f"{path}.tool_use_id", "is no id", hint="give the id of the tool_use")
    if is_error not in (None, True, False):
        raise FieldError(f"{path}.is_error", "is neither true nor false")
    if not _is_content(content):
        raise FieldError(f"{path}.content", "is neither text nor blocks")
    text = text_of(content, f"{path}.content", _CACHE)
    return Message(role="tool", tool_call_id=name, content=_ERROR_PREFIX + text if is_error else text)


def _is_content(content: object) -> bool:
    if isinstance(content, list):
        return all(isinstance(block, dict) for block in content)
    return content is None or isinstance(content, str)


def _assistant(blocks: list[dict[str, Any]], path: str) -> Message:
    texts: list[str] = []
    calls: list[ToolCall] = []
    for at, block in enumerate(blocks):
        here = f"{path}[{at}]"
        if block.get("type") == "tool_use":
            calls.append(_tool_use(block, here))
        elif calls:
            raise FieldError(here, "text stands after a tool_use", hint="put the text first")
        else:
            texts.append(block_text(block, here, ("citations", *_CACHE)))
            if block.get("citations"):
                raise FieldError(f"{here}.citations", "citations are not supported", hint="leave them out")
    return Message(role="assistant", content="".join(texts) if texts else None, tool_calls=tuple(calls))


def _tool_use(block: Mapping[str, Any], path: str) -> ToolCall:
    check_keys(block, path, ("type", "id", "name", "input", "caller", *_CACHE))
    for name, kind in (("id", str), ("name", str), ("input", dict)):
        if not isinstance(block.get(name), kind):
            raise FieldError(f"{path}.{name}", "is missing, or of another type")
    return ToolCall(id=block["id"], name=block["name"], arguments=encode_json(block["input"]).decode())


def _tool(tool: _Tool, path: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise FieldError(f"{path}.type", f"it is {tool.type[:40]!r}", hint="only tools of your own, `custom`")
    return whole_tool(tool_name(tool.name, f"{path}.name"), tool.description, tool.input_schema, tool.strict)


def _choice(choice: _Choice | None, names: set[str]) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool" and choice.name in names:
        return ToolChoice(mode="named", name=choice.name or "", parallel=parallel)
    if choice.name is not None or choice.type not in ("auto", "any", "none"):
        hint = 'use auto, any, none, or {"type": "tool", "name": one of tools}'
        raise FieldError("tool_choice", "it cannot be used", hint=hint)
    if choice.type == "any":
        return ToolChoice(mode="required", parallel=parallel)
    return ToolChoice(mode="none" if choice.type == "none" else "auto", parallel=parallel)
