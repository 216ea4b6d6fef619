"""The official `openai` client against a running server: chat, completions, streams.

Errors are in test_openai_client_errors.py; tools, responses, embeddings and models in
test_openai_client_more.py; files and batches have checks of their own. All run with the majors 1 to 3 of the
client (`benchmarks/reliability/s10.py`).
"""

import json
import math
import re
import time
from collections.abc import Callable
from typing import Any, Final

import openai
import pytest

from tests.server.openai_client import (
    SCHEMA,
    ask,
    complete,
    stream,
    text_of,
    user,
)
from tests.server.openai_server import ANSWERS

# A chat answer at once. `<user>Hi<assistant>` are 19 bytes, each a token; the end of the answer is one, too.

CHAT: Final[dict[str, Callable[[Any], bool]]] = {
    "id begins with chatcmpl-": lambda a: re.fullmatch(r"chatcmpl-[0-9a-f]{24}", a.id) is not None,
    "object is chat.completion": lambda a: a.object == "chat.completion",
    "created is now": lambda a: abs(a.created - time.time()) < 60,
    "model is the one asked": lambda a: a.model == "mock",
    "one choice": lambda a: len(a.choices) == 1,
    "index is 0": lambda a: a.choices[0].index == 0,
    "role is assistant": lambda a: a.choices[0].message.role == "assistant",
    "content is whole": lambda a: a.choices[0].message.content == "Hello there",
    "no refusal": lambda a: a.choices[0].message.refusal is None,
    "no tool calls": lambda a: a.choices[0].message.tool_calls is None,
    "no logprobs": lambda a: a.choices[0].logprobs is None,
    "finish reason is stop": lambda a: a.choices[0].finish_reason == "stop",
    "prompt tokens are exact": lambda a: a.usage.prompt_tokens == 19,
    "completion tokens are exact": lambda a: a.usage.completion_tokens == 12,
    "total tokens are the sum": lambda a: a.usage.total_tokens == 31,
    "cached tokens are a count": lambda a: a.usage.prompt_tokens_details.cached_tokens == 0,
    "reasoning tokens are a count": lambda a: a.usage.completion_tokens_details.reasoning_tokens == 0,
    "fingerprint of the model": lambda a: re.fullmatch(r"fp_[0-9a-f]{12}", a.system_fingerprint) is not None,
    "service tier is default": lambda a: a.service_tier == "default",
    "request id is at hand": lambda a: a._request_id.startswith("req_"),
    "id and request have one name": lambda a: a.id[9:] == a._request_id[4:],
}


@pytest.fixture(scope="module")
def hello(gpt: Any) -> Any:
    """One answer, looked at from all sides."""
    return ask(gpt, "Hi")


@pytest.mark.parametrize("check", CHAT.values(), ids=CHAT.keys())
def test_chat(hello: Any, check: Callable[[Any], bool]) -> None:
    assert check(hello)


TEXT: Final[dict[str, Callable[[Any], bool]]] = {
    "id begins with cmpl-": lambda a: re.fullmatch(r"cmpl-[0-9a-f]{24}", a.id) is not None,
    "object is text_completion": lambda a: a.object == "text_completion",
    "text continues the prompt": lambda a: a.choices[0].text == " a time",
    "finish reason is stop": lambda a: a.choices[0].finish_reason == "stop",
    "prompt tokens are exact": lambda a: a.usage.prompt_tokens == 9,
    "completion tokens are exact": lambda a: a.usage.completion_tokens == 8,
    "model is the one asked": lambda a: a.model == "mock",
    "no logprobs": lambda a: a.choices[0].logprobs is None,
    "fingerprint of the model": lambda a: a.system_fingerprint.startswith("fp_"),
}


@pytest.fixture(scope="module")
def story(gpt: Any) -> Any:
    """One continued text."""
    return complete(gpt, "Once upon")


@pytest.mark.parametrize("check", TEXT.values(), ids=TEXT.keys())
def test_completion(story: Any, check: Callable[[Any], bool]) -> None:
    assert check(story)


# What a request may say.


def content(client: Any, text: str, **fields: Any) -> str:
    found: str = ask(client, text, **fields).choices[0].message.content
    return found


def finish(client: Any, text: str, **fields: Any) -> str:
    found: str = ask(client, text, **fields).choices[0].finish_reason
    return found


