"""Prompts at their edges: empty ones, and lengths around the context with limits around what is left."""

import asyncio

import pytest

from tokenmill.core import Message, SamplingParams
from tokenmill.engine.mock import MockModel, MockScript
from tokenmill.router import Prepared
from tokenmill.router.local import LocalBackend, LocalConfig
from tokenmill.wire import Call, FieldError, parse_openai_completion
from tokenmill.wire.fields import encode_json

CONTEXT = 64
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def prepared(call: Call) -> Prepared:
    """What a mock of this context makes of a call, without an engine."""
    model = MockModel(MockScript(context_length=CONTEXT), template=TEMPLATE)
    backend = LocalBackend(LocalConfig(name="mock", model="m"), model)
    return asyncio.run(backend.prepare(call))


def completion(prompt: object, **fields: object) -> Call:
    """A call of /v1/completions."""
    body = encode_json({"model": "m", "prompt": prompt, **fields})
    return parse_openai_completion(body, SamplingParams(max_tokens=16))


@pytest.mark.parametrize("prompt", ["", [""], [], [[]], ["a", ""], [[1], []]])
def test_prompts_without_tokens_are_refused(prompt: object) -> None:
    with pytest.raises(FieldError) as caught:
        prepared(completion(prompt))
    assert caught.value.field.startswith("prompt")


@pytest.mark.parametrize("prompt", [" ", "\n", "\t \n", [256], "\0"])
def test_prompts_of_white_space_and_special_tokens_are_prompts(prompt: object) -> None:
    assert prepared(completion(prompt)).num_prompt_tokens >= 1


def test_a_conversation_that_renders_to_nothing_is_refused() -> None:
    with pytest.raises(FieldError):
        prepared(Call(model="m", messages=(Message(role="user", content=""),)))


@pytest.mark.parametrize("max_tokens", [1, CONTEXT - 1, CONTEXT, 1 << 20])
@pytest.mark.parametrize("length", [1, CONTEXT - 1])
def test_prompts_that_leave_room_are_answered_within_it(length: int, max_tokens: int) -> None:
    found = prepared(completion([65] * length, max_tokens=max_tokens))
    assert found.num_prompt_tokens == length
    assert found.max_output_tokens == min(max_tokens, CONTEXT - length)


@pytest.mark.parametrize("max_tokens", [1, CONTEXT, 1 << 20])
@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 10 * CONTEXT])
def test_prompts_that_leave_no_room_are_refused(length: int, max_tokens: int) -> None:
    for prompt in ([65] * length, "a" * length):
        with pytest.raises(FieldError) as caught:
            prepared(completion(prompt, max_tokens=max_tokens))
        assert caught.value.field == "prompt"


@pytest.mark.parametrize("max_tokens", [0, -1, (1 << 20) + 1])
@pytest.mark.parametrize("echo", [True, False])
def test_limits_that_are_none_are_refused(max_tokens: int, echo: bool) -> None:
    with pytest.raises(FieldError) as caught:
        completion("a", max_tokens=max_tokens, echo=echo)
    assert caught.value.field == "max_tokens"
