"""What the OpenAI API answers: whole replies and the events of a stream, of chats and of completions alike.

Only the fields that are needed are read, all others passed over. Servers differ in small things (arguments
as an object, no `index`, `reasoning_content`, another word for the end), which are taken as they are meant.
"""

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from tokenmill.core import EndpointError, FinishReason, Usage
from tokenmill.wire.errors import stream_error
from tokenmill.wire.fields import count_of, decode_reply, encode_json, quoted
from tokenmill.wire.reply import (
    Begin,
    Finish,
    Piece,
    Reply,
    ReplyBuilder,
    TextPiece,
    TokenText,
    ToolPiece,
    Totals,
)
from tokenmill.wire.sse import SseEvent

__all__ = ["OpenAIReader", "read_models", "read_openai_reply"]

_DONE: Final = b"[DONE]"
_FINISHES: Final[dict[str, FinishReason]] = {
    "stop": "completed",
    "tool_calls": "completed",
    "function_call": "completed",
    "eos_token": "completed",
    "stop_sequence": "stopped",
    "length": "length",
    "abort": "cancelled",
    "content_filter": "failed",
}


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Top(msgspec.Struct):
    token: str
    logprob: float


class _Token(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[_Top] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None


class _Answer(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    created: int | float | None = None
    system_fingerprint: str | None = None
    choices: list[_Choice] | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class OpenAIReader:
    """Reads the events of one stream.

    `is_done` once it has said that nothing follows, `is_complete` once there is an answer with its end: some
    servers do not say the former.
    """

    def __init__(self) -> None:
        self.is_done = self.is_complete = False
        self._began = False
        self._decoder = msgspec.json.Decoder(_Answer)

    def read(self, event: SseEvent) -> list[Piece]:
        """What happened. Raises EndpointError for nonsense, and the error that the endpoint sends."""
        data = event.data
        if data == _DONE:
            self.is_done = True
            return []
        try:
            answer = self._decoder.decode(data)
        except (ValueError, RecursionError) as error:
            raise EndpointError(
                f"an event of the stream makes no sense: {error}; it begins with {quoted(data)}"
            ) from None
        if answer.error is not None:
            raise stream_error(data)
        pieces: list[Piece] = []
        if not self._began:
            self._began = True
            pieces.append(_begin(answer))
        for choice in answer.choices or ():
            pieces += _pieces(choice, choice.delta)
            self.is_complete = self.is_complete or choice.finish_reason is not None
        if answer.usage is not None:
            pieces.append(Totals(_usage(answer.usage), answer.usage))
        return pieces


def read_openai_reply(body: bytes) -> Reply:
    """A reply that came at once. Raises EndpointError."""
    answer = decode_reply(body, _Answer)
    if not answer.choices:
        raise EndpointError(f"the answer has no choices; it begins with {quoted(body)}")
    builder = ReplyBuilder()
    builder.add([_begin(answer)])
    for choice in answer.choices:
        builder.add(_pieces(choice, choice.message))
        builder.add([] if choice.finish_reason else [Finish("completed", choice.index)])
    if answer.usage is not None:
        builder.add([Totals(_usage(answer.usage), answer.usage)])
    return builder.reply()


def read_models(body: bytes) -> list[str]:
    """The names in a list of models, of either API. Raises EndpointError."""
    return [model.id for model in decode_reply(body, _Models).data]


def _begin(answer: _Answer) -> Begin:
    fingerprint = answer.system_fingerprint or ""
    return Begin(answer.id or "", answer.model or "", int(answer.created or 0), fingerprint)


def _pieces(choice: _Choice, message: _Message | None) -> Iterator[Piece]:
    """What a choice says; `message` is its part of a conversation, None of a continuation."""
    index = choice.index
    logprobs = () if choice.logprobs is None else tuple(_token_texts(choice.logprobs))
    text = choice.text
    if message is not None:
        thought = message.reasoning_content or message.reasoning
        if thought:
            yield TextPiece(thought, index, True)
        text = message.content or message.refusal
    if text or logprobs:
        yield TextPiece(text or "", index, False, logprobs)
    if message is not None and message.tool_calls:
        for at, call in enumerate(message.tool_calls):
            yield _tool_piece(call, at, index)
    if choice.finish_reason:
        yield _finish(choice)


def _tool_piece(call: _Call, at: int, index: int) -> ToolPiece:
    function = call.function or _Function()
    arguments = function.arguments
    text = (
        arguments
        if isinstance(arguments, str)
        else ""
        if arguments is None
        else encode_json(arguments).decode()
    )
    return ToolPiece(
        at if call.index is None else call.index, call.id or "", function.name or "", text, index
    )


def _finish(choice: _Choice) -> Finish:
    word = choice.finish_reason or ""
    if word not in _FINISHES:
        raise EndpointError(f"the answer ended for the reason {quoted(word)}, which is not known")
    reason = _FINISHES[word]
    if reason == "completed" and choice.stop_reason is not None:
        reason = "stopped"
    stop = choice.stop_reason if isinstance(choice.stop_reason, str) else ""
    error = f"the endpoint withheld the answer ({word})" if reason == "failed" else ""
    return Finish(reason, choice.index, stop, error)


def _token_texts(logprobs: _Logprobs) -> Iterator[TokenText]:
    for token in logprobs.content or ():
        most_likely = tuple((each.token, each.logprob) for each in token.top_logprobs or ())
        yield TokenText(token.token, token.logprob, most_likely)
    tokens, values = logprobs.tokens or [], logprobs.token_logprobs or []
    tops: list[dict[str, float] | None] = logprobs.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(values) == len(tops):
        raise EndpointError("the lists of logprobs differ in length")
    for text, value, top in zip(tokens, values, tops, strict=True):
        yield TokenText(text, value, tuple((top or {}).items()))


def _usage(raw: dict[str, Any]) -> Usage:
    """Cached tokens are among `prompt_tokens` here."""
    details = raw.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    num_prompt, num_output = count_of(raw, "prompt_tokens"), count_of(raw, "completion_tokens")
    num_cached = count_of({"cached_tokens": cached}, "cached_tokens")
    if num_cached > num_prompt:
        raise EndpointError(f"the usage has {num_cached} cached tokens of {num_prompt}")
    return Usage(num_prompt_tokens=num_prompt, num_cached_tokens=num_cached, num_output_tokens=num_output)
