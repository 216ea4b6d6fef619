"""An instruction that every request of a workload repeats is learnt once instead of read each time.

A model that is trained on one task needs no telling what the task is (context distillation: Askell et al.
2021, Snell et al. 2022). Clients go on sending their system prompt; the model's own chat template leaves it
out where it is, to the letter, the one that was trained without. Any other system prompt is rendered as ever.
Fewer tokens are then trained on, computed and cached; whether quality stays is measured like all else.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from tokenmill.core import Message, UsageError
from tokenmill.models.chat.template import MAX_TEMPLATE_CHARS, ChatTemplate, encode_chat
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["common_system_prompt", "folded_template"]

_FEWEST_SHARE: Final = 0.95
_SHORTEST: Final = 20


def common_system_prompt(conversations: Iterable[Sequence[Message]]) -> str:
    """The system prompt with which nearly all (95 %) of the conversations begin; empty if there is none, or
    it is too short to matter.
    """
    counts: Counter[str] = Counter()
    total = 0
    for messages in conversations:
        total += 1
        if messages and messages[0].role == "system" and messages[0].content:
            counts[messages[0].content] += 1
    ((text, count),) = counts.most_common(1) or [("", 0)]
    return text if len(text) >= _SHORTEST and count >= _FEWEST_SHARE * total else ""


def folded_template(model: ModelDirectory, system: str) -> str:
    """The model's chat template, which renders the system prompt `system` as an empty one.

    Raises UsageError for a model without a template, or with one that cannot be changed like this.
    """
    template = model.chat_template()
    if template is None:
        raise UsageError(f"{model.name} has no chat template", hint="give a chat model")
    test = f"messages and messages[0]['role'] == 'system' and messages[0]['content'] == {_literal(system)}"
    empty = "[{'role': 'system', 'content': ''}] + messages[1:]"
    source = f"{{%- if {test} -%}}{{%- set messages = {empty} -%}}{{%- endif -%}}{template.source}"
    is_single = template.chosen([{}]) is template
    if not is_single or len(source) > MAX_TEMPLATE_CHARS or not _folds(model, template, source, system):
        raise UsageError(
            f"the chat template of {model.name} does not let this system prompt be folded",
            hint="leave it as it is",
        )
    return source


def _literal(text: str) -> str:
    """A text as Jinja reads it; a template's own delimiters do not stand in it."""
    return json.dumps(text, ensure_ascii=False).replace("{", "\\x7b").replace("}", "\\x7d")


def _folds(model: ModelDirectory, before: ChatTemplate, source: str, system: str) -> bool:
    """Whether the new template leaves out this system prompt, and nothing of another one."""
    after = ChatTemplate(source, origin="folded chat template")
    tokenizer, user = model.tokenizer(), Message(role="user", content="Hello")

    def ids(template: ChatTemplate, content: str) -> list[int]:
        return encode_chat(tokenizer, template, [Message(role="system", content=content), user])

    plain = ChatTemplate(before.source, origin=before.origin)
    other = f"{system} Also."
    return ids(after, system) == ids(plain, "") and ids(after, other) == ids(plain, other)
