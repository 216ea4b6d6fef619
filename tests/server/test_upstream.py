"""An endpoint as a deployment, over real sockets: what is sent, what comes back, what it is said to cost."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from benchmarks.reliability import s9
from tests.server.fake_endpoint import (
    Answer,
    Asked,
    FakeEndpoint,
    chat_events,
    fake_endpoint,
    json_answer,
    stream,
)
from tokenmill.core import (
    EndpointError,
    ExpiredError,
    Message,
    ResourceError,
    SamplingParams,
    TokenmillError,
    Usage,
    UsageError,
)
from tokenmill.router import BusyError, Job, Price, Spent, UpstreamBackend, UpstreamConfig
from tokenmill.wire import AnthropicWriter, Begin, Call, Finish, Piece, TextPiece, ToolPiece, Totals

KEY = "sk-very-secret"
JOB = Job(request_id="req-1")
HI = Call(model="alias", messages=(Message(role="user", content="Hi"),))
PRICE = Price(input_usd=1.0, output_usd=10.0, cached_usd=0.1)
USAGE = Usage(num_prompt_tokens=7, num_cached_tokens=0, num_output_tokens=3)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setenv("TEST_KEY", KEY)
    with fake_endpoint() as found:
        yield found


@asynccontextmanager
async def upstream(fake: FakeEndpoint, **more: Any) -> AsyncIterator[UpstreamBackend]:
    fields = {
        "name": "up",
        "url": fake.url,
        "model": "their-model",
        "key_env": "TEST_KEY",
        "price": PRICE,
        "connect_s": 5.0,
        "first_token_s": 1.0,
        "between_s": 0.5,
        "total_s": 3.0,
    }
    backend = UpstreamBackend(UpstreamConfig(**{**fields, **more}))
    try:
        yield backend
    finally:
        await backend.close()


def asked(
    fake: FakeEndpoint, call: Call = HI, job: Job = JOB, **more: Any
) -> tuple[list[Piece], TokenmillError | None, Spent]:
    """The pieces of an answer, the error at its end, and what it used."""

    async def run() -> tuple[list[Piece], TokenmillError | None, Spent]:
        async with upstream(fake, **more) as backend:
            attempt = backend.start(await backend.prepare(call), job)
            pieces: list[Piece] = []
            error: TokenmillError | None = None
            try:
                async for piece in attempt:
                    pieces.append(piece)
            except TokenmillError as raised:
                error = raised
            return pieces, error, await attempt.spent()

    return asyncio.run(asyncio.wait_for(run(), 20.0))


def with_backend(fake: FakeEndpoint, work: Callable[[UpstreamBackend], Awaitable[None]], **more: Any) -> None:
    async def run() -> None:
        async with upstream(fake, **more) as backend:
            await work(backend)

    asyncio.run(asyncio.wait_for(run(), 20.0))


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


# What goes out and what comes in.


def test_an_openai_upstream(fake: FakeEndpoint) -> None:
    call = Call(
        model="alias",
        messages=(Message(role="user", content="Hi"),),
        user="anna",
        metadata={"team": "x"},
        tier="fast",
    )
    pieces, error, spent = asked(fake, call)
    assert error is None and text_of(pieces) == "Hi"
    assert isinstance(pieces[0], Begin) and (pieces[0].id, pieces[0].model) == ("req-1", "their-model")
    assert isinstance(pieces[-2], Finish) and isinstance(pieces[-1], Totals)
    assert spent.usage == USAGE and spent.is_exact and spent.finish == "completed"
    assert spent.cost_nano_usd == 7 * 1000 + 3 * 10_000 and spent.nanoseconds > 0
    (request,) = fake.asked
    assert request.headers["authorization"] == f"Bearer {KEY}"
    sent = request.json
    assert sent["model"] == "their-model" and sent["stream_options"] == {"include_usage": True}
    assert not {"user", "metadata", "service_tier"} & set(sent)


def test_an_anthropic_upstream(fake: FakeEndpoint) -> None:
    writer = AnthropicWriter()
    tools = [ToolPiece(0, "c1", "look"), ToolPiece(0, arguments='{"a": 1}')]
    usage = Usage(num_prompt_tokens=12, num_cached_tokens=5, num_output_tokens=9)
    said: list[Piece] = [Begin("msg_1", "x"), TextPiece("Hi"), *tools, Finish("completed"), Totals(usage)]
    fake.answers = [stream([*map(writer.write, said), writer.end()])]
    pieces, error, spent = asked(fake, api="anthropic")
    assert error is None and pieces[1:] == [TextPiece("Hi"), *tools, Finish("completed"), pieces[-1]]
    assert spent.usage == usage and spent.cost_nano_usd == 7 * 1000 + 5 * 100 + 9 * 10_000
    assert fake.asked[0].headers["x-api-key"] == KEY and fake.asked[0].path == "/v1/messages"


def test_the_bound_of_a_prompt_is_more_than_its_bytes(fake: FakeEndpoint) -> None:
    async def work(backend: UpstreamBackend) -> None:
        text = "日本語 text " * 100
        call = Call(
            model="a",
            messages=(Message(role="user", content=text),),
            params=SamplingParams(n=2, max_tokens=50),
        )
        prepared = await backend.prepare(call)
        assert len(text.encode()) < prepared.num_prompt_tokens < 1.2 * len(text.encode()) + 300
        assert prepared.max_output_tokens == 100 and prepared.call is call

    with_backend(fake, work)


def test_what_the_api_cannot_be_asked_is_told_before(fake: FakeEndpoint) -> None:
    async def work(backend: UpstreamBackend) -> None:
        call = Call(model="a", messages=HI.messages, params=SamplingParams(seed=3))
        with pytest.raises(UsageError, match="seed"):
            await backend.prepare(call)
        with pytest.raises(UsageError, match="no embeddings"):
            await backend.embed(["x"], JOB)

    with_backend(fake, work, api="anthropic")
    assert not fake.asked


def test_a_key_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UsageError, match="NOT_SET is not set"):
        UpstreamBackend(UpstreamConfig(name="up", url="http://127.0.0.1:1", model="m", key_env="NOT_SET"))


def test_vectors(fake: FakeEndpoint) -> None:
    data = [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2.5]}]
    fake.answers = [
        json_answer({"data": data, "usage": {"prompt_tokens": 6}}),
        json_answer({"data": data[:1]}),
        json_answer({"error": {"message": "busy"}}, 429, Retry_After="7"),
    ]

    async def work(backend: UpstreamBackend) -> None:
        found = await backend.embed(["a", "b"], JOB)
        assert found.vectors == ((1.0, 2.5), (3.0, 4.0)) and found.usage.num_prompt_tokens == 6
        assert found.cost_nano_usd == 6000
        with pytest.raises(EndpointError, match="1 vectors for 2 texts"):
            await backend.embed(["a", "b"], JOB)
        with pytest.raises(BusyError) as caught:
            await backend.embed(["a"], JOB)
        assert caught.value.wait_s == 7.0

    with_backend(fake, work)
    assert fake.asked[0].path == "/v1/embeddings"
    assert fake.asked[0].json == {"model": "their-model", "input": ["a", "b"], "encoding_format": "float"}


# What goes wrong.


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UsageError),
        (413, UsageError),
        (401, EndpointError),
        (403, EndpointError),
        (404, EndpointError),
        (429, BusyError),
        (503, BusyError),
        (529, BusyError),
        (500, EndpointError),
        (501, EndpointError),
        (302, EndpointError),
    ],
)
def test_a_refusal_costs_nothing_and_says_whose_fault_it_is(
    fake: FakeEndpoint, status: int, kind: type[TokenmillError]
) -> None:
    fake.answers = [json_answer({"error": {"message": f"said with {KEY}"}}, status)]
    pieces, error, spent = asked(fake)
    assert type(error) is kind and not pieces
    assert str(error).startswith("up") and KEY not in str(error) and fake.url not in str(error)
    assert spent.usage.num_total_tokens == spent.cost_nano_usd == 0
    assert spent.finish == "failed" and spent.is_exact


def test_who_is_not_there_costs_nothing(fake: FakeEndpoint) -> None:
    _, error, spent = asked(fake, url="http://127.0.0.1:1")
    assert type(error) is EndpointError and error.message == "up: no connection"
    assert "http://127.0.0.1:1/v1: no connection" in str(error.__cause__), "for whoever runs the server"
    assert spent.cost_nano_usd == 0 and spent.is_exact


def test_what_was_sent_and_never_answered_may_have_cost(fake: FakeEndpoint) -> None:
    fake.answers = [Answer(script=[], keep=False)]
    call = Call(model="a", messages=(Message(role="user", content="x" * 400),))
    _, error, spent = asked(fake, call)
    assert isinstance(error, EndpointError)
    assert spent.usage.num_prompt_tokens == 100 and spent.cost_nano_usd == 100_000 and not spent.is_exact


def test_a_cut_stream_is_an_error_and_counted_by_its_pieces(fake: FakeEndpoint) -> None:
    for ends in (True, False):
        fake.answers = [stream(chat_events(["abcd" * 3, "e"])[:3], ends=ends)]
        pieces, error, spent = asked(fake)
        assert isinstance(error, EndpointError) and text_of(pieces) == "abcd" * 3 + "e"
        assert not any(isinstance(piece, Finish) for piece in pieces)
        assert spent.usage.num_output_tokens == 4 and not spent.is_exact and spent.finish == "failed"
        assert spent.cost_nano_usd == spent.usage.num_prompt_tokens * 1000 + 4 * 10_000


def test_what_breaks_after_the_end_takes_nothing_from_the_answer(fake: FakeEndpoint) -> None:
    events = chat_events(["Hi"])
    for num_events, is_exact in ((3, False), (4, True)):
        fake.answers = [stream(events[:num_events], ends=False, abort=True)]
        pieces, error, spent = asked(fake)
        assert error is None and text_of(pieces) == "Hi" and spent.finish == "completed"
        assert spent.is_exact == is_exact and isinstance(pieces[-1], Totals) == is_exact


def test_usage_that_does_not_come_is_not_waited_for_long(fake: FakeEndpoint) -> None:
    fake.answers = [stream([*chat_events(["Hi"])[:3], 5.0])]
    pieces, error, spent = asked(fake)
    assert error is None and isinstance(pieces[-1], Finish) and not spent.is_exact
    assert spent.nanoseconds < 2e9


def test_one_of_two_answers_is_none(fake: FakeEndpoint) -> None:
    fake.answers = [stream(chat_events(["Hi"]))]
    call = Call(model="a", messages=HI.messages, params=SamplingParams(n=2))
    _, error, spent = asked(fake, call)
    assert isinstance(error, EndpointError) and "1 answers have no end" in str(error)
    assert spent.finish == "failed" and not spent.is_exact


def test_an_answer_that_was_withheld_is_an_error_that_was_billed(fake: FakeEndpoint) -> None:
    fake.answers = [stream(chat_events(["Hi"], finish="content_filter"))]
    _, error, spent = asked(fake)
    assert isinstance(error, EndpointError) and "content_filter" in str(error)
    assert spent.usage == USAGE and spent.is_exact and spent.finish == "failed"


@pytest.mark.parametrize("at", [1, 2])
def test_an_error_in_the_stream(fake: FakeEndpoint, at: int) -> None:
    said = {"error": {"type": "rate_limit_error", "message": "slow down", "code": 429}}
    fake.answers = [stream([*chat_events(["Hi"])[:at], b"data: " + json.dumps(said).encode() + b"\n\n"])]
    _, error, spent = asked(fake)
    assert isinstance(error, BusyError) and "slow down" in str(error) and not spent.is_exact


# Time.


def test_signs_of_life_are_no_tokens(fake: FakeEndpoint) -> None:
    pings: list[bytes | float] = [piece for _ in range(40) for piece in (b": ping\n\n", 0.1)]
    fake.answers = [stream([*chat_events([])[:1], *pings])]
    _, error, spent = asked(fake)
    assert isinstance(error, EndpointError) and "no token in 1 s" in str(error)
    assert spent.finish == "failed" and 0.9e9 < spent.nanoseconds < 2e9
    fake.answers = [stream([*chat_events(["x"])[:2], *pings])]
    _, error, spent = asked(fake)
    assert isinstance(error, EndpointError) and "nothing came for 0.5 s" in str(error)


def test_the_whole_has_a_limit(fake: FakeEndpoint) -> None:
    drops: list[bytes | float] = [piece for _ in range(40) for piece in (chat_events(["x"])[1], 0.1)]
    fake.answers = [stream([chat_events([])[0], *drops])]
    pieces, error, _ = asked(fake, total_s=0.6)
    assert isinstance(error, EndpointError) and "no end in 0.6 s" in str(error) and text_of(pieces)


def test_the_time_of_the_request_is_its_own(fake: FakeEndpoint) -> None:
    fake.answers = [stream([5.0])]
    _, error, spent = asked(fake, job=Job(request_id="r", timeout_s=0.3))
    assert isinstance(error, ExpiredError) and spent.finish == "expired"


def test_a_slow_reader_is_not_the_upstreams_fault(fake: FakeEndpoint) -> None:
    fake.answers = [stream(chat_events([f"{at} " for at in range(300)]))]

    async def work(backend: UpstreamBackend) -> None:
        attempt = backend.start(await backend.prepare(HI), JOB)
        texts = []
        async for piece in attempt:
            if isinstance(piece, TextPiece):
                texts.append(piece.text)
                await asyncio.sleep(0.8 if len(texts) == 10 else 0.0)
        assert texts == [f"{at} " for at in range(300)] and (await attempt.spent()).is_exact

    with_backend(fake, work)


# Who leaves.


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_a_client_that_leaves_is_counted_and_the_upstream_is_let_go(fake: FakeEndpoint, how: str) -> None:
    slow: list[bytes | float] = [piece for event in chat_events(["x"] * 400) for piece in (event, 0.02)]
    fake.answers = [stream(slow)]

    async def work(backend: UpstreamBackend) -> None:
        attempt = backend.start(await backend.prepare(HI), JOB)
        num_texts = 0
        async for piece in attempt:
            num_texts += isinstance(piece, TextPiece)
            if num_texts == 3:
                if how == "break":
                    break
                attempt.cancel()
        spent = await asyncio.wait_for(attempt.spent(), 1.0)
        assert spent.finish == "cancelled" and not spent.is_exact
        assert 3 <= spent.usage.num_output_tokens <= 6 and spent.cost_nano_usd > 0
        async with asyncio.timeout(3.0):
            while fake.num_open:
                await asyncio.sleep(0.02)

    with_backend(fake, work)


def test_leaving_before_it_begins_costs_nothing(fake: FakeEndpoint) -> None:
    async def work(backend: UpstreamBackend) -> None:
        attempt = backend.start(await backend.prepare(HI), JOB)
        attempt.cancel()
        spent = await attempt.spent()
        assert spent.finish == "cancelled" and spent.is_exact and spent.usage.num_total_tokens == 0
        assert [piece async for piece in attempt] == []

    with_backend(fake, work)
    assert not fake.asked


def test_an_answer_that_nobody_reads_ends(fake: FakeEndpoint) -> None:
    fake.answers = [stream(chat_events(["x"] * 500))]

    async def work(backend: UpstreamBackend) -> None:
        attempt = backend.start(await backend.prepare(HI), JOB)
        await asyncio.sleep(0.2)
        attempt.cancel()
        assert (await asyncio.wait_for(attempt.spent(), 1.0)).finish == "cancelled"

    with_backend(fake, work)


def test_it_holds_so_many_and_drains(fake: FakeEndpoint) -> None:
    fake.respond = lambda asked: stream([0.2, *chat_events(["Hi"])])

    async def work(backend: UpstreamBackend) -> None:
        prepared = await backend.prepare(HI)
        attempts = [backend.start(prepared, JOB) for _ in range(2)]
        with pytest.raises(ResourceError, match="2 calls open"):
            backend.start(prepared, JOB)
        await backend.drain(3.0)
        assert backend.state == "drained"
        assert [(await each.spent()).finish for each in attempts] == ["completed", "completed"]
        with pytest.raises(ResourceError, match="no more calls"):
            backend.start(prepared, JOB)

    with_backend(fake, work, max_open=2)


def test_answers_are_never_mixed_up(fake: FakeEndpoint) -> None:
    """Calls are given up at every moment; those that are not get the words of their own request."""

    def respond(asked: Asked) -> Answer:
        text = asked.json["messages"][0]["content"]
        return stream([piece for event in chat_events([text] * 5) for piece in (event, 0.002)])

    fake.respond = respond

    async def work(backend: UpstreamBackend) -> None:
        async def one(at: int) -> bool:
            call = Call(model="a", messages=(Message(role="user", content=f"<{at}>"),))
            attempt = backend.start(await backend.prepare(call), JOB)
            if at % 2:
                asyncio.get_running_loop().call_later(at % 20 / 1000, attempt.cancel)
            pieces = [piece async for piece in attempt]
            assert f"<{at}>" * 5 == text_of(pieces) or (
                at % 2 and (f"<{at}>" * 5).startswith(text_of(pieces))
            )
            return text_of(pieces) == f"<{at}>" * 5

        whole = await asyncio.gather(*(one(at) for at in range(200)))
        assert 100 <= sum(whole) < 200

    with_backend(fake, work, first_token_s=10.0, between_s=10.0, total_s=15.0)


# The scorecard.


def test_no_upstream_fault_looks_like_an_answer() -> None:
    line = s9.run(cases=96, seed=5, guard=True, rate=20, down_s=31)
    assert (line.cases, line.violations) == (98, 0), line.figures


def test_the_scorecard_sees_ends_that_are_made_up_and_storms() -> None:
    line = s9.run(cases=96, seed=5, guard=False, rate=20, down_s=31)
    assert line.violations > 20 and int(line.figures["cut, and it looks whole"]) > 10
