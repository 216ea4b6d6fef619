"""The worker of batches: reads their input, fills idle rows of the engines with lines, writes their files.

    validating ─► in_progress ─► finalizing ─► completed, cancelled, expired          (or failed, any time)
                      │ lease ─► run ─► answer, counts and ledger in one transaction

Everything that it knows is in the store, so it goes on after `kill -9` where it was; a worker that starts
frees what its dead predecessor held. How many lines run at once follows the load: never more than what other
calls leave free of the engines' rows, half as many at once when somebody says that he is full, and more again
as lines end. The engine itself lets every other tier pass.

No batch stops another: a stage that fails is tried again a few times and then fails its batch alone, a line
that fails is tried again and then refused alone, and lines in whose company the server died twice run alone.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenmill.core import StorageError, TokenmillError, UsageError
from tokenmill.server.batch_files import BatchFiles
from tokenmill.server.batch_run import LineRun, LineRunner
from tokenmill.server.files import new_id
from tokenmill.store import Batch, BatchFault, BatchOutcome, Key, Line, LineEnd, LineState, ObjectStore

__all__ = ["BatchConfig", "BatchWorker"]

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Bounds of all batches.

    At most `max_in_flight` lines run at once, `headroom` fewer if others ask too; that should be the rows of
    the engines. A batch has `window_s` seconds. A lease holds for `lease_s` without a sign of life. A line
    may be begun `max_tries` times by a server that dies, a stage of a batch fail `max_stage_tries` times. A
    project has at most `max_open` batches that have not ended.
    """

    max_in_flight: int = 32
    headroom: int = 4
    window_s: float = 86400.0
    lease_s: float = 120.0
    max_tries: int = 5
    max_stage_tries: int = 8
    max_open: int = 64
    idle_s: float = 1.0
    retry_s: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.max_in_flight <= 1 << 16 or not 0 <= self.headroom < self.max_in_flight:
            raise UsageError(
                f"max_in_flight is {self.max_in_flight} and headroom {self.headroom}",
                hint="use 1 or more, and a smaller headroom",
            )
        if self.lease_s < 1.0:
            raise UsageError(f"lease_s is {self.lease_s}", hint="use a second or more")


@dataclass
class _Flight:
    """A line that runs. `end` is what it ends as if it is given up."""

    line: Line
    key_id: str
    end: LineState = "pending"
    task: "asyncio.Task[None] | None" = None
    has_begun: bool = False
    is_given_up: bool = False

    def give_up(self, end: LineState) -> None:
        """Let it end as `end`. A task that has not begun would never notice that it is cancelled: it asks."""
        if self.is_given_up:
            return
        self.end, self.is_given_up = end, True
        if self.has_begun and self.task is not None:
            self.task.cancel()


