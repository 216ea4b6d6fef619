"""Bounds of what a request may say: JSON's depth, names and numbers, and each number at both of its ends."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest

from tokenmill.core import SamplingParams
from tokenmill.server.openapi import document_of
from tokenmill.server.openapi_bounds import bounds_of
from tokenmill.wire import (
    Call,
    FieldError,
    parse_anthropic_call,
    parse_anthropic_count,
    parse_openai_chat,
    parse_openai_completion,
)
from tokenmill.wire.scan import MAX_CONTAINERS, BadJsonError, check_json

PLAIN = SamplingParams()
USER = {"role": "user", "content": "a"}
Parse = Callable[[bytes], Call]
CALLS: dict[str, tuple[Parse, dict[str, Any]]] = {
    "ChatRequest": (lambda body: parse_openai_chat(body, PLAIN), {"model": "m", "messages": [USER]}),
    "CompletionRequest": (lambda body: parse_openai_completion(body, PLAIN), {"model": "m", "prompt": "a"}),
    "MessagesRequest": (
        lambda body: parse_anthropic_call(body, PLAIN),
        {"model": "m", "messages": [USER], "max_tokens": 9},
    ),
    "CountTokensRequest": (parse_anthropic_count, {"model": "m", "messages": [USER]}),
}
COMPANIONS: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "min_tokens": {"max_tokens": 1 << 20},
    "best_of": {"n": 1},
}
"""What must stand beside a field so that it is its own value that is judged."""


def field_of(kind: str, raw: str) -> str:
    """The field of which a body's error speaks; `raw` is its last field as JSON."""
    parse, fields = CALLS[kind]
    body = json.dumps(fields)[:-1] + ", " + raw + "}"
    with pytest.raises(FieldError) as caught:
        parse(body.encode())
    return caught.value.field


# JSON.


@pytest.mark.parametrize("depth", [65, 1000, 100_000])
@pytest.mark.parametrize("name", ["messages", "unknown"])
@pytest.mark.parametrize("kind", CALLS)
def test_depth_is_bounded(kind: str, name: str, depth: int) -> None:
    begun_s = time.perf_counter()
    assert field_of(kind, f'"{name}": ' + "[" * (depth - 1) + "]" * (depth - 1)) == ""
    assert field_of(kind, f'"{name}": ' + '{"a":' * (depth - 1) + "1" + "}" * (depth - 1)) == ""
    assert time.perf_counter() - begun_s < 5.0


def test_a_million_brackets_end_at_the_scan() -> None:
    with pytest.raises(BadJsonError):
        check_json(b"[" * 1_000_000)


@pytest.mark.parametrize("depth", [63, 64])
def test_depth_up_to_the_bound_is_read(depth: int) -> None:
    check_json(b"[" * depth + b"]" * depth)
    nested = '{"a":' * (depth - 3) + "1" + "}" * (depth - 3)
    tools = [{"name": "f", "input_schema": "SCHEMA"}]
    body = json.dumps({**CALLS["MessagesRequest"][1], "tools": tools}).replace('"SCHEMA"', nested)
    assert parse_anthropic_call(body.encode(), PLAIN).tools


def test_brackets_in_texts_are_no_depth() -> None:
    text = '[{"' * 1000 + "\\"
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
    assert parse_openai_chat(body, PLAIN).messages[0].content == text


def test_without_the_scan_depth_reaches_the_parser() -> None:
    """The control: 65 deep is read, for nothing else bounds it."""
    schema = '{"a":' * 65 + "1" + "}" * 65
    body = json.dumps({**CALLS["MessagesRequest"][1], "tools": [{"name": "f", "input_schema": "S"}]})
    with patch("tokenmill.wire.fields.check_json", lambda body: None):
        assert parse_anthropic_call(body.replace('"S"', schema).encode(), PLAIN).tools


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("kind", CALLS)
def test_numbers_that_are_none(kind: str, word: str) -> None:
    field_of(kind, f'"temperature": {word}')
    field_of(kind, f'"metadata": {{"user_id": {word}}}')


