"""What can answer a call: an engine of this machine or an endpoint elsewhere, seen alike.

    prepared = await backend.prepare(call)          # checked and counted; an error here is free
    attempt = backend.start(prepared, job)          # from here on it costs
    async for piece in attempt: ...                 # breaking off cancels it
    spent = await attempt.spent()                   # what it used, however it ended, also after a disconnect

Whoever starts an attempt waits for `spent` in a task that no client can cancel.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from tokenmill.core import FinishReason, Tier, Usage
from tokenmill.wire import Call, Piece, Prompt

__all__ = ["Attempt", "Backend", "BackendState", "Embedded", "Job", "Prepared", "Spent", "cost_of_time"]

_NANO: Final = 1_000_000_000

BackendState: TypeAlias = Literal["live", "ready", "drained"]
"""As `engine.EngineState`: `ready` takes calls, `live` does not at the moment, `drained` never again."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """For whom a call is answered. `tenant` separates caches, `timeout_s` is what is left of its time.

    `key_id` and `feature` are for the ledger: a shadow is settled when nobody else knows them any more.
    """

    request_id: str
    tenant: str = ""
    tier: Tier = "standard"
    timeout_s: float | None = None
    key_id: str = ""
    feature: str = ""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A call that a backend would take, and the most tokens that it can come to.

    Of an upstream the prompt's tokens are an upper bound, for only it can count them. `prompts` are the
    tokens of each prompt, where the backend knows them.
    """

    call: Call
    num_prompt_tokens: int
    max_output_tokens: int
    prompts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one attempt used, until its end: `usage` over all choices, the prompt counted once.

    `cost_nano_usd` is what it cost whoever runs it: measured at a machine's price, or billed by an upstream.
    `is_exact` is False where an upstream did not say and the tokens were counted from what it sent.
    """

    usage: Usage
    finish: FinishReason
    nanoseconds: int
    nanojoules: int = 0
    cost_nano_usd: int = 0
    is_exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Vectors of texts, one each, the tokens that were read for them, and what that cost, as in `Spent`."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    nanoseconds: int = 0
    nanojoules: int = 0
    cost_nano_usd: int = 0


class Attempt(Protocol):
    """A call that is being answered: a `Begin` first, at the end a `Finish` for each choice, and `Totals`."""

    def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces as they come. Raises a TokenmillError for what is no answer; one reader, once."""
        ...

    def cancel(self) -> None:
        """Give it up. No-op once it has ended."""
        ...

    async def spent(self) -> Spent:
        """Wait for its end, and say what it used. Does not raise."""
        ...


class Backend(Protocol):
    """One deployment of one model."""

    @property
    def name(self) -> str:
        """The deployment's name: in the ledger, in metrics, and in a header of the answer."""
        ...

    @property
    def model(self) -> str:
        """The model that answers, as it is named in the answer."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether it runs here, so that a reservation in memory is enough."""
        ...

    @property
    def state(self) -> BackendState:
        """Whether it takes calls."""
        ...

    async def prepare(self, call: Call) -> Prepared:
        """Check and count a call. Raises UsageError for one that this model cannot answer."""
        ...

    def start(self, prepared: Prepared, job: Job) -> Attempt:
        """Begin to answer. Raises ResourceError if it is full or drains."""
        ...

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """Vectors of texts. Raises UsageError where the model has none."""
        ...

    async def drain(self, deadline_s: float) -> None:
        """Take no more calls and wait for the end of those that it has, at most so many seconds."""
        ...

    async def close(self) -> None:
        """End everything at once."""
        ...


def cost_of_time(nanoseconds: int, usd_per_hour: float) -> int:
    """Nanodollars of so much time of a machine, rounded up."""
    return -(-nanoseconds * round(usd_per_hour * _NANO) // (3600 * _NANO))
