"""Thousands of callers against an engine that keeps being killed: does every request end, once?

    python -m scripts.storm --requests 10000 --kills 20 --seed 1

The callers read, read slowly, wait for the result only, cancel, break off, are cancelled themselves, drop
their handle, or set a deadline they cannot keep. The engine is the mock, so each answer is known: what a
request got must be the reference answer, or its beginning if it did not end by itself. Checked besides:
one terminal state each, no KV block held when all is over, no task, file descriptor or process left.

`--no-guard` is the control: without the front end's ending of requests whose process died, it must fail.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tokenmill.core import Completion, Request, SamplingParams, Tier
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockScript, reference_tokens
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.handle import RequestHandle, StreamDelta
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.engine.serving.supervisor import SupervisorConfig

__all__ = ["Report", "StormConfig", "run_storm"]

_NUM_PROMPTS = 64
_MAX_TOKENS = 48
_OWN_ENDS = ("completed", "length")
_SPEC = EngineSpec(
    mock=MockScript(seed=7, step_s=0.001),
    config=LLMConfig(max_batch=64, max_rows=256, kv_tokens=96 * 32, swap_tokens=32 * 32),
)
_BOUNDS = SupervisorConfig(beat_s=0.1, silence_s=1.0, stall_s=5.0, backoff_s=0.05, max_backoff_s=1.0)


@dataclass(frozen=True, kw_only=True)
class StormConfig:
    """How much of it. Every fifth kill is a SIGSTOP, which the front end must notice by itself."""

    num_requests: int = 10_000
    num_kills: int = 20
    seed: int = 1
    concurrency: int = 256
    patience_s: float = 60.0
    guard: bool = True


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened, and what should not have."""

    num_requests: int
    num_kills: int
    num_restarts: int
    num_resubmitted: int
    ended: dict[str, int]
    callers: dict[str, int]
    seconds: float
    faults: tuple[str, ...]


class _Unguarded(AsyncEngine):
    """The control: it starts another process, and forgets what the last one had."""

    def _bury(self, why: str, *, was_drained: bool) -> None:
        pass


class _Storm:
    """One storm: its callers, its killer, and what it has seen of the ends."""

    def __init__(self, config: StormConfig) -> None:
        self.config = config
        self.rng = random.Random(config.seed)
        self.prompts = [
            tuple(self.rng.randrange(256) for _ in range(self.rng.randrange(1, 90)))
            for _ in range(_NUM_PROMPTS)
        ]
        self.references = [reference_tokens(prompt, _MAX_TOKENS, _SPEC.mock) for prompt in self.prompts]
        self.faults: list[str] = []
        self.ends: Counter[str] = Counter()
        self.callers: Counter[str] = Counter()
        self.num_kills = 0

    def request(self, number: int) -> Request:
        """The request of this number; its id says which prompt it has."""
        rng = self.rng
        which = rng.randrange(_NUM_PROMPTS)
        late = rng.random() < 0.05
        return Request(
            request_id=f"{number}-{which}",
            prompt=self.prompts[which],
            params=SamplingParams(max_tokens=rng.randrange(1, _MAX_TOKENS), n=1 + (rng.random() < 0.1)),
            timeout_s=rng.uniform(0.001, 0.05) if late else None,
            tier=rng.choice(get_args(Tier)),
            tenant=rng.choice("ab"),
        )

    def on_end(self, request: Request, completions: tuple[Completion, ...]) -> None:
        """Count an end, and compare it with what the answer must be."""
        self.ends[request.request_id] += 1
        reference = self.references[int(request.request_id.partition("-")[2])][: request.params.max_tokens]
        if len(completions) != request.params.n:
            self.faults.append(f"{request.request_id} has {len(completions)} completions")
        for completion in completions:
            tokens = list(completion.token_ids)
            whole = completion.finish_reason in _OWN_ENDS
            if tokens != (reference if whole else reference[: len(tokens)]):
                self.faults.append(f"{request.request_id} got other tokens ({completion.finish_reason})")

    async def call(self, engine: AsyncEngine, request: Request) -> None:
        """One caller, of a kind drawn by lot."""
        kinds: list[Callable[[RequestHandle], Awaitable[None]]] = [
            self.read,
            self.wait,
            self.read_slowly,
            self.cancel,
            self.break_off,
            self.be_cancelled,
        ]
        kind = self.rng.choice([*kinds, None])
        self.callers["drop" if kind is None else kind.__name__] += 1
        handle = engine.submit(request)
        if kind is None:
            del handle
            return
        try:
            async with asyncio.timeout(self.config.patience_s):
                await kind(handle)
        except TimeoutError:
            self.faults.append(f"{request.request_id} did not end in {self.config.patience_s:g} s")

    async def read(self, handle: RequestHandle, pause_s: float = 0.0) -> None:
        """Read to the end; the pieces must be the whole."""
        texts: dict[int, str] = {}
        async for news in handle:
            if isinstance(news, StreamDelta):
                texts[news.index] = texts.get(news.index, "") + news.text
            elif news.text != texts.get(news.index, ""):
                self.faults.append(f"{handle.request_id}: the stream is not the completion")
            if pause_s:
                await asyncio.sleep(pause_s)

    async def read_slowly(self, handle: RequestHandle) -> None:
        """Read more slowly than tokens come."""
        await self.read(handle, pause_s=self.rng.uniform(0.01, 0.1))

    async def wait(self, handle: RequestHandle) -> None:
        """Wait for the result."""
        await handle.result()

    async def cancel(self, handle: RequestHandle) -> None:
        """Cancel after some deltas, twice, and read on to the end."""
        count = self.rng.randrange(8)
        if not count:
            handle.cancel()
        async for _ in handle:
            count -= 1
            if count == 0:
                handle.cancel()
                handle.cancel()

    async def break_off(self, handle: RequestHandle) -> None:
        """Go away after some deltas."""
        count = self.rng.randrange(1, 8)
        async for _ in handle:
            count -= 1
            if count == 0:
                break

    async def be_cancelled(self, handle: RequestHandle) -> None:
        """Be a task that somebody cancels."""
        task = asyncio.ensure_future(handle.result() if self.rng.random() < 0.5 else self.read(handle))
        await asyncio.wait([task], timeout=self.rng.uniform(0.0, 0.2))
        task.cancel()
        await asyncio.wait([task])

    async def kill(self, engine: AsyncEngine) -> None:
        """Kill the engine each time another share of the requests has ended."""
        for number in range(1, self.config.num_kills + 1):
            threshold = number * self.config.num_requests // (self.config.num_kills + 1)
            while len(self.ends) < threshold or engine.state != "ready":
                await asyncio.sleep(0.01)
            os.kill(engine.stats.pid, signal.SIGSTOP if number % 5 == 0 else signal.SIGKILL)
            self.num_kills += 1
            while engine.state == "ready":
                await asyncio.sleep(0.01)

    async def run(self, engine: AsyncEngine) -> None:
        """All callers, at most `concurrency` at a time; the first fault ends it."""
        slots = asyncio.Semaphore(self.config.concurrency)
        killer = asyncio.create_task(self.kill(engine))
        async with asyncio.TaskGroup() as group:
            for number in range(self.config.num_requests):
                await slots.acquire()
                if self.faults:
                    break
                task = group.create_task(self.call(engine, self.request(number)))
                task.add_done_callback(lambda _: slots.release())
        if not self.faults:
            await self.settle(engine)
            await killer
            await self.settle(engine)
        killer.cancel()
        await asyncio.wait([killer])

    async def settle(self, engine: AsyncEngine) -> None:
        """Wait until nothing is in flight, and no block is held."""
        deadline = time.monotonic() + self.config.patience_s
        while (stats := engine.stats).num_in_flight or stats.num_blocks_in_use or stats.state != "ready":
            if time.monotonic() > deadline:
                self.faults.append(f"not idle: {stats}")
                return
            await asyncio.sleep(0.02)


