"""What a load is put on: something that takes a request and streams its answer.

The load generator sees a system only through `Target`, so an endpoint at a URL, a local model in a process of
its own and a test's script are measured by the same code. Who makes a target knows its protocol; nothing
here does. Times are seconds on the clock of the running event loop.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from tokenmill.core import SamplingParams

__all__ = ["Finish", "LoadRequest", "Piece", "StreamEvent", "Target"]


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """One request to send: a prompt as text, and as token ids where a tokenizer is at hand.

    `num_input_tokens` is what the prompt was made to have: exact with token ids, else an aim that the
    system's own count replaces.
    """

    id: str
    text: str
    params: SamplingParams
    num_input_tokens: int
    token_ids: tuple[int, ...] = ()


class Piece(NamedTuple):
    """Text arrived, at `at_s`. `num_tokens` is how many tokens it is, None if the system does not say."""

    at_s: float
    num_tokens: int | None = None


class Finish(NamedTuple):
    """The answer is complete, with the system's own counts; None for what it did not say."""

    at_s: float
    reason: str
    num_input_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None


StreamEvent: TypeAlias = Piece | Finish


class Target(Protocol):
    """A system under load."""

    def stream(self, request: LoadRequest) -> AsyncIterator[StreamEvent]:
        """Send a request now and yield each piece as it arrives, then one `Finish`.

        Raises TokenmillError or OSError for a request that failed. A reader that stops cancels the request.
        """
        ...
