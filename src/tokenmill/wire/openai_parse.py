"""Requests of the OpenAI API to calls: chat completions and completions, read strictly.

What is not supported is not passed over: an unknown field, a part that is no text and a value outside its
range are a `FieldError`. Parameters that OpenAI does not have are those that vLLM has, under its names.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, Final, Literal

import msgspec

from tokenmill.core import Grammar, Message, SamplingParams, Tier, ToolCall, UsageError
from tokenmill.wire.call import Call, Prompt, ToolChoice
from tokenmill.wire.fields import FieldError, decode_request, encode_json, named_fields
from tokenmill.wire.parts import arguments_text, filled, text_of, tool_name, whole_tool

__all__ = [
    "CHAT_REQUEST",
    "COMPLETION_REQUEST",
    "check_temperature",
    "check_tools",
    "parse_openai_chat",
    "parse_openai_completion",
    "tier_of",
    "told_call",
    "tool_choice_of",
]

_TIERS: Final[dict[str, Tier | None]] = {
    "auto": None,
    "default": None,
    "flex": "batch",
    "priority": "fast",
    "fast": "fast",
    "standard": "standard",
    "batch": "batch",
}
"""OpenAI's names and ours; None is the tier that the key has first."""

_MAX_TEMPERATURE: Final = 2.0
_MAX_TOOLS: Final = 128
_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_SAMPLING: Final = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "ignore_eos",
    "prompt_logprobs",
)


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Function(_Strict, kw_only=True):
    name: str
    arguments: str | dict[str, Any]


class _ToolCall(_Strict, kw_only=True):
    id: str = ""
    type: str = "function"
    function: _Function
    index: int | None = None


