"""Whatever an endpoint does, the client ends soon, with one error that names it and the next step."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

from tests.server.fake_endpoint import (
    STREAM_HEAD,
    Answer,
    Asked,
    FakeEndpoint,
    chat_events,
    chunk,
    fake_endpoint,
    json_answer,
    stream,
    whole,
)
from tokenmill.cli.arguments import Parser
from tokenmill.cli.remote import add_endpoint_flags, open_remote_model
from tokenmill.core import (
    EndpointError,
    Message,
    NotFoundError,
    ResourceError,
    SamplingParams,
    TokenmillError,
    Usage,
    UsageError,
)
from tokenmill.remote import (
    Passing,
    RemoteClient,
    RemoteConfig,
    RemoteModel,
    RetryConfig,
    TimedPiece,
    Timeouts,
    parse_endpoint,
    served_models,
)
from tokenmill.wire import AnthropicWriter, Begin, Call, Finish, Piece, TextPiece, ToolPiece, Totals

KEY = "sk-very-secret"
PLAIN = SamplingParams()
HI = (Message(role="user", content="Hi"),)
QUICK = RetryConfig(base_s=0.001, cap_s=0.01)
NO_RETRY = RetryConfig(max_tries=1)
TIMEOUTS = Timeouts(connect_s=1.0, first_byte_s=0.4, total_s=0.8)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setenv("TEST_KEY", KEY)
    with fake_endpoint() as found:
        yield found


def model(fake: FakeEndpoint, retry: RetryConfig = NO_RETRY, **more: Any) -> RemoteModel:
    config = RemoteConfig(retry=retry, concurrency=more.pop("concurrency", 4))
    endpoint = parse_endpoint(fake.url, "m", key_env="TEST_KEY", timeouts=TIMEOUTS, **more)
    return RemoteModel(endpoint, config)


def failure(call: Callable[[], object], fake: FakeEndpoint) -> TokenmillError:
    """The error of a call, which came in time, names the endpoint and the next step, and has no key."""
    began = time.monotonic()
    with pytest.raises(TokenmillError) as caught:
        call()
    assert time.monotonic() - began < 5.0
    error = caught.value
    assert error.message.startswith(f"{fake.url}/v1: ") and error.message.count(fake.url) == 1
    assert error.hint and error.message.isprintable() and len(error.message) < 600
    assert KEY[:8] not in str(error) and KEY not in repr(error)
    return error


# Answers that are good.


def test_a_stream_is_timed_as_it_arrives(fake: FakeEndpoint) -> None:
    events = chat_events(["a", "b"])
    fake.answers = [stream([*events[:2], 0.15, *events[2:]])]

    async def run() -> list[TimedPiece]:
        async with RemoteClient(model(fake).endpoint) as client:
            call = Call(model="m", messages=HI, stream=True, include_usage=True)
            return [piece async for piece in client.stream(call)]

    found = asyncio.run(run())
    texts = [(at_s, piece.text) for at_s, piece in found if isinstance(piece, TextPiece)]
    assert [text for _, text in texts] == ["a", "b"] and 0.12 < texts[1][0] - texts[0][0] < 0.6
    assert [type(piece) for _, piece in found] == [Begin, TextPiece, TextPiece, Finish, Totals]


def test_a_slow_reader_does_not_move_the_times(fake: FakeEndpoint) -> None:
    fake.answers = [stream([event for event in chat_events(["a", "b", "c"])])]

    async def run() -> list[float]:
        times = []
        async with RemoteClient(model(fake).endpoint) as client:
            async for at_s, _ in client.stream(Call(model="m", messages=HI, stream=True)):
                times.append(at_s)
                await asyncio.sleep(0.05)
        return times

    times = asyncio.run(run())
    assert times[-1] - times[0] < 0.05


def test_answers_come_in_order_and_so_many_at_a_time(fake: FakeEndpoint) -> None:
    def respond(asked: Asked) -> Answer:
        text = asked.json["messages"][0]["content"]
        return stream([0.02 if int(text) % 3 else 0.05, *chat_events([text])])

    fake.respond = respond
    found = model(fake).chat([[Message(role="user", content=str(at))] for at in range(20)], PLAIN)
    assert [completion.text for completion in found] == [str(at) for at in range(20)]
    assert fake.most_open == 4 == fake.num_connections
    assert all(completion.usage.num_output_tokens == 3 for completion in found)
    assert all(0.0 < completion.ttft_s <= completion.total_s < 1.0 for completion in found)
    assert {asked.headers["authorization"] for asked in fake.asked} == {f"Bearer {KEY}"}


def test_n_completions_are_n_requests_with_seeds_of_their_own(fake: FakeEndpoint) -> None:
    found = model(fake).chat([HI], SamplingParams(n=3, seed=5, temperature=1.0))
    assert [completion.index for completion in found] == [0, 1, 2]
    assert sorted(asked.json["seed"] for asked in fake.asked) == [5, 6, 7]


def test_it_may_be_called_where_a_loop_runs(fake: FakeEndpoint) -> None:
    async def notebook() -> str:
        return model(fake).chat([HI], PLAIN)[0].text

    assert asyncio.run(notebook()) == "Hi"


def test_a_character_in_two_chunks_and_lines_in_many(fake: FakeEndpoint) -> None:
    data = b"".join(chat_events(["h\u00e9\u4e16"])).replace(b"\\u00e9", "\u00e9".encode())
    data = b": hello\r\n\r\n" + data.replace(b"\n", b"\r\n")
    fake.answers = [stream([data[at : at + 1] for at in range(len(data))])]
    assert model(fake).chat([HI], PLAIN)[0].text == "h\u00e9\u4e16"


def test_tool_calls_are_read(fake: FakeEndpoint) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    events = [
        b"data: "
        + json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [each]}}]}).encode()
        + b"\n\n"
        for each in (call, rest)
    ]
    fake.answers = [stream([*events, *chat_events([], finish="tool_calls")])]
    tool = {"type": "function", "function": {"name": "f"}}
    (completion,) = model(fake).complete([Call(model="m", messages=HI, tools=(tool,))])
    (found,) = completion.tool_calls
    assert (found.name, found.arguments, completion.finish_reason) == ("f", '{"a": 1}', "completed")


def test_anthropic_has_its_own_path_headers_and_events(fake: FakeEndpoint) -> None:
    usage = Usage(num_prompt_tokens=9, num_cached_tokens=4, num_output_tokens=2)
    writer = AnthropicWriter(usage.num_prompt_tokens, usage.num_cached_tokens)
    start: list[Piece] = [Begin("a", "m"), TextPiece("Hi"), ToolPiece(0, "t", "f")]
    pieces = [*start, Finish("completed"), Totals(usage)]
    fake.answers = [
        stream([*map(writer.write, pieces), b'event: ping\ndata: {"type": "ping"}\n\n', writer.end()])
    ]
    (found,) = model(fake, api="anthropic").chat([HI], PLAIN)
    assert (found.text, found.tool_calls[0].arguments, found.usage) == ("Hi", "{}", usage)
    (asked,) = fake.asked
    assert asked.path == "/v1/messages" and asked.headers["x-api-key"] == KEY
    assert asked.headers["anthropic-version"] == "2023-06-01" and "authorization" not in asked.headers


# Failures that may pass.


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again(fake: FakeEndpoint, status: int) -> None:
    fake.answers = [json_answer({"error": {"message": "busy"}}, status)] * 2
    assert model(fake, QUICK).chat([HI], PLAIN)[0].text == "Hi"
    assert len(fake.asked) == 3


def test_retry_after_is_kept(fake: FakeEndpoint) -> None:
    fake.answers = [json_answer({}, 429, Retry_After="0.3")]
    began = time.monotonic()
    assert model(fake, QUICK).chat([HI], PLAIN)[0].text == "Hi"
    assert 0.3 <= time.monotonic() - began < 2.0
    fake.answers = [json_answer({}, 429, Retry_After="9999")]
    assert "9999 s" in failure(lambda: model(fake, QUICK).chat([HI], PLAIN), fake).hint


def test_tries_and_the_budget_end(fake: FakeEndpoint) -> None:
    fake.respond = lambda asked: json_answer({"error": "busy"}, 503)
    error = failure(lambda: model(fake, QUICK).chat([HI], PLAIN), fake)
    assert "busy" in error.message and "tried 6 times" in error.message and len(fake.asked) == 6
    fake.asked.clear()
    budget = RetryConfig(base_s=0.001, cap_s=0.001, max_tries=50, spare=3, share=0.0)
    failure(lambda: model(fake, budget).chat([HI] * 4, PLAIN), fake)
    assert len(fake.asked) <= 4 + 3


def test_a_cut_stream_is_asked_for_again(fake: FakeEndpoint) -> None:
    fake.answers = [stream(chat_events(["lost"])[:2], ends=False), stream(chat_events(["lost"])[:2])]
    assert model(fake, QUICK).chat([HI], PLAIN)[0].text == "Hi"


def test_a_kept_connection_that_was_closed_costs_nothing(fake: FakeEndpoint) -> None:
    fake.answers = [Answer(script=stream(chat_events(["a"])).script, keep=False)] * 3
    found = model(fake, NO_RETRY, concurrency=1).chat([HI] * 3, PLAIN)
    assert [completion.text for completion in found] == ["a"] * 3


def test_what_is_wrong_is_asked_once(fake: FakeEndpoint) -> None:
    fake.respond = lambda asked: json_answer({"error": {"message": f"no, {KEY}"}}, 400)
    assert isinstance(failure(lambda: model(fake, QUICK).chat([HI], PLAIN), fake), UsageError)
    assert len(fake.asked) == 1


# Failures of every other kind.

_EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n'
_BAD: dict[str, tuple[Answer, type[TokenmillError], str]] = {
    "401": (json_answer({"error": {"message": f"bad {KEY}"}}, 401), UsageError, "TEST_KEY"),
    "404": (json_answer({"detail": "Not Found"}, 404), NotFoundError, "Not Found"),
    "page": (whole(b"<html>hello</html>", kind="text/html"), EndpointError, "text/html"),
    "json": (json_answer({"choices": []}), EndpointError, "not a stream"),
    "gzip": (whole(b"x", kind="text/event-stream", Content_Encoding="gzip"), EndpointError, "gzip"),
    "moved": (whole(b"", 301, Location="http://elsewhere"), EndpointError, "301"),
    "no http": (Answer(script=[b"SSH-2.0-x\r\n"]), EndpointError, "no HTTP"),
    "closed": (Answer(script=[], keep=False), Passing, "closed the connection before an answer"),
    "reset": (stream([_EVENT], ends=False, abort=True), Passing, "closed the connection during"),
    "cut": (stream([_EVENT], ends=False), Passing, "closed the connection during"),
    "half": (stream([_EVENT]), Passing, "ended before its answer did"),
    "nonsense": (stream([b"data: {nonsense\n\n"]), EndpointError, "makes no sense"),
    "key": (stream([b"data: " + b"{" * 190 + KEY.encode() + b"\n\n"]), EndpointError, "makes no sense"),
    "half a character": (stream([b'data: {"choices": "\xe4\xb8"}\n\n']), EndpointError, "makes no sense"),
    "type": (stream([b'data: {"choices": 3}\n\n']), EndpointError, "makes no sense"),
    "deep": (stream([b"data: " + b"[" * 99999 + b"\n\n"]), EndpointError, "makes no sense"),
    "error": (stream([b'data: {"error": {"message": "out of memory"}}\n\n']), EndpointError, "out of memory"),
    "no usage": (stream(chat_events(["x"], usage=False)), EndpointError, "how many tokens"),
    "silent": (Answer(script=[3.0]), ResourceError, "no byte of an answer for over 0.4 s"),
    "stuck": (stream([_EVENT, 3.0]), ResourceError, "the answer took over 0.8 s"),
    "endless": (stream([_EVENT, 0.01] * 300), ResourceError, "the answer took over 0.8 s"),
    "headers": (Answer(script=[b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n" * 999] * 99]), EndpointError, "headers"),
    "one header": (Answer(script=[b"HTTP/1.1 200 OK\r\nX: ", *[b"x" * 9999] * 99]), EndpointError, "headers"),
    "long chunk": (Answer(script=[STREAM_HEAD, b"fffffffffffffffff\r\n"]), EndpointError, "no HTTP"),
}


@pytest.mark.parametrize("case", _BAD)
def test_a_bad_answer_is_one_clear_error(fake: FakeEndpoint, case: str) -> None:
    answer, kind, words = _BAD[case]
    fake.respond = lambda asked: answer
    error = failure(lambda: model(fake).chat([HI] * 8, PLAIN), fake)
    assert isinstance(error, kind) and words in str(error), error


def test_nobody_there(fake: FakeEndpoint) -> None:
    endpoint = parse_endpoint("http://127.0.0.1:1", "m")
    with pytest.raises(Passing, match=r"127.0.0.1:1/v1: no connection .*; is it running there\?"):
        RemoteModel(endpoint, RemoteConfig(retry=NO_RETRY)).chat([HI], PLAIN)


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 60000, b"x" * 60000, _EVENT * 900])
def test_endless_lines_and_text_take_bounded_memory(fake: FakeEndpoint, piece: bytes) -> None:
    def flood() -> Iterator[bytes | float]:
        yield STREAM_HEAD
        while True:
            yield chunk(piece)

    fake.respond = lambda asked: Answer(script=flood())
    tracemalloc.start()
    failure(lambda: model(fake).chat([HI], PLAIN), fake)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def test_a_reader_that_stops_leaves_nothing_open(fake: FakeEndpoint) -> None:
    fake.respond = lambda asked: stream([_EVENT, 0.01] * 300)

    async def run() -> None:
        async with RemoteClient(model(fake).endpoint) as client, AsyncExitStack() as stack:
            call = Call(model="m", messages=HI, stream=True)
            pieces = await stack.enter_async_context(aclosing(client.stream(call)))
            await anext(pieces)
        while fake.num_open:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 2.0))


# Scores.


def scoring(asked: Asked) -> Answer:
    """Tokens are characters; the log-probability of each is minus its place."""
    prompt, echo = asked.json["prompt"], asked.json.get("echo")
    text = (prompt if echo else "") + "!"
    logprobs = None
    if asked.json.get("logprobs"):
        values = [None, *(-float(at) for at in range(1, len(text)))] if echo else [-9.0]
        logprobs = {"tokens": list(text), "token_logprobs": values, "top_logprobs": None}
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 1}
    return json_answer({"id": "a", "choices": [choice], "usage": usage})


def test_scores(fake: FakeEndpoint) -> None:
    fake.respond = scoring
    found = model(fake).score(["ab", "ab", ""], ["cd", "e", "xyz"])
    assert [score.logprobs for score in found] == [(-2.0, -3.0), (-2.0,), (-1.0, -2.0)]
    assert len(fake.asked) == 4, "each different context is counted once"


def test_an_endpoint_that_cannot_score_says_so(fake: FakeEndpoint) -> None:
    def deaf(asked: Asked) -> Answer:
        return scoring(Asked(**{**vars(asked), "body": json.dumps({**asked.json, "echo": False}).encode()}))

    fake.respond = deaf
    error = failure(lambda: model(fake).score(["ab"], ["cd"]), fake)
    assert isinstance(error, UsageError) and "no log-probabilities of a prompt" in error.message
    fake.respond = lambda asked: json_answer({"detail": "Not Found"}, 404)
    assert "echo" in failure(lambda: model(fake).score(["ab"], ["cd"]), fake).hint
    fake.respond = lambda asked: scoring(Asked(**{**vars(asked), "body": b'{"prompt": "a", "logprobs": 1}'}))
    failure(lambda: model(fake).score([""], ["a"]), fake)
    assert "scores no text" in failure(lambda: model(fake, api="anthropic").score(["a"], ["b"]), fake).message


def test_logprobs_of_answers_are_refused(fake: FakeEndpoint) -> None:
    assert "logprobs" in failure(lambda: model(fake).chat([HI], SamplingParams(logprobs=1)), fake).hint


# URLs and keys.


@pytest.mark.parametrize(
    ("url", "base", "api"),
    [
        ("http://h:8000", "http://h:8000/v1", "openai"),
        ("http://h:8000/v1/", "http://h:8000/v1", "openai"),
        ("http://h:8000/v1/chat/completions", "http://h:8000/v1", "openai"),
        ("https://h/v1/messages", "https://h/v1", "anthropic"),
        ("http://[::1]:80/api", "http://[::1]/api/v1", "openai"),
        ("https://h/openai/v1beta", "https://h/openai/v1beta", "openai"),
    ],
)
def test_urls_as_people_write_them(url: str, base: str, api: str) -> None:
    endpoint = parse_endpoint(url, "m")
    assert (endpoint.url, endpoint.api) == (base, api)


@pytest.mark.parametrize(
    "url",
    [
        "h:8000",
        "ftp://h",
        "http://",
        "http://u:p@h",
        "http://h:99999",
        "http://h?x=1",
        "http://h/\r\nX: y",
        "http://h\u00e9",
    ],
)
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(UsageError):
        parse_endpoint(url, "m")


def test_a_key_goes_only_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert parse_endpoint("https://elsewhere/v1", "m").key == ""
    ours = parse_endpoint("https://api.openai.com", "m")
    assert ours.headers["Authorization"] == f"Bearer {KEY}" and KEY not in repr(ours)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(UsageError, match="ANTHROPIC_API_KEY is not set"):
        parse_endpoint("https://api.anthropic.com", "m")
    monkeypatch.setenv("BAD", "a\r\nX: y")
    with pytest.raises(UsageError, match="the key in BAD"):
        parse_endpoint("http://h", "m", key_env="BAD")


def test_models_are_listed(fake: FakeEndpoint) -> None:
    fake.respond = lambda asked: json_answer({"object": "list", "data": [{"id": "a"}, {"id": "b"}]})
    assert served_models(model(fake).endpoint) == ["a", "b"]
    assert fake.asked[0].path == "/v1/models"


def test_flags_name_a_model_or_the_only_one_is_taken(fake: FakeEndpoint) -> None:
    parser = Parser()
    add_endpoint_flags(parser)
    names = ["only"]
    fake.respond = lambda asked: json_answer({"data": [{"id": name} for name in names]})
    assert open_remote_model(fake.url, parser.parse_args([])).endpoint.model == "only"
    flags = [
        "--endpoint-model",
        "x",
        "--api",
        "anthropic",
        "--key-env",
        "TEST_KEY",
        "--no-sampling",
        "--concurrency",
        "3",
    ]
    found = open_remote_model(fake.url, parser.parse_args(flags))
    assert (found.endpoint.model, found.endpoint.api, found.endpoint.key) == ("x", "anthropic", KEY)
    assert (found.endpoint.with_sampling, found.config.concurrency) == (False, 3)
    names.append("other")
    with pytest.raises(UsageError, match="serves 2 models; name one: only, other"):
        open_remote_model(fake.url, parser.parse_args([]))