@pytest.mark.parametrize("digits", ["9" * 20, "-" + "9" * 19, "1" + "0" * 30, "9" * 100_000, str(1 << 64)])
@pytest.mark.parametrize("kind", CALLS)
def test_whole_numbers_beyond_64_bits_are_named(kind: str, digits: str) -> None:
    assert field_of(kind, f'"max_tokens_": {digits}') == "max_tokens_"
    assert field_of(kind, f'"a": [0, {{"b": {digits}}}]') == "a[1].b"


@pytest.mark.parametrize("kind", CALLS)
def test_names_stand_once(kind: str) -> None:
    assert field_of(kind, '"model": "other"') == "model"
    assert field_of(kind, '"metadata": {"a": "1", "\\u0061": "2"}') == "a"
    with patch("tokenmill.wire.fields.check_json", lambda body: None):
        parse, fields = CALLS[kind]
        assert parse((json.dumps(fields)[:-1] + ', "model": "other"}').encode()).model == "other"


def test_the_number_of_objects_is_bounded() -> None:
    with pytest.raises(BadJsonError, match="objects"):
        check_json(b"[" + b"{}," * MAX_CONTAINERS + b"1]")


# Every number that the document names, at both ends.


def numbers() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(request, field, schema) of every number in a request's own fields."""
    from tokenmill.server.anthropic_api import AnthropicApi
    from tokenmill.server.openai_api import OpenAIApi

    routes = [*AnthropicApi(None, 0).routes(), *OpenAIApi(None, 0).routes()]  # type: ignore[arg-type]
    schemas = document_of(routes, (), keyless=True)["components"]["schemas"]
    for kind in CALLS:
        name = kind if kind in schemas else f"OpenAI{kind}"
        for field, schema in schemas[name]["properties"].items():
            for each in schema.get("anyOf", [schema]):
                if each.get("type") in ("integer", "number"):
                    yield kind, field, each


NUMBERS = list(numbers())


def test_every_number_of_the_document_has_two_ends() -> None:
    assert len(NUMBERS) > 25
    for kind, field, schema in NUMBERS:
        assert "maximum" in schema and {"minimum", "exclusiveMinimum"} & schema.keys(), (kind, field)


@pytest.mark.parametrize(("kind", "field", "schema"), NUMBERS, ids=lambda value: str(value)[:24])
def test_numbers_have_the_bounds_of_the_document(kind: str, field: str, schema: dict[str, Any]) -> None:
    step: float = 1 if schema["type"] == "integer" else 1e-3
    low: float = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    inside = [schema["maximum"], *([schema["minimum"]] if "minimum" in schema else [])]
    outside = [schema["maximum"] + step, low - step if "minimum" in schema else low, 10**30, -(10**30)]
    parse, fields = CALLS[kind]
    beside = {name: value for name, value in COMPANIONS.get(field, {}).items() if name != field}
    for value in inside:
        if field == "best_of":
            beside = {"n": value}
        assert parse(json.dumps({**fields, **beside, field: value}).encode()).model == "m", (field, value)
    for value in [*outside, "5", True, [1]]:
        if field == "logprobs" and value is True:
            continue
        body = {**{name: each for name, each in fields.items() if name != field}, **beside, field: value}
        with pytest.raises(FieldError) as caught:
            parse(json.dumps(body).encode())
        assert caught.value.field.split("[")[0] in (field, "n"), (field, value, caught.value)


@pytest.mark.parametrize("value", [0, -1, 9, 10**9, 10**30, "5", 1.5, True])
def test_huge_n_is_refused_before_anything_is_made(value: Any) -> None:
    for kind in ("ChatRequest", "CompletionRequest"):
        begun_s = time.perf_counter()
        assert field_of(kind, f'"n": {json.dumps(value)}') == "n"
        assert time.perf_counter() - begun_s < 0.05


def test_bounds_are_those_of_the_engine() -> None:
    """The document's numbers are said again there: each end is taken, what is beyond it is not."""
    for name in ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed", "n"):
        bounds = bounds_of(name)
        assert getattr(SamplingParams(**{name: bounds["maximum"]}), name) == bounds["maximum"]
        with pytest.raises(Exception, match=name):
            SamplingParams(**{name: bounds["maximum"] + 1})
