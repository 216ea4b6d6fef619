"""A conversation to a prompt, with the model's own template, kept within bounds.

Jinja2 renders, in a process that a template cannot get out of and that ends when it takes too much memory or
time (`process`). What a user wrote is data: `encode_chat` makes sure that no control token of the
prompt contains a character that came from a message, a tool or its result. A user who writes `<|im_end|>`
has written ten characters. Tool calls in the model's answer are not read here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenmill.core import Message, ModelFormatError, ResourceError, UsageError
from tokenmill.models.chat.conversation import template_context
from tokenmill.models.chat.defuse import Defuser, unused_character
from tokenmill.models.chat.process import TemplateProcess
from tokenmill.models.text.tokenizer import Tokenizer

__all__ = ["MAX_TEMPLATE_CHARS", "ChatTemplate", "encode_chat"]

MAX_TEMPLATE_CHARS: Final = 1 << 18


class ChatTemplate:
    """One model's chat template. Safe to share between threads.

    Some models have another one `for_tools`. Templates write the `special_tokens` by their names.
    """

    def __init__(
        self,
        source: str,
        *,
        for_tools: "ChatTemplate | None" = None,
        origin: str = "chat template",
        **special_tokens: str,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelFormatError(f"{origin}: longer than {MAX_TEMPLATE_CHARS} characters")
        self.source = source
        self.origin = origin
        self._for_tools = for_tools
        self._tokens = {"bos_token": "", "eos_token": "", **special_tokens}
        self._process = TemplateProcess()

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, ending where the answer begins.

        `tools` are functions that the model may call, in the OpenAI shape; `variables` are what else a
        template asks for, such as `enable_thinking`. Raises UsageError for what no template could use and
        for messages that this one refuses, ResourceError for a template that takes too much time or
        memory, ModelFormatError for a broken one.
        """
        context = template_context(messages, tools, variables)
        return self.chosen(tools).rendered(context, add_generation_prompt)

    def start(self) -> None:
        """Start the process that renders, which the first rendering would else wait for."""
        self._process.start()

    @property
    def knows_tools(self) -> bool:
        """Whether tools have a place in the prompt, as far as the template's words say."""
        return re.search(r"\btools\b", self.chosen([{}]).source) is not None

    def chosen(self, tools: Sequence[Mapping[str, Any]]) -> "ChatTemplate":
        """The template for a conversation with these tools."""
        return self._for_tools if tools and self._for_tools is not None else self

    def rendered(self, context: Mapping[str, Any], add_generation_prompt: bool, mark: str = "") -> str:
        """The prompt text of a context that `template_context` made; see `defuse` for the mark."""
        full = {**context, "add_generation_prompt": add_generation_prompt, **self._tokens}
        ((outcome, text),) = self._process.render(self.source, full, mark).items()
        if outcome == "text":
            return text
        reason = "".join(char if char.isprintable() else "?" for char in text if char != mark)
        if outcome == "refused":
            raise UsageError(f"{self.origin}: refuses these messages ({reason})")
        if outcome == "exhausted":
            raise ResourceError(f"{self.origin}: takes too much to render ({reason})")
        raise ModelFormatError(f"{self.origin}: cannot be rendered ({reason})")


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation; only the template's own text can become control tokens (`defuse`).

    Parameters and errors as in `ChatTemplate.render`.
    """
    template = template.chosen(tools)
    given = template_context(messages, tools, variables)
    specials = tokenizer.special_tokens
    mark = unused_character([template.source, json.dumps(given, ensure_ascii=False), *specials])
    safe = template_context(messages, tools, variables, Defuser(specials, mark))
    return tokenizer.encode_marked(template.rendered(safe, add_generation_prompt, mark), mark)
