"""The bodies that the Anthropic API takes, as types: what may stand where, and the bounds of each number.

The types are the one source: requests are read by them, and the OpenAPI document is made of them. What is
not here is an error that names its field. Fields that mean nothing here are taken where leaving them out
changes nothing for the answer: `cache_control` (prefixes are cached anyway), `caller`, `signature`.
"""

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

__all__ = [
    "AssistantMessage",
    "CacheControl",
    "CountTokensRequest",
    "JsonFormat",
    "MessagesRequest",
    "Metadata",
    "OutputConfig",
    "PlainText",
    "RedactedThinkingBlock",
    "TextBlock",
    "Thinking",
    "ThinkingBlock",
    "Tool",
    "ToolChoiceBody",
    "ToolResultBlock",
    "ToolUseBlock",
    "UserMessage",
]

_Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
_Id: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
_ToolName: TypeAlias = Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]+$", min_length=1, max_length=128)]
_Stop: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]


class _Strict(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class CacheControl(_Strict, kw_only=True):
    """Where a prefix ends that should be cached. Taken, and without meaning: every prefix is."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(_Strict, tag_field="type", tag="text", kw_only=True):
    """Text."""

    text: str
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None
    cache_control: CacheControl | None = None


class PlainText(_Strict, kw_only=True):
    """Text where only text may stand: `type` is asked for, as among other blocks."""

    type: Literal["text"]
    text: str
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None
    cache_control: CacheControl | None = None


class ToolUseBlock(_Strict, tag_field="type", tag="tool_use", kw_only=True):
    """A call that the model made."""

    id: _Id
    name: _ToolName
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    cache_control: CacheControl | None = None


class ToolResultBlock(_Strict, tag_field="type", tag="tool_result", kw_only=True):
    """What a call came to."""

    tool_use_id: _Id
    content: str | list[PlainText] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(_Strict, tag_field="type", tag="thinking", kw_only=True):
    """Thoughts of an earlier answer, which the model is not shown again."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(_Strict, tag_field="type", tag="redacted_thinking", kw_only=True):
    """Thoughts that nobody can read, which the model is not shown either."""

    data: str


class UserMessage(_Strict, tag_field="role", tag="user", kw_only=True):
    """Results of calls first, then text."""

    content: str | Annotated[list[TextBlock | ToolResultBlock], Meta(min_length=1)]


class AssistantMessage(_Strict, tag_field="role", tag="assistant", kw_only=True):
    """Thoughts first, then text, then calls."""

    content: (
        str
        | Annotated[
            list[TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock], Meta(min_length=1)
        ]
    )


class Tool(_Strict, kw_only=True):
    """A function of the client's."""

    name: _ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None
    eager_input_streaming: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoiceBody(_Strict, kw_only=True):
    """Whether the model may, must or must not call; `name` goes with `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: _ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(_Strict, kw_only=True):
    """The client's name for its own user."""

    user_id: Annotated[str, Meta(max_length=512)] | None = None


class JsonFormat(_Strict, kw_only=True):
    """A JSON schema that the answer keeps to."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(_Strict, kw_only=True):
    """The form of the answer."""

    format: JsonFormat | None = None


class Thinking(_Strict, kw_only=True):
    """Only `disabled`: what a model thinks is its template's business here."""

    type: Literal["disabled"]


class CountTokensRequest(_Strict, kw_only=True):
    """The body of POST /v1/messages/count_tokens: what becomes part of the prompt."""

    model: _Name
    messages: Annotated[list[UserMessage | AssistantMessage], Meta(min_length=1, max_length=100_000)]
    system: str | list[PlainText] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoiceBody | None = None
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The body of POST /v1/messages. The bounds are those of `core.SamplingParams`."""

    max_tokens: Annotated[int, Meta(ge=1, le=1 << 20)]
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    stop_sequences: Annotated[list[_Stop], Meta(max_length=16)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard", "fast"] | None = None
