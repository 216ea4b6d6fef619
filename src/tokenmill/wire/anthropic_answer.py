"""Replies in the shapes of the Anthropic API: at once, and as the events of a stream, in their order.

A call's id that another API made (`call_...`) is written as this one names it (`toolu_...`).
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from tokenmill.core import EndpointError, FinishReason, Tier, Usage
from tokenmill.wire.fields import encode_json
from tokenmill.wire.reply import Begin, Finish, Piece, Reply, TextPiece, ToolPiece
from tokenmill.wire.sse import encode_sse

__all__ = ["AnthropicHead", "AnthropicWriter", "write_anthropic_reply"]

_FINISHES: Final[dict[FinishReason, str]] = {
    "completed": "end_turn",
    "stopped": "stop_sequence",
    "length": "max_tokens",
}
"""Ends that are answers, as of the OpenAI API."""
_TIERS: Final[dict[Tier, tuple[str, str]]] = {
    "standard": ("standard", "standard"),
    "fast": ("priority", "fast"),
    "batch": ("batch", "standard"),
}
"""Of a tier of ours, what the usage has as `service_tier` and `speed`."""


@dataclass(frozen=True, kw_only=True)
class AnthropicHead:
    """What a message says beside its answer: its id, its tier, and how many tokens were allowed.

    An answer that ended before `max_tokens` for want of room ended at the context window. An `id` that is
    empty is the reply's own; `max_tokens` 0: not known.
    """

    id: str = ""
    tier: Tier | None = None
    max_tokens: int = 0


_PLAIN: Final = AnthropicHead()


class _Open(NamedTuple):
    """The block that is being written: `text`, `thinking`, or `tool_use` with the call's position."""

    kind: str
    position: int = 0


class AnthropicWriter:
    """The events of one stream: `write` each piece, `Begin` first, `Totals` after `Finish`; then `end`.

    `num_prompt_tokens` and `num_cached_tokens` are told at the beginning, as that API does; the totals at
    the end stand in their place. A `ping` follows the beginning of the first block.
    """

    def __init__(
        self, num_prompt_tokens: int = 0, num_cached_tokens: int = 0, head: AnthropicHead = _PLAIN
    ) -> None:
        self._head = head
        self._usage = Usage(
            num_prompt_tokens=num_prompt_tokens, num_cached_tokens=num_cached_tokens, num_output_tokens=0
        )
        self._open: _Open | None = None
        self._num_blocks = 0
        self._has_calls = False
        self._finish: Finish | None = None

    def write(self, piece: Piece) -> bytes:
        """The events of one piece, which may be none."""
        if isinstance(piece, Begin):
            message = _message(piece.id, piece.model, [], self._usage, self._head)
            return _event("message_start", message=message)
        if isinstance(piece, TextPiece):
            assert piece.index == 0 and not piece.logprobs
            return self._text(piece) if piece.text else b""
        if isinstance(piece, ToolPiece):
            assert piece.index == 0
            return self._tool(piece)
        if isinstance(piece, Finish):
            assert piece.index == 0
            self._finish = piece
            return self._close()
        return self._totals(piece.usage)

    def end(self) -> bytes:
        """What says that nothing follows."""
        return _event("message_stop")

    def _text(self, piece: TextPiece) -> bytes:
        kind = "thinking" if piece.is_thought else "text"
        start = self._start(_Open(kind), {kind: ""} | ({"signature": ""} if piece.is_thought else {}))
        delta = {"type": f"{kind}_delta", kind: piece.text}
        return start + _event("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _tool(self, piece: ToolPiece) -> bytes:
        self._has_calls = True
        start = self._start(
            _Open("tool_use", piece.position), {"id": _call_id(piece.id), "name": piece.name, "input": {}}
        )
        if not piece.arguments:
            return start
        delta = {"type": "input_json_delta", "partial_json": piece.arguments}
        return start + _event("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _start(self, block: _Open, fields: dict[str, Any]) -> bytes:
        """Begin a block, unless it is the one that is open."""
        if self._open == block:
            return b""
        closed = self._close()
        self._open = block
        self._num_blocks += 1
        content = {"type": block.kind, **fields}
        begun = _event("content_block_start", index=self._num_blocks - 1, content_block=content)
        return closed + begun + (_event("ping") if self._num_blocks == 1 else b"")

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._num_blocks - 1)

    def _totals(self, usage: Usage) -> bytes:
        assert self._finish is not None
        reason, stop = self._finish.finish_reason, self._finish.stop
        delta = _end(reason, stop, self._has_calls, usage, self._head)
        return _event("message_delta", delta=delta, usage=_usage(usage, self._head))


def write_anthropic_reply(reply: Reply, head: AnthropicHead = _PLAIN) -> bytes:
    """The body of an answer at once; it has one choice, and usage.

    Raises EndpointError for a call whose arguments are no JSON object.
    """
    assert len(reply.choices) == 1 and reply.usage is not None
    (choice,) = reply.choices
    content: list[dict[str, Any]] = []
    if choice.thoughts:
        content.append({"type": "thinking", "thinking": choice.thoughts, "signature": ""})
    if choice.text:
        content.append({"type": "text", "text": choice.text})
    content += [
        {"type": "tool_use", "id": _call_id(call.id), "name": call.name, "input": _input(call.arguments)}
        for call in choice.tool_calls
    ]
    end = _end(choice.finish_reason, choice.stop, bool(choice.tool_calls), reply.usage, head)
    return encode_json(_message(reply.id, reply.model, content, reply.usage, head) | end)


def _call_id(name: str) -> str:
    return f"toolu_{name.removeprefix('call_')}" if name.startswith("call_") else name


def _input(arguments: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (ValueError, RecursionError):
        message = "the model's call of a function has arguments that are no JSON object"
        raise EndpointError(message, hint="ask again, or use a strict tool") from None


def _message(
    name: str, model: str, content: list[dict[str, Any]], usage: Usage, head: AnthropicHead
) -> dict[str, Any]:
    return {
        "id": head.id or name,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(usage, head),
    }


def _end(
    reason: FinishReason, stop: str, has_calls: bool, usage: Usage, head: AnthropicHead
) -> dict[str, Any]:
    assert reason in _FINISHES, f"{reason} is an error, not a reply"
    word = "tool_use" if has_calls and reason == "completed" else _FINISHES[reason]
    if reason == "length" and usage.num_output_tokens < head.max_tokens:
        word = "model_context_window_exceeded"
    return {"stop_reason": word, "stop_sequence": stop if reason == "stopped" else None}


def _usage(usage: Usage, head: AnthropicHead) -> dict[str, int | str]:
    """Cached tokens are not among `input_tokens` here."""
    tier, speed = ("", "") if head.tier is None else _TIERS[head.tier]
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
        **({"service_tier": tier, "speed": speed} if tier else {}),
    }


def _event(name: str, **fields: Any) -> bytes:
    return encode_sse(encode_json({"type": name, **fields}), name)
