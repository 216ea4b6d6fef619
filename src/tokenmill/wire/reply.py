"""What an endpoint answers, in no API's shape: at once (`Reply`), or in pieces (`Piece`).

Tokens are texts here, for that is what goes over the wire; `completions` makes `core.Completion` of it.
Thoughts of a reasoning model are kept apart from the answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import msgspec

from tokenmill.core import Completion, EndpointError, FinishReason, TokenLogprobs, ToolCall, Usage, UsageError

__all__ = [
    "Begin",
    "CallText",
    "Choice",
    "Finish",
    "Piece",
    "Reply",
    "ReplyBuilder",
    "TextPiece",
    "TokenText",
    "ToolPiece",
    "Totals",
    "reply_of",
]

_MAX_CHARS: Final = 32 << 20
_MAX_CHOICES: Final = 1024
_MAX_CALLS: Final = 128


class TokenText(msgspec.Struct, frozen=True):
    """A token's text, its natural log-probability, and the most likely (text, log-probability) there.

    Bytes that are no whole character are lone surrogates in the text (`surrogateescape`, PEP 383). The first
    token of an echoed prompt has no log-probability.
    """

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


class Begin(msgspec.Struct, frozen=True):
    """The first event of a stream: the endpoint's name for the reply, and the model that answers.

    `fingerprint` tells one build of a model from another under the same name, if it is known.
    """

    id: str
    model: str
    created: int = 0
    fingerprint: str = ""


class TextPiece(msgspec.Struct, frozen=True):
    """Text of the completion `index`, or of its thoughts."""

    text: str
    index: int = 0
    is_thought: bool = False
    logprobs: tuple[TokenText, ...] = ()


class ToolPiece(msgspec.Struct, frozen=True):
    """A piece of the call number `position` of a completion: first id and name, then text of arguments."""

    position: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    index: int = 0


class Finish(msgspec.Struct, frozen=True):
    """The end of a completion; `stop` is the stop string that ended it, if the endpoint says so."""

    finish_reason: FinishReason
    index: int = 0
    stop: str = ""
    error: str = ""


class Totals(msgspec.Struct, frozen=True):
    """Token counts of the whole request, with the endpoint's own object."""

    usage: Usage
    raw: dict[str, Any] = msgspec.field(default_factory=dict)


Piece: TypeAlias = Begin | TextPiece | ToolPiece | Finish | Totals
"""What happens in a stream."""


