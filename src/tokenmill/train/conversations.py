"""A conversation as an example: the prompt as the server would make it, then the answer and the end token.

The tokens before the answer are those of `encode_chat` with the place for an answer open: exactly what the
engine computes from the same request. So a model learns on what it will be asked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.core import Message, UsageError
from tokenmill.models.chat.template import ChatTemplate, encode_chat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.train.examples import Example

__all__ = ["ConversationEncoder"]


class ConversationEncoder:
    """Makes examples for one model."""

    def __init__(self, model: ModelDirectory) -> None:
        """Raises UsageError for a model without a chat template or without an end token."""
        template, ends = model.chat_template(), model.architecture.eos_token_ids
        if template is None:
            raise UsageError(f"{model.name} has no chat template", hint="train a chat model, or give tokens")
        if not ends:
            raise UsageError(f"{model.name} names no end token", hint="set eos_token_id in its config.json")
        self._template: ChatTemplate = template
        self._tokenizer: Tokenizer = model.tokenizer()
        self._end = ends[0]

    def example(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Example:
        """The conversation with its last message as what is learnt.

        Raises UsageError if that is no answer of the assistant, or what the template refuses.
        """
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise UsageError("the conversation does not end with an answer of the assistant")
        *before, answer = messages
        prompt = encode_chat(self._tokenizer, self._template, before, tools=tools)
        if answer.tool_calls:
            return self._rendered(prompt, messages, tools)
        assert answer.content is not None
        return self.from_answer(prompt, answer.content)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The tokens that an answer to these messages follows."""
        return encode_chat(self._tokenizer, self._template, messages, tools=tools)

    def from_answer(self, prompt: Sequence[int], answer: str) -> Example:
        """A prompt, and what should follow it; the end token is learnt, too."""
        learnt = [*self._tokenizer.encode_after(answer), self._end]
        return Example([*prompt, *learnt], [False] * len(prompt) + [True] * len(learnt))

    def _rendered(
        self, prompt: list[int], messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> Example:
        """Tool calls, which only the template knows how to write; learnt up to the end token."""
        whole = encode_chat(self._tokenizer, self._template, messages, False, tools=tools)
        if whole[: len(prompt)] != prompt or self._end not in whole[len(prompt) :]:
            raise UsageError("the chat template does not write tool calls after its prompt")
        end = whole.index(self._end, len(prompt)) + 1
        return Example(whole[:end], [False] * len(prompt) + [True] * (end - len(prompt)))
