"""The official `openai` client against a running server: tools, responses, embeddings, models."""

import base64
import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

import openai
import pytest

from tests.server.openai_client import SCHEMA, TOOL, ask, stream, user
from tests.server.openai_server import ANSWERS

OTHER: Final = {"type": "function", "function": {"name": "clock"}}
NAMED: Final = {"type": "function", "function": {"name": "weather"}}

# Tools. `mock` has them in its template, `plain` has not.


def message(client: Any, text: str, **fields: Any) -> Any:
    return ask(client, text, **{"tools": [TOOL], **fields}).choices[0].message


def call(client: Any, text: str, **fields: Any) -> Any:
    return message(client, text, **fields).tool_calls[0]


def end(client: Any, text: str, **fields: Any) -> str:
    found: str = ask(client, text, **{"tools": [TOOL], **fields}).choices[0].finish_reason
    return found


def cities(client: Any, text: str, **fields: Any) -> list[str]:
    calls = message(client, text, **fields).tool_calls
    return [json.loads(each.function.arguments)["city"] for each in calls]


def is_city(text: str) -> bool:
    """Whether the arguments match the schema of the tool."""
    found = json.loads(text)
    return set(found) == {"city"} and isinstance(found["city"], str)


FORCED: Final = {"seed": 1, "max_tokens": 600, "temperature": 0.0, "parallel_tool_calls": False}
"""The mock writes at random what the grammar leaves open: at temperature 0 it is always the same."""

TOOLS: Final[dict[str, Callable[[Any], bool]]] = {
    "a call has its name": lambda c: call(c, "Weather?").function.name == "weather",
    "a call has its arguments": lambda c: call(c, "Weather?").function.arguments == '{"city": "Rome"}',
    "a call has an id": lambda c: re.fullmatch(r"call_[0-9a-f]{24}", call(c, "Weather?").id) is not None,
    "a call is a function": lambda c: call(c, "Weather?").type == "function",
    "content is null beside it": lambda c: message(c, "Weather?").content is None,
    "the end is tool_calls": lambda c: end(c, "Weather?") == "tool_calls",
    "two calls": lambda c: cities(c, "Two?") == ["Rome", "Oslo"],
    "two calls have two ids": lambda c: len({each.id for each in message(c, "Two?").tool_calls}) == 2,
    "text before calls": lambda c: message(c, "Two?").content == "I look.",
    "one call where parallel is false": lambda c: cities(c, "Two?", parallel_tool_calls=False) == ["Rome"],
    "no call, no tool_calls": lambda c: message(c, "Hi").tool_calls is None,
    "no call, the end is stop": lambda c: end(c, "Hi") == "stop",
    "what is no call is text": lambda c: message(c, "No call").content == ANSWERS["No call"],
    "a call that breaks off keeps its arguments": lambda c: (
        call(c, "Broken?").function.arguments == '{"city": '
    ),
    "a call cut by length": lambda c: (
        end(c, "Weather?", max_tokens=50) == "length"
        and call(c, "Weather?", max_tokens=50).function.arguments.startswith("{")
    ),
    "tool_choice none leaves text": lambda c: message(c, "Weather?", tool_choice="none").tool_calls is None,
    "without tools a call is text": lambda c: (
        ask(c, "Weather?").choices[0].message.content == ANSWERS["Weather?"]
    ),
    "required, and the model would": lambda c: cities(c, "Weather?", tool_choice="required") == ["Rome"],
    "required, and the model would not": lambda c: is_city(
        call(c, "Hi", tool_choice="required", **FORCED).function.arguments
    ),
    "required ends with tool_calls": lambda c: end(c, "Hi", tool_choice="required", **FORCED) == "tool_calls",
    "a named tool": lambda c: (
        call(c, "Hi", tools=[OTHER, TOOL], tool_choice=NAMED, **FORCED).function.name == "weather"
    ),
    "a named tool matches its schema": lambda c: is_city(
        call(c, "Hi", tools=[OTHER, TOOL], tool_choice=NAMED, **FORCED).function.arguments
    ),
    "a tool without parameters": lambda c: (
        call(c, "Hi", tools=[OTHER], tool_choice="required", **FORCED).function.arguments.split() in
        (["{}"], ["{", "}"])
    ),
    "calls or an answer in JSON": lambda c: (
        cities(c, "Weather?", response_format={"type": "json_object"}) == ["Rome"]
        and message(c, "JSON", response_format={"type": "json_object"}).content == '{"city": "Rome"}'
    ),
    "a stream has the same call": lambda c: streamed(c, "Weather?") == [("weather", '{"city": "Rome"}')],
    "a stream has both calls": lambda c: [json.loads(a) for _, a in streamed(c, "Two?")] == [
        {"city": "Rome"}, {"city": "Oslo"}],
    "a stream's call comes in pieces": lambda c: len(deltas(c, "Weather?")) > 3,
    "a stream tells the name first": lambda c: (
        [(e.function.name, e.function.arguments) for e in deltas(c, "Weather?")[:1]] == [("weather", "")]
    ),
    "a stream tells the id once": lambda c: sum(bool(each.id) for each in deltas(c, "Weather?")) == 1,
    "a stream ends with tool_calls": lambda c: (
        stream(c, "Weather?", tools=[TOOL])[-1].choices[0].finish_reason == "tool_calls"
    ),
    "a stream does not show the mark": lambda c: "<" not in "".join(
        each.choices[0].delta.content or "" for each in stream(c, "Two?", tools=[TOOL])),
    "usage counts the call": lambda c: (
        ask(c, "Weather?", tools=[TOOL]).usage.completion_tokens == len(ANSWERS["Weather?"]) + 1
    ),
    "plain: a line of JSON is a call": lambda c: call(c, "Plain?", model="plain").function.name == "weather",
    "plain: tools are told": lambda c: (
        ask(c, "Hi", model="plain", tools=[TOOL]).usage.prompt_tokens
        > ask(c, "Hi", model="plain").usage.prompt_tokens + 200
    ),
    "plain: other JSON is text": lambda c: message(c, "JSON", model="plain").content == ANSWERS["JSON"],
    "plain: required": lambda c: is_city(
        call(c, "Hi", model="plain", tool_choice="required", **FORCED).function.arguments
    ),
}  # fmt: skip


