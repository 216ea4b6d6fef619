"""One call from whoever asks to whoever answers: admitted, reserved, routed, answered, settled.

    answer = await gateway.open(call, caller)       # raises what refuses it; nothing has begun then
    async for piece in answer.pieces(): ...         # breaking off cancels it
    reply = await answer.reply()                    # or all at once

What an answer used is settled once, in a task that no client can cancel: also if the client goes away in the
middle, and if the server drains. Every attempt has its line in the ledger with what it cost; the key pays for
the one that answered, as far as it got. Both APIs, batches and the playground come through here.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tokenmill.core import BudgetError, FinishReason, ResourceError, Tier, TokenmillError
from tokenmill.router import AttemptRecord, Backend, Before, Embedded, Job, Plan, Prepared, Routed, Router
from tokenmill.server.caller import Caller
from tokenmill.server.limits import KeyLimits, Permit
from tokenmill.server.pricing import PriceList
from tokenmill.store import Entry, Key, Ticket
from tokenmill.wire import Call, Piece, Prompt, Reply, ReplyBuilder, TextPiece, ToolPiece

__all__ = [
    "Answer",
    "AnswerCopy",
    "Copies",
    "Gateway",
    "GatewayConfig",
    "LineCaller",
    "LineMoney",
    "Money",
    "Settled",
]

_UNPAID: Final[tuple[FinishReason, ...]] = ("failed",)
"""Ends that the key does not pay for: they are not its fault."""


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
    """A call that has ended, for whoever counts: what it was, each attempt's line, when its first piece came.

    `call` is None for embeddings. `entries` is empty if no attempt was made, `is_refused` if
    that was for want of money.
    """

    caller: Caller
    call: Call | None
    tier: Tier
    entries: tuple[Entry, ...]
    records: tuple[AttemptRecord, ...]
    ttft_s: float | None
    total_s: float
    is_refused: bool = False


class Copies(Protocol):
    """Who keeps answered calls (`server.capture`). Both must be quick and not raise."""

    def wants(self, call: Call, caller: Caller) -> bool:
        """Whether to copy the answer to this call."""
        ...

    def take(self, settled: Settled, call: Call, reply: Reply) -> None:
        """The call as it was asked and the whole answer, once it is settled and read to its end."""
        ...


class Gateway:
    """Owns every call between its admission and its settlement. `on_settled` must be quick and not raise."""

    def __init__(
        self,
        router: Router,
        money: Money,
        prices: PriceList,
        config: GatewayConfig,
        *,
        on_settled: Callable[[Settled], None] = lambda _: None,
        copies: Copies | None = None,
    ) -> None:
        self.router = router
        self._money = money
        self._prices = prices
        self._config = config
        self._on_settled = on_settled
        self._copies = copies
        self._limits = KeyLimits()
        self._settling: set[asyncio.Task[None]] = set()
        self._answers: set[Answer] = set()
        self._refused: set[str] = set()
        self._num_calls = 0
        self._is_draining = False

    @property
    def models(self) -> list[str]:
        """Names that a call may give."""
        return self.router.models

    @property
    def num_calls(self) -> int:
        """Calls that are admitted and not settled."""
        return self._num_calls

    @property
    def answers(self) -> Collection["Answer"]:
        """Calls that are being answered, for whoever counts them."""
        return self._answers

    @property
    def num_unsettled(self) -> int:
        """Calls that have ended and are not in the ledger yet."""
        return max(0, len(self._settling) - self._num_calls)

    @property
    def is_draining(self) -> bool:
        """Whether no more are admitted."""
        return self._is_draining

    async def open(self, call: Call, caller: Caller) -> "Answer":
        """Admit a call and begin to answer it.

        Raises NotFoundError for a model that is not served, UsageError for what it cannot answer, LimitError
        and ResourceError for what the caller or the server has no room for. A budget that does not have it,
        and a deployment that fails, are raised where the pieces are read.
        """
        self.router.resolve(call.model)
        self._enter()
        with contextlib.ExitStack() as undo:
            undo.callback(self._leave)
            plan = await self.router.prepare(call)
            prepared = next(iter(plan.prepared.values()))
            permit = self._permit(caller, prepared.num_prompt_tokens + prepared.max_output_tokens)
            undo.callback(permit.leave, 0)
            answer = self._begin(plan, prepared, caller, permit)
            undo.pop_all()
        return answer

    async def embed(
        self,
        model: str,
        texts: Sequence[Prompt],
        caller: Caller,
        *,
        user: str = "",
        tier: Tier | None = None,
    ) -> Embedded:
        """Vectors of texts. Raises what `open` and reading its answer raise."""
        self.router.resolve(model)
        self._enter()
        work = asyncio.create_task(self._embed(model, texts, caller, user, caller.tier(tier)))
        self._settling.add(work_done := asyncio.create_task(_quiet(work)))
        work_done.add_done_callback(self._settling.discard)
        return await asyncio.shield(work)

    async def count_prompt_tokens(self, call: Call) -> int:
        """The tokens of a call's prompt, with its template. Raises what `open` does; nothing is charged."""
        self._enter()
        try:
            plan = await self.router.prepare(call)
        finally:
            self._leave()
        return next(iter(plan.prepared.values())).num_prompt_tokens

    async def drain(self, deadline_s: float) -> None:
        """Admit no more, and wait until all are settled; what has not ended by then fails."""
        self._is_draining = True
        await self.router.drain(deadline_s)
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

    def _permit(self, caller: Caller, num_tokens: int) -> Permit:
        limits = KeyLimits() if isinstance(caller, LineCaller) else self._limits
        return limits.enter(caller.key, num_tokens)

    def _begin(self, plan: Plan, prepared: Prepared, caller: Caller, permit: Permit) -> "Answer":
        """Start the answer, and the task that settles it whatever becomes of the client."""
        tier = caller.tier(plan.call.tier)
        if isinstance(caller, LineCaller):
            caller.money.begin()
        routed = self.router.start(plan, self._job(caller, tier), self._before(plan.call.model, caller, tier))
        answer = Answer(routed, prepared, caller, tier)
        if self._copies is not None and self._copies.wants(plan.call, caller):
            answer.copy = AnswerCopy(self._copies, plan.call)
        self._answers.add(answer)
        task = asyncio.create_task(self._settle(answer, permit))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return answer

    def _job(self, caller: Caller, tier: Tier) -> Job:
        return Job(
            request_id=caller.request_id,
            tenant=caller.key.project,
            tier=tier,
            timeout_s=self._config.timeout_s(tier),
            key_id=caller.key.id,
            feature=caller.feature,
        )

    def _before(self, model: str, caller: Caller, tier: Tier) -> Before:
        """What sets money aside before each attempt, durably if it costs money elsewhere."""
        money = self._money_of(caller)

        async def reserve(number: int, backend: Backend, prepared: Prepared) -> None:
            worst = self._prices.worst_nano_usd(
                model, tier, prepared.num_prompt_tokens, prepared.max_output_tokens
            )
            try:
                await money.reserve(
                    caller.key, caller.request_id, number, worst, durable=not backend.is_local
                )
            except BudgetError:
                self._refused.add(caller.request_id)
                raise

        return reserve

    def _money_of(self, caller: Caller) -> Money:
        return caller.money if isinstance(caller, LineCaller) else self._money

    async def _settle(self, answer: "Answer", permit: Permit) -> None:
        """Wait for the end of a call, whoever still listens, and write what it came to."""
        records = await answer.routed.spent()
        total_s = time.monotonic() - answer.started_s
        self._answers.discard(answer)
        is_refused = answer.caller.request_id in self._refused
        self._refused.discard(answer.caller.request_id)
        permit.leave(sum(record.spent.usage.num_total_tokens for record in records))
        self._leave()
        call = answer.call
        entries = self._entries(call.model, call.user, answer.caller, answer.tier, records)
        await self._money_of(answer.caller).settle(entries)
        settled = Settled(
            caller=answer.caller,
            call=call,
            tier=answer.tier,
            entries=entries,
            records=records,
            ttft_s=answer.ttft_s,
            total_s=total_s,
            is_refused=is_refused,
        )
        self._on_settled(settled)
        if answer.copy is not None:
            answer.copy.settle(settled)

    async def _embed(
        self, model: str, texts: Sequence[Prompt], caller: Caller, user: str, tier: Tier
    ) -> Embedded:
        started_s = time.monotonic()
        money = self._money_of(caller)
        try:
            permit = self._permit(caller, 0)
            try:
                found = await self.router.embed(
                    model, texts, self._job(caller, tier), self._before(model, caller, tier)
                )
            finally:
                permit.leave(0)
                self._refused.discard(caller.request_id)
        finally:
            self._leave()
        entries = self._entries(model, user, caller, tier, found.records)
        if isinstance(caller, LineCaller):
            # Written with what the line comes to, which is not known before this is answered.
            caller.money.begin()
            settling = asyncio.create_task(_quiet(asyncio.create_task(money.settle(entries))))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
        else:
            await money.settle(entries)
        self._on_settled(
            Settled(
                caller=caller,
                call=None,
                tier=tier,
                entries=entries,
                records=found.records,
                ttft_s=None,
                total_s=time.monotonic() - started_s,
            )
        )
        if found.embedded is None:
            assert found.error is not None
            raise found.error
        return found.embedded

    def _entries(
        self, model: str, user: str, caller: Caller, tier: Tier, records: Sequence[AttemptRecord]
    ) -> tuple[Entry, ...]:
        """A line of the ledger for each attempt."""
        at_s = self._money.now_s()
        is_line = isinstance(caller, LineCaller)
        return tuple(
            Entry(
                request_id=caller.request_id,
                attempt=record.number,
                kind="batch" if is_line else "local" if record.is_local else "upstream",
                at_s=at_s,
                key_id=caller.key.id,
                project=caller.key.project,
                feature=caller.feature,
                end_user=user,
                model=model,
                deployment=record.backend,
                tier=tier,
                finish=record.spent.finish,
                num_prompt_tokens=record.spent.usage.num_prompt_tokens,
                num_cached_tokens=record.spent.usage.num_cached_tokens,
                num_output_tokens=record.spent.usage.num_output_tokens,
                nanoseconds=record.spent.nanoseconds,
                nanojoules=record.spent.nanojoules,
                cost_nano_usd=record.spent.cost_nano_usd,
                price_nano_usd=self._price(model, tier, record),
            )
            for record in records
        )

    def _price(self, model: str, tier: Tier, record: AttemptRecord) -> int:
        is_free = record.error or record.spent.finish in _UNPAID
        return 0 if is_free else self._prices.nano_usd(model, tier, record.spent.usage)


