"""What the document says of requests beyond their types: bounds of numbers and lists, and known words.

Bounds that a type does not say are those of `core.SamplingParams`, by the field's name. A test asks for the
neighbours of each bound, and must be refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenmill.core.sampling import MAX_COMPLETIONS, MAX_LOGPROBS, MAX_STOP_STRINGS

__all__ = ["bounded", "bounds_of"]

_MOST_TOKENS: Final = 1 << 20
_MOST_INT: Final = (1 << 63) - 1
_BOUNDS: Final[dict[str, dict[str, Any]]] = {
    "max_tokens": {"minimum": 1, "maximum": _MOST_TOKENS},
    "max_completion_tokens": {"minimum": 1, "maximum": _MOST_TOKENS},
    "max_output_tokens": {"minimum": 1, "maximum": _MOST_TOKENS},
    "min_tokens": {"minimum": 0, "maximum": _MOST_TOKENS},
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": 0, "maximum": _MOST_TOKENS},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"minimum": 0.01, "maximum": 100},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "seed": {"minimum": 0, "maximum": _MOST_INT},
    "n": {"minimum": 1, "maximum": MAX_COMPLETIONS},
    "dimensions": {"minimum": 1, "maximum": _MOST_INT},
    "best_of": {"minimum": 1, "maximum": MAX_COMPLETIONS},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
}
_LISTS: Final[dict[str, dict[str, Any]]] = {
    "messages": {"minItems": 1},
    "stop": {"maxItems": MAX_STOP_STRINGS, "items": {"type": "string", "minLength": 1, "maxLength": 256}},
    "bad_words": {"maxItems": 256, "items": {"type": "string", "minLength": 1, "maxLength": 256}},
    "stop_token_ids": {"maxItems": 256, "items": {"type": "integer", "minimum": 0, "maximum": 1 << 31}},
}
_LOGIT_BIAS: Final = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "maxProperties": 1024,
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_NUMBERS: Final = ("integer", "number")
_NAME: Final = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"}
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_ONLY_FUNCTION: Final = {"type": "string", "enum": ["function"]}
_TOKEN: Final = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
_NULL: Final = {"type": "null"}
_PROMPT: Final = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": _TOKEN},
        {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": _TOKEN}},
    ]
}
_ITEM: Final = {
    "type": "object",
    "properties": {
        "type": {"enum": ["message", "function_call", "function_call_output", "reasoning"]},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
    },
}
_RESPONSES_TOOL: Final = {
    "type": "object",
    "properties": {"type": _ONLY_FUNCTION, "name": _NAME, "parameters": {"type": ["object", "null"]}},
    "required": ["type", "name"],
}
_REFINED: Final[dict[str, dict[str, Any]]] = {
    "OpenAIMessage": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, _NULL]},
        "annotations": {"anyOf": [{"type": "array", "maxItems": 0}, _NULL]},
    },
    "OpenAITool": {"type": _ONLY_FUNCTION},
    "OpenAIToolFunction": {"name": _NAME},
    "OpenAIToolCall": {"type": _ONLY_FUNCTION, "id": {"type": "string"}},
    "OpenAIFormat": {"type": {"type": "string", "enum": ["text", "json_object", "json_schema"]}},
    "OpenAIChatRequest": {
        "modalities": {"anyOf": [{"type": "array", "const": ["text"]}, _NULL]},
        "store": {"anyOf": [{"type": "boolean", "const": False}, _NULL]},
        "tool_choice": {
            "anyOf": [
                {"type": "string", "enum": ["auto", "none", "required"]},
                {
                    "type": "object",
                    "properties": {
                        "type": _ONLY_FUNCTION,
                        "function": {"type": "object", "properties": {"name": _NAME}, "required": ["name"]},
                    },
                    "required": ["type", "function"],
                },
                _NULL,
            ]
        },
    },
    "OpenAICompletionRequest": {
        "prompt": _PROMPT,
    },
    "EmbeddingsRequest": {"input": _PROMPT},
    "ResponsesFormat": {"type": {"type": "string", "enum": ["text", "json_object", "json_schema"]}},
    "ResponsesRequest": {
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _ITEM}]},
        "tools": {"anyOf": [{"type": "array", "maxItems": 128, "items": _RESPONSES_TOOL}, _NULL]},
        "truncation": {"anyOf": [{"type": "string", "enum": ["disabled"]}, _NULL]},
        "store": {"anyOf": [{"type": "boolean", "const": False}, _NULL]},
        "background": {"anyOf": [{"type": "boolean", "const": False}, _NULL]},
        "include": {"anyOf": [{"type": "array", "items": {"enum": ["message.output_text.logprobs"]}}, _NULL]},
    },
}
"""What the readers of OpenAI's requests hold that their types do not say."""
_TIER_NAMES: Final = ("auto", "default", "flex", "priority", "fast", "standard", "batch")
_WITH_TIER: Final = (
    "OpenAIChatRequest",
    "OpenAICompletionRequest",
    "ResponsesRequest",
    "EmbeddingsRequest",
)
_TIERS: Final = {"anyOf": [{"type": "string", "enum": list(_TIER_NAMES)}, _NULL]}


def bounds_of(name: str) -> Mapping[str, Any]:
    """The bounds of a number of this name in requests of the OpenAI API; empty if it has none of its own."""
    return _BOUNDS.get(name, {})


def bounded(components: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """The components with the bounds that their types do not say."""
    for title, schema in components.items():
        schema.get("properties", {}).update(_REFINED.get(title, {}))
        for name, field in schema.get("properties", {}).items():
            if name == "service_tier" and title in _WITH_TIER:
                field.clear()
                field.update(_TIERS)
            _bound(name, field)
            if name == "model" and models:
                field["enum"] = list(models)
            if name == "logit_bias":
                field["anyOf"] = [_LOGIT_BIAS, {"type": "null"}]
    return components


def _bound(name: str, field: dict[str, Any]) -> None:
    for each in field.get("anyOf", [field]):
        kind = each.get("type")
        if kind in _NUMBERS and not {"minimum", "exclusiveMinimum"} & each.keys():
            each.update(_BOUNDS.get(name, {"minimum": 0, "maximum": _MOST_INT}))
        if kind == "array":
            each.update(_LISTS.get(name, {}))
        if kind == "string" and name == "stop":
            each.update(minLength=1, maxLength=256)
