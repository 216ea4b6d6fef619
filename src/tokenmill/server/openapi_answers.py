"""JSON schemas of what routes answer. Readers may rely on what is here; there may be more.

Requests are described by the types that read them (`openapi`); answers are written as they are, in `wire`,
so their shape is said here, and the fuzzing of the API holds the two against each other.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

__all__ = ["ANSWERS", "ERROR_SCHEMAS", "Schema"]

Schema: TypeAlias = Mapping[str, Any]

_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_TEXT: Final[Schema] = {"type": "string"}
_MAYBE_TEXT: Final[Schema] = {"type": ["string", "null"]}
_MAYBE_COUNT: Final[Schema] = {"type": ["integer", "null"], "minimum": 0}
_ANY_OBJECT: Final[Schema] = {"type": "object"}


def _object(optional: Mapping[str, Schema] | None = None, /, **fields: Schema) -> Schema:
    """An object that has these fields, and may have the optional ones."""
    return {
        "type": "object",
        "properties": {**fields, **(optional or {})},
        "required": sorted(fields),
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _const(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_USAGE: Final = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
)
_OPENAI_ERROR: Final = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT))
_ANTHROPIC_ERROR: Final = _object(
    type=_const("error"),
    request_id=_TEXT,
    error=_object(
        message=_TEXT,
        type=_const(
            "invalid_request_error",
            "authentication_error",
            "billing_error",
            "permission_error",
            "not_found_error",
            "request_too_large",
            "rate_limit_error",
            "timeout_error",
            "overloaded_error",
            "api_error",
        ),
    ),
)
ERROR_SCHEMAS: Final[Mapping[str, Schema]] = {
    "openai": _OPENAI_ERROR,
    "anthropic": _ANTHROPIC_ERROR,
    "both": {"anyOf": [_OPENAI_ERROR, _ANTHROPIC_ERROR]},
}
"""Errors by the API whose shape a route answers in; `both`: as the request's headers say."""

_CALL: Final = _object(id=_TEXT, type=_const("function"), function=_object(name=_TEXT, arguments=_TEXT))
_CHAT: Final = _object(
    id=_TEXT,
    object=_const("chat.completion"),
    created=_COUNT,
    model=_TEXT,
    usage=_USAGE,
    choices=_list(
        _object(
            index=_COUNT,
            finish_reason=_const("stop", "length", "tool_calls"),
            message=_object({"tool_calls": _list(_CALL)}, role=_const("assistant"), content=_MAYBE_TEXT),
            logprobs={"type": ["object", "null"]},
        )
    ),
)
_COMPLETION: Final = _object(
    id=_TEXT,
    object=_const("text_completion"),
    created=_COUNT,
    model=_TEXT,
    usage=_USAGE,
    choices=_list(
        _object(
            index=_COUNT,
            text=_TEXT,
            finish_reason=_const("stop", "length"),
            logprobs={"type": ["object", "null"]},
        )
    ),
)
_MODEL: Final = _object(id=_TEXT, object=_const("model"), created=_COUNT, owned_by=_TEXT)
_ANTHROPIC_MODEL: Final = _object(id=_TEXT, type=_const("model"), display_name=_TEXT, created_at=_TEXT)


def _page(item: Schema) -> Schema:
    """A page as Anthropic has them; OpenAI's has `object`, too."""
    return _object(data=_list(item), has_more={"type": "boolean"}, first_id=_MAYBE_TEXT, last_id=_MAYBE_TEXT)


def _openai_page(item: Schema) -> Schema:
    return _object(object=_const("list"), data=_list(item))


_MESSAGE: Final = _object(
    id=_TEXT,
    type=_const("message"),
    role=_const("assistant"),
    model=_TEXT,
    content=_list(_object(type=_const("text", "thinking", "tool_use"))),
    stop_reason=_const(
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ),
    stop_sequence=_MAYBE_TEXT,
    usage=_object(
        input_tokens=_COUNT,
        output_tokens=_COUNT,
        cache_creation_input_tokens=_COUNT,
        cache_read_input_tokens=_COUNT,
        service_tier=_const("standard", "priority", "batch"),
    ),
)
_FILE: Final = _object(
    id=_TEXT, object=_const("file"), bytes=_COUNT, created_at=_COUNT, filename=_TEXT, purpose=_TEXT
)
_BATCH: Final = _object(
    id=_TEXT,
    object=_const("batch"),
    endpoint=_TEXT,
    input_file_id=_TEXT,
    completion_window=_TEXT,
    status=_TEXT,
    created_at=_COUNT,
    request_counts=_maybe(_object(total=_COUNT, completed=_COUNT, failed=_COUNT)),
)
_MESSAGE_BATCH: Final = _object(
    id=_TEXT,
    type=_const("message_batch"),
    processing_status=_const("in_progress", "canceling", "ended"),
    request_counts=_object(
        processing=_COUNT, succeeded=_COUNT, errored=_COUNT, canceled=_COUNT, expired=_COUNT
    ),
    created_at=_TEXT,
    expires_at=_TEXT,
    ended_at=_MAYBE_TEXT,
    results_url=_MAYBE_TEXT,
)
_HEALTH: Final = _object(status=_TEXT)

ANSWERS: Final[Mapping[str, Schema]] = {
    "anything": _ANY_OBJECT,
    "batch": _BATCH,
    "batches": _openai_page(_BATCH),
    "chat": _CHAT,
    "completion": _COMPLETION,
    "deleted": _object(id=_TEXT),
    "embeddings": _object(
        object=_const("list"), model=_TEXT, data=_list(_object(index=_COUNT)), usage=_ANY_OBJECT
    ),
    "file": _FILE,
    "files": _openai_page(_FILE),
    "health": _HEALTH,
    "input_tokens": _object(input_tokens=_COUNT),
    "message": _MESSAGE,
    "message_batch": _MESSAGE_BATCH,
    "message_batches": _page(_MESSAGE_BATCH),
    "model": {"anyOf": [_MODEL, _ANTHROPIC_MODEL]},
    "models": {"anyOf": [_openai_page(_MODEL), _page(_ANTHROPIC_MODEL)]},
    "response": _object(id=_TEXT, object=_const("response"), model=_TEXT, status=_TEXT, output=_list({})),
}
"""Answers by the names that `openapi_operations` gives them."""