class AnswerCopy:
    """Collects an answer while its reader gets it: kept once it is settled and read to its end."""

    def __init__(self, copies: Copies, call: Call) -> None:
        self._copies = copies
        self._call = call
        self._builder: ReplyBuilder | None = ReplyBuilder()
        self._reply: Reply | None = None
        self._settled: Settled | None = None

    def add(self, piece: Piece) -> None:
        """A piece that the reader gets. An answer without measure is not kept."""
        if self._builder is not None:
            try:
                self._builder.add((piece,))
            except TokenmillError:
                self._builder = None

    def end(self) -> None:
        """The reader has it all, or has left; then there is no whole answer to keep."""
        builder, self._builder = self._builder, None
        if builder is not None:
            with contextlib.suppress(TokenmillError):
                self._reply = builder.reply()
                self._keep()

    def settle(self, settled: Settled) -> None:
        """It is in the ledger."""
        self._settled = settled
        self._keep()

    def _keep(self) -> None:
        if self._settled is not None and self._reply is not None:
            self._copies.take(self._settled, self._call, self._reply)


class Answer:
    """A call that is being answered. One reader, once."""

    def __init__(self, routed: Routed, prepared: Prepared, caller: Caller, tier: Tier) -> None:
        self.routed = routed
        self.call = prepared.call
        self.num_prompt_tokens = prepared.num_prompt_tokens
        self.caller = caller
        self.tier: Tier = tier
        self.started_s = time.monotonic()
        self.ttft_s: float | None = None
        self.copy: AnswerCopy | None = None

    @property
    def deployment(self) -> str:
        """Whose answer it is, from the first piece on; empty before."""
        backend = self.routed.backend
        return "" if backend is None else backend.name

    def cancel(self) -> None:
        """Give it up. No-op once it has ended."""
        self.routed.cancel()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces as they come. Leaving early, with `aclosing`, cancels the call."""
        try:
            async for piece in self.routed:
                if self.ttft_s is None and isinstance(piece, TextPiece | ToolPiece):
                    self.ttft_s = time.monotonic() - self.started_s
                if self.copy is not None:
                    self.copy.add(piece)
                yield piece
        finally:
            self.routed.cancel()
            if self.copy is not None:
                self.copy.end()

    async def reply(self) -> Reply:
        """The whole answer. Cancelling who waits for it cancels the call."""
        builder = ReplyBuilder()
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                builder.add([piece])
        return builder.reply()


async def _quiet(work: "asyncio.Task[Any]") -> None:
    """Wait for a task whose result is somebody else's."""
    await asyncio.wait([work])
