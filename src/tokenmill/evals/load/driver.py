"""Sends the requests of a load, and writes down what became of each.

The sender never waits for an answer unless the arrivals say so. It is bounded: in requests, in seconds, in
requests at once, and each request by a time-out. Setting `stop` ends a run early with what was measured:
what is in flight is cancelled and counted as such.

The client is watched too. Python drives some thousand pieces a second; when it can not follow, its delays
would look like the system's, so its processor time and the delays of its event loop are part of every
result.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tokenmill.core import TokenmillError, UsageError
from tokenmill.evals.load.arrivals import Arrivals, ClosedLoop, OpenLoop
from tokenmill.evals.load.samples import Sample, Status
from tokenmill.evals.load.target import Finish, LoadRequest, Piece, Target

__all__ = ["ClientStats", "DriveConfig", "LoadProgress", "LoadRun", "ProgressCallback", "drive"]

_TICK_S = 0.005
_WAKE_EARLY_S = 0.0005
_BUSY_SHARE = 0.8
_LATE_S = 0.02
_ERROR_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class DriveConfig:
    """The bounds of a run. Its first `num_warmup` requests are in no figure.

    No request is sent later than `max_seconds` after the start; one that has not ended `timeout_s` after it
    was sent has failed.
    """

    num_warmup: int = 0
    max_seconds: float = 60.0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.num_warmup < 0:
            raise UsageError(f"num_warmup is {self.num_warmup}", hint="use 0 or more")
        for name in ("max_seconds", "timeout_s"):
            if not 0.0 < getattr(self, name) <= 86400.0:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="use seconds above 0, up to a day")


class LoadProgress(NamedTuple):
    """Where a run is: requests ended, in flight, planned."""

    num_ended: int
    num_in_flight: int
    num_requests: int


ProgressCallback = Callable[[LoadProgress], None]


@dataclass(frozen=True, kw_only=True)
class ClientStats:
    """What the load generator itself needed, in seconds: processor time, and delays of its event loop.

    A delay is how much later than asked a short sleep ended; timers round up to a millisecond.
    """

    wall_s: float
    cpu_s: float
    max_delay_s: float
    p99_delay_s: float

    @property
    def is_saturated(self) -> bool:
        """True if the client may have been the bottleneck: latencies are then partly its own."""
        return self.cpu_s > _BUSY_SHARE * self.wall_s or self.p99_delay_s > _LATE_S


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """All samples in the order of sending, and the state of the client.

    `started_at` is the time of day, in seconds since 1970. `was_stopped` says that it ended before its
    bounds.
    """

    samples: tuple[Sample, ...]
    started_at: float
    was_stopped: bool
    client: ClientStats


async def drive(
    target: Target,
    requests: Sequence[LoadRequest],
    arrivals: Arrivals,
    config: DriveConfig | None = None,
    *,
    stop: asyncio.Event | None = None,
    on_progress: ProgressCallback | None = None,
) -> LoadRun:
    """Put a load on a target. What a request raises is its sample's error; nothing is sent twice."""
    if isinstance(arrivals, OpenLoop) and len(arrivals.times_s) != len(requests):
        raise UsageError(
            f"{len(requests)} requests and {len(arrivals.times_s)} times", hint="give one time a request"
        )
    driver = _Driver(target, requests, config or DriveConfig(), on_progress)
    started_at = time.time()
    async with _ClientWatch() as watch:
        was_stopped = await driver.run(arrivals, stop or asyncio.Event())
    samples = sorted(driver.samples.items())
    return LoadRun(
        samples=tuple(sample for _, sample in samples),
        started_at=started_at,
        was_stopped=was_stopped,
        client=watch.stats(),
    )


