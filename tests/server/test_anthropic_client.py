"""The official `anthropic` client against a running server: what it sends, gets and raises."""

import json
import os
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from tests.server.anthropic_checks import (
    ASKED,
    ENDS,
    OTHER,
    STATUSES,
    TOOL,
    USER,
    WHOLE,
    WRONG,
    input_of,
)
from tests.server.anthropic_server import THREE, WRITTEN

anthropic = pytest.importorskip("anthropic", reason="the official client is an extra of development")


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """One server for all checks."""
    command = [sys.executable, "-m", "tests.server.anthropic_server", *_broken()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = select.select([process.stdout], [], [], 60.0)[0]
        try:
            yield process.stdout.readline().strip() if ready else ""
        finally:
            process.terminate()
            process.wait(30)


def _broken() -> list[str]:
    """The control of the scorecard's line serves shapes that are wrong."""
    return ["--broken"] if os.environ.get("TOKENMILL_S11_CONTROL") else []


@pytest.fixture(scope="session")
def make(url: str) -> Callable[..., Any]:
    """Makes a client that does not try again."""
    return lambda key="tm_good", **more: anthropic.Anthropic(
        **{"base_url": url, "api_key": key, "max_retries": 0, "timeout": 30.0, **more}
    )


@pytest.fixture(scope="session")
def claude(make: Callable[..., Any]) -> Iterator[Any]:
    """A client with a good key."""
    with make() as client:
        yield client


def ask(client: Any, model: str = "mock", **fields: Any) -> Any:
    """A message."""
    return client.messages.create(**{"model": model, "messages": USER, "max_tokens": 64, **fields})


def echo(client: Any, **fields: Any) -> dict[str, Any]:
    """What the server understood."""
    found: dict[str, Any] = json.loads(ask(client, "echo", **fields).content[0].text)
    return found


def events(client: Any, model: str = "mock", **fields: Any) -> list[Any]:
    """The raw events of a stream."""
    return list(ask(client, model, stream=True, **fields))


def error(client: Any, model: str = "mock", **fields: Any) -> Any:
    """The error that a request raises."""
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask(client, model, **fields)
    return caught.value


# The message at once.


@pytest.fixture(scope="session")
def whole(claude: Any) -> Any:
    """One message."""
    return ask(claude)


@pytest.mark.parametrize("check", WHOLE)
def test_message(whole: Any, check: str) -> None:
    assert WHOLE[check](whole), whole


# What the server understood of a request.


@pytest.mark.parametrize("check", ASKED)
def test_what_was_asked(claude: Any, check: str) -> None:
    fields, good = ASKED[check]
    call = echo(claude, **fields)
    assert good(call), call


# Streams.

STREAMS: Final[dict[str, Callable[[list[Any]], bool]]] = {
    "begins with message_start": lambda e: e[0].type == "message_start",
    "then the block, then its text": lambda e: [x.type for x in e[1:3]]
    == ["content_block_start", "content_block_delta"],
    "ends with three": lambda e: [x.type for x in e[-3:]]
    == ["content_block_stop", "message_delta", "message_stop"],
    "the first message is empty": lambda e: e[0].message.content == [],
    "the first message has no stop reason": lambda e: e[0].message.stop_reason is None,
    "the first message has an id": lambda e: e[0].message.id.startswith("msg_"),
    "the first message counts the input": lambda e: input_of(e[0].message) == 23,
    "the block begins empty": lambda e: e[1].content_block.text == "" and e[1].index == 0,
    "deltas are text": lambda e: {x.delta.type for x in _deltas(e)} == {"text_delta"},
    "deltas add up": lambda e: "".join(x.delta.text for x in _deltas(e)) == THREE,
    "the end says why": lambda e: e[-2].delta.stop_reason == "end_turn",
    "the end counts the output": lambda e: e[-2].usage.output_tokens == len(THREE) + 1,
    "the end counts the input": lambda e: e[-2].usage.input_tokens
    + e[-2].usage.cache_read_input_tokens == 23,
}  # fmt: skip


def _deltas(found: list[Any]) -> list[Any]:
    return [each for each in found if each.type == "content_block_delta"]


@pytest.fixture(scope="session")
def streamed(claude: Any) -> list[Any]:
    """The events of one stream."""
    return events(claude)


@pytest.mark.parametrize("check", STREAMS)
def test_stream(streamed: list[Any], check: str) -> None:
    assert STREAMS[check](streamed), streamed


def test_a_ping_follows_the_beginning_of_the_first_block(claude: Any) -> None:
    """The client passes pings over, so the lines are read."""
    body = {"model": "tools", "messages": USER, "max_tokens": 64, "tools": [TOOL], "stream": True}
    with claude.messages.with_streaming_response.create(**body) as response:
        names = [line[7:] for line in response.iter_lines() if line.startswith("event: ")]
    assert names[:4] == ["message_start", "content_block_start", "ping", "content_block_delta"]
    assert names.count("ping") == 1


def test_stream_helper_gathers_the_message(claude: Any) -> None:
    with claude.messages.stream(model="mock", messages=USER, max_tokens=64) as stream:
        assert "".join(stream.text_stream) == THREE
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", len(THREE) + 1)


def test_stream_of_an_empty_answer_has_no_block(claude: Any) -> None:
    found = events(claude, messages=[{"role": "user", "content": "Nothing."}])
    assert [each.type for each in found] == ["message_start", "message_delta", "message_stop"]


def test_an_empty_answer_has_no_block(claude: Any) -> None:
    message = ask(claude, messages=[{"role": "user", "content": "Nothing."}])
    assert (message.content, message.stop_reason) == ([], "end_turn")


def test_streams_do_not_cut_characters(claude: Any) -> None:
    found = events(claude, messages=[{"role": "user", "content": "Grüße."}])
    assert "".join(each.delta.text for each in _deltas(found)) == "Grüße, 世界 🌍"


def test_thoughts_are_a_block_of_their_own(claude: Any) -> None:
    message = ask(claude, "thinker")
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("Hm", "Yes")


def test_thoughts_are_streamed_as_thinking_deltas(claude: Any) -> None:
    found = events(claude, "thinker")
    assert [each.delta.type for each in _deltas(found)] == ["thinking_delta", "text_delta"]
    assert [each.index for each in _deltas(found)] == [0, 1]


def test_a_stream_can_be_left(claude: Any) -> None:
    with ask(claude, stream=True) as stream:
        assert next(iter(stream)).type == "message_start"
    assert ask(claude).stop_reason == "end_turn"


def test_the_async_client_streams(url: str) -> None:
    import asyncio

    async def run() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=url, api_key="tm_good", max_retries=0) as client,
            client.messages.stream(model="mock", messages=USER, max_tokens=64) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(run()) == THREE


