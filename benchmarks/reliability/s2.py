"""S2: streams held at once. One long answer each, on the mock; every token must come, in time, to everybody.

With the guard off the server admits half as many calls as are opened: those refused are violations.
"""

import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability.client import stream
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line

_STEP_S = 1.0
_MAX_GAP_S = 10.0


def run(*, cases: int, seed: int, guard: bool, minutes: float = 30.0) -> Line:
    """`cases` streams at once for so many minutes. A stream that fails or stalls is a violation."""
    begun_s = time.perf_counter()
    config = deployment(
        mock={"step_s": _STEP_S, "seed": seed},
        engine={"max_batch": cases, "max_rows": max(512, cases), "kv_tokens": 4096 * cases},
        http={"max_calls": cases if guard else cases // 2},
    )
    with tempfile.TemporaryDirectory() as folder, running(config, Path(folder)) as server:
        figures = asyncio.run(_hold(server, cases, 60.0 * minutes, random.Random(seed)))
    violations = figures.pop("violations")
    return Line(
        name="S2",
        what=f"{cases} streams held for {minutes:g} min; a stream that fails or is silent for 10 s counts",
        cases=cases,
        violations=violations,
        seconds=time.perf_counter() - begun_s,
        figures=figures,
    )


async def _hold(server: Server, num: int, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Open the streams over five seconds, and read all to their end."""
    tokens = max(8, min(4000, round(seconds / _STEP_S)))
    first_kb = _anon_kb(server.pid)
    delays = [draw.uniform(0.0, 5.0) for _ in range(num)]
    done = await asyncio.gather(*(_one(server.port, number, tokens, delays[number]) for number in range(num)))
    gaps = [gap for each in done for gap in each[1]]
    return {
        "violations": sum(not ok or max(found, default=0.0) > _MAX_GAP_S for ok, found in done),
        "streams": num,
        "tokens each": tokens,
        "events": sum(len(found) for _, found in done),
        "gap p50 s": round(statistics.median(gaps), 3) if gaps else 0,
        "gap max s": round(max(gaps, default=0.0), 2),
        "front end anonymous MB before, after": f"{first_kb / 1024:.0f}, {_anon_kb(server.pid) / 1024:.0f}",
    }


async def _one(port: int, number: int, tokens: int, delay_s: float) -> tuple[bool, list[float]]:
    """One stream: whether it ended as it should, and the seconds between its events."""
    await asyncio.sleep(delay_s)
    gaps: list[float] = []
    last_s, tail = time.perf_counter(), b""
    call = {"model": "mock", "prompt": f"stream {number}", "max_tokens": tokens, "ignore_eos": True}
    with contextlib.suppress(OSError, ValueError, EOFError):
        async for at_s, piece in stream(port, call):
            gaps.append(at_s - last_s)
            last_s, tail = at_s, piece
    return tail.endswith(b"data: [DONE]\n\n"), gaps


def _anon_kb(pid: int) -> int:
    """Memory of a process that is its own, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "VmSwap")))