class CallText(msgspec.Struct, frozen=True):
    """A function call as the model wrote it: whether `arguments` is JSON is not checked yet."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One completion of a reply."""

    index: int = 0
    text: str
    finish_reason: FinishReason
    tool_calls: tuple[CallText, ...] = ()
    stop: str = ""
    error: str = ""
    thoughts: str = ""
    logprobs: tuple[TokenText, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole answer. `usage` counts the request, all its choices together; None if it was not said.

    `raw_usage` is the endpoint's own object, in which prices may be told apart that `Usage` does not know.
    """

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None
    created: int = 0
    fingerprint: str = ""
    raw_usage: Mapping[str, Any] = field(default_factory=dict)

    def completion(self, request_id: str, *, ttft_s: float, total_s: float) -> Completion:
        """The only choice as a completion; without token ids, which no endpoint tells.

        A function call that is no JSON object makes it `failed`. Raises EndpointError without usage.
        """
        if self.usage is None:
            raise EndpointError(
                "the reply does not say how many tokens it has", hint="the endpoint must report usage"
            )
        if len(self.choices) != 1:
            raise EndpointError(f"the reply has {len(self.choices)} choices, 1 was asked for")
        choice = self.choices[0]
        finish, error = choice.finish_reason, choice.error
        calls: tuple[ToolCall, ...] = ()
        try:
            calls = tuple(ToolCall(id=c.id, name=c.name, arguments=c.arguments) for c in choice.tool_calls)
        except UsageError as wrong:
            finish, error = "failed", wrong.message
        return Completion(
            request_id=request_id,
            text=choice.text,
            token_ids=(),
            finish_reason=finish,
            usage=self.usage,
            ttft_s=ttft_s,
            total_s=total_s,
            index=choice.index,
            error=error,
            tool_calls=calls,
            stop=choice.stop,
        )


def reply_of(completions: Sequence[Completion], begin: Begin, token_text: Callable[[int], str]) -> Reply:
    """What a request's completions are on the wire; `token_text` gives a token's text for its logprobs.

    The prompt counts once, the outputs together. Raises EndpointError if one is an error, not an answer.
    """
    for each in completions:
        if each.finish_reason in ("failed", "expired", "cancelled"):
            raise EndpointError(
                f"the request {each.finish_reason}" + (f": {each.error}" if each.error else "")
            )
    first = completions[0].usage
    usage = Usage(
        num_prompt_tokens=first.num_prompt_tokens,
        num_cached_tokens=first.num_cached_tokens,
        num_output_tokens=sum(each.usage.num_output_tokens for each in completions),
    )
    choices = [
        Choice(
            index=each.index,
            text=each.text,
            finish_reason=each.finish_reason,
            stop=each.stop,
            tool_calls=tuple(CallText(call.id, call.name, call.arguments) for call in each.tool_calls),
            logprobs=None if each.logprobs is None else tuple(_token_texts(each.logprobs, token_text)),
        )
        for each in completions
    ]
    return Reply(id=begin.id, model=begin.model, created=begin.created, choices=tuple(choices), usage=usage)


def _token_texts(logprobs: Iterable[TokenLogprobs], token_text: Callable[[int], str]) -> Iterator[TokenText]:
    for each in logprobs:
        top = tuple((token_text(token), logprob) for token, logprob in each.top)
        yield TokenText(token_text(each.token_id), each.logprob, top)


class _Parts:
    """The pieces of one choice."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.thoughts: list[str] = []
        self.logprobs: list[TokenText] = []
        self.calls: dict[int, list[str]] = {}
        self.finish: Finish | None = None

    def add_call(self, piece: ToolPiece) -> None:
        parts = self.calls.setdefault(piece.position, ["", "", ""])
        parts[0], parts[1] = piece.id or parts[0], piece.name or parts[1]
        if piece.arguments:
            parts.append(piece.arguments)
        if len(self.calls) > _MAX_CALLS:
            raise EndpointError(f"the reply has over {_MAX_CALLS} function calls")

    def choice(self, index: int) -> Choice:
        if self.finish is None:
            raise EndpointError("the stream ended before its answer did", hint="try again")
        calls = [self.calls[at] for at in sorted(self.calls)]
        return Choice(
            index=index,
            text="".join(self.text),
            finish_reason=self.finish.finish_reason,
            tool_calls=tuple(CallText(c[0], c[1], "".join(c[2:]) or "{}") for c in calls),
            stop=self.finish.stop,
            error=self.finish.error,
            thoughts="".join(self.thoughts),
            logprobs=tuple(self.logprobs) or None,
        )


class ReplyBuilder:
    """Collects the pieces of a stream to a reply, within bounds."""

    def __init__(self) -> None:
        self._begin = Begin("", "")
        self._totals: Totals | None = None
        self._choices: dict[int, _Parts] = {}
        self._num_chars = 0

    def add(self, pieces: Iterable[Piece]) -> None:
        """Take them. Raises EndpointError for a reply without measure."""
        for piece in pieces:
            if isinstance(piece, Begin):
                self._begin = piece
            elif isinstance(piece, Totals):
                self._totals = piece
            else:
                self._add(piece)

    def _add(self, piece: TextPiece | ToolPiece | Finish) -> None:
        parts = self._choices.setdefault(piece.index, _Parts())
        if isinstance(piece, TextPiece):
            (parts.thoughts if piece.is_thought else parts.text).append(piece.text)
            parts.logprobs += piece.logprobs
            self._num_chars += len(piece.text) + 8
        elif isinstance(piece, ToolPiece):
            parts.add_call(piece)
            self._num_chars += len(piece.arguments) + 8
        else:
            parts.finish = piece
        if self._num_chars > _MAX_CHARS or len(self._choices) > _MAX_CHOICES:
            raise EndpointError(f"the reply has over {_MAX_CHARS} characters")

    def reply(self) -> Reply:
        """The whole. Raises EndpointError if an answer has no end, or there is none."""
        if not self._choices:
            raise EndpointError("the stream ended without an answer", hint="try again")
        return Reply(
            id=self._begin.id,
            model=self._begin.model,
            created=self._begin.created,
            fingerprint=self._begin.fingerprint,
            choices=tuple(self._choices[at].choice(at) for at in sorted(self._choices)),
            usage=None if self._totals is None else self._totals.usage,
            raw_usage={} if self._totals is None else self._totals.raw,
        )