# Ends.


@pytest.mark.parametrize("end", ENDS)
def test_ends(claude: Any, end: str) -> None:
    fields, reason, stop, text = ENDS[end]
    message = ask(claude, **fields)
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == (reason, stop, text)


@pytest.mark.parametrize("end", ENDS)
def test_ends_of_streams(claude: Any, end: str) -> None:
    fields, reason, stop, text = ENDS[end]
    found = events(claude, **fields)
    assert (found[-2].delta.stop_reason, found[-2].delta.stop_sequence) == (reason, stop)
    assert "".join(each.delta.text for each in _deltas(found)) == text


def test_the_context_window_is_a_reason(claude: Any) -> None:
    assert ask(claude, "window").stop_reason == "model_context_window_exceeded"
    assert ask(claude, "window", max_tokens=7).stop_reason == "max_tokens"


def test_cached_input_is_counted_apart(claude: Any) -> None:
    usage = ask(claude, "thinker").usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (7, 4, 7)


def test_a_prefix_that_was_seen_is_a_cache_read(claude: Any) -> None:
    long = [{"role": "user", "content": "Say it again. " * 20}]
    first, second = (ask(claude, messages=long, max_tokens=1).usage for _ in range(2))
    assert second.cache_read_input_tokens > first.cache_read_input_tokens
    assert second.input_tokens + second.cache_read_input_tokens == len("Say it again. ") * 20 + 17


def test_fast_is_said_in_the_usage(claude: Any) -> None:
    usage = ask(claude, "echo", speed="fast").usage
    assert (usage.service_tier, usage.speed) == ("priority", "fast")


def test_a_key_without_the_tier_gets_its_own(make: Callable[..., Any]) -> None:
    with make("tm_slow") as client:
        assert ask(client, "echo", speed="fast").usage.speed == "standard"


# Tools.


def test_tool_use(claude: Any) -> None:
    message = ask(claude, "tools", tools=[TOOL])
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use", "tool_use"]
    assert message.stop_reason == "tool_use"
    assert [block.input for block in message.content[1:]] == [{"city": "Rome"}, {"city": "Oslo"}, {}]
    assert [block.id for block in message.content[1:]] == ["toolu_a1", "toolu_b2", "toolu_c3"]