async def run_storm(config: StormConfig) -> Report:
    """Run one storm in this event loop."""
    began = time.monotonic()
    storm = _Storm(config)
    kind = AsyncEngine if config.guard else _Unguarded
    num_tasks, descriptors, children = len(asyncio.all_tasks()), _descriptors(), _children()
    engine = await kind.start(_SPEC, _BOUNDS, max_requests=4 * config.concurrency, on_end=storm.on_end)
    async with engine:
        await storm.run(engine)
        in_flight = engine.stats.num_in_flight
    await asyncio.sleep(0.05)
    faults = storm.faults
    if not faults:
        twice = [request_id for request_id, count in storm.ends.items() if count != 1]
        faults += [f"{request_id} ended {storm.ends[request_id]} times" for request_id in twice]
        if len(storm.ends) != config.num_requests:
            faults.append(f"{len(storm.ends)} of {config.num_requests} requests ended")
    faults += [f"{in_flight} requests in flight at the end"] if in_flight else []
    if len(asyncio.all_tasks()) != num_tasks:
        faults.append(f"tasks left: {asyncio.all_tasks()}")
    if left := _descriptors() - descriptors:
        faults.append(f"{left} file descriptors left")
    if new := _children() - children:
        faults.append(f"child processes left: {sorted(new)}")
    stats = engine.stats
    return Report(
        num_requests=config.num_requests,
        num_kills=storm.num_kills,
        num_restarts=stats.num_restarts,
        num_resubmitted=stats.num_resubmitted,
        ended={str(reason): count for reason, count in sorted(stats.num_ended.items())},
        callers=dict(sorted(storm.callers.items())),
        seconds=time.monotonic() - began,
        faults=tuple(faults),
    )


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _children() -> set[str]:
    return {
        pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text("ascii").split()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a storm and print its figures; exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description="Storm an engine process that keeps being killed.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-guard", action="store_true", help="the control, which must fail")
    args = parser.parse_args(arguments)
    config = StormConfig(
        num_requests=args.requests,
        num_kills=args.kills,
        seed=args.seed,
        guard=not args.no_guard,
        patience_s=10.0 if args.no_guard else 60.0,
    )
    report = asyncio.run(run_storm(config))
    for name in ("num_requests", "num_kills", "num_restarts", "num_resubmitted", "ended", "callers"):
        print(f"{name:16} {getattr(report, name)}")
    print(f"{'seconds':16} {report.seconds:.1f}")
    for fault in report.faults[:20]:
        print(f"FAULT {fault}")
    print(f"{len(report.faults)} faults")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
