"""New prompts pass two gates: nothing is repeated, and nothing of what certifies gets into training."""

from collections.abc import Sequence

import pytest

pytest.importorskip("torch")

from tokenmill.compress.synthesis import PromptGate, synthesise
from tokenmill.core import Completion, Message, SamplingParams, Usage, UsageError

KNOWN = ["play some jazz by miles davis", "what is the weather in oslo", "book a table for two at noon"]
HIDDEN = ["add this song to my road trip playlist please"]


class Writer:
    """Answers every question with the same lines."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.questions: list[str] = []

    def chat(
        self, conversations: Sequence[Sequence[Message]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        self.questions += [each[0].content or "" for each in conversations]
        usage = Usage(num_prompt_tokens=1, num_cached_tokens=0, num_output_tokens=1)
        return [
            Completion(
                request_id=str(number),
                text=self.answer,
                token_ids=(),
                finish_reason="completed",
                usage=usage,
                ttft_s=0.0,
                total_s=0.0,
            )
            for number in range(len(conversations))
        ]

    def generate(
        self, prompts: Sequence[str], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        raise AssertionError("nobody asks for that")


def test_only_new_prompts_pass() -> None:
    gate = PromptGate(KNOWN, HIDDEN)
    assert gate("Play some jazz, by Miles Davis!") == "duplicate"
    assert gate("play some jazz by miles davies") == "duplicate"
    assert gate("Add this song to my road trip playlist, please") == "leak"
    assert gate("please add this song to my road trip playlist") == "leak"
    assert gate("...") == "unusable"
    assert gate("who wrote the opera carmen") == "new"
    assert gate("Who wrote the opera Carmen?") == "duplicate"


def test_many_new_prompts_are_remembered() -> None:
    gate = PromptGate(KNOWN, [])
    texts = [f"{chr(97 + i % 26) * 6} {chr(97 + i // 26) * 7} {i * 7919}" for i in range(150)]
    assert [gate(text) for text in texts] == ["new"] * 150
    assert [gate(text) for text in texts] == ["duplicate"] * 150


def test_a_gate_without_hidden_prompts_lets_them_through() -> None:
    """The control: the gate and nothing else keeps them out."""
    assert PromptGate(KNOWN, [])(HIDDEN[0]) == "new"


def test_what_a_model_writes_is_counted() -> None:
    lines = [
        "1. play some jazz by miles davis",
        f"- {HIDDEN[0]}",
        '2) "is there a bakery near the old harbour"',
        "***",
    ]
    writer = Writer("\n".join(lines))
    found = synthesise(writer, KNOWN, PromptGate(KNOWN, HIDDEN), 5, most_asked=20)
    assert found.prompts == ("is there a bakery near the old harbour",)
    assert (found.num_duplicates, found.num_leaks) == (20 + 19, 20)
    assert len(writer.questions) == 20
    assert all(any(text in question for text in KNOWN) for question in writer.questions)


def test_nothing_to_begin_from_is_an_error() -> None:
    with pytest.raises(UsageError, match="no prompts to begin from"):
        PromptGate([], [])
