"""Answers of the Responses API: one object with its items, at once or as the events by which it grows.

Order of events: `response.created`, `response.in_progress`; for each item `output_item.added`, its content,
`output_item.done`; then `response.completed`, `.incomplete` (the limit of tokens) or `.failed`. Items follow
each other, and each event has the next `sequence_number`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tokenmill.core import EndpointError, Tier, TokenmillError, Usage
from tokenmill.wire.errors import status_of
from tokenmill.wire.fields import encode_json
from tokenmill.wire.openai_answer import OPENAI_TIERS, token_logprob
from tokenmill.wire.reply import Begin, Choice, Finish, Piece, Reply, TextPiece, TokenText, ToolPiece, Totals
from tokenmill.wire.responses_parse import ResponseEcho
from tokenmill.wire.sse import encode_sse

__all__ = ["ResponseHead", "ResponseWriter", "write_response"]

_PREFIXES: Final = {"message": "msg", "function_call": "fc", "reasoning": "rs"}
_CODES: Final = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


@dataclass(frozen=True, kw_only=True)
class ResponseHead:
    """What the server says of an answer: the random part of its ids, the tier, what the request asked for."""

    name: str
    tier: Tier
    echo: ResponseEcho


@dataclass
class _Item:
    """An item that grows: text of a message, thoughts, or the arguments of the call number `position`."""

    kind: Literal["message", "function_call", "reasoning"]
    id: str
    position: int = 0
    call_id: str = ""
    name: str = ""
    text: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    def part(self, text: str, logprobs: list[Any]) -> dict[str, Any]:
        """Its one part of content, with this text."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def whole(self, status: str, *, is_new: bool = False) -> dict[str, Any]:
        """The item as JSON; a new one has no content yet."""
        head = {"id": self.id, "type": self.kind, "status": status}
        text = "" if is_new else "".join(self.text)
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": text}
        content = [] if is_new else [self.part(text, self.logprobs)]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}


