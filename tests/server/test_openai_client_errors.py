"""The official `openai` client against a running server: what it raises, what it tries again, time."""

import time
from collections.abc import Callable
from typing import Any, Final

import openai
import pytest

from tests.server.openai_client import TOOL, ask, complete, error, stream, text_of, user
from tests.server.openai_server import FAULT

# Errors: 400, and the field that is wrong.

WRONG: Final[list[tuple[str, dict[str, Any]]]] = [
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.1}),
    ("n", {"n": 0}),
    ("n", {"n": 9}),
    ("n", {"n": 1 << 70}),
    ("n", {"n": 1.5}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_completion_tokens", {"max_completion_tokens": 0}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("logprobs", {"logprobs": 3}),
    ("logit_bias", {"logit_bias": {"5": 101}}),
    ("logit_bias", {"logit_bias": {"100000": 1}}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": ["x" * 257]}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": "x"}),
    ("service_tier", {"service_tier": "gold"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("store", {"store": True}),
    ("modalities", {"modalities": ["audio"]}),
    ("reasoning_effort", {"reasoning_effort": "high"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("prediction", {"prediction": {"type": "content", "content": "x"}}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("response_format", {"response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}}),
    ("messages", {"messages": []}),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]}]}),
    ("model", {"model": ""}),
    ("frobnicate", {"extra_body": {"frobnicate": 1}}),
    ("messages[0].mood", {"messages": [{"role": "user", "content": "x", "mood": "good"}]}),
    ("tools[0].type", {"tools": [{"type": "magic", "function": {"name": "f"}}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "no spaces"}}]}),
    ("tools[1].function.name", {"tools": [TOOL, TOOL]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}),
    ("tools", {"tool_choice": "required", "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}]}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": "sometimes"}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}),
    ("tool_choice", {"tool_choice": "required"}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "fields"), WRONG, ids=[f"{f}={str(v)[:40]}" for f, v in WRONG])
def test_wrong_fields_are_named(gpt: Any, field: str, fields: dict[str, Any]) -> None:
    caught = error(gpt, **fields)
    assert type(caught) is openai.BadRequestError
    assert (caught.status_code, caught.param, caught.type) == (400, field, "invalid_request_error")
    assert field.rpartition(".")[2].partition("[")[0] in caught.message


WRONG_TEXT: Final[list[tuple[str, dict[str, Any]]]] = [
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [""]}),
    ("prompt", {"prompt": [[-1]]}),
    ("prompt", {"prompt": [[1000]]}),
    ("prompt", {"prompt": ["x", [1]]}),
    ("logprobs", {"logprobs": 21}),
    ("best_of", {"best_of": 3}),
    ("suffix", {"suffix": "x"}),
]


@pytest.mark.parametrize(("field", "fields"), WRONG_TEXT, ids=[str(v) for _, v in WRONG_TEXT])
def test_wrong_fields_of_completions_are_named(gpt: Any, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(gpt, **{"prompt": "x", **fields})
    assert caught.value.param == field


def test_too_long_a_prompt(gpt: Any) -> None:
    caught = error(gpt, messages=user("x" * 3000))
    assert type(caught) is openai.BadRequestError
    assert (caught.param, caught.code) == ("messages", "context_length_exceeded")


# Errors: the class of each status.


def test_an_unknown_model(gpt: Any) -> None:
    caught = error(gpt, model="gpt-9")
    assert type(caught) is openai.NotFoundError
    assert (caught.status_code, caught.code, caught.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("secret", "kind", "status", "code"),
    [
        ("tm_wrong", "AuthenticationError", 401, "invalid_api_key"),
        ("tm_expired", "AuthenticationError", 401, "invalid_api_key"),
        ("tm_scopeless", "PermissionDeniedError", 403, None),
        ("tm_poor", "RateLimitError", 429, "insufficient_quota"),
    ],
)
def test_keys(make_openai: Callable[..., Any], secret: str, kind: str, status: int, code: str | None) -> None:
    with make_openai(secret) as client:
        caught = error(client)
    assert (type(caught).__name__, caught.status_code, caught.code) == (kind, status, code)


@pytest.mark.parametrize(
    ("model", "kind", "status"),
    [
        ("full", "RateLimitError", 429),
        ("broken", "InternalServerError", 500),
        ("gone", "InternalServerError", 502),
        ("late", "InternalServerError", 504),
    ],
)
def test_statuses(gpt: Any, model: str, kind: str, status: int) -> None:
    caught = error(gpt, model=model)
    assert (type(caught).__name__, caught.status_code) == (kind, status)
    assert caught.request_id.startswith("req_")
    with pytest.raises(openai.APIError):
        stream(gpt, "Hi", model=model)


def test_a_row_that_fails_is_an_error(gpt: Any) -> None:
    caught = error(gpt, messages=user(FAULT))
    assert caught.status_code == 500
    assert text_of(ask(gpt, "Hi")) == "Hello there"


def test_a_body_that_is_too_long(gpt: Any) -> None:
    assert error(gpt, messages=user("x" * (1 << 20))).status_code == 413


def test_a_wrong_path_and_method(gpt: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        gpt.post("/nothing", body={}, cast_to=object)
    with pytest.raises(openai.APIStatusError) as caught:
        gpt.get("/chat/completions", cast_to=object)
    assert caught.value.status_code == 405


# Retries and time.


def test_retry_after_is_sent(make_openai: Callable[..., Any]) -> None:
    with make_openai("tm_limited") as client:
        ask(client, "Hi")
        caught = error(client)
    assert type(caught) is openai.RateLimitError
    assert 1 <= int(caught.response.headers["retry-after"]) <= 60
    assert caught.code == "rate_limit_exceeded"


def test_the_client_tries_again_after_the_time_it_is_told(make_openai: Callable[..., Any]) -> None:
    """The key has one place, which a stream has until somebody was refused."""
    statuses: list[int] = []

    def hook(response: Any) -> None:
        statuses.append(response.status_code)
        if response.status_code == 429:
            chunks.close()

    http = openai.DefaultHttpxClient(event_hooks={"response": [hook]})
    long = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    with make_openai("tm_one", max_retries=5, http_client=http) as client:
        chunks = ask(client, "Dice", stream=True, **long)
        next(iter(chunks))
        begun_s = time.monotonic()
        assert text_of(ask(client, "Hi")) == "Hello there"
    assert time.monotonic() - begun_s >= 0.9
    assert statuses[:2] == [200, 429] and statuses[-1] == 200


def test_no_retry_of_a_bad_request(make_openai: Callable[..., Any]) -> None:
    with make_openai(max_retries=3) as client:
        begun_s = time.monotonic()
        error(client, n=0)
    assert time.monotonic() - begun_s < 0.4


def test_a_timeout_is_typed(make_openai: Callable[..., Any]) -> None:
    with make_openai(timeout=0.05) as client, pytest.raises(openai.APITimeoutError):
        ask(client, "Dice", max_tokens=2000, extra_body={"ignore_eos": True})


def test_no_server_is_typed(make_openai: Callable[..., Any]) -> None:
    with make_openai(base_url="http://127.0.0.1:1/v1") as client, pytest.raises(openai.APIConnectionError):
        ask(client, "Hi")
