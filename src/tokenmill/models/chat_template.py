"""A conversation to a prompt, with the model's own template, kept within bounds.

Bounded: the template's size, its steps (fuel), its output, and, unless its text is one that tokenmill
knows, its memory and time, because it then runs in a child process with a limited address space.

Message content is data. `encode_chat` makes sure that no control token of the prompt contains a character
that came from a message: a user who writes `<|im_end|>` has written eleven characters. What it cannot see
through is a template that deletes text from the middle of a message and so joins its two sides.
"""

import hashlib
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Sequence
from typing import IO, Any, Final

from tokenmill.core import Message, ModelFormatError, ResourceError, UsageError
from tokenmill.models import template_worker
from tokenmill.models.child import end_child
from tokenmill.models.tokenizer import Tokenizer

__all__ = ["MAX_TEMPLATE_CHARS", "ROLES", "ChatTemplate", "encode_chat"]

MAX_TEMPLATE_CHARS: Final = 1 << 18
ROLES: Final = ("system", "developer", "user", "assistant", "tool")

_WORKER_BYTES: Final = 128 << 20
_WORKER_SECONDS: Final = 3.0
_MAX_MESSAGE_CHARS: Final = 8 << 20
_KNOWN_TEMPLATES: Final = frozenset(
    # SHA-256 of the template text; these were reviewed, and are linear in their input.
    {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"}
)


class ChatTemplate:
    """One model's chat template. Safe to share between threads."""

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", origin: str = "chat template"
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelFormatError(f"{origin}: longer than {MAX_TEMPLATE_CHARS} characters")
        self.source = source
        self.origin = origin
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        is_known = hashlib.sha256(source.encode()).hexdigest() in _KNOWN_TEMPLATES
        self._worker = None if is_known else _Worker(origin)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation, ending where the answer begins.

        Raises UsageError for an unknown role or messages that the template refuses, ResourceError for
        a template that takes too many steps or too much memory, ModelFormatError for a broken one.
        """
        _check_messages(messages)
        context = {
            "messages": [{"role": each.role, "content": each.content} for each in messages],
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        render = template_worker.render if self._worker is None else self._worker.render
        answer = render(self.source, context)
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise UsageError(f"{self.origin}: refuses these messages ({answer['refused']})")
        if "exhausted" in answer:
            raise ResourceError(f"{self.origin}: takes too much to render ({answer['exhausted']})")
        raise ModelFormatError(f"{self.origin}: cannot be rendered ({answer.get('broken')})")


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation; only the template's own text can become control tokens.

    A mark that occurs nowhere else is put into every piece of a message that is, or could become, part of
    a control token's text; it breaks the match, and is deleted before the plain text is encoded.
    """
    mark = _unused_character(template.source, *(message.content for message in messages))
    specials = tokenizer.special_tokens
    safe = [Message(role=each.role, content=_defuse(each.content, specials, mark)) for each in messages]
    return tokenizer.encode_marked(template.render(safe, add_generation_prompt), mark)


class _Worker:
    """A child process that renders, started at first use, replaced after it died, ended with its owner."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, source: str, context: dict[str, Any]) -> dict[str, str]:
        """The child's answer. Raises ResourceError if it died or did not answer in time."""
        with self._lock:
            child = self._started()
            answer = None
            assert child.stdin is not None and child.stdout is not None
            try:
                template_worker.write_packet(child.stdin, {"source": source, "context": context})
                answer = _read_in_time(child.stdout)
            except OSError:  # the child ended while it was written to
                pass
            finally:
                if answer is None:
                    end_child(child)
            if answer is None:
                raise ResourceError(
                    f"{self._origin}: needs more than {_WORKER_BYTES >> 20} MiB or {_WORKER_SECONDS:.0f} s"
                )
            return answer

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-I", template_worker.__file__, str(_WORKER_BYTES)]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            weakref.finalize(self, end_child, self._child)
        return self._child


def _read_in_time(stream: IO[bytes]) -> dict[str, Any] | None:
    is_ready, _, _ = select.select([stream], [], [], _WORKER_SECONDS)
    return template_worker.read_packet(stream) if is_ready else None


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise UsageError("the conversation has no messages", hint="give at least one")
    for message in messages:
        if message.role not in ROLES:
            raise UsageError(f"role is {message.role[:40]!r}", hint=f"use one of {', '.join(ROLES)}")
    if sum(len(message.content) for message in messages) > _MAX_MESSAGE_CHARS:
        raise UsageError(f"the messages have over {_MAX_MESSAGE_CHARS} characters", hint="shorten them")


def _unused_character(*texts: str) -> str:
    """A private-use character that is in none of the texts."""
    used = set().union(*texts)
    return next(char for char in map(chr, range(0x10FFFD, 0xF0000, -1)) if char not in used)


def _defuse(content: str, specials: Collection[str], mark: str) -> str:
    """`content` with `mark` inside every control token, and at an end that could complete one."""
    for special in specials:
        while special in content:  # again, because occurrences may overlap
            content = content.replace(special, special[0] + mark + special[1:])
    core = content.strip()
    if not core:
        return content
    begin = content.find(core)
    opens = any(_ends_with_start_of(core, special) for special in specials)
    closes = any(_starts_with_end_of(core, special) or core in special for special in specials)
    inner = (mark if closes else "") + core + (mark if opens else "")
    return content[:begin] + inner + content[begin + len(core) :]


def _ends_with_start_of(text: str, special: str) -> bool:
    return any(text.endswith(special[:size]) for size in range(1, len(special)))


def _starts_with_end_of(text: str, special: str) -> bool:
    return any(text.startswith(special[-size:]) for size in range(1, len(special)))
