"""POST /v1/responses: the body to a call, and to what the answer repeats of it. Read strictly.

Nothing is stored, so `previous_response_id`, `conversation`, `background` and `store: true` are refused, and
`store` is told as false. Of tools only functions are known. Items of the conversation are `responses_items`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from tokenmill.core import Grammar, Message, SamplingParams
from tokenmill.wire.call import Call, ToolChoice
from tokenmill.wire.fields import FieldError, decode_request, encode_json, named_fields
from tokenmill.wire.openai_parse import check_temperature, check_tools, tier_of, tool_choice_of
from tokenmill.wire.parts import filled, tool_name, whole_tool
from tokenmill.wire.responses_items import read_items

__all__ = ["RESPONSE_REQUEST", "ResponseEcho", "parse_response"]

_INCLUDABLE: Final = ("message.output_text.logprobs",)


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class _Format(_Strict):
    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class _Text(_Strict):
    format: _Format | None = None
    verbosity: Literal["medium"] | None = None


class _Tool(_Strict):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _StreamOptions(_Strict):
    include_obfuscation: Literal[False] | None = None


class _Request(_Strict):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    text: _Text | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    service_tier: str | None = None
    truncation: str | None = None
    store: bool | None = None
    background: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: None = None
    conversation: None = None
    max_tool_calls: None = None
    prompt: None = None
    prompt_cache_retention: None = None
    reasoning: None = None
    context_management: None = None
    moderation: None = None


@dataclass(frozen=True, kw_only=True)
class ResponseEcho:
    """The fields of a request that its answer repeats, by their names there."""

    fields: Mapping[str, Any]
    with_logprobs: bool = False


def parse_response(body: bytes, defaults: SamplingParams) -> tuple[Call, ResponseEcho]:
    """The call in the body, and what its answer repeats. Raises FieldError."""
    request = decode_request(body, _Request)
    _check(request)
    params = _params(request, defaults)
    messages = read_items(request.input)
    if request.instructions:
        messages = (Message(role="system", content=request.instructions), *messages)
    tools = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(request.tools or ())]
    check_tools([tool["function"]["name"] for tool in tools])
    with named_fields({"model": "model", "tool_choice": "tool_choice", "messages": "input"}):
        call = Call(
            model=request.model,
            messages=messages,
            params=params,
            tools=tuple(tools),
            tool_choice=_tool_choice(request, {tool["function"]["name"] for tool in tools}),
            stream=bool(request.stream),
            tier=tier_of(request.service_tier),
            user=request.user or request.safety_identifier or "",
            metadata=request.metadata or {},
        )
    return call, ResponseEcho(fields=_echo(request), with_logprobs=params.logprobs is not None)


def _check(request: _Request) -> None:
    """Raise FieldError for what is known and not done here."""
    for name in ("store", "background"):
        if getattr(request, name):
            raise FieldError(name, "nothing is stored", hint="leave it out, and send the conversation whole")
    if request.truncation not in (None, "disabled"):
        raise FieldError("truncation", f"it is {request.truncation[:40]!r}", hint="use disabled")
    for at, name in enumerate(request.include or ()):
        if name not in _INCLUDABLE:
            raise FieldError(f"include[{at}]", f"it is {name[:60]!r}", hint=f"use {', '.join(_INCLUDABLE)}")
    if request.stream_options is not None and not request.stream:
        raise FieldError("stream_options", "is for streams", hint='"stream": true')
    check_temperature(request.temperature)


def _params(request: _Request, defaults: SamplingParams) -> SamplingParams:
    wants = request.top_logprobs is not None or bool(request.include)
    given = {
        "max_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "logprobs": (request.top_logprobs or 0) if wants else None,
        "grammar": _grammar(request.text.format if request.text else None),
    }
    names = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs", "grammar": "text.format"}
    return filled(defaults, given, names)


def _grammar(format_: _Format | None) -> Grammar | None:
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return Grammar(kind="json_object")
    if format_.type != "json_schema":
        hint = "use text, json_object or json_schema"
        raise FieldError("text.format.type", f"it is {format_.type[:40]!r}", hint=hint)
    if format_.schema is None or not format_.name:
        missing = "schema" if format_.schema is None else "name"
        raise FieldError(f"text.format.{missing}", "is missing", hint="give name and schema")
    with named_fields({}, "text.format.schema"):
        return Grammar(kind="json_schema", source=encode_json(format_.schema).decode())


def _tool(raw: dict[str, Any], path: str) -> dict[str, Any]:
    kind = raw.get("type")
    if kind != "function":
        raise FieldError(
            f"{path}.type", f"it is {str(kind)[:40]!r}", hint="only functions can be called here"
        )
    try:
        tool = msgspec.convert(raw, _Tool)
    except msgspec.ValidationError as error:
        raise FieldError(path, str(error), hint="give type, name, description, parameters, strict") from None
    name = tool_name(tool.name, f"{path}.name")
    return whole_tool(name, tool.description, tool.parameters, tool.strict)


def _tool_choice(request: _Request, names: set[str]) -> ToolChoice:
    choice = request.tool_choice
    name = choice.get("name") if isinstance(choice, dict) and choice.get("type") == "function" else None
    example = '{"type": "function", "name": one of tools}'
    return tool_choice_of(choice, name, names, parallel=request.parallel_tool_calls, example=example)


def _echo(request: _Request) -> dict[str, Any]:
    """What the answer repeats, with the values of what was left out."""
    text = request.text.format if request.text else None
    format_ = {"type": "text"} if text is None else _given(text)
    tools = [{"description": None, "parameters": None, "strict": None} | tool for tool in request.tools or ()]
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": format_, "verbosity": "medium"},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": tools,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


def _given(format_: _Format) -> dict[str, Any]:
    found = {name: getattr(format_, name) for name in ("type", "name", "schema", "description", "strict")}
    return {name: value for name, value in found.items() if value is not None}


RESPONSE_REQUEST: Final = _Request
"""The type of a body of POST /v1/responses, for the OpenAPI document."""