class BatchWorker:
    """Runs all batches of a store. It belongs to one event loop; `stop` it before the gateway drains.

    `find_key` gives the key of an id, `num_calls` how many calls the gateway has, ours among them, `now_s`
    the time of the store's accounts.
    """

    def __init__(
        self,
        objects: ObjectStore,
        files: BatchFiles,
        runner: LineRunner,
        config: BatchConfig,
        *,
        find_key: Callable[[str], Awaitable[Key | None]],
        num_calls: Callable[[], int],
        now_s: Callable[[], float],
    ) -> None:
        self._objects = objects
        self._files = files
        self._runner = runner
        self._config = config
        self._find_key = find_key
        self._num_calls = num_calls
        self._now_s = now_s
        self._flights: dict[tuple[str, int], _Flight] = {}
        self._stages: dict[str, asyncio.Task[None]] = {}
        self._cap = float(config.max_in_flight)
        self._pause_until_s = 0.0
        self._quiet = ""  # the batch whose suspects wait for an empty house
        self._poor: set[str] = set()  # keys whose budget is short: one line at a time shows whether for good
        self._turn = 0
        self._cared_s = 0.0
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_in_flight(self) -> int:
        """Lines that run."""
        return len(self._flights)

    @property
    def limit(self) -> int:
        """How many lines may run now: what others leave of the rows. At least one, for batches must end."""
        others = max(0, self._num_calls() - len(self._flights))
        headroom = self._config.headroom if others else 0
        return max(1, min(int(self._cap), self._config.max_in_flight - headroom - others))

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Give the lines that run back, and end."""
        self._stopping.set()
        self._wake.set()
        if self._task is not None:
            await self._task  # not cancelled: what it is leasing would be nobody's
        for stage in self._stages.values():
            stage.cancel()
        for flight in self._flights.values():
            flight.give_up("pending")
        flights = [flight.task for flight in self._flights.values() if flight.task is not None]
        await asyncio.gather(*self._stages.values(), *flights, return_exceptions=True)

    def wake(self) -> None:
        """Look at the batches now."""
        self._wake.set()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            delay_s = self._config.idle_s
            try:
                await self._care()
                await self._look()
            except StorageError as error:
                _LOG.warning("batches wait: %s", error)
                delay_s = self._config.retry_s
            except Exception:
                _LOG.exception("a look at the batches failed")
                delay_s = self._config.retry_s
            paused_s = self._pause_until_s - asyncio.get_running_loop().time()
            waits_for = self._stopping if paused_s > 0 else self._wake
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(waits_for.wait(), min(paused_s, delay_s) if paused_s > 0 else delay_s)

    async def _care(self) -> None:
        """Now and then: keep our leases, free lost ones, forget what is over."""
        now_s = self._now_s()
        if abs(now_s - self._cared_s) < self._config.lease_s / 4:
            return
        self._cared_s = now_s
        leases = sorted({flight.line.lease for flight in self._flights.values()})
        await self._objects.renew(leases, now_s + self._config.lease_s)
        await self._objects.free_lost(now_s)
        await self._files.forget_expired(now_s)
        for batch_id in await self._objects.stale_batches():
            while await self._objects.clear_lines(batch_id):
                await asyncio.sleep(0)

    async def _look(self) -> None:
        """Move every batch on as far as it goes."""
        batches = await self._objects.open_batches()
        running = []
        for batch in batches:
            is_free = batch.id not in self._stages or batch.status == "cancelling"
            if is_free and await self._advance(batch):
                running.append(batch)
        if running:
            self._turn = (self._turn + 1) % len(running)
            await self._fill(running[self._turn :] + running[: self._turn])

    async def _advance(self, batch: Batch) -> bool:
        """Do what its status asks for; returns whether its lines may run."""
        if batch.status == "finalizing":
            self._begin_stage(batch, self._files.write(batch))
            return False
        expired = self._now_s() >= batch.expires_s
        if batch.status == "cancelling" or expired:
            await self._give_up(batch, "expired" if expired and batch.status != "cancelling" else "cancelled")
            return False
        if batch.status == "validating":
            self._begin_stage(batch, self._files.read(batch))
            return False
        return True

    async def _give_up(self, batch: Batch, state: LineState) -> None:
        """End what has not ended of it."""
        assert state in ("cancelled", "expired"), state
        if (stage := self._stages.get(batch.id)) is not None:
            stage.cancel()
            return
        if state == "expired" and batch.status == "validating":
            await self._objects.start_batch(batch.id, batch.model, self._now_s())
        for flight in self._flights.values():
            if flight.line.batch_id == batch.id:
                flight.give_up(state)
        await self._objects.end_pending(batch.id, state)
        await self._finalize(batch, "expired" if state == "expired" else "cancelled")

    async def _finalize(self, batch: Batch, outcome: BatchOutcome) -> None:
        """Begin to write its files, if no line is open."""
        ids = (new_id("file-"), new_id("file-"))
        if await self._objects.finalize(batch.id, outcome, *ids, self._now_s()):
            self.wake()

    async def _fill(self, batches: Sequence[Batch]) -> None:
        """Give free rows to the batches in turn."""
        if self._quiet:
            batches = [each for each in batches if each.id == self._quiet]
            if self._flights:
                return
            self._quiet = ""
        free = self.limit - len(self._flights)
        if asyncio.get_running_loop().time() < self._pause_until_s:
            return
        for at, batch in enumerate(batches):
            if free <= 0:
                return
            share = max(1, free // (len(batches) - at))
            key = await self._key(batch)
            if key is None or (key.id in self._poor and self._num_of_key(key.id)):
                continue
            share = 1 if key.id in self._poor else share
            until_s = self._now_s() + self._config.lease_s
            lines = await self._objects.lease(batch.id, share, until_s)
            if not lines:
                lines = await self._last_lines(batch, until_s)
            for line in lines:
                await self._launch(batch, line, key)
            free -= len(lines)

    async def _last_lines(self, batch: Batch, until_s: float) -> list[Line]:
        """A suspect, if nothing else runs; if there is none and nothing runs of the batch, it is done."""
        num_pending, num_suspects, num_leased = await self._objects.open_lines(batch.id)
        if num_suspects and not self._flights:
            return await self._objects.lease(batch.id, 1, until_s, suspects=True)
        if num_suspects:
            self._quiet = batch.id
        elif not num_pending and not num_leased:
            await self._finalize(batch, "completed")
        return []

    async def _launch(self, batch: Batch, line: Line, key: Key) -> None:
        where = (batch.id, line.number)
        if line.num_tries > self._config.max_tries:
            error = TokenmillError(
                f"the server died {line.num_tries - 1} times while this line ran",
                hint="ask for something else",
            )
            await self._runner.refuse(batch, line, error)
            return
        if where in self._flights:
            # Its last try has given it back and is not quite gone, or its lease ran out under it: not yet.
            await self._objects.close_line(line, LineEnd(state="pending"), [])
            return
        flight = self._flights[where] = _Flight(line, key.id)
        run = LineRun(
            batch=batch,
            line=line,
            read=lambda: self._files.line(batch, line),
            key=key,
            is_last_of_key=lambda: self._num_of_key(key.id) <= 1,
        )
        flight.task = asyncio.create_task(self._fly(flight, run))

    async def _fly(self, flight: _Flight, run: LineRun) -> None:
        """Run a line and draw conclusions from how it went."""
        flight.has_begun = True
        try:
            if flight.is_given_up:
                await self._objects.close_line(run.line, LineEnd(state=flight.end), [])
                return
            fate = await self._runner.run(run, lambda: flight.end)
            if fate == "busy":
                self._cap = max(1.0, min(self._cap, len(self._flights)) / 2)
            elif fate != "lost":
                self._cap = min(float(self._config.max_in_flight), self._cap + 0.25)
            if fate == "poor":
                self._poor.add(run.key.id)
            elif fate == "answered":
                self._poor.discard(run.key.id)
            if fate in ("busy", "lost"):
                self._pause_until_s = asyncio.get_running_loop().time() + self._config.retry_s
        except StorageError as error:
            _LOG.warning("%s has no end yet: %s", run.line.request_id, error)
        finally:
            del self._flights[run.batch.id, run.line.number]
            self.wake()

    def _num_of_key(self, key_id: str) -> int:
        return Counter(flight.key_id for flight in self._flights.values())[key_id]

    async def _key(self, batch: Batch) -> Key | None:
        """The batch's key; a batch whose key is no longer valid is cancelled."""
        key = await self._find_key(batch.key_id)
        if key is not None and key.is_valid(self._now_s()):
            return key
        _LOG.info("%s is cancelled: its key is no longer valid", batch.id)
        await self._objects.cancel_batch(batch.project, batch.id, batch.api, self._now_s())
        self.wake()
        return None

    def _begin_stage(self, batch: Batch, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._stage(batch, work))
        self._stages[batch.id] = task

    async def _stage(self, batch: Batch, work: Coroutine[Any, Any, None]) -> None:
        """Read a batch's input or write its files; what fails too often fails the batch."""
        try:
            tries = await self._objects.begin_stage(batch.id)
            if tries > self._config.max_stage_tries:
                what = "read its input" if batch.status == "validating" else "write its files"
                fault = BatchFault(code="server_error", message=f"the server could not {what}")
                await self._objects.fail_batch(batch.id, [fault], self._now_s())
                return
            await work
        except FileNotFoundError:
            _LOG.exception("a stage of %s failed", batch.id)
            await asyncio.sleep(self._config.retry_s)
        except (StorageError, OSError) as error:
            _LOG.warning("%s waits: %s", batch.id, error)
            await self._undo_stage(batch)
            await asyncio.sleep(self._config.retry_s)
        except asyncio.CancelledError:
            await self._undo_stage(batch)
            raise
        except Exception:
            _LOG.exception("a stage of %s failed", batch.id)
            await asyncio.sleep(self._config.retry_s)
        finally:
            work.close()
            del self._stages[batch.id]
            self.wake()

    async def _undo_stage(self, batch: Batch) -> None:
        """Not a fault of the batch: do not count it."""
        with contextlib.suppress(StorageError):
            await self._objects.begin_stage(batch.id, -1)
