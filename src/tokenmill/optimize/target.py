"""A backend as a target of the load generator, which keeps what was answered.

What is loaded is what `tokenmill serve` runs behind its HTTP: templates, tokenizer, engine, cascade.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from tokenmill.core import EndpointError, SamplingParams
from tokenmill.evals.load import Finish, LoadRequest, Piece, StreamEvent
from tokenmill.optimize.cases import Case
from tokenmill.router import Backend, Job, Spent
from tokenmill.router.cascade import answer_probability
from tokenmill.wire import Call, TextPiece, ToolPiece
from tokenmill.wire import Finish as WireFinish
from tokenmill.wire import Piece as WirePiece
from tokenmill.workload import canonical_json

__all__ = ["BackendTarget", "Given", "request_of"]

_NOTHING: Final = SamplingParams()


@dataclass(frozen=True, kw_only=True)
class Given:
    """What was answered: its text, or tool calls as canonical JSON; its own probability; what it used."""

    text: str
    probability: float
    spent: Spent


def request_of(case: Case) -> LoadRequest:
    """What the load generator sends for a case: its id."""
    return LoadRequest(id=case.id, text="", params=_NOTHING, num_input_tokens=0)


class BackendTarget:
    """A `Target` over a backend. `given` has the answer to each case, by id, once it is there."""

    def __init__(self, backend: Backend, cases: Mapping[str, Case]) -> None:
        self.given: dict[str, Given] = {}
        self._backend = backend
        self._cases = cases
        self._num_sent = 0

    async def stream(self, request: LoadRequest) -> AsyncIterator[StreamEvent]:
        """Send a case. Raises what the backend refuses, and EndpointError for a call that is none."""
        case = self._cases[request.id]
        if case.call is None:
            raise EndpointError(case.refusal)
        loop = asyncio.get_running_loop()
        self._num_sent += 1
        prepared = await self._backend.prepare(_asked(case.call))
        attempt = self._backend.start(prepared, Job(request_id=f"{request.id}-{self._num_sent}"))
        pieces: list[WirePiece] = []
        finish = ""
        try:
            async for piece in attempt:
                pieces.append(piece)
                if (isinstance(piece, TextPiece) and piece.text) or isinstance(piece, ToolPiece):
                    yield Piece(
                        loop.time(), len(piece.logprobs) or None if isinstance(piece, TextPiece) else 1
                    )
                elif isinstance(piece, WireFinish):
                    finish = piece.finish_reason
        except BaseException:
            attempt.cancel()
            raise
        spent = await attempt.spent()
        self.given[request.id] = Given(
            text=_text(pieces), probability=answer_probability(pieces), spent=spent
        )
        usage = spent.usage
        yield Finish(
            loop.time(), finish, usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens
        )


def _asked(call: Call) -> Call:
    """The call with the log-probabilities that its own confidence is made of."""
    if call.params.logprobs is not None:
        return call
    return replace(call, params=replace(call.params, logprobs=0))


def _text(pieces: list[WirePiece]) -> str:
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        if isinstance(piece, ToolPiece):
            parts = calls.setdefault(piece.position, ["", ""])
            parts[0], parts[1] = piece.name or parts[0], parts[1] + piece.arguments
    if calls:
        return canonical_json([{"name": name, "arguments": _value(text)} for name, text in calls.values()])
    return "".join(each.text for each in pieces if isinstance(each, TextPiece) and not each.is_thought)


def _value(text: str) -> object:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text