ASKED: Final[dict[str, Callable[[Any], bool]]] = {
    "text beyond ASCII": lambda c: content(c, "Grüße") == "Grüße, 世界 🌍",
    "an empty answer is empty text": lambda c: content(c, "Nothing") == "",
    "stop as a string": lambda c: content(c, "Count.", stop=" END") == "one",
    "stop as a list": lambda c: content(c, "Count.", stop=["STOP", "END"]) == "one ",
    "stop ends with stop": lambda c: finish(c, "Count.", stop="END") == "stop",
    "stop null": lambda c: content(c, "Hi", stop=None) == "Hello there",
    "max_tokens ends with length": lambda c: finish(c, "Hi", max_tokens=5) == "length",
    "max_tokens cuts": lambda c: content(c, "Hi", max_tokens=5) == "Hello",
    "max_completion_tokens cuts": lambda c: content(c, "Hi", max_completion_tokens=5) == "Hello",
    "max_tokens is counted": lambda c: ask(c, "Hi", max_tokens=5).usage.completion_tokens == 5,
    "n gives so many choices": lambda c: len(ask(c, "Hi", n=3).choices) == 3,
    "n numbers them": lambda c: [each.index for each in ask(c, "Hi", n=3).choices] == [0, 1, 2],
    "n counts the prompt once": lambda c: ask(c, "Hi", n=3).usage.prompt_tokens == 19,
    "n counts all answers": lambda c: ask(c, "Hi", n=3).usage.completion_tokens == 36,
    "temperature 0": lambda c: content(c, "Hi", temperature=0) == "Hello there",
    "temperature 2": lambda c: content(c, "Hi", temperature=2) == "Hello there",
    "top_p": lambda c: content(c, "Hi", top_p=0.5) == "Hello there",
    "penalties": lambda c: content(c, "Hi", presence_penalty=1, frequency_penalty=-1) == "Hello there",
    "seed repeats an answer": lambda c: (
        content(c, "Dice", seed=7, max_tokens=30) == content(c, "Dice", seed=7, max_tokens=30)
    ),
    "another seed, another answer": lambda c: (
        content(c, "Dice", seed=7, max_tokens=30) != content(c, "Dice", seed=8, max_tokens=30)
    ),
    "logit_bias forbids a token": lambda c: (
        "a" not in content(c, "Dice", seed=7, max_tokens=99, logit_bias={"97": -100})
    ),
    "logit_bias wants a token": lambda c: (
        content(c, "Dice", seed=7, max_tokens=4, logit_bias={"97": 100}) == "aaaa"
    ),
    "user, metadata and cache key": lambda c: (
        content(c, "Hi", user="u", metadata={"a": "b"}, extra_body={"prompt_cache_key": "k"}) == "Hello there"
    ),
    "store false": lambda c: content(c, "Hi", store=False) == "Hello there",
    "a system message": lambda c: (
        text_of(
            c.chat.completions.create(
                model="mock", messages=[{"role": "system", "content": "S"}, *user("Hi")]
            )
        )
        == "Hello there"
    ),
    "a developer message": lambda c: (
        text_of(
            c.chat.completions.create(
                model="mock", messages=[{"role": "developer", "content": "S"}, *user("Hi")]
            )
        )
        == "Hello there"
    ),
    "parts of text": lambda c: (
        text_of(
            c.chat.completions.create(
                model="mock",
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
                    }
                ],
            )
        )
        == "Hello there"
    ),
    "earlier turns": lambda c: (
        ask(c, "Hi", before=[*user("a"), {"role": "assistant", "content": "b"}]).usage.prompt_tokens
        == 19 + 19
    ),
    "a repeated prompt is cached": lambda c: (
        [ask(c, "cache me " * 20) for _ in range(2)][1].usage.prompt_tokens_details.cached_tokens >= 128
    ),
    "tier flex": lambda c: ask(c, "Hi", service_tier="flex").service_tier == "flex",
    "tier priority": lambda c: ask(c, "Hi", service_tier="priority").service_tier == "priority",
    "tier auto": lambda c: ask(c, "Hi", service_tier="auto").service_tier == "default",
    "tier fast, our name": lambda c: (
        ask(c, "Hi", extra_body={"service_tier": "fast"}).service_tier == "priority"
    ),
    "tier batch, our name": lambda c: (
        ask(c, "Hi", extra_body={"service_tier": "batch"}).service_tier == "flex"
    ),
    "tier standard, our name": lambda c: (
        ask(c, "Hi", extra_body={"service_tier": "standard"}).service_tier == "default"
    ),
    "completion of several prompts": lambda c: (
        [each.text for each in complete(c, ["Once upon", "Once upon"]).choices] == [" a time"] * 2
    ),
    "completion of token ids": lambda c: (
        complete(c, [list(b"Once upon")]).choices[0].text == complete(c, list(b"Once upon")).choices[0].text
    ),
    "completion with n": lambda c: [e.index for e in complete(c, "Once upon", n=2).choices] == [0, 1],
    "completion cut by length": lambda c: complete(c, "Once upon", max_tokens=2).choices[0].text == " a",
    "completion defaults to 16 tokens": lambda c: complete(c, "Dice: ", seed=1).usage.completion_tokens <= 16,
}


