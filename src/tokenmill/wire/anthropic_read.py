"""What the Anthropic API answers: whole messages, and the events of a stream.

Its `input_tokens` are without what came from the cache or went into it; here both are part of the prompt.
"""

from typing import Any, Final

import msgspec

from tokenmill.core import EndpointError, FinishReason, Usage
from tokenmill.wire.errors import stream_error
from tokenmill.wire.fields import count_of, decode_reply, encode_json, quoted
from tokenmill.wire.reply import Begin, Finish, Piece, Reply, ReplyBuilder, TextPiece, ToolPiece, Totals
from tokenmill.wire.sse import SseEvent

__all__ = ["AnthropicReader", "read_anthropic_reply"]

_FINISHES: Final[dict[str, FinishReason]] = {
    "end_turn": "completed",
    "tool_use": "completed",
    "stop_sequence": "stopped",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "failed",
}


class _Block(msgspec.Struct):
    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: Any = None


class _Body(msgspec.Struct):
    id: str = ""
    model: str = ""
    content: list[_Block] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: dict[str, Any] | None = None


class _Delta(msgspec.Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None
    stop_sequence: str | None = None


class _Event(msgspec.Struct):
    type: str
    index: int = 0
    message: _Body | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: dict[str, Any] | None = None


class AnthropicReader:
    """Reads the events of one stream. `is_done` and `is_complete` once it has said that nothing follows."""

    def __init__(self) -> None:
        self.is_done = False
        self._decoder = msgspec.json.Decoder(_Event)
        self._raw_usage: dict[str, Any] = {}
        self._positions: dict[int, int] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the message is whole."""
        return self.is_done

    def read(self, event: SseEvent) -> list[Piece]:
        """What happened. Raises EndpointError for nonsense, and the error that the endpoint sends."""
        try:
            found = self._decoder.decode(event.data)
        except (ValueError, RecursionError) as error:
            raise EndpointError(
                f"an event of the stream makes no sense: {error}; it begins with {quoted(event.data)}"
            ) from None
        kind = found.type
        if kind == "content_block_delta" and found.delta is not None:
            return self._delta(found.index, found.delta)
        if kind == "content_block_start" and found.content_block is not None:
            return self._block(found.index, found.content_block)
        if kind == "message_start" and found.message is not None:
            self._raw_usage = dict(found.message.usage or {})
            return [Begin(found.message.id, found.message.model)]
        if kind == "message_delta" and found.delta is not None:
            return self._end(found.delta, found.usage or {})
        if kind == "error":
            raise stream_error(event.data)
        if kind == "message_stop":
            self.is_done = True
        return []

    def _block(self, index: int, block: _Block) -> list[Piece]:
        if block.type == "tool_use":
            if index in self._positions:
                raise EndpointError(f"the stream begins its block {index} twice")
            position = self._positions[index] = len(self._positions)
            return [ToolPiece(position, block.id, block.name, _arguments(block.input))]
        return _text_pieces(block)

    def _delta(self, index: int, delta: _Delta) -> list[Piece]:
        if delta.type == "text_delta":
            return [TextPiece(delta.text)]
        if delta.type == "input_json_delta" and index in self._positions:
            return [ToolPiece(self._positions[index], arguments=delta.partial_json)]
        if delta.type == "thinking_delta":
            return [TextPiece(delta.thinking, is_thought=True)]
        if delta.type in ("signature_delta", "citations_delta"):
            return []
        raise EndpointError(f"the stream has a delta of the type {quoted(delta.type)}, which is not known")

    def _end(self, delta: _Delta, usage: dict[str, Any]) -> list[Piece]:
        """Later counts stand in place of earlier ones, where they are given."""
        self._raw_usage |= {name: value for name, value in usage.items() if value is not None}
        totals = Totals(_usage(self._raw_usage), self._raw_usage)
        return [_finish(delta.stop_reason, delta.stop_sequence), totals]


def read_anthropic_reply(body: bytes) -> Reply:
    """A message that came at once. Raises EndpointError."""
    found = decode_reply(body, _Body)
    if found.stop_reason is None:
        raise EndpointError(f"the answer is no message; it begins with {quoted(body)}")
    builder = ReplyBuilder()
    builder.add([Begin(found.id, found.model)])
    num_calls = 0
    for block in found.content:
        if block.type == "tool_use":
            builder.add([ToolPiece(num_calls, block.id, block.name, _arguments(block.input))])
            num_calls += 1
        else:
            builder.add(_text_pieces(block))
    builder.add([_finish(found.stop_reason, found.stop_sequence)])
    if found.usage is not None:
        builder.add([Totals(_usage(found.usage), found.usage)])
    return builder.reply()


def _text_pieces(block: _Block) -> list[Piece]:
    if block.type == "text":
        return [TextPiece(block.text)] if block.text else []
    if block.type == "thinking":
        return [TextPiece(block.thinking, is_thought=True)] if block.thinking else []
    if block.type == "redacted_thinking":
        return []
    raise EndpointError(f"the answer has a block of the type {quoted(block.type)}, which is not known")


def _arguments(value: Any) -> str:
    """The text of a call's input; empty for the empty one, which a stream fills afterwards."""
    return encode_json(value).decode() if value else ""


def _finish(reason: str | None, stop: str | None) -> Finish:
    if reason not in _FINISHES:
        raise EndpointError(f"the answer ended for the reason {quoted(str(reason))}, which is not known")
    finish = _FINISHES[reason]
    error = f"the endpoint withheld the answer ({reason})" if finish == "failed" else ""
    return Finish(finish, 0, stop or "", error)


def _usage(raw: dict[str, Any]) -> Usage:
    cached = count_of(raw, "cache_read_input_tokens")
    num_prompt = count_of(raw, "input_tokens") + cached + count_of(raw, "cache_creation_input_tokens")
    num_output = count_of(raw, "output_tokens")
    return Usage(num_prompt_tokens=num_prompt, num_cached_tokens=cached, num_output_tokens=num_output)
