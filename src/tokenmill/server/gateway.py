"""One call from whoever asks to whoever answers: admitted, reserved, answered, settled.

    answer = await gateway.open(call, caller)       # raises what refuses it; nothing has begun then
    async for piece in answer.pieces(): ...         # breaking off cancels it
    reply = await answer.reply()                    # or all at once

What an answer used is settled once, in a task that no client can cancel: also if the client goes away in the
middle, and if the server drains. Both APIs, batches and the playground come through here.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenmill.core import NotFoundError, ResourceError, Tier
from tokenmill.router import Attempt, Backend, Job, Prepared, Spent
from tokenmill.server.caller import Caller
from tokenmill.server.limits import KeyLimits, Permit
from tokenmill.server.pricing import PriceList
from tokenmill.store import Entry, Key, Ticket
from tokenmill.wire import Call, Piece, Reply, ReplyBuilder, TextPiece, ToolPiece

__all__ = ["Answer", "Gateway", "GatewayConfig", "LineCaller", "LineMoney", "Money", "Settled"]


class Money(Protocol):
    """The accounts, as the gateway needs them (`store.Accounts`)."""

    def now_s(self) -> float:
        """The time of a line of the ledger."""
        ...

    async def reserve(
        self, key: Key, request_id: str, attempt: int, nano_usd: int, *, durable: bool
    ) -> Ticket:
        """Set the most that an attempt can come to aside. Raises BudgetError."""
        ...

    async def release(self, ticket: Ticket) -> None:
        """Give back what was set aside for an attempt that never began."""
        ...

    async def settle(self, entries: Sequence[Entry]) -> int:
        """Write what attempts came to, and give back what was set aside for them."""
        ...


class LineMoney(Money, Protocol):
    """The accounts of one line of a batch: settles what it used together with what it came to."""

    def begin(self) -> None:
        """The line's answer has begun: `settle` will follow, once."""
        ...


@dataclass(frozen=True, kw_only=True)
class LineCaller(Caller):
    """A line of a batch as a caller. Limits a minute do not hold for it: a worker decides when it runs."""

    money: LineMoney


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Bounds of all calls together: how many at once, and how many seconds one may take by tier."""

    max_calls: int = 1024
    fast_s: float = 120.0
    standard_s: float = 600.0
    batch_s: float = 86400.0

    def timeout_s(self, tier: Tier) -> float:
        """The seconds after which a call of this tier ends as expired."""
        return {"fast": self.fast_s, "standard": self.standard_s, "batch": self.batch_s}[tier]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A call that has ended, for whoever counts: what it was, what it used, when its first piece came."""

    caller: Caller
    call: Call
    entry: Entry
    spent: Spent
    ttft_s: float | None
    total_s: float


