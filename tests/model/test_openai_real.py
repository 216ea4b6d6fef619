"""The OpenAI API over the real model: what a mock, which knows nothing of language, cannot show."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.server import running

openai = pytest.importorskip("openai", reason="the official client is an extra of development")

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
QUESTION = [{"role": "user", "content": "What will the weather be in Oslo in the next 3 days?"}]


@pytest.fixture(scope="module")
def client(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server with the default model."""
    config = {"models": [{"name": "small", "model": str(model_dir)}]}
    with running(config, tmp_path_factory.mktemp("openai")) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def is_valid(text: str) -> bool:
    found = json.loads(text)
    return found["city"] in ("Rome", "Oslo") and found["days"] in range(1, 10) and len(found) == 2


def test_a_required_call_matches_its_schema(client: Any) -> None:
    for temperature, seed in ((0, 0), (1.5, 1), (1.5, 2)):
        answer = client.chat.completions.create(
            model="small", messages=QUESTION, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
            temperature=temperature, seed=seed, max_tokens=200,
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        assert call.function.name == "weather" and is_valid(call.function.arguments)


def test_a_stream_has_the_call_in_pieces(client: Any) -> None:
    chunks = client.chat.completions.create(
        model="small", messages=QUESTION, tools=[TOOL], stream=True, temperature=0, max_tokens=200,
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )  # fmt: skip
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or ()]
    assert len(pieces) > 3 and is_valid("".join(piece.function.arguments for piece in pieces))


def test_a_result_is_answered(client: Any) -> None:
    made = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": "snow, -3 degrees"},
    ]
    answer = client.chat.completions.create(
        model="small", messages=messages, tools=[TOOL], temperature=0, max_tokens=40
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_a_schema_is_kept_in_a_response(client: Any) -> None:
    format_ = {"type": "json_schema", "name": "trip", "schema": SCHEMA, "strict": True}
    answer = client.responses.create(
        model="small", input="Where to?", text={"format": format_}, temperature=1, max_output_tokens=200
    )
    assert answer.status == "completed" and is_valid(answer.output_text)


def test_vectors_of_like_texts_are_alike(client: Any) -> None:
    texts = ["The cat sits on the mat.", "A cat is sitting on a mat.", "Interest rates rose by two per cent."]
    rows = [each.embedding for each in client.embeddings.create(model="small", input=texts).data]
    assert len(rows[0]) == 576
    like, unlike = (sum(a * b for a, b in zip(rows[0], row, strict=True)) for row in rows[1:])
    assert like > unlike


def test_tokens_and_bytes_are_the_text(client: Any) -> None:
    answer = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "Say: Grüße 🌍"}], logprobs=True, max_tokens=20,
        temperature=0,
    )  # fmt: skip
    choice = answer.choices[0]
    text = bytes(byte for token in choice.logprobs.content for byte in token.bytes).decode("utf-8", "ignore")
    assert choice.message.content and text.startswith(choice.message.content)
