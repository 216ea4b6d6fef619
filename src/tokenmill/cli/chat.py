"""`tokenmill chat`: a conversation, one line a turn, at a terminal or through pipes."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tokenmill.cli.answers import check_answers, completion_fields, summary
from tokenmill.cli.arguments import (
    Subparsers,
    adapter_name,
    add_command,
    add_generator_flags,
    add_model_argument,
    open_model,
    opened_llm,
)
from tokenmill.cli.inputs import stdin_is_terminal
from tokenmill.cli.output import Output
from tokenmill.cli.sampling import add_sampling_flags, sampling_params
from tokenmill.cli.tools import add_tools_flag, tools
from tokenmill.core import Completion, Message, SamplingParams, StorageError, TokenmillError, UsageError

if TYPE_CHECKING:
    from tokenmill.engine import LLM

__all__ = ["Conversation", "add_parser"]

_DESCRIPTION = """\
Talk to a model: one line a turn. `/new` forgets the conversation, `/exit` or Ctrl-D ends it, Ctrl-C stops
an answer. When the conversation no longer fits into the model's context, its oldest turns are left out.
"""
_PROMPT = "> "


def add_parser(subparsers: Subparsers) -> None:
    """Add `chat`."""
    parser = add_command(subparsers, "chat", _chat, summary="talk to a model", description=_DESCRIPTION)
    add_model_argument(parser)
    add_tools_flag(parser)
    add_sampling_flags(parser)
    add_generator_flags(parser)


class Conversation:
    """The messages of a chat, and what each answer took."""

    def __init__(
        self,
        llm: "LLM",
        params: SamplingParams,
        out: Output,
        adapter: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.messages: list[Message] = []
        self.turns: list[dict[str, Any]] = []
        self._llm = llm
        self._params = params
        self._out = out
        self._adapter = adapter
        self._tools = tools

    def forget(self) -> None:
        """Start anew; what was answered stays on record."""
        self.messages.clear()

    def say(self, text: str) -> None:
        """One turn: the answer is streamed and remembered, also if Ctrl-C cut it short.

        Raises UsageError for a text that does not fit, TokenmillError for an answer that failed; then the
        turn is forgotten.
        """
        self.messages.append(Message(role="user", content=text))
        try:
            ids = self._fitting_prompt()
        except UsageError:
            self.messages.pop()
            raise
        pieces: list[str] = []
        completion = None
        try:
            for piece in self._llm.stream(ids, self._params, adapter=self._adapter):
                if isinstance(piece, Completion):
                    completion = piece
                else:
                    pieces.append(piece)
                    self._out.text(piece, end="")
        except KeyboardInterrupt:
            self._out.note(" [stopped]")
        answer = "".join(pieces)
        if completion is not None and not answer.endswith("\n"):
            self._out.text("")
        self._record(text, answer, completion)
        if completion is not None and completion.finish_reason == "failed":
            self.messages.pop()
            check_answers([completion])
        self.messages.append(Message(role="assistant", content=answer))

    def _record(self, text: str, answer: str, completion: Completion | None) -> None:
        if completion is None:
            self.turns.append({"prompt": text, "text": answer, "finish_reason": "cancelled"})
            return
        self.turns.append({"prompt": text, **completion_fields(completion)})
        if self._out.stderr.isatty():
            self._out.note(summary(completion))

    def _fitting_prompt(self) -> list[int]:
        """The conversation as tokens, the oldest turns left out until there is room for an answer."""
        ids = self._llm.encode_chat(self.messages, self._tools)
        num_left_out = 0
        while len(ids) >= self._llm.context_length and len(self.messages) > 2:
            del self.messages[:2]
            num_left_out += 1
            ids = self._llm.encode_chat(self.messages, self._tools)
        if num_left_out:
            self._out.note(f"[the context is full: the oldest {num_left_out} turns are left out]")
        if len(ids) >= self._llm.context_length:
            raise UsageError(
                f"the text has {len(ids)} tokens; the model's context is {self._llm.context_length}",
                hint="say it in fewer words",
            )
        return ids


def _chat(args: argparse.Namespace, out: Output) -> int:
    params = sampling_params(args)
    model = open_model(args.model)
    template = model.chat_template()
    if template is None:
        raise UsageError(
            f"{model.name} has no chat template: it is a base model",
            hint=f'continue a text instead: tokenmill run {args.model} "text"',
        )
    given_tools = tools(args, model)
    template.chosen(given_tools).start()  # it starts while the weights are loaded
    with opened_llm(model, args, out) as llm:
        conversation = Conversation(llm, params, out, adapter_name(args), given_tools)
        if not stdin_is_terminal():
            _talk_through_pipe(conversation)
        else:
            out.note(f"{model.name}, {llm.config.weights}. Ctrl-C stops an answer, /new forgets, /exit ends.")
            _talk(conversation, out)
        out.document({"model": model.name, "weights": llm.config.weights, "turns": conversation.turns})
    return 0


def _talk_through_pipe(conversation: Conversation) -> None:
    """One line a turn; any error ends it."""
    for data in sys.stdin.buffer:
        try:
            line = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UsageError("standard input is not UTF-8", hint="give plain text") from error
        if not _obey(line, conversation):
            break


def _talk(conversation: Conversation, out: Output) -> None:
    """At a terminal an error in a turn is shown, and the conversation goes on."""
    while True:
        try:
            line = _ask(out).strip()
        except KeyboardInterrupt:
            out.note("")
            continue
        except EOFError:
            out.note("")
            break
        try:
            if not _obey(line, conversation):
                break
        except StorageError:
            raise
        except TokenmillError as error:
            out.note(f"error: {error}")


def _obey(line: str, conversation: Conversation) -> bool:
    """Do what one line says; False if it ends the conversation."""
    if line == "/exit":
        return False
    if line == "/new":
        conversation.forget()
    elif line:
        conversation.say(line)
    return True


def _ask(out: Output) -> str:
    """One line from the terminal, with editing and history where it can; EOFError at its end."""
    if out.as_json or not out.stdout.isatty():
        out.stderr.write(_PROMPT)
        out.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line
    with suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is imported)
    return input(_PROMPT)
