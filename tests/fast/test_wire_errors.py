"""Errors on the wire, both ways: shapes that clients know, and classes that our callers know."""

import json

import pytest

from tokenmill.core import EndpointError, NotFoundError, ResourceError, TokenmillError, UsageError
from tokenmill.wire import (
    AnthropicReader,
    Api,
    OpenAIReader,
    SseParser,
    error_of,
    retry_after,
    status_of,
    stream_error,
    write_error,
    write_stream_error,
)

APIS: tuple[Api, ...] = ("openai", "anthropic")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UsageError),
        (401, UsageError),
        (404, NotFoundError),
        (413, UsageError),
        (422, UsageError),
        (429, ResourceError),
        (500, EndpointError),
        (529, ResourceError),
    ],
)
def test_an_error_is_of_our_tree_and_says_what_to_do(status: int, kind: type[TokenmillError]) -> None:
    for body in (
        b'{"error": {"message": "too bad", "type": "t", "param": null, "code": null}}',
        b'{"type": "error", "error": {"type": "t", "message": "too bad"}}',
        b'{"error": "too bad"}',
        b'{"detail": "too bad"}',
        b'{"detail": [{"msg": "too bad"}]}',
        b'{"object": "error", "message": "too bad"}',
        b"<html>too bad\n\x1b[31m",
    ):
        error = error_of(status, body)
        assert type(error) is kind and error.hint and "too bad" in error.message
        assert str(status) in error.message and error.message.isprintable()
    assert len(error_of(status, b"x" * 99999).message) < 400


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 500, 503, 529])
def test_an_error_that_we_write_is_read_as_itself(status: int) -> None:
    error = UsageError("no good", hint="be good")
    for api in APIS:
        assert "no good; be good" in error_of(status, write_error(api, error, status=status)).message


def test_types_of_errors() -> None:
    def kinds(error: TokenmillError, status: int = 0) -> tuple[int, str, str]:
        found = json.loads(write_error("openai", error, status=status))["error"]
        other = json.loads(write_error("anthropic", error, status=status))["error"]
        return status or status_of(error), found["type"], other["type"]

    assert kinds(UsageError("x")) == (400, "invalid_request_error", "invalid_request_error")
    assert kinds(NotFoundError("x")) == (404, "invalid_request_error", "not_found_error")
    assert kinds(ResourceError("x")) == (429, "rate_limit_error", "overloaded_error")
    assert kinds(TokenmillError("x")) == (500, "server_error", "api_error")
    assert kinds(UsageError("x"), 401) == (401, "invalid_request_error", "authentication_error")
    assert kinds(UsageError("x"), 529) == (529, "server_error", "overloaded_error")


def test_an_error_in_a_stream() -> None:
    readers: list[OpenAIReader | AnthropicReader] = [OpenAIReader(), AnthropicReader()]
    for api, reader in zip(APIS, readers, strict=True):
        (event,) = SseParser().feed(write_stream_error(api, ResourceError("too much")))
        with pytest.raises(ResourceError, match=r"in the stream.*too much"):
            reader.read(event)
    assert type(stream_error(b'{"error": {"message": "x", "code": 400}}')) is UsageError
    assert type(stream_error(b"nonsense")) is EndpointError


def test_retry_after() -> None:
    assert retry_after("7") == 7.0
    assert retry_after("0.5") == 0.5
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after("Wed, 21 Oct 2199 07:28:00 GMT") > 1e9
    assert retry_after("soon") == retry_after("") == retry_after("-1") == 0.0
