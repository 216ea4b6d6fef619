"""One codec: what one side writes the other reads as it was meant, and nothing is passed over."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.wire_values import COMPLETIONS, chats, replies, streams
from tokenmill.core import (
    Completion,
    EndpointError,
    Message,
    SamplingParams,
    TokenLogprobs,
    Usage,
)
from tokenmill.wire import (
    AnthropicReader,
    AnthropicWriter,
    Begin,
    Call,
    Choice,
    FieldError,
    Finish,
    OpenAIReader,
    OpenAIWriter,
    Piece,
    Reply,
    ReplyBuilder,
    SseParser,
    TextPiece,
    ToolPiece,
    Totals,
    parse_anthropic_call,
    parse_openai_chat,
    parse_openai_completion,
    read_anthropic_reply,
    read_openai_reply,
    reply_of,
    write_anthropic_call,
    write_anthropic_reply,
    write_error,
    write_openai_call,
    write_openai_reply,
)

PLAIN = SamplingParams()
QUICK = settings(max_examples=25, deadline=None)
USER = {"role": "user", "content": "Hi"}


def openai(**fields: Any) -> Call:
    return parse_openai_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), PLAIN)


def anthropic(**fields: Any) -> Call:
    body = {"model": "m", "max_tokens": 9, "messages": [USER], **fields}
    return parse_anthropic_call(json.dumps(body).encode(), PLAIN)


def without_raw(reply: Reply) -> Reply:
    return replace(reply, raw_usage={})


# Both directions.


@QUICK
@given(chats())
def test_openai_chats_come_back(call: Call) -> None:
    assert parse_openai_chat(write_openai_call(call), PLAIN) == call
    newer = write_openai_call(call, max_tokens_field="max_completion_tokens")
    assert parse_openai_chat(newer, PLAIN) == call


@QUICK
@given(COMPLETIONS)
def test_openai_completions_come_back(call: Call) -> None:
    assert parse_openai_completion(write_openai_call(call), PLAIN) == call


@QUICK
@given(chats(anthropic=True))
def test_anthropic_calls_come_back(call: Call) -> None:
    assert parse_anthropic_call(write_anthropic_call(call), PLAIN) == call


@QUICK
@given(replies("chat"), replies("text"), replies("anthropic"))
def test_replies_come_back(chat: Reply, text: Reply, anthropic: Reply) -> None:
    assert without_raw(read_openai_reply(write_openai_reply(chat, chat=True))) == chat
    assert without_raw(read_openai_reply(write_openai_reply(text, chat=False))) == text
    assert without_raw(read_anthropic_reply(write_anthropic_reply(anthropic))) == anthropic


@QUICK
@given(streams("chat"), streams("text"), streams("anthropic"), st.randoms(use_true_random=False))
def test_streams_come_back(chat: list[Piece], text: list[Piece], anthropic: list[Piece], cuts: Any) -> None:
    cases: list[tuple[list[Piece], Any, Any]] = [
        (chat, OpenAIWriter(chat=True, include_usage=True), OpenAIReader()),
        (text, OpenAIWriter(chat=False, include_usage=True), OpenAIReader()),
        (anthropic, AnthropicWriter(), AnthropicReader()),
    ]
    for pieces, writer, reader in cases:
        data = b"".join(map(writer.write, pieces)) + writer.end()
        parser = SseParser()
        found: list[Piece] = []
        while data:
            size = cuts.randint(1, 40)
            for event in parser.feed(data[:size]):
                found += reader.read(event)
            data = data[size:]
        assert reader.is_done and reader.is_complete and not parser.is_inside
        assert [Totals(p.usage) if isinstance(p, Totals) else p for p in found] == pieces


def test_a_load_generator_may_ask_for_counts_in_every_event() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    assert parse_openai_chat(json.dumps(body | {"stream_options": options}).encode(), PLAIN).include_usage


def test_a_stream_of_several_completions_names_each() -> None:
    writer, builder = OpenAIWriter(chat=True, include_usage=True), ReplyBuilder()
    pieces: list[Piece] = [
        Begin("a", "m"),
        TextPiece("x", 1),
        TextPiece("y", 0),
        Finish("length", 1),
        Finish("completed", 0),
    ]
    reader = OpenAIReader()
    for event in SseParser().feed(b"".join(map(writer.write, pieces))):
        builder.add(reader.read(event))
    assert [(c.text, c.finish_reason) for c in builder.reply().choices] == [
        ("y", "completed"),
        ("x", "length"),
    ]


# Requests are read strictly.


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": 101}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"surprise": 1}, "surprise"),
        ({"functions": []}, "functions"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[1].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]},
            "messages[0].content[0].x",
        ),
        (
            {"messages": [{**USER, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
            "messages[0].tool_calls",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools[0].function.name"),
        ({"tool_choice": "f"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
    ],
)
def test_openai_requests_that_cannot_be_used(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        openai(**fields)
    assert caught.value.field == field, caught.value
    assert json.loads(write_error("openai", caught.value))["error"]["param"] == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": 1.5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"seed": 1}, "seed"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"thinking": {"type": "enabled"}}, "thinking.type"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "document", "title": "x"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": 1}],
                    }
                ]
            },
            "messages[0].content[0].input",
        ),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f", "input_schema": {}, "type": "bash_20250124"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"mcp_servers": []}, "mcp_servers"),
    ],
)
def test_anthropic_requests_that_cannot_be_used(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        anthropic(**fields)
    assert caught.value.field == field, caught.value
    shape = json.loads(write_error("anthropic", caught.value, request_id="r"))
    assert shape["error"]["type"] == "invalid_request_error" and field in shape["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": NaN}', b'{"a":"\xff"}', b'["\\ud800"]', b"[" * 99999]
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    for parse in (parse_openai_chat, parse_openai_completion, parse_anthropic_call):
        with pytest.raises(FieldError):
            parse(body, PLAIN)


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[]], [-1], [[1], "a"], [True], 3, None])
def test_prompts_that_cannot_be_used(prompt: Any) -> None:
    with pytest.raises(FieldError, match="prompt"):
        parse_openai_completion(json.dumps({"model": "m", "prompt": prompt}).encode(), PLAIN)


def test_models_that_take_no_sampling_get_none() -> None:
    call = Call(model="m", messages=(Message(role="user", content="a"),), params=SamplingParams(top_p=0.5))
    for write in (write_openai_call, write_anthropic_call):
        assert {"temperature", "top_p"} <= json.loads(write(call)).keys()
        assert not {"temperature", "top_p"} & json.loads(write(call, with_sampling=False)).keys()


def test_what_is_not_said_is_the_default() -> None:
    defaults = SamplingParams(temperature=1.0, max_tokens=77)
    body = json.dumps({"model": "m", "messages": [USER], "top_p": None}).encode()
    assert parse_openai_chat(body, defaults).params == defaults


def test_parts_and_blocks_are_put_together() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert openai(messages=[{"role": "user", "content": parts}]).messages[0].content == "ab"
    blocks = [
        {"type": "tool_result", "tool_use_id": "1", "content": parts, "is_error": True},
        {"type": "tool_result", "tool_use_id": "2", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "c"},
    ]
    assert anthropic(system=parts, messages=[{"role": "user", "content": blocks}]).messages == (
        Message(role="system", content="ab"),
        Message(role="tool", content="Error: ab", tool_call_id="1"),
        Message(role="tool", content="", tool_call_id="2"),
        Message(role="user", content="c"),
    )


def test_arguments_may_be_an_object() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
    (message,) = openai(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]).messages
    assert message.tool_calls[0].arguments == '{"a":[1]}'


@pytest.mark.parametrize(
    "written", ["no", '{"a": ', "[1]", '{"a": 1, }', "{" * 1000, '{"a": NaN}', "x" * 100_000]
)
def test_malformed_arguments_do_not_end_a_conversation(written: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": written}}
    (message,) = openai(messages=[{"role": "assistant", "tool_calls": [call]}]).messages
    assert json.loads(message.tool_calls[0].arguments) == {"invalid_json": written}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"params": SamplingParams(seed=1)}, "seed"),
        ({"params": SamplingParams(temperature=1.5)}, "temperature"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"tier": "batch"}, "tier"),
        ({"messages": (Message(role="user", content="a", name="Bob"),)}, "messages[0].name"),
        (
            {"messages": (Message(role="user", content="a"), Message(role="system", content="b"))},
            "messages[1].role",
        ),
    ],
)
def test_what_anthropic_has_no_place_for_is_named(changes: dict[str, Any], field: str) -> None:
    call = Call(model="m", messages=(Message(role="user", content="a"),))
    with pytest.raises(FieldError) as caught:
        write_anthropic_call(replace(call, **changes))
    assert caught.value.field == field


# Answers are read as they are meant.


def test_cached_tokens_are_normalised() -> None:
    usage = {
        "input_tokens": 10,
        "cache_read_input_tokens": 30,
        "cache_creation_input_tokens": 2,
        "output_tokens": 4,
    }
    content = [{"type": "text", "text": "x"}]
    body = {"id": "a", "model": "m", "content": content, "stop_reason": "end_turn", "usage": usage}
    reply = read_anthropic_reply(json.dumps(body).encode())
    assert reply.usage == Usage(num_prompt_tokens=42, num_cached_tokens=30, num_output_tokens=4)
    assert reply.raw_usage == usage
    assert json.loads(write_openai_reply(reply, chat=True))["usage"] == {
        "prompt_tokens": 42,
        "completion_tokens": 4,
        "total_tokens": 46,
        "prompt_tokens_details": {"cached_tokens": 30, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


@pytest.mark.parametrize(
    "change",
    [
        {"choices": []},
        {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "bored"}]},
        {"usage": {"prompt_tokens": -1}},
        {"usage": {"prompt_tokens": True}},
        {"usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}},
        {"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]},
    ],
)
def test_answers_that_make_no_sense(change: dict[str, Any]) -> None:
    good = {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}
    assert read_openai_reply(json.dumps(good).encode()).choices[0].text == "x"
    with pytest.raises(EndpointError):
        read_openai_reply(json.dumps({**good, **change}).encode())


def test_a_withheld_answer_is_a_failure_with_its_reason() -> None:
    choice = {"index": 0, "message": {"content": ""}, "finish_reason": "content_filter"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}
    completion = read_openai_reply(json.dumps(body).encode()).completion("r", ttft_s=0.0, total_s=0.0)
    assert (completion.finish_reason, "content_filter" in completion.error) == ("failed", True)


def test_a_call_that_is_no_json_is_a_failed_completion() -> None:
    builder = ReplyBuilder()
    usage = Usage(num_prompt_tokens=1, num_cached_tokens=0, num_output_tokens=1)
    builder.add([ToolPiece(0, "1", "f", '{"a"'), Finish("completed"), Totals(usage)])
    completion = builder.reply().completion("r", ttft_s=0.0, total_s=0.0)
    assert completion.finish_reason == "failed" and "'f'" in completion.error


def test_a_reply_without_measure_is_refused() -> None:
    builder = ReplyBuilder()
    with pytest.raises(EndpointError, match="characters"):
        for _ in range(99):
            builder.add([TextPiece("x" * (1 << 20))])
    with pytest.raises(EndpointError, match="function calls"):
        ReplyBuilder().add(ToolPiece(at) for at in range(999))


def test_completions_of_the_engine_become_a_reply() -> None:
    usage = Usage(num_prompt_tokens=7, num_cached_tokens=3, num_output_tokens=2)
    logprobs = (TokenLogprobs(token_id=65, logprob=-1.0, top=((66, -0.5),)),)
    done = Completion(
        request_id="r",
        text="A",
        token_ids=(65,),
        finish_reason="stopped",
        usage=usage,
        ttft_s=0.0,
        total_s=0.0,
        logprobs=logprobs,
    )
    reply = reply_of([done, replace(done, index=1)], Begin("id", "m", 5), chr)
    assert reply.usage == replace(usage, num_output_tokens=4)
    again = read_openai_reply(write_openai_reply(reply, chat=True))
    assert without_raw(again) == reply and again.choices[1].logprobs is not None
    assert again.choices[1].logprobs[0].top == (("B", -0.5),)
    with pytest.raises(EndpointError, match="out of luck"):
        reply_of([replace(done, finish_reason="failed", error="out of luck")], Begin("id", "m"), chr)


def test_a_choice_is_no_reply_without_its_end() -> None:
    builder = ReplyBuilder()
    builder.add([TextPiece("x")])
    with pytest.raises(EndpointError, match="ended before"):
        builder.reply()
    with pytest.raises(EndpointError, match="without an answer"):
        ReplyBuilder().reply()
    with pytest.raises(EndpointError, match="how many tokens"):
        choice = Choice(text="x", finish_reason="completed")
        Reply(id="", model="", choices=(choice,), usage=None).completion("r", ttft_s=0.0, total_s=0.0)
