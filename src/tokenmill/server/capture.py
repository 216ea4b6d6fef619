"""Capture: calls whose key or route says so become lines of a workload, off the event loop.

    capture = Capture(CaptureConfig(), folder, origins, accounts.settle)
    gateway = Gateway(..., copies=capture)      # wants, take
    router = Router(..., on_pair=capture.pair)  # a shadow's line of the ledger, and both answers in one line
    await capture.close()                       # writes what waits

It can neither delay nor fail a call: what does not fit into the queue, cannot be redacted or cannot be
written is left out and counted. Nothing is written that was not redacted. A call that was cancelled, failed
or expired has no answer and is left out; so are prompts of token ids, which cannot be searched.
"""

import asyncio
import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tokenmill.core import FinishReason, Tier, TokenmillError, UsageError
from tokenmill.models.store.library import default_home
from tokenmill.router import Pair
from tokenmill.server.caller import Caller
from tokenmill.server.gateway import Settled
from tokenmill.server.metrics import Gauge
from tokenmill.server.redaction import PATTERNS, Pattern, Redactor, load_redactor
from tokenmill.store import Entry
from tokenmill.wire import Call, Reply, write_openai_call, write_openai_reply
from tokenmill.workload.erasure import erased_until, read_erasures
from tokenmill.workload.folder import ERASURES_NAME, FolderConfig, WorkloadFolder
from tokenmill.workload.record import Given, Origin, WorkloadCall, write_call

__all__ = ["Capture", "CaptureConfig", "Provenance", "default_folder"]