class _Driver:
    """One run. `samples` is by the request's place in the list."""

    def __init__(
        self,
        target: Target,
        requests: Sequence[LoadRequest],
        config: DriveConfig,
        on_progress: ProgressCallback | None,
    ) -> None:
        self.samples: dict[int, Sample] = {}
        self._target = target
        self._requests = requests
        self._config = config
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self._start_s = self._loop.time()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def run(self, arrivals: Arrivals, stop: asyncio.Event) -> bool:
        """Send all, and wait for their ends; True if it was stopped before."""
        work = asyncio.create_task(
            self._open(arrivals) if isinstance(arrivals, OpenLoop) else self._closed(arrivals)
        )
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            self._stopping = not work.done()
        finally:
            for task in (work, stopped, *self._tasks):
                task.cancel()
            await asyncio.wait({work, stopped, *self._tasks})
        if not work.cancelled():
            work.result()
        return self._stopping

    async def _open(self, arrivals: OpenLoop) -> None:
        slots = asyncio.Semaphore(arrivals.max_in_flight)
        due = [at_s for at_s in arrivals.times_s if at_s <= self._config.max_seconds]
        for index, due_s in enumerate(due):
            await self._sleep_until(due_s)
            try:
                async with asyncio.timeout(self._config.max_seconds - self._now()):
                    await slots.acquire()
            except TimeoutError:
                self._give_up(index, due)
                break
            task = asyncio.create_task(self._send(index, due_s))
            self._tasks.add(task)
            task.add_done_callback(lambda done: slots.release())
        await self._gather()

    async def _closed(self, arrivals: ClosedLoop) -> None:
        queue = iter(range(len(self._requests)))

        async def worker() -> None:
            for index in queue:
                if self._now() > self._config.max_seconds:
                    break
                await self._send(index, None)

        self._tasks = {asyncio.create_task(worker()) for _ in range(arrivals.concurrency)}
        await self._gather()

    async def _gather(self) -> None:
        if self._tasks:
            await asyncio.gather(*self._tasks)

    async def _sleep_until(self, due_s: float) -> None:
        """Timers fire up to a millisecond late, so it wakes a little early and yields until it is time."""
        if (wait_s := due_s - _WAKE_EARLY_S - self._now()) > 0:
            await asyncio.sleep(wait_s)
        while (left_s := due_s - self._now()) > 0:
            await asyncio.sleep(0 if left_s < _WAKE_EARLY_S else left_s)

    def _give_up(self, first: int, due: Sequence[float]) -> None:
        """What was due and could not be sent has failed: leaving it out would flatter the system."""
        now_s = self._now()
        for index, due_s in enumerate(due[first:], start=first):
            self.samples[index] = Sample(
                id=self._requests[index].id,
                is_warmup=index < self._config.num_warmup,
                due_s=due_s,
                sent_s=now_s,
                end_s=now_s,
                status="error",
                error="not sent in time: too many requests were in flight",
            )

    async def _send(self, index: int, due_s: float | None) -> None:
        """Send one request and keep its sample, whatever becomes of it."""
        sent_s = self._now()
        pieces: list[Piece] = []
        finish: Finish | None = None
        status: Status = "error"
        error = ""
        try:
            async with asyncio.timeout(self._config.timeout_s):
                async for event in self._target.stream(self._requests[index]):
                    if isinstance(event, Piece):
                        pieces.append(event)
                    else:
                        finish = event
            status, error = _verdict(pieces, finish)
        except TimeoutError as problem:
            error = str(problem) or f"no end within {self._config.timeout_s:g} s"
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        except (TokenmillError, OSError) as problem:
            error = str(problem) or type(problem).__name__
        finally:
            self.samples[index] = self._sample(index, due_s, sent_s, pieces, finish, status, error)
            if self._on_progress is not None:
                num_in_flight = sum(not task.done() for task in self._tasks)
                self._on_progress(LoadProgress(len(self.samples), num_in_flight, len(self._requests)))

    def _sample(
        self,
        index: int,
        due_s: float | None,
        sent_s: float,
        pieces: Sequence[Piece],
        finish: Finish | None,
        status: Status,
        error: str,
    ) -> Sample:
        request = self._requests[index]
        counted = None if finish is None else finish.num_output_tokens
        num_input = None if finish is None else finish.num_input_tokens
        return Sample(
            id=request.id,
            is_warmup=index < self._config.num_warmup,
            due_s=sent_s if due_s is None else due_s,
            sent_s=sent_s,
            end_s=self._now() if finish is None else finish.at_s - self._start_s,
            status=status,
            piece_times_s=tuple(piece.at_s - self._start_s for piece in pieces),
            num_input_tokens=request.num_input_tokens if num_input is None else num_input,
            num_cached_tokens=0 if finish is None else finish.num_cached_tokens or 0,
            num_output_tokens=counted if counted is not None else sum(p.num_tokens or 1 for p in pieces),
            counted_by="pieces" if counted is None else "system",
            finish_reason="" if finish is None else finish.reason,
            error=error[:_ERROR_CHARS],
        )

    def _now(self) -> float:
        return self._loop.time() - self._start_s


def _verdict(pieces: Sequence[Piece], finish: Finish | None) -> tuple[Status, str]:
    """An answer that is cut off or empty is no fast answer."""
    if finish is None:
        return "error", "the stream broke off before its end"
    if finish.reason in ("failed", "expired", "cancelled"):
        return "error", f"the answer ended as {finish.reason}"
    return ("ok", "") if pieces else ("error", "the answer has no text")


class _ClientWatch:
    """Measures this process while the block runs."""

    def __init__(self) -> None:
        self._delays_s: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._from = (self._loop.time(), time.process_time())
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "_ClientWatch":
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    def stats(self) -> ClientStats:
        """What was seen so far."""
        wall_s, cpu_s = self._loop.time() - self._from[0], time.process_time() - self._from[1]
        delays = self._delays_s or [0.0]
        p99_s = float(np.quantile(delays, 0.99))
        return ClientStats(wall_s=wall_s, cpu_s=cpu_s, max_delay_s=max(delays), p99_delay_s=p99_s)

    async def _tick(self) -> None:
        while True:
            before_s = self._loop.time()
            await asyncio.sleep(_TICK_S)
            self._delays_s.append(self._loop.time() - before_s - _TICK_S)
