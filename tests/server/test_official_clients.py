"""What our codec writes, the official clients read; what they send, our codec reads."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.fake_endpoint import Answer, Asked, FakeEndpoint, fake_endpoint, stream, whole
from tokenmill.core import (
    Message,
    NotFoundError,
    ResourceError,
    SamplingParams,
    TokenmillError,
    Usage,
    UsageError,
)
from tokenmill.wire import (
    AnthropicWriter,
    Api,
    Begin,
    Call,
    CallText,
    Choice,
    Finish,
    OpenAIWriter,
    Piece,
    Reply,
    TextPiece,
    TokenText,
    ToolPiece,
    Totals,
    parse_anthropic_call,
    parse_openai_chat,
    parse_openai_completion,
    status_of,
    write_anthropic_reply,
    write_error,
    write_openai_reply,
    write_stream_error,
)

openai = pytest.importorskip("openai", reason="the official client is an extra of development")
anthropic = pytest.importorskip("anthropic", reason="the official client is an extra of development")

USAGE = Usage(num_prompt_tokens=9, num_cached_tokens=4, num_output_tokens=2)
LOGPROBS = (TokenText("He", -0.5, (("He", -0.5), ("Ha", -1.5))), TokenText("llo", -0.1))
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
USER = [{"role": "user", "content": "Hi"}]
STREAM: list[Piece] = [Begin("id-1", "m", 5), TextPiece("He"), TextPiece("llo")]
CALLS: list[Piece] = [
    ToolPiece(0, "c0", "weather"),
    ToolPiece(0, arguments='{"city":'),
    ToolPiece(0, arguments=' "Rome"}'),
    ToolPiece(1, "c1", "weather"),
    ToolPiece(1, arguments='{"city": "Oslo"}'),
]
ENDS: list[Piece] = [Finish("completed"), Totals(USAGE)]


class Server:
    """Parses what comes, keeps the call, and answers with pieces, a reply or an error."""

    def __init__(self, fake: FakeEndpoint) -> None:
        self.url = fake.url
        self.calls: list[Call] = []
        self.pieces: list[Piece] = []
        self.error: TokenmillError | None = None
        self.status = 0
        fake.respond = self.respond

    def respond(self, asked: Asked) -> Answer:
        api: Api = "anthropic" if asked.path.endswith("/messages") else "openai"
        try:
            call = self.parse(asked)
            if self.error is not None and not call.stream:
                raise self.error
        except TokenmillError as error:
            body = write_error(api, error, status=self.status, request_id="req-1")
            return whole(body, self.status or status_of(error), request_id="req-1")
        self.calls.append(call)
        if not call.stream:
            return whole(self.write(call, api))
        writer: AnthropicWriter | OpenAIWriter
        if api == "anthropic":
            writer = AnthropicWriter(USAGE.num_prompt_tokens, USAGE.num_cached_tokens)
        else:
            writer = OpenAIWriter(chat=call.is_chat, include_usage=call.include_usage)
        events = [writer.write(piece) for piece in self.pieces]
        if self.error is not None:
            return stream([*filter(None, events), write_stream_error(api, self.error)])
        return stream([*filter(None, events), writer.end()])

    def parse(self, asked: Asked) -> Call:
        defaults = SamplingParams()
        if asked.path.endswith("/messages"):
            return parse_anthropic_call(asked.body, defaults)
        chat = asked.path.endswith("/chat/completions")
        return (parse_openai_chat if chat else parse_openai_completion)(asked.body, defaults)

    def write(self, call: Call, api: Api) -> bytes:
        tool = CallText("c0", "weather", '{"city": "Rome"}')
        choices = [
            Choice(
                index=index,
                text="" if call.tools else "Hello",
                tool_calls=(tool,) if call.tools else (),
                finish_reason="stopped" if call.params.stop else "completed",
                stop="".join(call.params.stop),
                logprobs=LOGPROBS if call.params.logprobs is not None else None,
            )
            for index in range(call.params.n)
        ]
        reply = Reply(id="id-1", model="m", choices=tuple(choices), usage=USAGE, created=5)
        return (
            write_anthropic_reply(reply)
            if api == "anthropic"
            else write_openai_reply(reply, chat=call.is_chat)
        )


@pytest.fixture
def server() -> Iterator[Server]:
    with fake_endpoint() as fake:
        yield Server(fake)


@pytest.fixture
def gpt(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: Server) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0) as client:
        yield client


def test_openai_chat(server: Server, gpt: Any) -> None:
    answer = gpt.chat.completions.create(
        model="m", messages=USER, n=2, seed=3, stop=["\n"], temperature=0.5, max_completion_tokens=7,
        logprobs=True, top_logprobs=2, logit_bias={"5": -1}, user="u", service_tier="flex",
    )  # fmt: skip
    assert server.calls[0].params == SamplingParams(
        n=2, seed=3, stop=("\n",), temperature=0.5, max_tokens=7, logprobs=2, logit_bias=((5, -1.0),)
    )
    assert (server.calls[0].user, server.calls[0].tier) == ("u", "batch")
    assert [choice.message.content for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.choices[1].finish_reason == "stop" and answer.choices[1].index == 1
    tokens = answer.choices[0].logprobs.content
    assert (tokens[0].token, tokens[0].logprob, tokens[0].bytes) == ("He", -0.5, [72, 101])
    assert [top.token for top in tokens[0].top_logprobs] == ["He", "Ha"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        9,
        2,
        11,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert (answer.id, answer.object, answer.created, answer.model) == ("id-1", "chat.completion", 5, "m")


def test_openai_tools_and_their_results(server: Server, gpt: Any) -> None:
    first = gpt.chat.completions.create(model="m", messages=USER, tools=[TOOL], tool_choice="required")
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls" and message.content is None
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Rome"}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    gpt.chat.completions.create(model="m", messages=[*USER, message, result])
    assert [each.role for each in server.calls[1].messages] == ["user", "assistant", "tool"]
    assert server.calls[1].messages[1].tool_calls[0].name == "weather"
    gpt.chat.completions.create(model="m", messages=[*USER, message.model_dump(), result])
    assert server.calls[2].messages == server.calls[1].messages
    assert server.calls[0].tools == (TOOL,)


def test_openai_streams(server: Server, gpt: Any) -> None:
    server.pieces = [*STREAM, *CALLS, *ENDS]
    with gpt.chat.completions.stream(
        model="m", messages=USER, tools=[TOOL], stream_options={"include_usage": True}
    ) as events:
        final = events.get_final_completion()
    choice = final.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello", "tool_calls")
    assert [call.function.arguments for call in choice.message.tool_calls] == [
        '{"city": "Rome"}',
        '{"city": "Oslo"}',
    ]
    assert final.usage.prompt_tokens_details.cached_tokens == 4
    server.pieces = [*STREAM, *ENDS]
    chunks = list(gpt.chat.completions.create(model="m", messages=USER, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    assert chunks[0].choices[0].delta.role == "assistant" and all(chunk.usage is None for chunk in chunks)


def test_openai_formats(server: Server, gpt: Any) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    gpt.chat.completions.create(model="m", messages=USER, response_format=format_)
    grammar = server.calls[0].params.grammar
    assert grammar is not None and json.loads(grammar.source) == SCHEMA


def test_openai_completions(server: Server, gpt: Any) -> None:
    answer = gpt.completions.create(model="m", prompt=["a", "b"], logprobs=2, echo=True, max_tokens=1)
    assert server.calls[0].prompts == ("a", "b") and server.calls[0].echo
    choice = answer.choices[0]
    assert (choice.text, choice.logprobs.tokens, choice.logprobs.text_offset) == (
        "Hello",
        ["He", "llo"],
        [0, 2],
    )
    assert choice.logprobs.top_logprobs[0] == {"He": -0.5, "Ha": -1.5}
    server.pieces = [*STREAM, *ENDS]
    chunks = gpt.completions.create(model="m", prompt=[1, 2], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert server.calls[1].prompts == ((1, 2),)


def test_openai_errors(server: Server, gpt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        gpt.chat.completions.create(model="m", messages=USER, temperature=101)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    cases = [
        (UsageError("x"), 401, openai.AuthenticationError),
        (UsageError("x"), 403, openai.PermissionDeniedError),
        (NotFoundError("x"), 404, openai.NotFoundError),
        (ResourceError("x"), 429, openai.RateLimitError),
        (TokenmillError("x"), 500, openai.InternalServerError),
    ]
    for server.error, server.status, kind in cases:
        with pytest.raises(kind) as caught:
            gpt.chat.completions.create(model="m", messages=USER)
        assert caught.value.status_code == server.status
    server.pieces = list(STREAM)
    with pytest.raises(openai.APIError, match="x"):
        list(gpt.chat.completions.create(model="m", messages=USER, stream=True))


def test_anthropic_messages(server: Server, claude: Any) -> None:
    answer = claude.messages.create(
        model="m", messages=USER, max_tokens=7, stop_sequences=["\n"],
        extra_body={"temperature": 0.5, "top_k": 3},
        system=[{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        metadata={"user_id": "u"}, speed="fast",
    )  # fmt: skip
    call = server.calls[0]
    assert call.params == SamplingParams(max_tokens=7, temperature=0.5, top_k=3, stop=("\n",))
    assert call.messages == (Message(role="system", content="S"), Message(role="user", content="Hi"))
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == (
        "Hello",
        "stop_sequence",
        "\n",
    )
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens, answer.usage.output_tokens) == (
        5,
        4,
        2,
    )
    assert (answer.id, answer.type, answer.role, call.user) == ("id-1", "message", "assistant", "u")
    assert call.tier == "fast"


def test_anthropic_tools_and_their_results(server: Server, claude: Any) -> None:
    tool = {"name": "weather", "description": "d", "input_schema": SCHEMA}
    first = claude.messages.create(
        model="m", messages=USER, max_tokens=7, tools=[tool], tool_choice={"type": "any"}
    )
    (block,) = first.content
    assert (block.type, block.input, first.stop_reason) == ("tool_use", {"city": "Rome"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny", "is_error": False}
    messages = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    claude.messages.create(model="m", messages=messages, max_tokens=7)
    assert [each.role for each in server.calls[1].messages] == ["user", "assistant", "tool"]
    assert server.calls[0].tools == (TOOL,) and server.calls[0].tool_choice.mode == "required"


def test_anthropic_streams(server: Server, claude: Any) -> None:
    server.pieces = [Begin("id-1", "m"), TextPiece("Hm", is_thought=True), *STREAM[1:], *CALLS, *ENDS]
    kinds = []
    with claude.messages.stream(model="m", messages=USER, max_tokens=7) as events:
        kinds += [event.type for event in events]
        final = events.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (final.content[1].text, final.content[2].input, final.content[3].input) == (
        "Hello",
        {"city": "Rome"},
        {"city": "Oslo"},
    )
    assert (final.stop_reason, final.usage.output_tokens, final.usage.input_tokens) == ("tool_use", 2, 5)
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


def test_anthropic_errors(server: Server, claude: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(model="m", messages=USER, max_tokens=7, extra_body={"temperature": 1.5})
    cases = [
        (UsageError("x"), 401, anthropic.AuthenticationError, "authentication_error"),
        (UsageError("x"), 403, anthropic.PermissionDeniedError, "permission_error"),
        (NotFoundError("x"), 404, anthropic.NotFoundError, "not_found_error"),
        (ResourceError("x"), 429, anthropic.RateLimitError, "rate_limit_error"),
        (TokenmillError("x"), 500, anthropic.InternalServerError, "api_error"),
        (TokenmillError("x"), 529, anthropic.InternalServerError, "overloaded_error"),
    ]
    for server.error, server.status, kind, name in cases:
        with pytest.raises(kind) as caught:
            claude.messages.create(model="m", messages=USER, max_tokens=7)
        assert caught.value.body["error"]["type"] == name and caught.value.body["request_id"] == "req-1"
    server.pieces = list(STREAM)
    with (
        pytest.raises(anthropic.APIError, match="x"),
        claude.messages.stream(model="m", messages=USER, max_tokens=7) as events,
    ):
        list(events)
