"""S1: overload. Ten times what the server can do arrives at random times; everybody is answered, and soon.

A call is answered (200) or refused (429, 503) with a Retry-After, and what is answered a second does not fall
below 95 % of what a full server answers. With the guard off the bound of open calls is beyond reach.
"""

import asyncio
import collections
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability.client import Answered, post
from benchmarks.reliability.command import main
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line

_BATCH = 16
_TOKENS = 20
_STEP_S = 0.02
_MAX_CALLS = 64
_OVERLOAD = 10.0
_REFUSAL_S = 0.05
_CLOSED_S = 8.0


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """`cases` calls at ten times the capacity. Unanswered calls and missed bounds are violations."""
    begun_s = time.perf_counter()
    config = deployment(
        mock={"step_s": _STEP_S, "seed": seed},
        engine={"max_batch": _BATCH},
        http={"max_calls": _MAX_CALLS if guard else 1 << 20},
    )
    with tempfile.TemporaryDirectory() as folder, running(config, Path(folder)) as server:
        figures, violations = asyncio.run(_measure(server, cases, random.Random(seed)))
    return Line(
        name="S1",
        what="calls at 10x capacity; unanswered ones, slow refusals (p99) and lost goodput count",
        cases=cases,
        violations=violations,
        seconds=time.perf_counter() - begun_s,
        figures=figures,
    )


async def _measure(server: Server, cases: int, draw: random.Random) -> tuple[dict[str, Any], int]:
    peak = await _closed(server.port)
    offered = peak * _OVERLOAD
    begun_s = time.perf_counter()
    tasks, due_s = [], begun_s
    for _ in range(cases):
        tasks.append(asyncio.create_task(_call(server.port)))
        due_s += draw.expovariate(offered)  # not from now: a late call must not make the rest late
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    sent_s = time.perf_counter() - begun_s
    answers = await asyncio.gather(*tasks)
    elapsed_s = time.perf_counter() - begun_s
    counts = collections.Counter(each.status for each in answers)
    refused = sorted(each.total_s for each in answers if each.status in (429, 503))
    p99 = refused[int(0.99 * (len(refused) - 1))] if refused else 0.0
    goodput = counts[200] / elapsed_s
    unanswered = sum(each.status not in (200, 429, 503) for each in answers)
    without_wait = sum(each.status in (429, 503) and not each.retry_after for each in answers)
    violations = unanswered + without_wait + (p99 >= _REFUSAL_S) + (goodput < 0.95 * peak) + (not refused)
    return {
        "capacity": f"{peak:.1f} calls/s",
        "offered": f"{cases / sent_s:.1f} calls/s",
        "statuses": str(dict(sorted(counts.items()))),
        "refusal p99 ms": round(1e3 * p99, 1),
        "goodput": f"{goodput:.1f} calls/s, {goodput / peak:.0%} of capacity",
    }, violations


async def _closed(port: int) -> float:
    """Calls a second of a server that is just full."""
    await asyncio.gather(*(_call(port) for _ in range(_BATCH)))
    begun_s, num = time.perf_counter(), 0

    async def user() -> None:
        nonlocal num
        while time.perf_counter() - begun_s < _CLOSED_S:
            answer = await _call(port)
            num += answer.status == 200

    await asyncio.gather(*(user() for _ in range(2 * _BATCH)))
    return num / (time.perf_counter() - begun_s)


async def _call(port: int) -> Answered:
    value = {"model": "mock", "prompt": "hello", "max_tokens": _TOKENS, "ignore_eos": True}
    return await post(port, "/v1/completions", value)


if __name__ == "__main__":
    sys.exit(main("s1", run, 3_000, __doc__))
