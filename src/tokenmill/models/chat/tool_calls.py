"""Tools of a model on this machine: how its template wants them told, and how the model then calls them.

The chat template says which it is: Hermes and Qwen write `<tool_call>{...}</tool_call>`, Llama 3 a JSON
object with `parameters`, Mistral a list after `[TOOL_CALLS]`. For a template without a place for tools they
are told in the system message, calls and results in the conversation are told as text, and the model is asked
to answer with a line of JSON. Where a call is required, a grammar holds name and arguments to the schemas.

Not covered: formats that are no JSON (Qwen3-Coder, GLM, DeepSeek); their calls stay text.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from tokenmill.core import Grammar, Message
from tokenmill.models.chat.template import ChatTemplate
from tokenmill.models.chat.tool_reader import ToolReader, new_call_id
from tokenmill.wire import ToolChoice

__all__ = ["ToolFormat", "ToolKind"]

ToolKind: TypeAlias = Literal["hermes", "llama", "mistral", "plain"]

_MAX_FORCED_CALLS: Final = 8
_NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
_SPACE_BOUND: Final = {"x-guidance": {"whitespace_pattern": r"[ \n]{0,12}"}}
"""Weak models lose themselves in white space between tokens."""

_INTRODUCTION: Final = (
    "You can call functions. To call one, answer with one line of JSON and nothing else, like this:\n"
    '{"name": "the function", "arguments": {"its parameter": "a value"}}\n'
    "If no function helps, answer in plain text. These are the functions:\n"
)


class _Layout(NamedTuple):
    """How calls are written: around each, between two, around all, and what the arguments are called."""

    marks: tuple[str, str] = ("", "")
    around: tuple[str, str] = ("", "")
    between: str = "\n"
    around_all: tuple[str, str] = ("", "")
    key: str = "arguments"


_LAYOUTS: Final[Mapping[ToolKind, _Layout]] = {
    "hermes": _Layout(("<tool_call>", "</tool_call>"), ("<tool_call>\n", "\n</tool_call>")),
    "llama": _Layout(("<|python_tag|>", ""), between="; ", key="parameters"),
    "mistral": _Layout(("[TOOL_CALLS]", ""), between=", ", around_all=("[", "]")),
    "plain": _Layout(),
}


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How one model is told of tools and calls them. `in_template`: its template has a place for them."""

    kind: ToolKind
    in_template: bool

    @classmethod
    def of(cls, template: ChatTemplate) -> "ToolFormat":
        """The format that the words of a template speak of."""
        source = template.chosen([{}]).source
        if not template.knows_tools:
            return cls(kind="plain", in_template=False)
        if "<tool_call>" in source:
            return cls(kind="hermes", in_template=True)
        if "[TOOL_CALLS]" in source:
            return cls(kind="mistral", in_template=True)
        is_llama = "<|python_tag|>" in source or ("ipython" in source and "parameters" in source)
        return cls(kind="llama" if is_llama else "plain", in_template=True)

    def reader(self, tools: Sequence[Mapping[str, Any]], *, index: int, parallel: bool) -> ToolReader:
        """What reads the calls in the completion `index`."""
        new_id = _short_id if self.kind == "mistral" else new_call_id
        names = frozenset(_function(tool)["name"] for tool in tools)
        marks = _LAYOUTS[self.kind].marks
        return ToolReader(marks, names, index=index, parallel=parallel, new_id=new_id)

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], choice: ToolChoice
    ) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
        """The messages and tools to render: as they are, or all told in messages."""
        if self.in_template:
            return tuple(messages), tuple(tools)
        told = list(_told(messages, _LAYOUTS[self.kind]))
        if tools:
            system = _introduction(tools, choice)
            if told and told[0].role in ("system", "developer"):
                told[0] = replace(told[0], content=f"{told[0].content or ''}\n\n{system}")
            else:
                told.insert(0, Message(role="system", content=system))
        return tuple(told), ()

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], choice: ToolChoice, answer: Grammar | None
    ) -> Grammar | None:
        """What the whole completion must match: calls if they are required, else calls or the `answer`.

        `answer` alone where nothing is to be said of calls. Raises UsageError for one that is too long.
        """
        if choice.mode in ("required", "named"):
            chosen = [tool for tool in tools if choice.name in ("", _function(tool)["name"])]
            most = 1 if choice.name or not choice.parallel else _MAX_FORCED_CALLS
            return Grammar(kind="lark", source="start: calls\n" + self._calls(chosen, most))
        if choice.mode == "none" or answer is None or answer.kind not in ("json_schema", "json_object"):
            return answer
        most = _MAX_FORCED_CALLS if choice.parallel else 1
        schema = answer.source if answer.kind == "json_schema" else '{"type": "object"}'
        source = f"start: answer | calls\nanswer: {_json_rule(json.loads(schema))}\n"
        return Grammar(kind="lark", source=source + self._calls(tools, most))

    def _calls(self, tools: Sequence[Mapping[str, Any]], most: int) -> str:
        """The rule `calls`, in Lark's notation; schemas stand by themselves, so that their $refs hold."""
        layout = _LAYOUTS[self.kind]
        more = f"({_quoted(layout.between)} call){{0,{most - 1}}}" if most > 1 else ""
        first, last = (_quoted(text) if text else "" for text in layout.around_all)
        rules = [" ".join(filter(None, ("calls:", first, "call", more, last)))]
        rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(tools))))
        for at, tool in enumerate(tools):
            function = _function(tool)
            head = f'{layout.around[0]}{{"name": {json.dumps(function["name"])}, "{layout.key}": '
            tail = "}" + layout.around[1]
            rules.append(f"call_{at}: {_quoted(head)} args_{at} {_quoted(tail)}")
            rules.append(f"args_{at}: {_json_rule(function.get('parameters') or _NO_PARAMETERS)}")
        return "\n".join(rules) + "\n"


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function: Mapping[str, Any] = tool.get("function", tool)
    return function


def _quoted(text: str) -> str:
    """A text as a literal in Lark's notation."""
    return json.dumps(text)


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(schema if 'x-guidance' in schema else {**schema, **_SPACE_BOUND})}"


def _introduction(tools: Sequence[Mapping[str, Any]], choice: ToolChoice) -> str:
    lines = "\n".join(json.dumps(_function(tool), ensure_ascii=False) for tool in tools)
    must = {"required": "\n\nCall a function now.", "named": f"\n\nCall {choice.name} now."}
    return _INTRODUCTION + lines + must.get(choice.mode, "")


def _told(messages: Sequence[Message], layout: _Layout) -> Iterator[Message]:
    """The messages with calls and their results as text; results that follow each other are one message."""
    names: dict[str, str] = {}
    results: list[str] = []
    for message in messages:
        if message.role == "tool":
            name = message.name or names.get(message.tool_call_id, "")
            results.append(f"Result of {name}: {message.content}" if name else f"Result: {message.content}")
            continue
        if results and message.role == "user":
            message = replace(message, content="\n".join([*results, message.content or ""]))
        elif results:
            yield Message(role="user", content="\n".join(results))
        results = []
        if message.tool_calls:
            names |= {call.id: call.name for call in message.tool_calls}
            lines = [
                f'{{"name": {json.dumps(call.name)}, "{layout.key}": {call.arguments}}}'
                for call in message.tool_calls
            ]
            content = "\n".join([message.content, *lines] if message.content else lines)
            message = Message(role="assistant", content=content, name=message.name)
        yield message
    if results:
        yield Message(role="user", content="\n".join(results))


def _short_id() -> str:
    """Nine letters or digits, which Mistral's templates insist on."""
    return secrets.token_hex(5)[:9]