def deltas(client: Any, text: str) -> list[Any]:
    """The pieces of calls in a stream."""
    chunks = stream(client, text, tools=[TOOL])
    return [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]


def streamed(client: Any, text: str) -> list[tuple[str, str]]:
    """The calls of a stream, put together."""
    found: dict[int, list[str]] = {}
    for piece in deltas(client, text):
        parts = found.setdefault(piece.index, ["", ""])
        parts[0] += piece.function.name or ""
        parts[1] += piece.function.arguments or ""
    return [(name, arguments) for name, arguments in found.values()]


@pytest.mark.parametrize("check", TOOLS.values(), ids=TOOLS.keys())
def test_tools(gpt: Any, check: Callable[[Any], bool]) -> None:
    assert check(gpt)


@pytest.mark.parametrize("model", ["mock", "plain"])
@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', "", '{"city": ', "[]", "no"])
def test_a_conversation_goes_on_after_a_call(gpt: Any, model: str, arguments: str) -> None:
    made = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        *user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
    ]
    answer = gpt.chat.completions.create(model=model, messages=messages, tools=[TOOL])
    assert answer.choices[0].message.content == "It is 18 degrees."


# Responses.

FUNCTION: Final = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}


def respond(client: Any, given: Any, **fields: Any) -> Any:
    return _responded(client, json.dumps({"model": "mock", "input": given, **fields}))


@functools.cache
def _responded(client: Any, fields: str) -> Any:
    """Several checks look at one answer."""
    body = json.loads(fields)
    found = client.responses.create(**body)
    return list(found) if body.get("stream") else found


