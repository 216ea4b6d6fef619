"""Requests of the Anthropic API to calls: messages and the counting of their tokens, read strictly.

The API's newest models take no `temperature`, `top_p` and `top_k`; here they are taken, as older ones did.
A tool's result that `is_error` says so in its text. Thoughts of earlier answers are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from tokenmill.core import Grammar, Message, SamplingParams, ToolCall
from tokenmill.wire.anthropic_types import (
    AssistantMessage,
    CountTokensRequest,
    MessagesRequest,
    OutputConfig,
    PlainText,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolChoiceBody,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)
from tokenmill.wire.call import Call, ToolChoice
from tokenmill.wire.fields import FieldError, decode_request, encode_json, named_fields
from tokenmill.wire.parts import filled, tool_name, whole_tool

__all__ = ["parse_anthropic_call", "parse_anthropic_count"]

_NAMES: Final = {"stop": "stop_sequences", "a stop string": "stop_sequences", "grammar": "output_config"}
_ERROR_PREFIX: Final = "Error: "
_HINT: Final = "see docs/api-anthropic.md for what can be asked"


def parse_anthropic_call(body: bytes, defaults: SamplingParams) -> Call:
    """The call in the body of POST /v1/messages. Raises FieldError.

    `defaults` are the parameters of a request that says nothing.
    """
    request = decode_request(body, MessagesRequest, hint=_HINT)
    given = {
        **{name: getattr(request, name) for name in ("max_tokens", "temperature", "top_p", "top_k")},
        "stop": None if request.stop_sequences is None else tuple(request.stop_sequences),
        "grammar": _grammar(request.output_config),
    }
    call = _call(request, filled(defaults, given, _NAMES))
    return replace(
        call,
        stream=bool(request.stream),
        include_usage=bool(request.stream),
        tier="fast" if request.speed == "fast" else None,
        user=(request.metadata and request.metadata.user_id) or "",
    )


def parse_anthropic_count(body: bytes) -> Call:
    """The call whose prompt is to be counted, in the body of POST /v1/messages/count_tokens."""
    request = decode_request(body, CountTokensRequest, hint=_HINT)
    return _call(request, SamplingParams(max_tokens=1))


def _call(request: CountTokensRequest, params: SamplingParams) -> Call:
    """What both kinds of request have."""
    tools = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(request.tools or ())]
    with named_fields({"model": "model", "tool_choice": "tool_choice"}):
        return Call(
            model=request.model,
            messages=tuple(_messages(request)),
            params=params,
            tools=tuple(tools),
            tool_choice=_choice(request.tool_choice, {tool["function"]["name"] for tool in tools}),
        )


def _grammar(config: OutputConfig | None) -> Grammar | None:
    if config is None or config.format is None:
        return None
    with named_fields({}, "output_config.format.schema"):
        return Grammar(kind="json_schema", source=encode_json(config.format.schema).decode())


def _messages(request: CountTokensRequest) -> Iterator[Message]:
    if request.system:
        yield Message(role="system", content=_text(request.system))
    for at, message in enumerate(request.messages):
        path = f"messages[{at}]"
        with named_fields({}, path):
            if isinstance(message, UserMessage):
                yield from _user(message, f"{path}.content")
            else:
                yield _assistant(message, f"{path}.content")


def _user(message: UserMessage, path: str) -> Iterator[Message]:
    """Results of functions, each a message of its own, and then what the user says."""
    if isinstance(message.content, str):
        yield Message(role="user", content=message.content)
        return
    texts: list[str] = []
    for at, block in enumerate(message.content):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif texts:
            raise FieldError(f"{path}[{at}]", "a tool_result stands after text", hint="put all results first")
        else:
            yield _result(block)
    if texts:
        yield Message(role="user", content="".join(texts))


def _result(block: ToolResultBlock) -> Message:
    text = _text(block.content)
    return Message(
        role="tool",
        tool_call_id=block.tool_use_id,
        content=_ERROR_PREFIX + text if block.is_error else text,
    )


def _assistant(message: AssistantMessage, path: str) -> Message:
    if isinstance(message.content, str):
        return Message(role="assistant", content=message.content)
    texts: list[str] = []
    calls: list[ToolCall] = []
    for at, block in enumerate(message.content):
        if isinstance(block, ToolUseBlock):
            name = tool_name(block.name, f"{path}[{at}].name")
            calls.append(ToolCall(id=block.id, name=name, arguments=encode_json(block.input).decode()))
        elif isinstance(block, ThinkingBlock | RedactedThinkingBlock):
            continue
        elif calls:
            raise FieldError(f"{path}[{at}]", "text stands after a tool_use", hint="put the text first")
        else:
            texts.append(block.text)
    content = "".join(texts) if texts or not calls else None
    return Message(role="assistant", content=content, tool_calls=tuple(calls))


def _text(content: str | Sequence[PlainText] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text for block in content)


def _tool(tool: Tool, path: str) -> dict[str, Any]:
    name = tool_name(tool.name, f"{path}.name")
    return whole_tool(name, tool.description, tool.input_schema, tool.strict)


def _choice(choice: ToolChoiceBody | None, names: set[str]) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool" and choice.name in names:
        return ToolChoice(mode="named", name=choice.name or "", parallel=parallel)
    if choice.name is not None or choice.type == "tool":
        hint = 'use auto, any, none, or {"type": "tool", "name": one of tools}'
        raise FieldError("tool_choice", "it cannot be used", hint=hint)
    if choice.type == "any":
        return ToolChoice(mode="required", parallel=parallel)
    return ToolChoice(mode="none" if choice.type == "none" else "auto", parallel=parallel)
