"""`AsyncEngine`: the engine for many callers, in a process of its own, behind an asyncio front end.

    async with await AsyncEngine.start(EngineSpec(model="models/smollm2-135m")) as engine:
        handle = engine.submit(Request(request_id="a", prompt=ids))
        async for news in handle: ...

One promise: a request that was submitted ends once, in one of the six terminal states, whatever becomes of
the caller or of the engine process. All ends pass through `_end`, and it is the only writer.

The engine writes the end if it can: also after a cancellation, so that the tokens counted are those computed.
If its process dies, hangs or speaks nonsense, it is killed and another is started; of its requests, those
that have produced nothing are sent to the next process, once, and the others end as `failed` with the reason
as `error`. Deadlines hold throughout, also while there is no process.

An `AsyncEngine` belongs to one event loop. It counts nothing in tokens or bytes: limits of users are the
server's.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias, get_args

import numpy as np

from tokenmill.core import Completion, FinishReason, Request, ResourceError, Tier, TokenmillError, UsageError
from tokenmill.core import errors as error_tree
from tokenmill.engine.counts import EngineCounts
from tokenmill.engine.embedding import EmbeddingRequest
from tokenmill.engine.serving.handle import (
    Embedding,
    EmbeddingHandle,
    EmbeddingRecord,
    RequestHandle,
    RequestRecord,
)
from tokenmill.engine.serving.messages import (
    Advance,
    Beat,
    Cancel,
    Embed,
    Embedded,
    End,
    EngineSpec,
    FromEngine,
    Ready,
    Refused,
    StartFailed,
    Submit,
    encode,
)
from tokenmill.engine.serving.supervisor import EngineProcess, SupervisorConfig

__all__ = ["AsyncEngine", "EngineState", "EngineStats", "OnEnd"]

EngineState = Literal["live", "ready", "drained"]
"""`ready` takes requests and computes them; `live` has no engine process at the moment, or drains; `drained`
has nothing to do and takes nothing."""

OnEnd = Callable[[Request, tuple[Completion, ...]], None]

_Record: TypeAlias = RequestRecord | EmbeddingRecord

_MIN_TIMEOUT_S = 0.001
_MAX_TRIES = 2


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """The front end's counts, and the last ones that the present process reported: after a restart they begin
    at 0. `busy_ns` of its time, and `busy_nj` of the machine's energy, were charged to requests, `idle_ns`
    passed without work.

    `num_in_flight` requests have not ended; `num_ended` counts completions by finish reason. An idle engine
    has 0 `num_blocks_in_use`. `failure` says why the last process ended; `pid` is 0 without one.
    """

    state: EngineState
    pid: int
    num_in_flight: int
    num_ended: Mapping[FinishReason, int]
    num_restarts: int
    num_resubmitted: int
    failure: str
    num_steps: int
    num_waiting: int
    num_running: int
    num_blocks: int
    num_blocks_in_use: int
    running_by_tier: Mapping[Tier, int]
    waiting_by_tier: Mapping[Tier, int]
    counts: EngineCounts
    busy_ns: int
    idle_ns: int
    busy_nj: int


class AsyncEngine:
    """Requests in, streams out. Make it with `start`, end it with `close` (or `async with`)."""

    def __init__(
        self, spec: EngineSpec, config: SupervisorConfig, max_requests: int, on_end: OnEnd | None
    ) -> None:
        self._spec = spec
        self._config = config
        self._max_requests = max_requests
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._records: dict[int, _Record] = {}
        self._ids: set[str] = set()
        self._num_submitted = 0
        self._num_ended: Counter[FinishReason] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self._process: EngineProcess | None = None
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._start_error: TokenmillError | None = None
        self._closed_why = ""
        self._num_restarts = 0
        self._num_resubmitted = 0
        self._failure = ""
        self._stopped = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        spec: EngineSpec,
        config: SupervisorConfig | None = None,
        *,
        max_requests: int = 1024,
        on_end: OnEnd | None = None,
    ) -> Self:
        """Start the engine process and wait until its model is open.

        At most `max_requests` may be in flight, here and in the process together. `on_end` is called once for
        each request at its end, before who waits for it goes on, also if the caller is gone: the place to
        settle an account.
        Raises what opening the model raises, and ResourceError if the process does not come up.
        """
        if not 1 <= max_requests <= 1 << 20:
            raise UsageError(f"max_requests is {max_requests}", hint="use a value from 1 to 1048576")
        engine = cls(spec, config or SupervisorConfig(), max_requests, on_end)
        engine._supervisor = asyncio.create_task(engine._supervise())
        try:
            await engine._started
        except BaseException:
            await engine.close()
            raise
        return engine

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def state(self) -> EngineState:
        """What a load balancer should know."""
        if self._closed_why:
            return "live" if self._records else "drained"
        return "ready" if self._takes_requests else "live"

    @property
    def stats(self) -> EngineStats:
        """The counts now."""
        process = self._process
        beat = Beat() if process is None else process.beat
        return EngineStats(
            state=self.state,
            pid=0 if process is None else process.pid,
            num_in_flight=len(self._records),
            num_ended=dict(self._num_ended),
            num_restarts=self._num_restarts,
            num_resubmitted=self._num_resubmitted,
            failure=self._failure,
            num_steps=beat.num_steps,
            num_waiting=beat.num_waiting,
            num_running=beat.num_running,
            num_blocks=beat.num_blocks,
            num_blocks_in_use=beat.num_blocks_in_use,
            running_by_tier={tier: beat.running_by_tier.get(tier, 0) for tier in get_args(Tier)},
            waiting_by_tier={tier: beat.waiting_by_tier.get(tier, 0) for tier in get_args(Tier)},
            counts=beat.counts,
            busy_ns=beat.busy_ns,
            idle_ns=beat.idle_ns,
            busy_nj=beat.busy_nj,
        )

    def submit(self, request: Request) -> RequestHandle:
        """Take a request; while the engine restarts it waits for it. Read the handle, and keep it.

        Raises ResourceError if there are too many, or the engine drains or is closed; UsageError if its id is
        that of a request in flight. What the model must decide, the handle raises.
        """
        self._check(request.request_id)
        record = RequestRecord(key=self._num_submitted, request=request, submitted_s=self._loop.time())
        self._admit(record)
        return RequestHandle(record, self._cancel, self._loop)

    def embed(self, request: EmbeddingRequest) -> EmbeddingHandle:
        """Take a request for embeddings, on the same terms as `submit` takes one for completions.

        It counts as one in flight, however many texts it has. `on_end` is not called for it: who holds the
        handle gets all of it at once.
        """
        self._check(request.request_id)
        record = EmbeddingRecord(key=self._num_submitted, request=request, submitted_s=self._loop.time())
        self._admit(record)
        return EmbeddingHandle(record, self._cancel, self._loop)

    async def drain(self, deadline_s: float) -> None:
        """Take no more requests, and wait until all have ended.

        Those that have not after `deadline_s` seconds end as `failed`.
        """
        self._closed_why = self._closed_why or "the engine is being drained"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        for record in list(self._records.values()):
            self._tell_cancelled(record)
            self._end_rest(record, "failed", "the engine was shut down")

    async def close(self) -> None:
        """End everything at once: requests in flight as `failed`, then the process. May be called again."""
        self._closed_why = "the engine is closed"
        await self.drain(0.0)
        self._stopped.set()
        if self._process is not None:
            self._process.hang_up()
        if self._supervisor is not None:
            await asyncio.wait([self._supervisor])

    @property
    def _takes_requests(self) -> bool:
        process = self._process
        return process is not None and process.is_ready and not process.is_draining

    def _admit(self, record: _Record) -> None:
        """Keep it until its end, and send it if there is a process. Raises as `encode` does; then it is not
        kept.
        """
        request, frame = record.request, self._submission(record)
        self._num_submitted += 1
        self._records[record.key] = record
        self._ids.add(request.request_id)
        self._idle.clear()
        if request.timeout_s is not None:
            record.timer = self._loop.call_later(request.timeout_s, self._expire, record.key)
        if self._takes_requests:
            self._send(record, frame)

    def _check(self, request_id: str) -> None:
        if self._closed_why:
            raise ResourceError(self._closed_why, hint="send the request to another engine")
        if len(self._records) >= self._max_requests:
            raise ResourceError(f"{self._max_requests} requests are in flight", hint="try again later")
        if request_id in self._ids:
            raise UsageError(f"request {request_id!r} is in flight", hint="use an id of its own")

    def _submission(self, record: _Record) -> bytes:
        """The frame that submits a request with the time it has left."""
        timeout_s = record.request.timeout_s
        if timeout_s is not None:
            timeout_s = max(record.submitted_s + timeout_s - self._loop.time(), _MIN_TIMEOUT_S)
        if isinstance(record, RequestRecord):
            return encode(Submit(key=record.key, request=replace(record.request, timeout_s=timeout_s)))
        return encode(Embed(key=record.key, request=replace(record.request, timeout_s=timeout_s)))

    def _send(self, record: _Record, frame: bytes) -> None:
        assert self._process is not None
        record.sent = True
        self._num_resubmitted += record.num_tries > 0
        record.num_tries += 1
        self._process.send(frame)

    def _cancel(self, key: int) -> None:
        record = self._records.get(key)
        if record is None or record.cancelled:
            return
        record.cancelled = True
        if record.sent:
            self._tell_cancelled(record)
        else:
            self._end_rest(record, "cancelled")

    def _tell_cancelled(self, record: _Record) -> None:
        if record.sent and self._process is not None:
            self._process.send(encode(Cancel(key=record.key)))

    def _expire(self, key: int, *, is_last: bool = False) -> None:
        """A request's time is up. The engine knows, and gets a moment to say so if it has the request."""
        record = self._records[key]
        if record.sent and not is_last:
            again = self._loop.call_later(self._config.grace_s, lambda: self._expire(key, is_last=True))
            record.timer = again
            return
        self._tell_cancelled(record)
        self._end_rest(record, "expired")

    def _end(self, record: RequestRecord, completion: Completion) -> None:
        """Write one terminal state; nobody else does."""
        choice = record.choices[completion.index]
        assert choice.completion is None, f"{completion.request_id} ends twice"
        choice.completion = completion
        self._num_ended[completion.finish_reason] += 1
        record.changed.set()
        if len(completions := record.completions()) < len(record.choices):
            return
        if self._on_end is not None:
            self._loop.call_soon(self._on_end, record.request, completions)
        self._forget(record)

    def _end_embedding(self, record: EmbeddingRecord, embedding: Embedding) -> None:
        """Write the terminal state of a request for embeddings; nobody else does."""
        assert record.embedding is None, f"{embedding.request_id} ends twice"
        record.embedding = embedding
        self._num_ended[embedding.finish_reason] += 1
        self._forget(record)

    def _forget(self, record: _Record) -> None:
        """It has ended."""
        record.done.set()
        if record.timer is not None:
            record.timer.cancel()
        del self._records[record.key]
        self._ids.remove(record.request.request_id)
        if not self._records:
            self._idle.set()

    def _end_rest(self, record: _Record, reason: FinishReason, error: str = "") -> None:
        """End what has not ended, with what has come so far. Who has cancelled is not told of failures."""
        now_s = self._loop.time()
        if record.cancelled and reason == "failed":
            reason, error = "cancelled", ""
        if isinstance(record, EmbeddingRecord):
            self._end_embedding(record, record.ended(reason, error=error))
            return
        for choice in record.choices:
            if choice.completion is None:
                self._end(record, choice.so_far(record, reason, error, now_s))

    def _take(self, message: FromEngine) -> None:
        """What the engine process says. ValueError for what it could not say if it were sane."""
        if isinstance(message, Ready):
            self._begin()
        elif isinstance(message, StartFailed):
            self._start_error = _rebuilt(message)
        elif isinstance(message, Advance | End | Embedded | Refused) and (
            record := self._records.get(message.key)
        ):
            self._take_news(record, message)

    def _take_news(self, record: _Record, message: Advance | End | Embedded | Refused) -> None:
        if not record.sent:
            raise ValueError(f"news of {record.request.request_id}, which it does not have")
        if isinstance(message, Refused):
            self._refuse(record, message)
        elif isinstance(record, EmbeddingRecord) and isinstance(message, Embedded):
            self._take_embedded(record, message)
        elif isinstance(record, RequestRecord) and isinstance(message, Advance):
            self._advance(record, message)
        elif isinstance(record, RequestRecord) and isinstance(message, End):
            self._take_end(record, message)
        else:
            raise ValueError(f"a {type(message).__name__} for a request of another kind")

    def _begin(self) -> None:
        """A process is ready: send it what waits, the oldest first."""
        if not self._started.done():
            self._started.set_result(None)
        for record in self._records.values():
            self._send(record, self._submission(record))

    def _advance(self, record: RequestRecord, message: Advance) -> None:
        choices, index = record.choices, message.index
        if index >= len(choices) or choices[index].completion is not None:
            raise ValueError(f"news of completion {index}, which is not being made")
        if len(choices[index].token_ids) + len(message.token_ids) > record.request.params.max_tokens:
            raise ValueError("more tokens than were asked for")
        choices[index].add(message.text, message.token_ids, message.logprobs)
        record.changed.set()

    def _take_end(self, record: RequestRecord, message: End) -> None:
        completion = message.completion
        choices, index = record.choices, completion.index
        if not 0 <= index < len(choices) or choices[index].completion is not None:
            raise ValueError(f"an end of completion {index}, which is not being made")
        if completion.token_ids != tuple(choices[index].token_ids):
            raise ValueError("an end with other tokens than were sent")
        if completion.request_id != record.request.request_id:
            raise ValueError("an end with the id of another request")
        record.charge += message.charge
        self._end(record, completion)

    def _take_embedded(self, record: EmbeddingRecord, message: Embedded) -> None:
        rows, is_done = len(record.request.prompts), message.finish_reason == "completed"
        if len(message.data) % (4 * rows) or bool(message.data) != is_done:
            raise ValueError(f"{len(message.data)} bytes of vectors of {rows} texts")
        vectors_ND = np.frombuffer(message.data, np.dtype("<f4")).reshape(rows, -1) if is_done else None
        embedding = record.ended(
            message.finish_reason,
            vectors_ND=vectors_ND,
            num_cached=message.num_cached_tokens,
            charge=message.charge,
            error=message.error,
        )
        self._end_embedding(record, embedding)

    def _refuse(self, record: _Record, message: Refused) -> None:
        if message.again:
            record.sent = False
            record.num_tries -= 1
            if record.cancelled:
                self._end_rest(record, "cancelled")
            return
        record.refusal = _rebuilt(message)
        self._tell_cancelled(record)
        self._end_rest(record, "failed", str(record.refusal))

    async def _supervise(self) -> None:
        """Keep an engine process running; if this itself fails, nobody is left to wait for it."""
        try:
            await self._keep_running()
        except Exception as error:
            self._give_up(ResourceError(f"the engine cannot be supervised ({error!r})"))
            self._loop.call_exception_handler({"message": "engine supervisor", "exception": error})

    async def _keep_running(self) -> None:
        num_idle, num_unready = 0, 0
        while not self._stopped.is_set():
            process = await self._run_process()
            if not self._started.done() and self._start_error is not None:
                self._give_up(self._start_error)
                return
            num_idle = 0 if process.beat.num_steps else num_idle + 1
            num_unready = 0 if process.is_ready else num_unready + 1
            if num_unready == self._config.max_failures:
                self._give_up(ResourceError(self._failure, hint="see its output; start it again"))
                return
            delay_s = min(self._config.backoff_s * 2.0 ** min(num_idle, 64), self._config.max_backoff_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), delay_s)
            self._num_restarts += not self._stopped.is_set()

    async def _run_process(self) -> EngineProcess:
        """One process, from start to end, and what its end means for its requests."""
        process = self._process = EngineProcess(self._config, self._take)
        try:
            self._failure = await process.run(self._spec, self._has_sent)
        except OSError as error:
            self._failure = f"the engine process could not be started ({error})"
        finally:
            self._process = None
        self._bury(self._failure, was_drained=process.is_draining)
        return process

    def _has_sent(self) -> bool:
        return any(record.sent for record in self._records.values())

    def _bury(self, why: str, *, was_drained: bool) -> None:
        """A process is gone: each request that it had ends, or waits for the next one."""
        for record in [each for each in self._records.values() if each.sent]:
            record.sent = False
            is_lost = record.has_output or (record.num_tries >= _MAX_TRIES and not was_drained)
            if is_lost or record.cancelled:
                self._end_rest(record, "failed", why)

    def _give_up(self, error: TokenmillError) -> None:
        """No process will come: nothing waits for it any longer."""
        self._closed_why = f"the engine does not run: {error.message}"
        for record in list(self._records.values()):
            self._end_rest(record, "failed", str(error))
        if not self._started.done():
            self._started.set_exception(error)


def _rebuilt(message: StartFailed | Refused) -> TokenmillError:
    """The error that the process had, as the class of the error tree that it names."""
    is_known = message.kind in error_tree.__all__
    kind: type[TokenmillError] = getattr(error_tree, message.kind) if is_known else TokenmillError
    return kind(message.message, hint=message.hint)