_LOG: Final = logging.getLogger(__name__)
_NO_ANSWER: Final[tuple[FinishReason, ...]] = ("cancelled", "failed", "expired")
_MAX_QUEUED: Final = 4096
_MAX_QUEUED_CHARS: Final = 64 << 20
_BATCH: Final = 256
_TRIM_S: Final = 60.0
_LEFT_OUT: Final = ("stream", "stream_options", "user", "service_tier", "model")
_OUTCOMES: Final = ("written", "pairs", "queue_full", "not_redacted", "not_written", "token_ids", "erased")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What is kept of calls, and how long. Keys opt in by themselves (`tokenmill keys change --capture on`).

    `routes` are names that clients ask for whose calls are all kept. `folder` is by default beside the
    server's database. Files have `max_bytes` together; a line is gone after `keep_days`. `patterns` are taken
    out of texts, and what `redact` (module:function, text to text) takes out.
    """

    routes: tuple[str, ...] = ()
    folder: str = ""
    max_bytes: int = 1 << 30
    max_file_bytes: int = 64 << 20
    keep_days: float = 30.0
    patterns: tuple[Pattern, ...] = PATTERNS
    redact: str = ""

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if pattern not in PATTERNS:
                raise UsageError(f"patterns has {pattern!r}", hint=f"use {', '.join(PATTERNS)}")
        if self.redact.count(":") != bool(self.redact):
            raise UsageError(f"redact is {self.redact!r}", hint="give module:function")
        self.of_folder()

    def of_folder(self) -> FolderConfig:
        """The bounds of the folder. Raises UsageError."""
        return FolderConfig(
            max_bytes=self.max_bytes,
            max_file_bytes=min(self.max_file_bytes, self.max_bytes),
            keep_days=self.keep_days,
        )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which model a deployment runs, and the licences or terms of what it answers."""

    origin: Origin
    terms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """Whose answer, and what it cost."""

    reply: Reply
    deployment: str
    cost_nano_usd: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A line to be made."""

    call: Call
    request_id: str
    created_s: float
    project: str
    feature: str
    tier: Tier
    price_nano_usd: int
    answer: _Answer
    shadow: _Answer | None
    num_chars: int


class Capture:
    """Takes answered calls in an event loop, and writes them in a thread of its own."""

    def __init__(
        self,
        config: CaptureConfig,
        folder: Path,
        origins: Mapping[str, Provenance],
        settle: Callable[[Sequence[Entry]], Awaitable[object]],
    ) -> None:
        """`origins` by the deployment's name; `settle` writes lines of the ledger. Raises UsageError."""
        self.folder = WorkloadFolder(folder, config.of_folder())
        self.counts: Counter[str] = Counter()
        self._routes = frozenset(config.routes)
        self._redactor = Redactor(config.patterns, load_redactor(config.redact))
        self._origins = origins
        self._settle = settle
        self._queue: deque[_Job] = deque()
        self._num_chars = 0
        self._wake = threading.Condition()
        self._is_closing = False
        self._erased: tuple[int, Callable[[str, str], float]] = (0, erased_until(()))
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def gauges(self) -> list[Gauge]:
        """For metrics: calls by what became of them."""

        def read() -> Iterable[tuple[tuple[str, ...], float]]:
            return [((name,), float(self.counts[name])) for name in _OUTCOMES]

        text = "Answered calls that were to be kept, by what became of them"
        return [Gauge(name="tokenmill_captured_calls", help=text, labels=("outcome",), read=read)]

    def wants(self, call: Call, caller: Caller) -> bool:
        """Whether a call is to be kept."""
        return caller.key.capture or call.model in self._routes

    def take(self, settled: Settled, call: Call, reply: Reply) -> None:
        """Keep a call that was answered, if there is room. Does not wait and does not raise."""
        if not settled.entries or settled.entries[-1].finish in _NO_ANSWER:
            return
        last = settled.entries[-1]
        self._put(
            _Job(
                call=call,
                request_id=last.request_id,
                created_s=time.time() - settled.total_s,
                project=last.project,
                feature=last.feature,
                tier=settled.tier,
                price_nano_usd=sum(each.price_nano_usd for each in settled.entries),
                answer=_Answer(
                    reply=reply,
                    deployment=last.deployment,
                    cost_nano_usd=sum(each.cost_nano_usd for each in settled.entries),
                ),
                shadow=None,
                num_chars=_size(call, reply),
            )
        )

    async def pair(self, pair: Pair) -> None:
        """Settle what a shadow used, at the price 0, and keep both answers if there are two."""
        if pair.record is not None:
            await self._settle([_shadow_entry(pair)])
        if pair.shadow is None:
            return
        self._put(
            _Job(
                call=pair.call,
                request_id=pair.job.request_id,
                created_s=pair.begun_s,
                project=pair.job.tenant,
                feature=pair.job.feature,
                tier=pair.job.tier,
                price_nano_usd=0,
                answer=_Answer(reply=pair.primary, deployment=pair.primary_backend, cost_nano_usd=0),
                shadow=_Answer(
                    reply=pair.shadow,
                    deployment=pair.shadow_backend,
                    cost_nano_usd=pair.record.spent.cost_nano_usd if pair.record else 0,
                ),
                num_chars=_size(pair.call, pair.primary, pair.shadow),
            )
        )

    async def close(self) -> None:
        """Write what waits, and end the thread."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _put(self, job: _Job) -> None:
        if any(not isinstance(each, str) for each in job.call.prompts):
            self.counts["token_ids"] += 1
            return
        with self._wake:
            is_full = len(self._queue) >= _MAX_QUEUED or self._num_chars + job.num_chars > _MAX_QUEUED_CHARS
            if is_full or self._is_closing:
                self.counts["queue_full"] += 1
                return
            self._queue.append(job)
            self._num_chars += job.num_chars
            self._wake.notify()

    def _run(self) -> None:
        """The thread: batches until the end, and old files away once a minute."""
        trim_s = 0.0
        while True:
            with self._wake:
                while not self._queue and not self._is_closing and time.monotonic() < trim_s:
                    self._wake.wait(trim_s - time.monotonic())
                jobs = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
                if not jobs and self._is_closing:
                    return
            self._write(jobs)
            with self._wake:
                self._num_chars -= sum(job.num_chars for job in jobs)
            if time.monotonic() >= trim_s:
                trim_s = time.monotonic() + _TRIM_S
                self._trim()

    def _write(self, jobs: Sequence[_Job]) -> None:
        """Make lines and write those that nobody erased meanwhile."""
        made = [(record, line, job) for job in jobs for record, line in self._lines(job)]
        if not made:
            return
        try:
            with self.folder.locked():
                until = self._erased_until()
                kept = [each for each in made if until(each[0].project, each[0].end_user) < each[0].created]
                if kept:
                    self.folder.append([line for _, line, _ in kept])
        except Exception as error:
            self._lose("not_written", len(made), error)
            return
        self.counts["erased"] += len(made) - len(kept)
        for _, _, job in kept:
            self.counts["written" if job.shadow is None else "pairs"] += 1

    def _lines(self, job: _Job) -> list[tuple[WorkloadCall, bytes]]:
        """One line, or none if it cannot be redacted or written."""
        try:
            record = self._record(job)
            return [(record, write_call(record))]
        except Exception as error:  # the operator's function may raise anything
            self._lose("not_redacted", 1, error)
            return []

    def _record(self, job: _Job) -> WorkloadCall:
        call, user = job.call, job.call.user
        end_user = self.folder.pseudonym(job.project, user)
        request: dict[str, Any] = json.loads(write_openai_call(call))
        request = {"model": call.model} | {k: v for k, v in request.items() if k not in _LEFT_OUT}
        shadow = None if job.shadow is None else self._given(job.shadow, call.is_chat, user, end_user)
        return WorkloadCall(
            id=job.request_id,
            created=job.created_s,
            project=job.project,
            end_user=end_user,
            feature=job.feature,
            tier=job.tier,
            price_nano_usd=job.price_nano_usd,
            request=self._redactor.value(_without(request, user, end_user)),
            shadow=shadow,
            **self._given_fields(job.answer, call.is_chat, user, end_user),
        )

    def _given(self, answer: _Answer, chat: bool, user: str, end_user: str) -> Given:
        return Given(**self._given_fields(answer, chat, user, end_user))

    def _given_fields(self, answer: _Answer, chat: bool, user: str, end_user: str) -> dict[str, Any]:
        """The answer without log-probabilities, which spell the text out a second time."""
        choices = tuple(replace(each, logprobs=None) for each in answer.reply.choices)
        response = json.loads(write_openai_reply(replace(answer.reply, choices=choices), chat=chat))
        known = self._origins.get(answer.deployment)
        return {
            "response": self._redactor.value(_without(response, user, end_user)),
            "deployment": answer.deployment,
            "origin": known.origin if known else Origin(model=answer.reply.model),
            "terms": known.terms if known else (),
            "cost_nano_usd": answer.cost_nano_usd,
        }

    def _erased_until(self) -> Callable[[str, str], float]:
        """Who was erased, read again if that has changed; the lock is held."""
        path = self.folder.path / ERASURES_NAME
        size = path.stat().st_size if path.exists() else 0
        if size != self._erased[0]:
            self._erased = (size, erased_until(read_erasures(self.folder)))
        return self._erased[1]

    def _trim(self) -> None:
        try:
            if self.folder.path.is_dir():
                with self.folder.locked():
                    self.folder.trim()
        except TokenmillError as error:
            _LOG.warning("old captures were not deleted: %s", type(error).__name__)

    def _lose(self, outcome: str, num: int, error: Exception) -> None:
        if not self.counts[outcome]:
            reason = str(error) if isinstance(error, TokenmillError) else type(error).__name__
            _LOG.warning("calls are not captured (%s): %s", outcome, reason[:200])
        self.counts[outcome] += num


def default_folder(store: str) -> Path:
    """Where captures lie unless somebody says otherwise: beside the database's file, or in the home."""
    return Path(f"{store}.captures").expanduser() if "://" not in store else default_home() / "captures"


