"""Embeddings over a route: each deployment is asked once, in order, until one gives the vectors."""

import time
from dataclasses import dataclass

from tokenmill.core import TokenmillError, UsageError
from tokenmill.router.backend import Backend, Embedded, Job, Prepared, Spent
from tokenmill.router.events import OnEvent, RouteEvent
from tokenmill.router.routed import NO_USAGE, AttemptRecord, Before, Plan, blame
from tokenmill.router.upstream import prompt_bytes

__all__ = ["RoutedVectors", "ask_vectors"]

_TOKENS_PER_TEXT = 8
"""What a model may put around a text."""


@dataclass(frozen=True, kw_only=True)
class RoutedVectors:
    """Vectors of texts, or the error, and every attempt that was made for them."""

    embedded: Embedded | None
    error: TokenmillError | None = None
    records: tuple[AttemptRecord, ...] = ()


async def ask_vectors(plan: Plan, job: Job, before: Before, on_event: OnEvent) -> RoutedVectors:
    """The vectors of the plan's prompts. Raises only what `before` raises."""
    num_tokens = prompt_bytes(plan.call) + _TOKENS_PER_TEXT * len(plan.call.prompts)
    prepared = Prepared(call=plan.call, num_prompt_tokens=num_tokens, max_output_tokens=0)
    records: list[AttemptRecord] = []
    last: TokenmillError | None = None
    for backend, breaker in plan.order[: plan.max_attempts]:
        permit = breaker.enter() if backend.state == "ready" else None
        if permit is None:
            on_event(RouteEvent(kind="skipped", backend=backend.name, route=plan.route))
            continue
        try:
            await before(len(records) + 1, backend, prepared)
            on_event(RouteEvent(kind="attempt", backend=backend.name, route=plan.route))
            embedded, error, record = await _ask(backend, plan, job, len(records) + 1)
            records.append(record)
            if error is None:
                permit.succeed()
                return RoutedVectors(embedded=embedded, records=tuple(records))
            blame(permit, error)
        finally:
            permit.leave()
        name = type(error).__name__
        on_event(RouteEvent(kind="failure", backend=backend.name, route=plan.route, error=name))
        last = last if isinstance(error, UsageError) and last is not None else error
    return RoutedVectors(embedded=None, error=last or plan.unavailable(), records=tuple(records))


async def _ask(
    backend: Backend, plan: Plan, job: Job, number: int
) -> tuple[Embedded | None, TokenmillError | None, AttemptRecord]:
    """One deployment's vectors or its error, and what it used; of a failed attempt nothing is known."""
    began_s = time.monotonic()
    embedded, error = None, None
    try:
        embedded = await backend.embed(plan.call.prompts, job)
    except TokenmillError as raised:
        error = raised
    none = Embedded(vectors=(), usage=NO_USAGE, nanoseconds=round((time.monotonic() - began_s) * 1e9))
    used = embedded or none
    spent = Spent(
        usage=used.usage,
        finish="completed" if embedded else "failed",
        nanoseconds=used.nanoseconds,
        nanojoules=used.nanojoules,
        cost_nano_usd=used.cost_nano_usd,
        is_exact=embedded is not None,
    )
    record = AttemptRecord(
        number=number,
        backend=backend.name,
        model=backend.model,
        is_local=backend.is_local,
        spent=spent,
        error="" if error is None else str(error.__cause__ or error),
    )
    return embedded, error, record