@pytest.mark.parametrize("check", ASKED.values(), ids=ASKED.keys())
def test_asked(gpt: Any, check: Callable[[Any], bool]) -> None:
    assert check(gpt)


def test_the_first_tier_of_a_key_is_its_default(make_openai: Callable[..., Any]) -> None:
    with make_openai("tm_batch") as client:
        assert ask(client, "Hi").service_tier == "flex"
        assert ask(client, "Hi", service_tier="priority").service_tier == "flex"


# response_format.


def in_format(client: Any, text: str, **schema: Any) -> Any:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", **schema}}
    return json.loads(content(client, text, response_format=wanted, max_tokens=400, seed=1))


BOOLEAN: Final = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["yes", "kind"],
    "additionalProperties": False,
}
FORMATS: Final[dict[str, Callable[[Any], bool]]] = {
    "text": lambda c: content(c, "Hi", response_format={"type": "text"}) == "Hello there",
    "json_object": lambda c: (
        json.loads(content(c, "JSON", response_format={"type": "json_object"})) == {"city": "Rome"}
    ),
    "json_schema that fits": lambda c: in_format(c, "JSON", schema=SCHEMA, strict=True) == {"city": "Rome"},
    "json_schema holds a model that would not": lambda c: (
        set(in_format(c, "Dice", schema=BOOLEAN, strict=True)) == {"yes", "kind"}
    ),
    "json_schema without strict holds, too": lambda c: (
        in_format(c, "Dice", schema=BOOLEAN)["kind"] in ("a", "b")
    ),
    "json_schema with a reference": lambda c: (
        set(
            in_format(
                c,
                "Dice",
                schema={**BOOLEAN, "properties": {**BOOLEAN["properties"], "yes": {"$ref": "#/$defs/y"}},  # type: ignore[dict-item]
                        "$defs": {"y": {"type": "boolean"}}},
            )
        )
        == {"yes", "kind"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", FORMATS.values(), ids=FORMATS.keys())
def test_response_format(gpt: Any, check: Callable[[Any], bool]) -> None:
    assert check(gpt)


# Log-probabilities.


def tokens(client: Any, text: str, **fields: Any) -> Any:
    return ask(client, text, logprobs=True, **fields).choices[0].logprobs.content


LOGPROBS: Final[dict[str, Callable[[Any], bool]]] = {
    "one for each token of the text": lambda c: [t.token for t in tokens(c, "Hi")] == list("Hello there"),
    "bytes of a token": lambda c: tokens(c, "Hi")[0].bytes == [72],
    "bytes of half a character": lambda c: (
        bytes(byte for t in tokens(c, "Grüße") for byte in t.bytes).decode() == ANSWERS["Grüße"]
    ),
    "no top tokens unless asked": lambda c: tokens(c, "Hi")[0].top_logprobs == [],
    "so many top tokens as asked": lambda c: len(tokens(c, "Hi", top_logprobs=5)[0].top_logprobs) == 5,
    "twenty top tokens": lambda c: len(tokens(c, "Hi", top_logprobs=20)[0].top_logprobs) == 20,
    "top tokens in order": lambda c: all(
        a.logprob >= b.logprob
        for t in tokens(c, "Dice", top_logprobs=5, max_tokens=8)
        for a, b in zip(t.top_logprobs, t.top_logprobs[1:], strict=False)
    ),
    "a certain token has 0": lambda c: tokens(c, "Hi")[0].logprob == 0.0,
    "shares sum to at most 1": lambda c: all(
        sum(math.exp(top.logprob) for top in t.top_logprobs) <= 1.0 + 1e-6
        for t in tokens(c, "Dice", top_logprobs=20, max_tokens=8)
    ),
    "the most likely one at temperature 0": lambda c: all(
        t.logprob == t.top_logprobs[0].logprob
        for t in tokens(c, "Dice", top_logprobs=1, max_tokens=8, temperature=0)
    ),
    "of each choice": lambda c: all(
        len(each.logprobs.content) == 11 for each in ask(c, "Hi", n=2, logprobs=True).choices
    ),
    "of a stream, the same": lambda c: (
        [t.token for chunk in stream(c, "Hi", logprobs=True) for e in chunk.choices if e.logprobs
         for t in e.logprobs.content] == list("Hello there")
    ),
    "completion: tokens": lambda c: (
        complete(c, "Once upon", logprobs=0).choices[0].logprobs.tokens == list(" a time")
    ),
    "completion: offsets": lambda c: (
        complete(c, "Once upon", logprobs=0).choices[0].logprobs.text_offset == list(range(7))
    ),
    "completion: values": lambda c: (
        complete(c, "Once upon", logprobs=0).choices[0].logprobs.token_logprobs == [0.0] * 7
    ),
    "completion: top tokens": lambda c: (
        [len(top) for top in complete(c, "Once upon", logprobs=3).choices[0].logprobs.top_logprobs] == [3] * 7
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", LOGPROBS.values(), ids=LOGPROBS.keys())
def test_logprobs(gpt: Any, check: Callable[[Any], bool]) -> None:
    assert check(gpt)


# Streams.

USAGE: Final = {"stream_options": {"include_usage": True}}


def joined(chunks: list[Any], index: int = 0) -> str:
    return "".join(
        each.delta.content or "" for chunk in chunks for each in chunk.choices if each.index == index
    )


STREAMS: Final[dict[str, Callable[[Any], bool]]] = {
    "text is whole": lambda c: joined(stream(c, "Count.")) == ANSWERS["Count."],
    "text beyond ASCII": lambda c: joined(stream(c, "Grüße")) == ANSWERS["Grüße"],
    "it comes in pieces": lambda c: len(stream(c, "Count.")) > 3,
    "one id": lambda c: len({chunk.id for chunk in stream(c, "Count.")}) == 1,
    "ids begin with chatcmpl-": lambda c: stream(c, "Hi")[0].id.startswith("chatcmpl-"),
    "object is a chunk": lambda c: {e.object for e in stream(c, "Hi")} == {"chat.completion.chunk"},
    "role comes first": lambda c: stream(c, "Hi")[0].choices[0].delta.role == "assistant",
    "role comes once": lambda c: sum(bool(e.choices[0].delta.role) for e in stream(c, "Hi")) == 1,
    "the last chunk has the end": lambda c: stream(c, "Hi")[-1].choices[0].finish_reason == "stop",
    "one end": lambda c: sum(bool(e.choices[0].finish_reason) for e in stream(c, "Hi")) == 1,
    "the end is length": lambda c: stream(c, "Hi", max_tokens=3)[-1].choices[0].finish_reason == "length",
    "no usage unless asked": lambda c: all(e.usage is None for e in stream(c, "Hi")),
    "usage comes last": lambda c: stream(c, "Hi", **USAGE)[-1].usage.total_tokens == 31,
    "usage has no choices": lambda c: stream(c, "Hi", **USAGE)[-1].choices == [],
    "usage is null before": lambda c: all(e.usage is None for e in stream(c, "Hi", **USAGE)[:-1]),
    "usage is null and there": lambda c: "usage" in stream(c, "Hi", **USAGE)[0].model_fields_set,
    "n choices in one stream": lambda c: (
        [joined(chunks, at) for chunks in [stream(c, "Hi", n=2)] for at in (0, 1)] == ["Hello there"] * 2
    ),
    "n ends": lambda c: sum(bool(e.choices[0].finish_reason) for e in stream(c, "Hi", n=2)) == 2,
    "stop string is not shown": lambda c: joined(stream(c, "Count.", stop="END")) == "one ",
    "an empty answer": lambda c: joined(stream(c, "Nothing")) == "",
    "tier and fingerprint": lambda c: all(
        e.service_tier == "default" and e.system_fingerprint.startswith("fp_") for e in stream(c, "Hi")
    ),
    "thoughts are apart": lambda c: (
        stream(c, "Hi", model="thinker")[0].choices[0].delta.content == ""
        and joined(stream(c, "Hi", model="thinker")) == "Yes"
    ),
    "completion stream": lambda c: (
        "".join(e.choices[0].text for e in complete(c, "Once upon", stream=True)) == " a time"
    ),
    "completion stream, usage": lambda c: (
        [e.usage.total_tokens for e in complete(c, "Once upon", stream=True, **USAGE) if e.usage] == [17]
    ),
    "the same as at once": lambda c: (
        joined(stream(c, "Dice", seed=3, max_tokens=40)) == content(c, "Dice", seed=3, max_tokens=40)
    ),
}


@pytest.mark.parametrize("check", STREAMS.values(), ids=STREAMS.keys())
def test_stream(gpt: Any, check: Callable[[Any], bool]) -> None:
    assert check(gpt)


def test_a_stream_that_breaks_raises(gpt: Any) -> None:
    with pytest.raises(openai.APIError, match="broke in the middle"):
        stream(gpt, "Hi", model="cut")


def test_a_stream_may_be_left(gpt: Any) -> None:
    with gpt.chat.completions.create(model="mock", messages=user("Dice"), stream=True) as chunks:
        next(iter(chunks))
    assert content(gpt, "Hi") == "Hello there"


def test_raw_answers_have_their_headers(gpt: Any) -> None:
    raw = gpt.chat.completions.with_raw_response.create(model="mock", messages=user("Hi"))
    assert raw.headers["x-tokenmill-deployment"] == "mock"
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-request-id"] == raw.parse()._request_id


def test_stream_headers(gpt: Any) -> None:
    raw = gpt.chat.completions.with_raw_response.create(model="mock", messages=user("Hi"), stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.headers["cache-control"] == "no-cache"