class ResponseWriter:
    """The events of one answer: `write` each piece, `Begin` first, then `end`, or `fail`."""

    def __init__(self, head: ResponseHead) -> None:
        self._head = head
        self._begin = Begin("", "")
        self._num_events = 0
        self._open: _Item | None = None
        self._done: list[dict[str, Any]] = []
        self._positions: set[int] = set()
        self._held_logprobs: list[Any] = []
        self._usage: Usage | None = None
        self._is_cut = False

    def write(self, piece: Piece) -> bytes:
        """The events of one piece, which may be none."""
        if isinstance(piece, Begin):
            self._begin = piece
            response = self.response("in_progress")
            created = self._event("response.created", response=response)
            return created + self._event("response.in_progress", response=response)
        if isinstance(piece, TextPiece):
            return self._text(piece)
        if isinstance(piece, ToolPiece):
            return self._tool(piece)
        if isinstance(piece, Finish):
            return self._finish(piece)
        self._usage = piece.usage
        return b""

    def end(self) -> bytes:
        """The last event."""
        status = "incomplete" if self._is_cut else "completed"
        return self._event(f"response.{status}", response=self.response(status))

    def fail(self, error: TokenmillError) -> bytes:
        """The last event of an answer that failed on its way."""
        response = self.response("failed")
        response["error"] = {"code": _CODES.get(status_of(error), "server_error"), "message": str(error)}
        return self._event("response.failed", response=response)

    def response(self, status: str) -> dict[str, Any]:
        """The object as it is now."""
        usage = self._usage
        return {
            "id": f"resp_{self._head.name}",
            "object": "response",
            "created_at": self._begin.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._begin.model,
            "output": list(self._done),
            "service_tier": OPENAI_TIERS[self._head.tier],
            "usage": None if usage is None or status == "in_progress" else _usage(usage),
            **self._head.echo.fields,
        }

    def _text(self, piece: TextPiece) -> bytes:
        if self._head.echo.with_logprobs:
            self._held_logprobs += map(_logprob, piece.logprobs)
        if not piece.text:
            return b""
        kind: Literal["message", "reasoning"] = "reasoning" if piece.is_thought else "message"
        events = self._start(kind) if self._open is None or self._open.kind != kind else b""
        item = self._open
        assert item is not None
        item.text.append(piece.text)
        if item.kind == "reasoning":
            return events + self._content("response.reasoning_text.delta", delta=piece.text)
        logprobs, self._held_logprobs = self._held_logprobs, []
        item.logprobs += logprobs
        return events + self._content("response.output_text.delta", delta=piece.text, logprobs=logprobs)

    def _tool(self, piece: ToolPiece) -> bytes:
        item, events = self._open, b""
        if item is None or item.kind != "function_call" or item.position != piece.position:
            if piece.position in self._positions:
                raise EndpointError("the pieces of two function calls are mixed")
            self._positions.add(piece.position)
            events = self._start("function_call", piece)
        assert self._open is not None
        if not piece.arguments:
            return events
        self._open.text.append(piece.arguments)
        return events + self._of_item("response.function_call_arguments.delta", delta=piece.arguments)

    def _finish(self, piece: Finish) -> bytes:
        self._is_cut = piece.finish_reason == "length"
        events = b"" if self._open or self._done else self._start("message")
        return events + self._close("incomplete" if self._is_cut else "completed")

    def _start(
        self, kind: Literal["message", "function_call", "reasoning"], call: ToolPiece | None = None
    ) -> bytes:
        """Begin an item, after the one that is open."""
        events = self._close("completed")
        item = _Item(kind, f"{_PREFIXES[kind]}_{self._head.name}{len(self._done):02x}")
        if call is not None:
            item.position, item.call_id, item.name = call.position, call.id, call.name
        self._open = item
        events += self._event(
            "response.output_item.added",
            output_index=len(self._done),
            item=item.whole("in_progress", is_new=True),
        )
        if kind != "function_call":
            events += self._content("response.content_part.added", part=item.part("", []))
        return events

    def _close(self, status: str) -> bytes:
        """End the item that is open, if one is."""
        item = self._open
        if item is None:
            return b""
        text = "".join(item.text)
        item.logprobs += self._held_logprobs
        self._held_logprobs = []
        if item.kind == "function_call":
            events = self._of_item("response.function_call_arguments.done", name=item.name, arguments=text)
        elif item.kind == "reasoning":
            events = self._content("response.reasoning_text.done", text=text)
        else:
            events = self._content("response.output_text.done", text=text, logprobs=item.logprobs)
        if item.kind != "function_call":
            events += self._content("response.content_part.done", part=item.part(text, item.logprobs))
        whole = item.whole(status)
        events += self._event("response.output_item.done", output_index=len(self._done), item=whole)
        self._done.append(whole)
        self._open = None
        return events

    def _content(self, kind: str, **fields: Any) -> bytes:
        return self._of_item(kind, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(kind, item_id=self._open.id, output_index=len(self._done), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return encode_sse(encode_json({"type": kind, "sequence_number": number, **fields}), kind)


def write_response(reply: Reply, head: ResponseHead) -> bytes:
    """The body of an answer at once: what its events come to."""
    assert len(reply.choices) == 1
    (choice,) = reply.choices
    writer = ResponseWriter(head)
    for piece in _pieces(reply, choice):
        writer.write(piece)
    return encode_json(writer.response("incomplete" if choice.finish_reason == "length" else "completed"))


def _pieces(reply: Reply, choice: Choice) -> Iterator[Piece]:
    yield Begin(reply.id, reply.model, reply.created)
    if choice.thoughts:
        yield TextPiece(choice.thoughts, is_thought=True)
    if choice.text:
        yield TextPiece(choice.text, logprobs=choice.logprobs or ())
    for position, call in enumerate(choice.tool_calls):
        yield ToolPiece(position, call.id, call.name, call.arguments)
    yield Finish(choice.finish_reason)
    if reply.usage is not None:
        yield Totals(reply.usage)


def _logprob(token: TokenText) -> dict[str, Any]:
    top = [_known_bytes(*each) for each in token.top]
    return {**_known_bytes(token.text, token.logprob), "top_logprobs": top}


def _known_bytes(text: str, logprob: float | None) -> dict[str, Any]:
    """A token; this API wants its bytes in any case."""
    found = token_logprob(text, logprob)
    return found if found["bytes"] is not None else {**found, "bytes": list(text.encode())}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_total_tokens,
    }
