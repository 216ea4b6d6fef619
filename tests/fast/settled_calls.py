"""Calls that have ended, for tests of who counts them. Whatever a client says of itself is a canary."""

from collections.abc import Sequence

from tokenmill.core import FinishReason, Message, Tier, Usage
from tokenmill.router import AttemptRecord, Spent
from tokenmill.server.caller import Caller
from tokenmill.server.gateway import Settled
from tokenmill.store import Entry, Key
from tokenmill.wire import Call

__all__ = ["CANARY", "settled"]

CANARY = "canary-9f3"


def settled(
    *,
    finishes: Sequence[FinishReason] = ("completed",),
    model: str = "mock",
    tier: Tier = "fast",
    ttft_s: float | None = 0.25,
    total_s: float = 1.5,
    error: str = "",
    request_id: str = "req_1",
) -> Settled:
    """A call of key_1: 10 prompt tokens, 4 of them cached, 5 out; an attempt for each of `finishes`."""
    key = Key(id="key_1", name=CANARY, project=CANARY, tags=(CANARY,), created_s=0.0)
    caller = Caller(key=key, request_id=request_id, api="openai", feature=CANARY)
    usage = Usage(num_prompt_tokens=10, num_cached_tokens=4, num_output_tokens=5)
    message = Message(role="user", content=CANARY)
    records = tuple(
        AttemptRecord(
            number=number,
            backend=f"deployment-{number}",
            model=model,
            is_local=True,
            spent=Spent(usage=usage, finish=finish, nanoseconds=10**9),
            error=error,
        )
        for number, finish in enumerate(finishes)
    )
    return Settled(
        caller=caller,
        call=Call(model=model, messages=(message,), user=CANARY, metadata={CANARY: CANARY}),
        tier=tier,
        entries=tuple(_entry(caller, record, model, tier) for record in records),
        records=records,
        ttft_s=ttft_s,
        total_s=total_s,
    )


def _entry(caller: Caller, record: AttemptRecord, model: str, tier: Tier) -> Entry:
    usage = record.spent.usage
    return Entry(
        request_id=caller.request_id,
        attempt=record.number,
        kind="local",
        at_s=0.0,
        key_id=caller.key.id,
        project=caller.key.project,
        feature=caller.feature,
        end_user=CANARY,
        model=model,
        deployment=record.backend,
        tier=tier,
        finish=record.spent.finish,
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_output_tokens=usage.num_output_tokens,
        nanoseconds=10**9,
        nanojoules=2 * 10**9,
        cost_nano_usd=7000,
        price_nano_usd=9000,
    )