class _Message(_Strict, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class _ToolFunction(_Strict, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(_Strict, kw_only=True):
    type: str
    function: _ToolFunction


class _StreamOptions(_Strict, kw_only=True):
    """`continuous_usage_stats` is vLLM's; load generators send it. The counts come once all the same."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Schema(_Strict, kw_only=True):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class _Format(_Strict, kw_only=True):
    type: str
    json_schema: _Schema | None = None


class _Structured(_Strict, kw_only=True):
    json: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None


class _Request(_Strict, kw_only=True):
    """What both kinds of request have."""

    model: str
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    response_format: _Format | None = None
    structured_outputs: _Structured | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_retention: None = None


class _ChatRequest(_Request, kw_only=True):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    store: bool | None = None
    audio: None = None
    functions: None = None
    function_call: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    moderation: None = None


class _CompletionRequest(_Request, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None


def parse_openai_chat(body: bytes, defaults: SamplingParams) -> Call:
    """The call in the body of POST /v1/chat/completions. Raises FieldError.

    `defaults` are the parameters of a request that says nothing.
    """
    request = decode_request(body, _ChatRequest)
    if request.store:
        raise FieldError("store", "nothing is stored", hint="leave it out")
    if request.modalities not in (None, ["text"]):
        raise FieldError("modalities", "only text can be asked for", hint='use ["text"]')
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise FieldError("max_tokens", "differs from max_completion_tokens", hint="give the latter alone")
    if request.top_logprobs is not None and not request.logprobs:
        raise FieldError("top_logprobs", "needs logprobs", hint='"logprobs": true')
    given = {
        **_sampling(request),
        "max_tokens": limits.pop() if limits else None,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }
    limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    params = filled(defaults, given, {"max_tokens": limit, "logprobs": "top_logprobs"})
    if not request.messages:
        raise FieldError("messages", "is empty", hint="give at least one")
    tools = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(request.tools or ())]
    check_tools([tool["function"]["name"] for tool in tools])
    with named_fields({"model": "model", "tool_choice": "tool_choice", "tools": "tools"}):
        return Call(
            **_envelope(request),
            params=params,
            messages=tuple(_message(each, f"messages[{at}]") for at, each in enumerate(request.messages)),
            tools=tuple(tools),
            tool_choice=_tool_choice(request, {tool["function"]["name"] for tool in tools}),
            variables=request.chat_template_kwargs or {},
        )


def parse_openai_completion(body: bytes, defaults: SamplingParams) -> Call:
    """The call in the body of POST /v1/completions; the rest as of `parse_openai_chat`."""
    request = decode_request(body, _CompletionRequest)
    if request.best_of not in (None, request.n or 1):
        raise FieldError("best_of", "the best of several is not chosen here", hint="use n")
    params = filled(defaults, {**_sampling(request), "logprobs": request.logprobs})
    with named_fields({"model": "model"}, "prompt"):
        return Call(
            **_envelope(request), params=params, prompts=_prompts(request.prompt), echo=bool(request.echo)
        )


def _sampling(request: _Request) -> dict[str, Any]:
    """Parameters by our names; None where they are not given."""
    check_temperature(request.temperature)
    stop = (request.stop,) if isinstance(request.stop, str) else request.stop
    lists = {"stop": stop, "stop_token_ids": request.stop_token_ids, "bad_words": request.bad_words}
    return {
        **{name: getattr(request, name) for name in _SAMPLING},
        **{name: None if value is None else tuple(value) for name, value in lists.items()},
        "logit_bias": None if request.logit_bias is None else tuple(request.logit_bias.items()),
        "grammar": _grammar(request),
    }


def _grammar(request: _Request) -> Grammar | None:
    format_, structured = request.response_format, request.structured_outputs
    found: list[Grammar] = []
    with named_fields({}, "response_format"):
        if format_ is not None and format_.type != "text":
            found.append(_format_grammar(format_))
    with named_fields({}, "structured_outputs"):
        if structured is not None:
            if structured.json is not None:
                found.append(Grammar(kind="json_schema", source=encode_json(structured.json).decode()))
            if structured.regex is not None:
                found.append(Grammar(kind="regex", source=structured.regex))
            if structured.grammar is not None:
                found.append(Grammar(kind="lark", source=structured.grammar))
            if len(found) != 1:
                raise FieldError(
                    "structured_outputs", f"{len(found)} formats are asked for", hint="ask for one"
                )
    return found[0] if found else None


def _format_grammar(format_: _Format) -> Grammar:
    if format_.type == "json_object":
        return Grammar(kind="json_object")
    if format_.type != "json_schema":
        hint = "use text, json_object or json_schema"
        raise FieldError("response_format.type", f"it is {format_.type[:40]!r}", hint=hint)
    if format_.json_schema is None or format_.json_schema.schema is None:
        raise FieldError("response_format.json_schema", "has no schema", hint='give {"name", "schema"}')
    return Grammar(kind="json_schema", source=encode_json(format_.json_schema.schema).decode())


def tier_of(name: str | None) -> Tier | None:
    """The tier that a `service_tier` means; None: the one that the key has first. Raises FieldError."""
    if name is not None and name not in _TIERS:
        raise FieldError("service_tier", f"it is {name[:40]!r}", hint=f"use one of {', '.join(_TIERS)}")
    return _TIERS[name or "auto"]


def check_temperature(value: float | None) -> None:
    """Raise FieldError for one above what OpenAI takes."""
    if value is not None and value > _MAX_TEMPERATURE:
        raise FieldError("temperature", f"is {value}", hint=f"use a value from 0 to {_MAX_TEMPERATURE:g}")


def _envelope(request: _Request) -> dict[str, Any]:
    if request.stream_options is not None and not request.stream:
        raise FieldError("stream_options", "is for streams", hint='"stream": true')
    options = request.stream_options or _StreamOptions()
    return {
        "model": request.model,
        "stream": bool(request.stream),
        "include_usage": bool(options.include_usage),
        "tier": tier_of(request.service_tier),
        "user": request.user or request.safety_identifier or "",
        "metadata": request.metadata or {},
    }


def _message(message: _Message, path: str) -> Message:
    if message.role not in _ROLES:
        raise FieldError(
            f"{path}.role", f"it is {message.role[:40]!r}", hint=f"use one of {', '.join(_ROLES)}"
        )
    if message.annotations:
        raise FieldError(f"{path}.annotations", "annotations are not supported", hint="leave them out")
    names = {name: f"{path}.{name}" for name in ("content", "name", "tool_call_id", "tool_calls")}
    with named_fields(names | {"tool calls": f"{path}.tool_calls"}, path):
        calls = tuple(
            _call(call, f"{path}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls or ())
        )
        has_text = message.content is not None
        return Message(
            role=message.role,
            content=text_of(message.content, f"{path}.content", ()) if has_text else None,
            name=message.name or "",
            tool_calls=calls,
            tool_call_id=message.tool_call_id or "",
        )


def _call(call: _ToolCall, path: str) -> ToolCall:
    if call.type != "function":
        raise FieldError(f"{path}.type", f"it is {call.type[:40]!r}", hint="use function")
    names = {"name": f"{path}.function.name", "id": f"{path}.id"}
    return told_call(call.id, call.function.name, call.function.arguments, names)


def told_call(call_id: str, name: str, arguments: str | dict[str, Any], names: Mapping[str, str]) -> ToolCall:
    """A call of the conversation; `names` are the fields of its name and id. Raises FieldError.

    Arguments that are no JSON object came from a model, which must not end its conversation: they are told to
    it as a text.
    """
    text = arguments_text(arguments) or "{}"
    with named_fields(names, names["name"]):
        try:
            return ToolCall(id=call_id, name=name, arguments=text)
        except UsageError as error:
            if "no JSON object" not in error.message:
                raise
        return ToolCall(id=call_id, name=name, arguments=encode_json({"invalid_json": text}).decode())


def check_tools(names: Sequence[str]) -> None:
    """Raise FieldError for too many tools, and for two of one name."""
    if len(names) > _MAX_TOOLS:
        raise FieldError("tools", f"has {len(names)} entries", hint=f"use at most {_MAX_TOOLS}")
    for at, name in enumerate(names):
        if name in names[:at]:
            raise FieldError(f"tools[{at}].function.name", f"{name!r} is there twice", hint="name each once")


def _tool(tool: _Tool, path: str) -> dict[str, Any]:
    if tool.type != "function":
        raise FieldError(f"{path}.type", f"it is {tool.type[:40]!r}", hint="use function")
    function = tool.function
    name = tool_name(function.name, f"{path}.function.name")
    return whole_tool(name, function.description, function.parameters, function.strict)


def _tool_choice(request: _ChatRequest, names: set[str]) -> ToolChoice:
    choice = request.tool_choice
    name = "" if choice is None else _chosen_name(choice)
    example = '{"type": "function", "function": {"name": one of tools}}'
    return tool_choice_of(choice, name, names, parallel=request.parallel_tool_calls, example=example)


def tool_choice_of(
    choice: object, name: object, names: Set[str], *, parallel: bool | None, example: str
) -> ToolChoice:
    """What `tool_choice` asks for: one of three words, or the function `name`, written as in `example`.

    Raises FieldError for a name that is none of `names`.
    """
    is_parallel = parallel is not False
    if choice is None or choice == "auto":
        return ToolChoice(parallel=is_parallel)
    if choice == "none":
        return ToolChoice(mode="none", parallel=is_parallel)
    if choice == "required":
        return ToolChoice(mode="required", parallel=is_parallel)
    if not isinstance(name, str) or name not in names:
        hint = f"use auto, none, required, or {example}"
        raise FieldError("tool_choice", "it cannot be used", hint=hint)
    return ToolChoice(mode="named", name=name, parallel=is_parallel)


def _chosen_name(choice: str | dict[str, Any]) -> str:
    """The name in {"type": "function", "function": {"name": ...}}; empty for anything else."""
    function = (
        choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    )
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _prompts(prompt: str | Sequence[str | int | list[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and all(isinstance(each, int) for each in prompt):
        return (_tokens(prompt),)
    texts: list[Prompt] = [each for each in prompt if isinstance(each, str)]
    if texts and len(texts) == len(prompt):
        return tuple(texts)
    lists = [each for each in prompt if isinstance(each, list)]
    if lists and len(lists) == len(prompt):
        return tuple(_tokens(each) for each in lists)
    raise FieldError("prompt", "is no prompt", hint="give text, texts, token ids, or lists of token ids")


def _tokens(ids: Sequence[object]) -> tuple[int, ...]:
    tokens = tuple(each for each in ids if isinstance(each, int) and 0 <= each < 1 << 31)
    if not tokens or len(tokens) != len(ids):
        raise FieldError("prompt", "has token ids that cannot be", hint="use whole numbers from 0")
    return tokens


CHAT_REQUEST: Final = _ChatRequest
"""The type of a body of POST /v1/chat/completions, for the OpenAPI document."""
COMPLETION_REQUEST: Final = _CompletionRequest
"""The type of a body of POST /v1/completions, for the OpenAPI document."""
