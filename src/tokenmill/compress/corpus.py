"""The rows of a workload as what a model reads and writes: conversations, examples, and a teacher made ready.

A row becomes the conversation that the server would see, with its answer as the last message. Rows that no
server here would take, or that are longer than a model's context, are left out and counted. Which rows may be
used is for the callers: terms are judged before.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenmill.compress.folding import common_system_prompt, folded_template
from tokenmill.compress.vocabulary import trim_vocabulary
from tokenmill.core import Message, SamplingParams, TokenmillError, UsageError
from tokenmill.models.chat.template import ChatTemplate
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.train import ConversationEncoder, Example, fitting
from tokenmill.wire import parse_openai_chat
from tokenmill.workload import Row

__all__ = ["Conversation", "conversations_of", "examples_of", "prepare_teacher"]

_DEFAULTS: Final = SamplingParams(temperature=0.0, max_tokens=1)


class Conversation(NamedTuple):
    """Messages, of which the last is the answer, and the tools that the model was given."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def conversations_of(rows: Iterable[Row]) -> list[Conversation]:
    """The rows with what is right as their answer, without those that the server would refuse."""
    return [each for each in map(_conversation, rows) if each is not None]


def examples_of(model: ModelDirectory, conversations: Sequence[Conversation]) -> list[Example]:
    """What the model learns from: of each conversation the answer. Too long ones are left out.

    Raises UsageError if none is left.
    """
    encoder = ConversationEncoder(model)
    examples = []
    for each in conversations:
        try:
            examples.append(encoder.example(each.messages, each.tools))
        except UsageError:  # what this model's template refuses
            continue
    kept = fitting(examples, model.architecture.max_positions)
    if not kept:
        raise UsageError(
            f"{model.name} can learn from none of the {len(conversations)} conversations",
            hint="see `tokenmill workload check`",
        )
    return [examples[index] for index in kept]


def prepare_teacher(
    model: ModelDirectory,
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    vocabulary: int = 4096,
    fold: bool = True,
) -> ModelDirectory:
    """Write `model` with the vocabulary that these conversations need as the new model directory `folder`.

    With `fold`, a system prompt that they have in common is left out by the new model's template. The model
    answers as before (but for a folded prompt), at less cost; a student that is cut out of it shares its
    vocabulary. Errors as in `trim_vocabulary`.
    """
    template = model.chat_template()
    if template is None:
        raise UsageError(f"{model.name} has no chat template", hint="give a chat model")
    system = common_system_prompt(each.messages for each in conversations) if fold else ""
    source = folded_template(model, system) if system else ""
    # What is counted is rendered as it will be.
    shown = ChatTemplate(source, origin="folded chat template") if source else template
    return trim_vocabulary(model, _texts(shown, conversations), vocabulary, folder, chat_template=source)


def _texts(template: ChatTemplate, conversations: Sequence[Conversation]) -> Iterable[str]:
    for each in conversations:
        try:
            yield template.render(each.messages, add_generation_prompt=False, tools=each.tools)
        except UsageError:
            continue


def _conversation(row: Row) -> Conversation | None:
    answer = {"role": "assistant", **_answer(row)}
    body = {**row.request, "model": "workload", "messages": [*row.request["messages"], answer]}
    try:
        call = parse_openai_chat(json.dumps(body).encode(), _DEFAULTS)
    except TokenmillError:
        return None
    return Conversation(call.messages, call.tools)


def _answer(row: Row) -> dict[str, Any]:
    """The answer as a message has it: text, or the calls of a row with tools."""
    calls = _calls(row.target) if row.request.get("tools") else []
    if not calls:
        return {"content": row.target}
    return {
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": each["name"], "arguments": json.dumps(each["arguments"])},
            }
            for number, each in enumerate(calls)
        ],
    }


def _calls(answer: str) -> list[dict[str, Any]]:
    """The calls in a row's answer; none if it is text."""
    try:
        value = json.loads(answer)
    except ValueError:
        return []
    is_calls = isinstance(value, list) and all(
        isinstance(each, dict) and each.keys() == {"name", "arguments"} for each in value
    )
    return value if is_calls else []