def in_format(client: Any, wanted: dict[str, Any]) -> str:
    found: str = respond(client, "JSON", text={"format": wanted}).output_text
    return found


def events(client: Any, text: str, **fields: Any) -> list[Any]:
    found: list[Any] = respond(client, text, stream=True, **fields)
    return found


def kinds(found: list[Any]) -> list[str]:
    """The types of events, each run of deltas once."""
    types = [each.type.removeprefix("response.") for each in found]
    return [each for at, each in enumerate(types) if at == 0 or each != types[at - 1]]


def output(client: Any, items: list[Any]) -> str:
    found: str = respond(client, items).output_text
    return found


ROME: Final = '{"city": "Rome"}'
MADE: Final = {
    "type": "function_call",
    "call_id": "call_1",
    "name": "weather",
    "arguments": '{"city": "Rome"}',
}
BEGIN: Final = ["created", "in_progress", "output_item.added"]
TEXT_EVENTS: Final = [
    *BEGIN, "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
    "output_item.done", "completed",
]  # fmt: skip
CALL_EVENTS: Final = [
    *BEGIN, "function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed",
]  # fmt: skip
THOUGHT_EVENTS: Final = [
    *BEGIN, "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
    "output_item.done", *TEXT_EVENTS[2:],
]  # fmt: skip

