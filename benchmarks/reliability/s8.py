"""S8: a leak soak. Calls of many kinds for a long time, and what both processes hold after it.

    python -m benchmarks.reliability.s8 --minutes 1440

On the mock, at 70 % of what it can do, with 5 % of the calls broken off by the client. Every 5 s memory
that is a process's own (RssAnon + VmSwap, which counts what went to swap), open files and threads are
noted, of the front end and the engine. A violation: a slope of memory over the second half whose 95 %
interval is not below 1 MB/h (runs of 10 minutes and more; a short one may be too noisy to show it), files
or threads that were not there before, or blocks of the KV cache, calls or streams that are left in the end.
With the guard off the server keeps every call that it settled.
"""

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.client import connect, post, stream
from benchmarks.reliability.command import main
from benchmarks.reliability.heard import hear
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line

__all__ = ["run", "slope_mb_per_hour"]

_SHARE = 0.7
_ABORTED = 0.05
_STEP_S = 0.01
_BATCH = 16
_MAX_SLOPE = 1.0
_SLACK = 4
"""Connections of readers of the database, and threads of pools that start when they are needed."""
_REST_S = 1.0
_WARM_S = 600.0
"""A shorter run is of a server that still gets to its size: its slope says nothing."""
_KEEPING = """
from tokenmill.server import observer
kept = []
settled = observer.Observer.settled
def keeping(self, call):
    kept.append(bytearray(b"x" * 20000))
    settled(self, call)
observer.Observer.settled = keeping
"""


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One process at one time: seconds, KiB of its own memory, open files, threads."""

    at_s: float
    kb: int
    files: int
    threads: int


def run(*, cases: int, seed: int, guard: bool, minutes: float = 1440.0) -> Line:
    """So many minutes of load; each of both processes is a case."""
    begun_s = time.perf_counter()
    config = deployment(mock={"step_s": _STEP_S, "seed": seed}, engine={"max_batch": _BATCH})
    with (
        tempfile.TemporaryDirectory(prefix="s8-") as folder,
        running(config, Path(folder), sabotage="" if guard else _KEEPING) as server,
    ):
        figures, violations = asyncio.run(_soak(server, 60.0 * minutes, random.Random(seed)))
    return Line(
        name="S8",
        what=f"{minutes:g} min at {_SHARE:.0%} load, {_ABORTED:.0%} aborted: memory, files, threads, blocks",
        cases=2,
        violations=violations,
        seconds=time.perf_counter() - begun_s,
        figures=figures,
    )


async def _soak(server: Server, seconds: float, draw: random.Random) -> tuple[dict[str, Any], int]:
    rate = _SHARE * await _capacity(server.port, min(20.0, seconds / 6), draw)
    counts: dict[str, int] = {}
    pids = {"front end": server.pid, "engine": server.engine_pids()[0]}
    await asyncio.sleep(_REST_S)
    before = {name: _look(pid) for name, pid in pids.items()}
    samples: dict[str, list[_Sample]] = {name: [] for name in pids}
    sampling = asyncio.create_task(_sample(pids, samples, min(5.0, seconds / 40)))
    tasks, end_s = set[asyncio.Task[None]](), time.perf_counter() + seconds
    for number in itertools.count():
        if time.perf_counter() >= end_s:
            break
        task = asyncio.create_task(_one(server.port, number, draw, counts))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(draw.expovariate(rate))
    sampling.cancel()
    await asyncio.gather(*tasks)
    left = await _left(server.port)
    await asyncio.sleep(_REST_S)
    figures: dict[str, Any] = {"calls/s": round(rate, 1), "calls": str(counts), "left in the end": str(left)}
    violations = sum(left.values()) + counts.get("failed", 0)
    for name, found in samples.items():
        after, first = _look(pids[name]), before[name]
        violations += after.files > first.files + _SLACK or after.threads > first.threads + _SLACK
        half = found[len(found) // 2 :]
        slope, low, high = slope_mb_per_hour([each.at_s for each in half], [each.kb for each in half])
        violations += high >= _MAX_SLOPE and seconds >= _WARM_S
        figures[f"{name}: MB/h of the second half (95 %)"] = f"{slope:.2f} ({low:.2f} to {high:.2f})"
        figures[f"{name}: MB first, half, last"] = ", ".join(
            f"{each.kb / 1024:.1f}" for each in (found[0], half[0], found[-1])
        )
        figures[f"{name}: files, threads before and after"] = (
            f"{first.files}, {first.threads}; {after.files}, {after.threads}"
        )
    return figures, violations


async def _capacity(port: int, seconds: float, draw: random.Random) -> float:
    """Calls a second of the same mix that a full server answers."""
    end_s, num = time.perf_counter() + seconds, 0
    counts: dict[str, int] = {}

    async def user() -> None:
        nonlocal num
        while time.perf_counter() < end_s:
            await _one(port, num, draw, counts)
            num += 1

    await asyncio.gather(*(user() for _ in range(2 * _BATCH)))
    return num / seconds


async def _one(port: int, number: int, draw: random.Random, counts: dict[str, int]) -> None:
    """One call: streamed or plain, of either API, or broken off."""
    tokens = draw.randint(1, 40)
    # Few texts: the tokenizers library keeps words that it met, some 40 MB of long ones, then no more.
    chat = {
        "model": "mock",
        "messages": [{"role": "user", "content": f"{number % 500} " + "x" * (number % 400)}],
    }
    call = {**chat, "max_tokens": tokens}
    if draw.random() < _ABORTED:
        counts["aborted"] = counts.get("aborted", 0) + 1
        with contextlib.suppress(OSError, ValueError, EOFError, TimeoutError):
            async with asyncio.timeout(draw.uniform(0.0, 0.3)):
                async with contextlib.aclosing(stream(port, call, "/v1/chat/completions")) as pieces:
                    async for _ in pieces:
                        pass
        return
    path = "/v1/messages" if number % 3 == 0 else "/v1/chat/completions"
    if number % 50 == 0:
        # Also what is refused leaves something behind, if anything does.
        answer = await post(port, path, {**call, "max_tokens": -1})
        name = "refused" if answer.status == 400 else "failed"
    else:
        heard = await hear(port, {**call, "stream": number % 2 == 0}, path)
        name = "whole" if heard.ended == "whole" else "failed"
    counts[name] = counts.get(name, 0) + 1


async def _sample(pids: dict[str, int], samples: dict[str, list[_Sample]], every_s: float) -> None:
    while True:
        for name, pid in pids.items():
            samples[name].append(_look(pid))
        await asyncio.sleep(every_s)


def _look(pid: int) -> _Sample:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":", 1) for line in status)
    return _Sample(
        at_s=time.perf_counter(),
        kb=sum(int(found[key].split()[0]) for key in ("RssAnon", "VmSwap")),
        files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(found["Threads"]),
    )


async def _left(port: int) -> dict[str, int]:
    """Calls and blocks that are not given back 10 s after the end."""
    left = {"calls": -1, "blocks": -1}
    for _ in range(20):
        drained = json.loads(await _get(port, "/health/drained"))
        lines = (await _get(port, "/metrics")).decode().splitlines()
        blocks = [line for line in lines if line.startswith("tokenmill_kv_blocks_in_use")]
        assert blocks, "the metrics do not say how many blocks are in use"
        left = {
            "calls": drained["open"] + drained["unsettled"],
            "blocks": int(sum(float(line.rpartition(" ")[2]) for line in blocks)),
        }
        if not any(left.values()):
            break
        await asyncio.sleep(0.5)
    return left


async def _get(port: int, path: str) -> bytes:
    async with connect(port) as connection:
        connection.send("GET", path)
        _, headers = await connection.head()
        return b"".join([piece async for piece in connection.pieces(headers)])


def slope_mb_per_hour(at_s: list[float], kb: list[int], seed: int = 1) -> tuple[float, float, float]:
    """The slope of a straight line and its 95 % interval. Samples in a row resemble each other, so the
    interval is of slopes over resampled blocks of eight.
    """
    times, values = np.array(at_s) / 3600.0, np.array(kb) / 1024.0
    if len(times) < 4:
        return 0.0, 0.0, 0.0
    slope, offset = np.polyfit(times, values, 1)
    rest = values - (slope * times + offset)
    size, rng = min(8, len(rest)), np.random.default_rng(seed)
    slopes = []
    for _ in range(1000):
        starts = rng.integers(0, len(rest) - size + 1, -(-len(rest) // size))
        noise = np.concatenate([rest[start : start + size] for start in starts])[: len(rest)]
        slopes.append(float(np.polyfit(times, slope * times + offset + noise, 1)[0]))
    cuts = statistics.quantiles(slopes, n=40)
    return float(slope), cuts[0], cuts[-1]


if __name__ == "__main__":
    sys.exit(main("s8", run, 2, __doc__, minutes=1440.0))
