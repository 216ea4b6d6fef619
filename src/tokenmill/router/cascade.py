"""The small model first: a call that it is not sure of goes on to the larger one.

Sure is what it says itself: the probability that it gave its whole answer, the product over its tokens, is at
least `min_probability`. Until that is known nothing of an answer goes out, so a call that goes on waits for
both, and costs both. Where the threshold comes from, and what it guarantees, is the affair of who set it.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from tokenmill.core import FinishReason, TokenmillError, Usage, UsageError
from tokenmill.router.backend import Attempt, Backend, BackendState, Embedded, Job, Prepared, Spent
from tokenmill.wire import Begin, Call, Finish, Piece, Prompt, TextPiece, ToolPiece

__all__ = ["CascadeAttempt", "CascadeBackend", "CascadeConfig", "answer_probability"]


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """`name` is what clients ask for; `first` answers if it is sure, else `second`, both deployments."""

    name: str
    first: str
    second: str
    min_probability: float

    def __post_init__(self) -> None:
        if len({self.name, self.first, self.second}) < 3 or not all((self.name, self.first, self.second)):
            raise UsageError("a cascade needs a name, a first and a second", hint="give three names")
        if not 0.0 <= self.min_probability <= 1.0:
            raise UsageError(f"min_probability is {self.min_probability}", hint="use a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class _Both(Prepared):
    """What both would take; a call that the first cannot answer at all goes to the second at once."""

    first: Prepared | None
    second: Prepared


def answer_probability(pieces: Sequence[Piece]) -> float:
    """The probability of an answer by its own tokens; 0 of one that is cut off, calls tools or says none."""
    total, num_tokens, is_whole = 0.0, 0, False
    for piece in pieces:
        if isinstance(piece, TextPiece):
            known = [each.logprob for each in piece.logprobs if each.logprob is not None]
            total, num_tokens = total + math.fsum(known), num_tokens + len(known)
        elif isinstance(piece, ToolPiece):
            return 0.0
        elif isinstance(piece, Finish):
            is_whole = piece.finish_reason in ("completed", "stopped")
    return math.exp(total) if is_whole and num_tokens else 0.0


class CascadeBackend:
    """Two backends as one; neither is closed with it."""

    def __init__(self, config: CascadeConfig, first: Backend, second: Backend) -> None:
        self._config = config
        self.first = first
        self.second = second

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self._config.name

    @property
    def model(self) -> str:
        """Its own name: either may answer."""
        return self._config.name

    @property
    def min_probability(self) -> float:
        """The threshold."""
        return self._config.min_probability

    @property
    def is_local(self) -> bool:
        """Whether both are."""
        return self.first.is_local and self.second.is_local

    @property
    def state(self) -> BackendState:
        """Ready while the second is: it can answer everything."""
        return self.second.state

    async def prepare(self, call: Call) -> Prepared:
        """Check and count a call for both. Raises UsageError for one that the second cannot answer."""
        if call.params.n != 1:
            raise UsageError("a cascade gives one answer", hint="leave n out")
        second = await self.second.prepare(call)
        asked = replace(call, params=replace(call.params, logprobs=call.params.logprobs or 0))
        try:
            first = await self.first.prepare(asked)
        except UsageError:
            first = None
        each = [second] if first is None else [first, second]
        return _Both(
            call=call,
            num_prompt_tokens=sum(part.num_prompt_tokens for part in each),
            max_output_tokens=sum(part.max_output_tokens for part in each),
            first=first,
            second=second,
        )

    def start(self, prepared: Prepared, job: Job) -> "CascadeAttempt":
        """Ask the first. Raises ResourceError if it is full."""
        assert isinstance(prepared, _Both), "prepared by another backend"
        first = None if prepared.first is None else self.first.start(prepared.first, job)
        return CascadeAttempt(self, prepared, first, job)

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """Raises UsageError: two models have two spaces."""
        raise UsageError(f"{self.name} has no embeddings", hint="ask one of its models")

    async def drain(self, deadline_s: float) -> None:
        """Both drain by themselves."""

    async def close(self) -> None:
        """As `drain`."""


class CascadeAttempt:
    """A call on its way through both. `was_deferred` and `probability` are known once it answers."""

    def __init__(self, backend: CascadeBackend, prepared: _Both, first: Attempt | None, job: Job) -> None:
        self._backend = backend
        self._prepared = prepared
        self._job = job
        self._first = first
        self._second: Attempt | None = None
        self._is_cancelled = False
        self.probability = 0.0
        self.was_deferred = False
        self._deciding = asyncio.create_task(self._decide())

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[Piece]:
        held = await asyncio.shield(self._deciding)
        if self._second is None:
            for piece in held:
                yield self._shown(piece)
            return
        async for piece in self._second:
            yield self._named(piece)

    def cancel(self) -> None:
        """Give up whichever is working."""
        self._is_cancelled = True
        for each in (self._first, self._second):
            if each is not None:
                each.cancel()

    async def spent(self) -> Spent:
        """Of both: tokens, time, money; the end is that of the one that answered."""
        with contextlib.suppress(TokenmillError):
            await asyncio.shield(self._deciding)
        parts = [await each.spent() for each in (self._first, self._second) if each is not None]
        return _sum(parts)

    async def _decide(self) -> list[Piece]:
        """Hear the first out; begin with the second if it is not sure."""
        held: list[Piece] = []
        with contextlib.suppress(TokenmillError):
            if self._first is not None:
                async for piece in self._first:
                    held.append(piece)
            self.probability = answer_probability(held)
        is_answer = any(isinstance(each, Finish) for each in held)
        if self._is_cancelled or (is_answer and self.probability >= self._backend.min_probability):
            return held
        self.was_deferred = True
        self._second = self._backend.second.start(self._prepared.second, self._job)
        return []

    def _named(self, piece: Piece) -> Piece:
        return Begin(piece.id, self._backend.model, piece.created) if isinstance(piece, Begin) else piece

    def _shown(self, piece: Piece) -> Piece:
        """Without the log-probabilities that only the cascade asked for."""
        if isinstance(piece, TextPiece) and self._prepared.call.params.logprobs is None:
            return TextPiece(piece.text, piece.index, piece.is_thought)
        return self._named(piece)


def _sum(parts: Sequence[Spent]) -> Spent:
    usages = [each.usage for each in parts]
    finish: FinishReason = parts[-1].finish if parts else "cancelled"
    return Spent(
        usage=Usage(
            num_prompt_tokens=sum(each.num_prompt_tokens for each in usages),
            num_cached_tokens=sum(each.num_cached_tokens for each in usages),
            num_output_tokens=sum(each.num_output_tokens for each in usages),
            num_draft_tokens=sum(each.num_draft_tokens for each in usages),
            num_accepted_tokens=sum(each.num_accepted_tokens for each in usages),
        ),
        finish=finish,
        nanoseconds=sum(each.nanoseconds for each in parts),
        nanojoules=sum(each.nanojoules for each in parts),
        cost_nano_usd=sum(each.cost_nano_usd for each in parts),
        is_exact=all(each.is_exact for each in parts),
    )