class Gateway:
    """Owns every call between its admission and its settlement."""

    def __init__(
        self,
        backends: Sequence[Backend],
        money: Money,
        prices: PriceList,
        config: GatewayConfig,
        *,
        on_settled: Callable[[Settled], None] = lambda _: None,
    ) -> None:
        self._backends = {backend.model: backend for backend in backends}
        self._money = money
        self._prices = prices
        self._config = config
        self._on_settled = on_settled
        self._limits = KeyLimits()
        self._settling: set[asyncio.Task[None]] = set()
        self._num_calls = 0
        self._is_draining = False

    @property
    def models(self) -> list[str]:
        """Names that a call may give."""
        return sorted(self._backends)

    @property
    def num_calls(self) -> int:
        """Calls that are admitted and not settled."""
        return self._num_calls

    async def open(self, call: Call, caller: Caller) -> "Answer":
        """Admit a call and begin to answer it.

        Raises NotFoundError for a model that is not served, UsageError for what it cannot answer,
        ResourceError and BudgetError for what the caller or the server has no room for.
        """
        backend = self.backend(call.model)
        money = caller.money if isinstance(caller, LineCaller) else self._money
        limits = KeyLimits() if isinstance(caller, LineCaller) else self._limits
        self._enter()
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(self._leave)
            prepared = await backend.prepare(call)
            permit = limits.enter(caller.key, prepared.num_prompt_tokens + prepared.max_output_tokens)
            undo.callback(permit.leave, 0)
            tier = caller.tier(call.tier)
            worst = self._prices.worst_nano_usd(
                call.model, tier, prepared.num_prompt_tokens, prepared.max_output_tokens
            )
            ticket = await money.reserve(
                caller.key, caller.request_id, 0, worst, durable=not backend.is_local
            )
            undo.push_async_callback(money.release, ticket)
            job = Job(
                request_id=caller.request_id,
                tenant=caller.key.project,
                tier=tier,
                timeout_s=self._config.timeout_s(tier),
            )
            answer = Answer(backend.start(prepared, job), backend, prepared, caller, tier)
            undo.pop_all()
        if isinstance(caller, LineCaller):
            caller.money.begin()
        task = asyncio.create_task(self._settle(answer, permit, money))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return answer

    def backend(self, model: str) -> Backend:
        """Who answers for a model. Raises NotFoundError naming those that are served."""
        if model not in self._backends:
            known = ", ".join(self.models)
            raise NotFoundError(f"the model {model[:80]!r} is not served", hint=f"use {known}")
        return self._backends[model]

    async def drain(self, deadline_s: float) -> None:
        """Admit no more, and wait until all are settled; what has not ended by then fails."""
        self._is_draining = True
        await asyncio.gather(*(each.drain(deadline_s) for each in self._backends.values()))
        while self._settling:
            await asyncio.wait(self._settling)

    def _enter(self) -> None:
        if self._is_draining:
            raise ResourceError("the server is shutting down", hint="ask another one")
        if self._num_calls >= self._config.max_calls:
            raise ResourceError(f"{self._num_calls} calls are being answered", hint="try again in a second")
        self._num_calls += 1

    def _leave(self) -> None:
        self._num_calls -= 1

    async def _settle(self, answer: "Answer", permit: Permit, money: Money) -> None:
        """Wait for the end of a call, whoever still listens, and write what it came to."""
        spent = await answer.attempt.spent()
        permit.leave(spent.usage.num_total_tokens)
        self._leave()
        entry = self._entry(answer, spent)
        await money.settle([entry])
        self._on_settled(
            Settled(
                caller=answer.caller,
                call=answer.call,
                entry=entry,
                spent=spent,
                ttft_s=answer.ttft_s,
                total_s=time.monotonic() - answer.started_s,
            )
        )

    def _entry(self, answer: "Answer", spent: Spent) -> Entry:
        caller, usage = answer.caller, spent.usage
        return Entry(
            request_id=caller.request_id,
            attempt=0,
            kind="local" if answer.backend.is_local else "upstream",
            at_s=self._money.now_s(),
            key_id=caller.key.id,
            project=caller.key.project,
            feature=caller.feature,
            end_user=answer.call.user,
            model=answer.call.model,
            deployment=answer.backend.name,
            tier=answer.tier,
            finish=spent.finish,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_output_tokens=usage.num_output_tokens,
            nanoseconds=spent.nanoseconds,
            nanojoules=spent.nanojoules,
            cost_nano_usd=spent.cost_nano_usd,
            price_nano_usd=self._prices.nano_usd(answer.call.model, answer.tier, usage),
        )


class Answer:
    """A call that is being answered. One reader, once."""

    def __init__(
        self, attempt: Attempt, backend: Backend, prepared: Prepared, caller: Caller, tier: Tier
    ) -> None:
        self.attempt = attempt
        self.backend = backend
        self.call = prepared.call
        self.num_prompt_tokens = prepared.num_prompt_tokens
        self.caller = caller
        self.tier: Tier = tier
        self.started_s = time.monotonic()
        self.ttft_s: float | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces as they come. Leaving early, with `aclosing`, cancels the call."""
        try:
            async for piece in self.attempt:
                if self.ttft_s is None and isinstance(piece, TextPiece | ToolPiece):
                    self.ttft_s = time.monotonic() - self.started_s
                yield piece
        finally:
            self.attempt.cancel()

    async def reply(self) -> Reply:
        """The whole answer. Cancelling who waits for it cancels the call."""
        builder = ReplyBuilder()
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                builder.add([piece])
        return builder.reply()
