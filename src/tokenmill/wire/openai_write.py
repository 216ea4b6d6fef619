"""Calls to requests of the OpenAI API: chat completions and completions.

Parameters that OpenAI does not have keep the names that vLLM gave them, and are only sent where they differ
from doing nothing; an endpoint that does not know them may refuse them.
"""

from collections.abc import Mapping
from typing import Any, Final

from tokenmill.core import Grammar, Message, SamplingParams
from tokenmill.wire.call import Call, ToolChoice
from tokenmill.wire.fields import encode_json, schema_of

__all__ = ["write_openai_call"]

_TIERS: Final = {"fast": "priority", "batch": "flex"}
"""Tiers to OpenAI's `service_tier`; what is not here is not written."""

_QUIET: Final = {
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "ignore_eos": False,
    "prompt_logprobs": None,
    "n": 1,
}
"""Parameters that have the same name there, with the value that does nothing."""


def write_openai_call(
    call: Call, *, max_tokens_field: str = "max_tokens", with_sampling: bool = True
) -> bytes:
    """The body of POST /v1/chat/completions, or of /v1/completions for prompts.

    `max_tokens_field` is the name that the endpoint has for the limit. Without `with_sampling` temperature
    and `top_p` are left to the model: some take none. Raises UsageError for half a surrogate pair.
    """
    body: dict[str, Any] = {"model": call.model}
    if call.is_chat:
        body["messages"] = [_message(message) for message in call.messages]
        body |= _tools(call)
        if call.params.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": call.params.logprobs}
    else:
        max_tokens_field = "max_tokens"
        body["prompt"] = call.prompts[0] if len(call.prompts) == 1 else call.prompts
        if call.params.logprobs is not None:
            body["logprobs"] = call.params.logprobs
        if call.echo:
            body["echo"] = True
    body |= {max_tokens_field: call.params.max_tokens, **_sampling(call.params), **_envelope(call)}
    if not with_sampling:
        body.pop("temperature")
        body.pop("top_p", None)
    return encode_json(body)


def _message(message: Message) -> dict[str, Any]:
    """A message; what is empty is left out, but for `content`."""
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        result["name"] = message.name
    if message.tool_call_id:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return result


def _sampling(params: SamplingParams) -> dict[str, Any]:
    body: dict[str, Any] = {"temperature": params.temperature}
    for name, quiet in _QUIET.items():
        value = getattr(params, name)
        if value != quiet:
            body[name] = value
    for name in ("stop", "stop_token_ids", "bad_words"):
        if getattr(params, name):
            body[name] = getattr(params, name)
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    if params.grammar is not None:
        body |= _grammar(params.grammar)
    return body


def _grammar(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if grammar.kind == "json_schema":
        schema = {"name": "answer", "schema": schema_of(grammar.source), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    name = "grammar" if grammar.kind == "lark" else "regex"
    return {"structured_outputs": {name: grammar.source}}


def _tools(call: Call) -> dict[str, Any]:
    if not call.tools:
        return {}
    body: dict[str, Any] = {"tools": [_whole_tool(tool) for tool in call.tools]}
    choice = _choice(call.tool_choice)
    if choice != "auto":
        body["tool_choice"] = choice
    if not call.tool_choice.parallel:
        body["parallel_tool_calls"] = False
    return body


def _whole_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool if "function" in tool else {"type": "function", "function": tool}


def _choice(choice: ToolChoice) -> Any:
    return {"type": "function", "function": {"name": choice.name}} if choice.name else choice.mode


def _envelope(call: Call) -> dict[str, Any]:
    """What is about the request, not about the answer."""
    body: dict[str, Any] = {}
    if call.stream:
        body["stream"] = True
    if call.stream and call.include_usage:
        body["stream_options"] = {"include_usage": True}
    if call.tier in _TIERS:
        body["service_tier"] = _TIERS[call.tier]
    if call.user:
        body["user"] = call.user
    if call.metadata:
        body["metadata"] = call.metadata
    if call.variables:
        body["chat_template_kwargs"] = call.variables
    return body