def test_tool_choice_any_calls_at_once(claude: Any) -> None:
    message = ask(claude, "tools", tools=[TOOL], tool_choice={"type": "any"})
    assert message.content[0].type == "tool_use"


def test_tool_choice_tool_calls_that_one(claude: Any) -> None:
    choice = {"type": "tool", "name": "time.of-day"}
    message = ask(claude, "tools", tools=[TOOL, OTHER], tool_choice=choice)
    assert message.content[0].name == "time.of-day"


def test_tool_choice_none_calls_nothing(claude: Any) -> None:
    message = ask(claude, "tools", tools=[TOOL], tool_choice={"type": "none"})
    assert ([block.type for block in message.content], message.stop_reason) == (["text"], "end_turn")


def test_one_call_where_parallel_is_disabled(claude: Any) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    assert len(ask(claude, "tools", tools=[TOOL], tool_choice=choice).content) == 1


def test_tool_use_is_streamed(claude: Any) -> None:
    found = events(claude, "tools", tools=[TOOL])
    starts = [each for each in found if each.type == "content_block_start"]
    assert [each.content_block.type for each in starts] == ["text", "tool_use", "tool_use", "tool_use"]
    assert [each.index for each in starts] == [0, 1, 2, 3]
    assert starts[1].content_block.input == {} and starts[1].content_block.name == "weather"
    parts = [each.delta.partial_json for each in _deltas(found) if each.index == 1]
    assert json.loads("".join(parts)) == {"city": "Rome"} and len(parts) == 2
    assert found[-2].delta.stop_reason == "tool_use"


def test_every_block_is_closed_before_the_next(claude: Any) -> None:
    kinds = [each.type for each in events(claude, "tools", tools=[TOOL])]
    blocks = [kind for kind in kinds if kind in ("content_block_start", "content_block_stop")]
    assert blocks == ["content_block_start", "content_block_stop"] * 4


def test_the_stream_helper_gathers_calls(claude: Any) -> None:
    with claude.messages.stream(model="tools", messages=USER, max_tokens=64, tools=[TOOL]) as stream:
        final = stream.get_final_message()
    assert [block.input for block in final.content[1:]] == [{"city": "Rome"}, {"city": "Oslo"}, {}]


def test_results_of_tools_are_answered(claude: Any) -> None:
    first = ask(claude, "tools", tools=[TOOL])
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]}
        for block in first.content[1:]
    ]
    turns = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    message = ask(claude, "tools", tools=[TOOL], messages=turns)
    assert (message.content[0].text, message.stop_reason) == ("It is sunny.", "end_turn")


def test_arguments_that_are_no_json_are_an_error(claude: Any) -> None:
    assert error(claude, "bad-arguments", tools=[TOOL]).status_code == 502


# Counting.


def count(client: Any, **fields: Any) -> int:
    """The tokens of a prompt."""
    found = client.messages.count_tokens(**{"model": "mock", "messages": USER, **fields})
    return int(found.input_tokens)


def test_count_is_what_a_message_uses(claude: Any, whole: Any) -> None:
    assert count(claude) == input_of(whole)


def test_count_takes_the_system_prompt(claude: Any) -> None:
    assert count(claude, system="abc") == count(claude) + len("<system>abc")


def test_count_takes_blocks(claude: Any) -> None:
    blocks = [{"role": "user", "content": [{"type": "text", "text": "Count."}]}]
    assert count(claude, messages=blocks) == 23


def test_count_takes_tools(claude: Any) -> None:
    assert count(claude, tools=[TOOL]) > count(claude) + len("weather")


def test_count_leaves_tools_out_that_may_not_be_called(claude: Any) -> None:
    assert count(claude, tools=[TOOL], tool_choice={"type": "none"}) == count(claude)


def test_count_of_a_conversation(claude: Any) -> None:
    turns = [*USER, {"role": "assistant", "content": "ab"}, *USER]
    assert count(claude, messages=turns) == len("<user>Count.<assistant>ab<user>Count.<assistant>")