RESPONSES: Final[dict[str, Callable[[Any], bool]]] = {
    "id begins with resp_": lambda c: re.fullmatch(r"resp_[0-9a-f]{24}", respond(c, "Hi").id) is not None,
    "object is response": lambda c: respond(c, "Hi").object == "response",
    "status is completed": lambda c: respond(c, "Hi").status == "completed",
    "text": lambda c: respond(c, "Hi").output_text == "Hello there",
    "text beyond ASCII": lambda c: respond(c, "Grüße").output_text == ANSWERS["Grüße"],
    "one message": lambda c: [each.type for each in respond(c, "Hi").output] == ["message"],
    "its id begins with msg_": lambda c: respond(c, "Hi").output[0].id.startswith("msg_"),
    "no error": lambda c: respond(c, "Hi").error is None,
    "input tokens": lambda c: respond(c, "Hi").usage.input_tokens == 19,
    "output tokens": lambda c: respond(c, "Hi").usage.output_tokens == 12,
    "total tokens": lambda c: respond(c, "Hi").usage.total_tokens == 31,
    "cached tokens": lambda c: respond(c, "Hi").usage.input_tokens_details.cached_tokens == 0,
    "reasoning tokens": lambda c: respond(c, "Hi").usage.output_tokens_details.reasoning_tokens == 0,
    "instructions": lambda c: (
        respond(c, "Hi", instructions="Be brief.").usage.input_tokens == 19 + len("<system>Be brief.")
    ),
    "instructions are repeated": lambda c: respond(c, "Hi", instructions="B").instructions == "B",
    "nothing is stored": lambda c: respond(c, "Hi").store is False,
    "metadata are repeated": lambda c: respond(c, "Hi", metadata={"a": "b"}).metadata == {"a": "b"},
    "the limit": lambda c: respond(c, "Hi", max_output_tokens=5).output_text == "Hello",
    "the limit is told": lambda c: (
        respond(c, "Hi", max_output_tokens=5).incomplete_details.reason == "max_output_tokens"
    ),
    "the limit makes it incomplete": lambda c: respond(c, "Hi", max_output_tokens=5).status == "incomplete",
    "tier flex": lambda c: respond(c, "Hi", service_tier="flex").service_tier == "flex",
    "an item": lambda c: output(c, user("Hi")) == "Hello there",
    "parts of text": lambda c: (
        output(c, [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]) == "Hello there"
    ),
    "an answer as input": lambda c: (
        output(c, [*user("Hi"), *[e.model_dump(exclude_none=True) for e in respond(c, "Hi").output],
                   *user("Hi")]) == "Hello there"
    ),
    "a call and its output": lambda c: (
        output(c, [*user("Weather?"), MADE,
                   {"type": "function_call_output", "call_id": "call_1", "output": "18 degrees"}])
        == "It is 18 degrees."
    ),
    "a function call": lambda c: (
        [(e.type, e.name, e.arguments) for e in respond(c, "Weather?", tools=[FUNCTION]).output]
        == [("function_call", "weather", '{"city": "Rome"}')]
    ),
    "ids of a call": lambda c: all(
        e.id.startswith("fc_") and e.call_id.startswith("call_")
        for e in respond(c, "Weather?", tools=[FUNCTION]).output
    ),
    "text and two calls": lambda c: (
        [e.type for e in respond(c, "Two?", tools=[FUNCTION]).output]
        == ["message", "function_call", "function_call"]
    ),
    "a required call": lambda c: is_city(
        respond(c, "Hi", tools=[FUNCTION], tool_choice="required", temperature=0, max_output_tokens=600,
                parallel_tool_calls=False).output[0].arguments
    ),
    "a named function": lambda c: is_city(
        respond(c, "Hi", tools=[FUNCTION], tool_choice={"type": "function", "name": "weather"},
                temperature=0, max_output_tokens=600).output[0].arguments
    ),
    "JSON by a schema": lambda c: in_format(
        c, {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}) == ROME,
    "JSON object": lambda c: in_format(c, {"type": "json_object"}) == ROME,
    "logprobs": lambda c: (
        [e.token for e in respond(c, "Hi", top_logprobs=2, include=["message.output_text.logprobs"])
         .output[0].content[0].logprobs] == list("Hello there")
    ),
    "thoughts are an item": lambda c: (
        [e.type for e in respond(c, "Hi", model="thinker").output] == ["reasoning", "message"]
    ),
    "events of text": lambda c: kinds(events(c, "Hi")) == TEXT_EVENTS,
    "events of a call": lambda c: kinds(events(c, "Weather?", tools=[FUNCTION])) == CALL_EVENTS,
    "events of thoughts": lambda c: kinds(events(c, "Hi", model="thinker")) == THOUGHT_EVENTS,
    "events of an empty answer": lambda c: (
        kinds(events(c, "Nothing")) == [each for each in TEXT_EVENTS if each != "output_text.delta"]
    ),
    "events end incomplete": lambda c: kinds(events(c, "Hi", max_output_tokens=5))[-1] == "incomplete",
    "events end failed": lambda c: (
        [(e.type, e.response.error.code) for e in events(c, "Hi", model="cut")[-1:]]
        == [("response.failed", "server_error")]
    ),
    "events are numbered": lambda c: all(
        [e.sequence_number for e in found] == list(range(len(found)))
        for found in (events(c, "Hi"), events(c, "Two?", tools=[FUNCTION]))
    ),
    "deltas are the text": lambda c: (
        "".join(e.delta for e in events(c, "Count.") if e.type == "response.output_text.delta")
        == ANSWERS["Count."]
    ),
    "done has the text": lambda c: (
        [e.text for e in events(c, "Count.") if e.type == "response.output_text.done"] == [ANSWERS["Count."]]
    ),
    "the last event is the whole": lambda c: events(c, "Hi")[-1].response.output_text == "Hello there",
    "the last event has the usage": lambda c: events(c, "Hi")[-1].response.usage.total_tokens == 31,
    "the first event has none": lambda c: events(c, "Hi")[0].response.usage is None,
    "items of events and of the whole are one": lambda c: all(
        [e.item.id for e in found if e.type == "response.output_item.done"]
        == [e.id for e in found[-1].response.output]
        for found in [events(c, "Two?", tools=[FUNCTION])]
    ),
    "output_index counts items": lambda c: (
        [e.output_index for e in events(c, "Two?", tools=[FUNCTION]) if e.type.endswith("item.added")]
        == [0, 1, 2]
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", RESPONSES.values(), ids=RESPONSES.keys())
def test_responses(gpt: Any, check: Callable[[Any], bool]) -> None:
    assert check(gpt)


WRONG: Final[list[tuple[str, dict[str, Any]]]] = [
    ("input", {"input": []}),
    ("input[0].type", {"input": [{"type": "item_reference", "id": "x"}]}),
    ("input[0].role", {"input": [{"role": "robot", "content": "x"}]}),
    ("input[0].content[0].type", {"input": [
        {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
    ("input[0].call_id", {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}),
    ("temperature", {"temperature": 3}),
    ("top_p", {"top_p": 2}),
    ("max_output_tokens", {"max_output_tokens": 0}),
    ("top_logprobs", {"top_logprobs": 21}),
    ("include[0]", {"include": ["file_search_call.results"]}),
    ("store", {"store": True}),
    ("background", {"background": True}),
    ("previous_response_id", {"previous_response_id": "resp_1"}),
    ("truncation", {"truncation": "auto"}),
    ("reasoning", {"reasoning": {"effort": "high"}}),
    ("text.format.type", {"text": {"format": {"type": "xml"}}}),
    ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "x"}}}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}),
    ("tool_choice", {"tool_choice": {"type": "function", "name": "other"}, "tools": [FUNCTION]}),
    ("tool_choice", {"tool_choice": {"type": "function", "name": ["weather"]}, "tools": [FUNCTION]}),
    ("input[0].call_id", {"input": [{**MADE, "call_id": "x" * 300}]}),
    ("service_tier", {"service_tier": "gold"}),
    ("stream_options", {"stream_options": {}}),
    ("frobnicate", {"frobnicate": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "fields"), WRONG, ids=[f"{f}={str(v)[:40]}" for f, v in WRONG])
def test_wrong_fields_of_responses_are_named(gpt: Any, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        gpt.responses.create(model="mock", input="Hi", extra_body=fields)
    assert caught.value.param == field


def test_responses_are_not_stored(gpt: Any) -> None:
    name = respond(gpt, "Hi").id
    for ask_for in (gpt.responses.retrieve, gpt.responses.delete, gpt.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            ask_for(name)


# Embeddings. The mock's vectors have 8 numbers.


def embed(client: Any, given: Any, **fields: Any) -> Any:
    return client.embeddings.create(**{"model": "mock", "input": given, **fields})


def numbers(client: Any, given: Any, **fields: Any) -> list[float]:
    found: list[float] = embed(client, given, **{"encoding_format": "float", **fields}).data[0].embedding
    return found


def length(vector: list[float]) -> float:
    return math.sqrt(sum(value * value for value in vector))


EMBEDDINGS: Final[dict[str, Callable[[Any], bool]]] = {
    "object is list": lambda c: embed(c, "a").object == "list",
    "each is an embedding": lambda c: embed(c, "a").data[0].object == "embedding",
    "model is told": lambda c: embed(c, "a").model == "mock",
    "a vector of the model's size": lambda c: len(numbers(c, "a")) == 8,
    "length is 1": lambda c: math.isclose(length(numbers(c, "some text")), 1.0, rel_tol=1e-5),
    "several texts, in order": lambda c: [e.index for e in embed(c, ["a", "b", "c"]).data] == [0, 1, 2],
    "a text alone or among others": lambda c: numbers(c, "b") == numbers(c, ["b", "a"]),
    "token ids": lambda c: numbers(c, [97, 98]) == numbers(c, "ab"),
    "lists of token ids": lambda c: numbers(c, [[97, 98]]) == numbers(c, "ab"),
    "base64 is what the client asks for": lambda c: all(
        math.isclose(a, b, rel_tol=1e-6)
        for a, b in zip(embed(c, "a").data[0].embedding, numbers(c, "a"), strict=True)
    ),
    "base64 as it is": lambda c: (
        len(base64.b64decode(embed(c, "a", encoding_format="base64").data[0].embedding)) == 32
    ),
    "fewer dimensions": lambda c: len(numbers(c, "a", dimensions=3)) == 3,
    "fewer dimensions, of length 1": lambda c: math.isclose(length(numbers(c, "a", dimensions=3)), 1.0),
    "tokens are counted": lambda c: embed(c, ["abc", "de"]).usage.prompt_tokens == 5,
    "total tokens": lambda c: embed(c, ["abc", "de"]).usage.total_tokens == 5,
    "user": lambda c: embed(c, "a", user="u").model == "mock",
}


@pytest.mark.parametrize("check", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_embeddings(gpt: Any, check: Callable[[Any], bool]) -> None:
    assert check(gpt)


WRONG_EMBEDDINGS: Final[list[tuple[str, dict[str, Any]]]] = [
    ("input", {"input": ""}),
    ("input", {"input": []}),
    ("input[1]", {"input": ["a", ""]}),
    ("input", {"input": [1, "a"]}),
    ("input", {"input": [5000]}),
    ("input", {"input": "x" * 3000}),
    ("input", {"input": ["x"] * 2049}),
    ("dimensions", {"dimensions": 0}),
    ("dimensions", {"dimensions": 9}),
    ("encoding_format", {"encoding_format": "hex"}),
    ("frobnicate", {"frobnicate": 1}),
]


@pytest.mark.parametrize(
    ("field", "fields"), WRONG_EMBEDDINGS, ids=[f"{f}={str(v)[:40]}" for f, v in WRONG_EMBEDDINGS]
)
def test_wrong_fields_of_embeddings_are_named(gpt: Any, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        embed(gpt, "a", extra_body=fields)
    assert caught.value.param == field


# Models.

MODELS: Final[dict[str, Callable[[Any], bool]]] = {
    "the list has them": lambda c: {"mock", "plain"} <= {each.id for each in c.models.list()},
    "each is a model": lambda c: {each.object for each in c.models.list()} == {"model"},
    "each has an owner": lambda c: all(each.owned_by for each in c.models.list()),
    "each has a time": lambda c: all(each.created > 1.7e9 for each in c.models.list()),
    "one by its name": lambda c: c.models.retrieve("mock").id == "mock",
}


@pytest.mark.parametrize("check", MODELS.values(), ids=MODELS.keys())
def test_models(gpt: Any, check: Callable[[Any], bool]) -> None:
    assert check(gpt)


def test_a_model_that_is_not_there(gpt: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        gpt.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


# What the client makes of answers by itself.


def test_parsed_answers(gpt: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    place = pydantic.create_model("Place", city=(str, ...))
    parse = getattr(gpt.chat.completions, "parse", None) or gpt.beta.chat.completions.parse
    answer = parse(model="mock", messages=user("JSON"), response_format=place)
    assert answer.choices[0].message.parsed.city == "Rome"


def test_parsed_tools(gpt: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    weather = pydantic.create_model("weather", city=(str, ...))
    parse = getattr(gpt.chat.completions, "parse", None) or gpt.beta.chat.completions.parse
    answer = parse(model="mock", messages=user("Weather?"), tools=[openai.pydantic_function_tool(weather)])
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments.city == "Rome"


def test_parsed_responses(gpt: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    place = pydantic.create_model("Place", city=(str, ...))
    assert gpt.responses.parse(model="mock", input="JSON", text_format=place).output_parsed.city == "Rome"


def test_the_helper_for_streams(gpt: Any) -> None:
    helper = getattr(gpt.chat.completions, "stream", None) or gpt.beta.chat.completions.stream
    with helper(model="mock", messages=user("Weather?"), tools=[TOOL]) as found:
        for _ in found:
            pass
        final = found.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"city": "Rome"}'


def test_the_helper_for_streams_of_responses(gpt: Any) -> None:
    with gpt.responses.stream(model="mock", input="Hi") as found:
        for _ in found:
            pass
        assert found.get_final_response().output_text == "Hello there"
