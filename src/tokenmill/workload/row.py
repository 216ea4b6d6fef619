"""A row of a workload: one call with the answer that was given, whatever file it came from.

Rows are what all of the main job works on: they are split, trained on, scored and certified. A row says who
answered and under which terms. Lines that make no row are faults: they are named by number and kept aside.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Fault",
    "Log",
    "Row",
    "canonical_json",
    "content_digest",
    "estimated_tokens",
    "prompt_text",
    "row_id",
]

_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One call of a workload with the answer that was given.

    `id` is unique within a workload, and the same each time the log is read. `number` is the line of
    `file`, which is only named where a log has several.
    `request` is a body for chat completions without `model`. `answer` is text, or the tool calls as canonical
    JSON; `reference` the right answer, where the log has one. Rows with the same `conversation` (or end user)
    belong together; `created` is Unix time in seconds. `num_*_tokens` are as the API counted them.
    `origin` is the model that answered, `terms` its licence or its provider's terms; (): nobody said.
    """

    id: str
    number: int
    file: str = ""
    request: Mapping[str, Any]
    answer: str
    reference: str | None = None
    slice: str = ""
    created: float | None = None
    conversation: str = ""
    num_input_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None
    origin: str = ""
    terms: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """What is right: the reference, else the answer that was given."""
        return self.answer if self.reference is None else self.reference


@dataclass(frozen=True)
class Fault:
    """A line that makes no row, and why; `line` is its beginning. Number 0 is the whole file."""

    number: int
    reason: str
    file: str = ""
    line: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.reason}" if self.file else f"{self.number}: {self.reason}"


@dataclass(frozen=True)
class Log:
    """What a log holds: its rows, the lines that make none, and the format that was found."""

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    format: str


def canonical_json(value: Any) -> str:
    """A value as JSON with sorted keys and no spaces: equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def row_id(request: Mapping[str, Any], own_id: str, repeat: int = 0) -> str:
    """16 hex digits of a request and its line's own id; `repeat` counts equal ones before it."""
    text = f"{canonical_json(request)}\n{own_id}\n{repeat}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def content_digest(row: Row) -> str:
    """16 hex digits of what a row says: request, answer and reference."""
    text = canonical_json([row.request, row.answer, row.reference])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompt_text(request: Mapping[str, Any], *, with_system: bool = True) -> str:
    """The texts of a request's messages, one under the other; its tools are not in it."""
    messages: Sequence[Mapping[str, Any]] = request["messages"]
    chosen = (each for each in messages if with_system or each["role"] not in ("system", "developer"))
    return "\n".join(_text(each) for each in chosen)


def _text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (canonical_json(calls) if calls else "")


def estimated_tokens(row: Row) -> tuple[int, int]:
    """Tokens of input and output: recorded ones where there are, else a token for each 4 bytes of text, and
    4 for each message. A guess within about 30 % for English.
    """
    num_input, num_output = row.num_input_tokens, row.num_output_tokens
    if num_input is None:
        tools = row.request.get("tools")
        text = prompt_text(row.request) + (canonical_json(tools) if tools else "")
        num_input = _tokens(text) + _TOKENS_PER_MESSAGE * len(row.request["messages"])
    return num_input, _tokens(row.answer) if num_output is None else num_output


def _tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)
