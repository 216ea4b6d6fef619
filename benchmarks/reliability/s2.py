"""S2: streams held at once. One long answer each, on the mock; tokens must come, in time, to everybody. In
the end all clients leave at once, and their calls must end.

With the guard off the server admits half as many calls as are opened: those refused are violations.
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.client import connect, stream
from benchmarks.reliability.command import main
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line

_STEP_S = 1.0
_MAX_GAP_S = 10.0
_FIRST_S = 60.0
"""While all the others arrive."""
_TOKENS = 4000
"""More than any stream gets."""


def run(*, cases: int, seed: int, guard: bool, minutes: float = 30.0) -> Line:
    """`cases` streams at once for so many minutes. One that ends, begins late or stalls is a violation."""
    begun_s = time.perf_counter()
    config = deployment(
        mock={"step_s": _STEP_S, "seed": seed},
        engine={"max_batch": cases, "max_rows": max(512, cases), "kv_tokens": 4096 * cases},
        http={"max_calls": cases if guard else cases // 2, "standard_s": 120.0 * minutes + 600.0},
    )
    with tempfile.TemporaryDirectory() as folder, running(config, Path(folder)) as server:
        figures = asyncio.run(_hold(server, cases, 60.0 * minutes, random.Random(seed)))
    violations = figures.pop("violations")
    return Line(
        name="S2",
        what=f"{cases} streams held for {minutes:g} min; those that fail or are silent for 10 s, calls left",
        cases=cases,
        violations=violations,
        seconds=time.perf_counter() - begun_s,
        figures=figures,
    )


async def _hold(server: Server, num: int, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Open the streams over five seconds, read all of them for so long, and leave."""
    first_kb = _anon_kb(server.pid)
    end_s = time.perf_counter() + seconds
    delays = [draw.uniform(0.0, min(5.0, seconds / 4)) for _ in range(num)]
    done = await asyncio.gather(*(_one(server.port, number, end_s, delays[number]) for number in range(num)))
    held_kb = _anon_kb(server.pid)
    num_left = await _open_calls(server)
    gaps = [gap for each in done for gap in each.gaps_s]
    num_silent = sum(max((*each.gaps_s, each.last_s)) > _MAX_GAP_S for each in done)
    num_late = sum(each.first_s > _FIRST_S for each in done)
    num_ended = sum(each.has_ended for each in done)
    return {
        "violations": num_silent + num_late + num_ended + num_left,
        "streams": num,
        "ended or refused, silent, begun late": f"{num_ended}, {num_silent}, {num_late}",
        "calls left 30 s after all had gone": num_left,
        "events": len(gaps),
        "first event s, p50, max": f"{_p50([each.first_s for each in done])}, "
        f"{max(each.first_s for each in done):.2f}",
        "gap s, p50, max": f"{_p50(gaps)}, {max(gaps, default=0.0):.2f}",
        "front end anonymous MB before, held": f"{first_kb / 1024:.0f}, {held_kb / 1024:.0f}",
    }


def _p50(values: list[float]) -> str:
    return f"{statistics.median(values):.3f}" if values else "none"


@dataclass(frozen=True, kw_only=True)
class _Held:
    """One stream: whether it ended before its time, the seconds until its first event, between two, and since
    the last.
    """

    has_ended: bool
    first_s: float
    gaps_s: tuple[float, ...]
    last_s: float


async def _one(port: int, number: int, end_s: float, delay_s: float) -> _Held:
    """Read one stream until the time has come."""
    await asyncio.sleep(delay_s)
    began_s, gaps, has_ended = time.perf_counter(), list[float](), True
    last_s = began_s
    call = {"model": "mock", "prompt": f"stream {number}", "max_tokens": _TOKENS, "ignore_eos": True}
    try:
        async with asyncio.timeout(end_s - began_s), aclosing(stream(port, call)) as pieces:
            async for at_s, piece in pieces:
                if b"data: {" in piece and b'"error"' not in piece:
                    gaps.append(at_s - last_s)
                    last_s = at_s
    except TimeoutError:
        has_ended = False
    except (OSError, ValueError, EOFError):
        pass
    left_s = 0.0 if has_ended else end_s - last_s
    return _Held(
        has_ended=has_ended, first_s=gaps[0] if gaps else left_s, gaps_s=tuple(gaps[1:]), last_s=left_s
    )


async def _open_calls(server: Server) -> int:
    """Calls that the server still has 30 s later; `/health/drained` counts them."""
    found = 0
    for _ in range(60):
        async with connect(server.port) as connection:
            connection.send("GET", "/health/drained")
            _, headers = await connection.head()
            body = json.loads(b"".join([piece async for piece in connection.pieces(headers)]))
        found = int(body["open"]) + int(body["unsettled"])
        if not found:
            break
        await asyncio.sleep(0.5)
    return found


def _anon_kb(pid: int) -> int:
    """Memory of a process that is its own, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "VmSwap")))


if __name__ == "__main__":
    sys.exit(main("s2", run, 1_000, __doc__, minutes=30.0))