def _shadow_entry(pair: Pair) -> Entry:
    """The line of the ledger of a second answer, for which no key pays."""
    assert pair.record is not None
    spent, usage = pair.record.spent, pair.record.spent.usage
    return Entry(
        request_id=pair.job.request_id,
        attempt=pair.record.number,
        kind="shadow",
        at_s=time.time(),
        key_id=pair.job.key_id,
        project=pair.job.tenant,
        feature=pair.job.feature,
        end_user=pair.call.user,
        model=pair.call.model,
        deployment=pair.shadow_backend,
        tier="batch",
        finish=spent.finish,
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_output_tokens=usage.num_output_tokens,
        nanoseconds=spent.nanoseconds,
        nanojoules=spent.nanojoules,
        cost_nano_usd=spent.cost_nano_usd,
        price_nano_usd=0,
    )


def _without(value: Any, user: str, end_user: str) -> Any:
    """A JSON value in which an end user's id is their pseudonym, wherever it stands."""
    if len(user) < 3:
        return value
    if isinstance(value, str):
        return value.replace(user, end_user)
    if isinstance(value, list):
        return [_without(each, user, end_user) for each in value]
    if isinstance(value, dict):
        return {name: _without(inner, user, end_user) for name, inner in value.items()}
    return value


def _size(call: Call, *replies: Reply) -> int:
    """About how many characters a line will have."""
    asked = sum(len(each.content or "") for each in call.messages) + sum(map(len, call.prompts))
    return 2048 + asked + sum(len(each.text) + len(each.thoughts) for r in replies for each in r.choices)
