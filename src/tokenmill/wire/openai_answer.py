"""Replies in the shapes of the OpenAI API: at once, and as the events of a stream."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenmill.core import FinishReason, Tier, Usage
from tokenmill.wire.fields import encode_json
from tokenmill.wire.reply import Begin, Choice, Finish, Piece, Reply, TextPiece, TokenText, ToolPiece
from tokenmill.wire.sse import encode_sse

__all__ = ["OPENAI_TIERS", "OpenAIHead", "OpenAIWriter", "token_logprob", "write_openai_reply"]

OPENAI_TIERS: Final[dict[Tier, str]] = {"standard": "default", "fast": "priority", "batch": "flex"}
"""Our tiers as `service_tier` in an answer."""

_FINISHES: Final[dict[FinishReason, str]] = {"completed": "stop", "stopped": "stop", "length": "length"}
"""Ends that are answers. What failed, expired or was cancelled is an error, not a reply."""


@dataclass(frozen=True, kw_only=True)
class OpenAIHead:
    """What the server says of an answer: its `id`, if it is not that of whoever answers, and its tier."""

    id: str = ""
    tier: Tier | None = None

    def fields(self, begin: Begin, *, chat: bool, kind: str) -> dict[str, Any]:
        """What every body and event begins with."""
        result = {
            "id": self.id or begin.id,
            "object": kind,
            "created": begin.created,
            "model": begin.model,
            "system_fingerprint": begin.fingerprint or None,
        }
        return result | {"service_tier": OPENAI_TIERS[self.tier]} if chat and self.tier else result


class OpenAIWriter:
    """The events of one stream: `write` each piece, from `Begin` on, then `end`.

    `chat` says which of the two kinds of stream it is. Totals are written if `include_usage` asks for them.
    """

    def __init__(self, *, chat: bool, include_usage: bool = False, head: OpenAIHead | None = None) -> None:
        self._chat = chat
        self._told = head or OpenAIHead()
        self._include_usage = include_usage
        self._head: dict[str, Any] = {}
        self._spoken: set[int] = set()
        self._called: set[int] = set()
        self._seen_calls: set[tuple[int, int]] = set()
        self._offsets: dict[int, int] = {}

    def write(self, piece: Piece) -> bytes:
        """The events of one piece, which may be none."""
        if isinstance(piece, Begin):
            kind = "chat.completion.chunk" if self._chat else "text_completion"
            self._head = self._told.fields(piece, chat=self._chat, kind=kind)
            return b""
        if isinstance(piece, TextPiece):
            return self._text(piece)
        if isinstance(piece, ToolPiece):
            return self._tool(piece)
        if isinstance(piece, Finish):
            return self._finish(piece)
        return self._event([], usage=_usage(piece.usage)) if self._include_usage else b""

    def end(self) -> bytes:
        """What says that nothing follows."""
        return encode_sse(b"[DONE]")

    def _text(self, piece: TextPiece) -> bytes:
        logprobs = piece.logprobs
        if not self._chat:
            offset = self._offsets.get(piece.index, 0)
            self._offsets[piece.index] = offset + len(piece.text)
            return self._choice(piece.index, None, text=piece.text, logprobs=_text_logprobs(logprobs, offset))
        delta = {"reasoning_content" if piece.is_thought else "content": piece.text}
        return self._choice(piece.index, None, delta=delta, logprobs=_chat_logprobs(logprobs))

    def _tool(self, piece: ToolPiece) -> bytes:
        function = {"name": piece.name} if piece.name else {}
        call: dict[str, Any] = {
            "index": piece.position,
            "function": function | {"arguments": piece.arguments},
        }
        if (piece.index, piece.position) not in self._seen_calls:
            self._seen_calls.add((piece.index, piece.position))
            call |= {"id": piece.id, "type": "function"}
        self._called.add(piece.index)
        return self._choice(piece.index, None, delta={"tool_calls": [call]}, logprobs=None)

    def _finish(self, piece: Finish) -> bytes:
        called = piece.index in self._called
        reason = _finish(piece.finish_reason, has_calls=called)
        stop = piece.stop if piece.finish_reason == "stopped" else None
        body: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._choice(piece.index, reason, **body, logprobs=None, stop_reason=stop)

    def _choice(self, index: int, finish: str | None, **body: Any) -> bytes:
        role = b""
        if self._chat and index not in self._spoken:
            self._spoken.add(index)
            delta = {"role": "assistant", "content": ""}
            role = self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        return role + self._event([{"index": index, **body, "finish_reason": finish}])

    def _event(self, choices: Sequence[Any], usage: dict[str, Any] | None = None) -> bytes:
        body = {**self._head, "choices": choices}
        return encode_sse(encode_json(body | {"usage": usage} if self._include_usage else body))


def write_openai_reply(reply: Reply, *, chat: bool, head: OpenAIHead | None = None) -> bytes:
    """The body of an answer at once, of a chat or of a completion."""
    begin = Begin(reply.id, reply.model, reply.created, reply.fingerprint)
    kind = "chat.completion" if chat else "text_completion"
    body = (head or OpenAIHead()).fields(begin, chat=chat, kind=kind)
    body["choices"] = [(_chat_choice if chat else _text_choice)(choice) for choice in reply.choices]
    return encode_json(body if reply.usage is None else body | {"usage": _usage(reply.usage)})


def _chat_choice(choice: Choice) -> dict[str, Any]:
    content = choice.text if choice.text or not choice.tool_calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if choice.thoughts:
        message["reasoning_content"] = choice.thoughts
    if choice.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ]
    logprobs = None if choice.logprobs is None else _chat_logprobs(choice.logprobs)
    return {"index": choice.index, "message": message, "logprobs": logprobs, **_end(choice)}


def _text_choice(choice: Choice) -> dict[str, Any]:
    assert not choice.tool_calls
    logprobs = None if choice.logprobs is None else _text_logprobs(choice.logprobs, 0)
    return {"index": choice.index, "text": choice.text, "logprobs": logprobs, **_end(choice)}


def _end(choice: Choice) -> dict[str, Any]:
    reason = _finish(choice.finish_reason, has_calls=bool(choice.tool_calls))
    return {
        "finish_reason": reason,
        "stop_reason": choice.stop if choice.finish_reason == "stopped" else None,
    }


def _finish(reason: FinishReason, *, has_calls: bool) -> str:
    assert reason in _FINISHES, f"{reason} is an error, not a reply"
    return "tool_calls" if has_calls and reason != "length" else _FINISHES[reason]


def _chat_logprobs(logprobs: Iterable[TokenText]) -> dict[str, Any] | None:
    tokens = [
        {**token_logprob(each.text, each.logprob), "top_logprobs": [token_logprob(*top) for top in each.top]}
        for each in logprobs
    ]
    return {"content": tokens, "refusal": None} if tokens else None


def token_logprob(text: str, logprob: float | None) -> dict[str, Any]:
    """A token with its bytes; U+FFFD that came so from an endpoint stands for bytes that nobody knows."""
    data = text.encode("utf-8", "surrogateescape")
    shown = data.decode("utf-8", "replace")
    return {"token": shown, "logprob": logprob, "bytes": None if "\ufffd" in text else list(data)}


def _token_name(text: str) -> str:
    """A token in the lists of a completion; one that is no text is named by its bytes."""
    data = text.encode("utf-8", "surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _text_logprobs(logprobs: Sequence[TokenText], offset: int) -> dict[str, Any] | None:
    """The lists of a completion; `text_offset` counts characters from its beginning."""
    if not logprobs:
        return None
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.text)
    has_top = any(each.top for each in logprobs)
    return {
        "tokens": [_token_name(each.text) for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [_tops(each) for each in logprobs] if has_top else None,
        "text_offset": offsets,
    }


def _tops(token: TokenText) -> dict[str, float] | None:
    return {_token_name(text): logprob for text, logprob in token.top} or None


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