def test_count_has_no_max_tokens(claude: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        count(claude, extra_body={"max_tokens": 3})


def test_count_of_a_model_that_is_not_served(claude: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nothing"):
        count(claude, model="nothing")


def test_models_are_listed(claude: Any) -> None:
    assert {each.id for each in claude.models.list()} == {"mock", *WRITTEN}


def test_models_are_paged(claude: Any) -> None:
    page = claude.models.list(limit=3)
    assert (len(page.data), page.has_more) == (3, True)
    assert len(list(page)) == 1 + len(WRITTEN)


def test_models_before_one(claude: Any) -> None:
    names = [each.id for each in claude.models.list()]
    assert [each.id for each in claude.models.list(before_id=names[3], limit=2).data] == names[1:3]


def test_a_model(claude: Any) -> None:
    found = claude.models.retrieve("mock")
    assert (found.id, found.type, found.display_name) == ("mock", "model", "mock")


def test_a_model_that_is_not_served(claude: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.models.retrieve("nothing")


def test_a_page_that_cannot_be(claude: Any) -> None:
    for fields in ({"limit": 0}, {"limit": 1001}, {"after_id": "nothing"}):
        with pytest.raises(anthropic.BadRequestError):
            claude.models.list(**fields)


# Errors.


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_name_their_field(claude: Any, name: str) -> None:
    fields, field = WRONG[name]
    caught = error(claude, **fields)
    assert isinstance(caught, anthropic.BadRequestError), caught
    body = caught.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(field), body


@pytest.mark.parametrize("name", STATUSES)
def test_statuses(make: Callable[..., Any], name: str) -> None:
    key, model, status, kind = STATUSES[name]
    with make(key) as client:
        caught = error(client, model)
    assert (caught.status_code, caught.body["error"]["type"]) == (status, kind), caught
    assert caught.body["type"] == "error" and set(caught.body) == {"type", "error", "request_id"}
    assert caught.request_id == caught.body["request_id"] == caught.response.headers["request-id"]


@pytest.mark.parametrize("name", STATUSES)
def test_statuses_before_a_stream(make: Callable[..., Any], name: str) -> None:
    key, model, status, _ = STATUSES[name]
    with make(key) as client:
        assert error(client, model, stream=True).status_code == status


def test_a_rate_limit_says_when(make: Callable[..., Any]) -> None:
    with make("tm_limited") as client:
        ask(client, "echo")
        caught = error(client, "echo")
    assert isinstance(caught, anthropic.RateLimitError)
    assert caught.body["error"]["type"] == "rate_limit_error"
    assert 1 <= int(caught.response.headers["retry-after"]) <= 60


def test_a_full_queue_says_when(claude: Any) -> None:
    assert error(claude, "full").response.headers["retry-after"] == "1"


def test_the_client_tries_a_full_queue_again(make: Callable[..., Any]) -> None:
    with make(max_retries=1) as client:
        begun_s = time.monotonic()
        assert error(client, "full").status_code == 529
    assert time.monotonic() - begun_s > 0.4


def test_an_error_in_the_middle_of_a_stream(claude: Any) -> None:
    found: list[Any] = []
    with pytest.raises(anthropic.APIStatusError, match="in the middle") as caught:
        found += iter(ask(claude, "cut", stream=True))
    assert caught.value.body["error"]["type"] == "api_error"
    assert caught.value.body["request_id"].startswith("req_")


def test_no_key(url: str) -> None:
    """The client sends nothing without one."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/messages", b"{}"), timeout=30)
    body = json.loads(caught.value.read())
    assert (caught.value.code, body["error"]["type"]) == (401, "authentication_error")


def test_a_key_as_a_bearer_token(url: str) -> None:
    with anthropic.Anthropic(base_url=url, auth_token="tm_good", max_retries=0) as client:
        assert ask(client).stop_reason == "end_turn"


def test_an_old_version_is_taken(claude: Any) -> None:
    assert ask(claude, extra_headers={"anthropic-version": "2023-01-01"}).type == "message"


def test_a_version_that_never_was(claude: Any) -> None:
    caught = error(claude, extra_headers={"anthropic-version": "newest"})
    assert caught.status_code == 400 and "anthropic-version" in str(caught)


def test_a_body_that_is_too_large(claude: Any) -> None:
    caught = error(claude, messages=[{"role": "user", "content": "x" * (1 << 20)}])
    assert (caught.status_code, caught.body["error"]["type"]) == (413, "request_too_large")


def test_a_path_that_is_not_there(claude: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.post("/v1/messages/nothing", cast_to=object, body={})
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_a_method_that_is_not_there(claude: Any) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        claude.get("/v1/messages", cast_to=object)
    assert caught.value.status_code == 405 and caught.value.response.headers["allow"] == "POST"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
