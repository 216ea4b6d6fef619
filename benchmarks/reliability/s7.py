"""S7: faults of processes, and what clients, probes and the ledger see of them.

    python -m benchmarks.reliability.s7 --cases 200 --seed 1

Five faults (killed, stopped, hung, out of memory, told to end) of three parts (the engine process, the
front end, the front end in the middle of its writes), each under streams and plain calls of both APIs.
Checked: each call ends as a whole answer, an error, or a connection that visibly broke with the process;
/health/ready says no within 5 s of an engine's fault and yes again afterwards; lines of the ledger that
were there stay, once; SIGTERM ends with exit code 0. Then a full server's probes. With the guard off the
server sends no errors in streams, and does not watch its engine.
"""

import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import apsw

from benchmarks.reliability.command import main
from benchmarks.reliability.heard import Heard, Probe, hear, percentile, watch
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line

__all__ = ["Figures", "config", "engine_trial", "front_trial", "run", "run_drain", "run_probes"]

_HANG, _EXIT = 257, 258
"""Token ids that no text has: prompts with them make the mock hang, or exit."""
_DETECT_S = 5.0
_AGAIN_S = 60.0
_FAULTS = ("kill", "stop", "hang", "memory", "term")
_PARTS = ("engine", "front end", "writer")
_NUM_STREAMS = 12
_LIVE_S = 0.1
_BLIND = """
from dataclasses import replace
from tokenmill.engine.serving import supervisor
from tokenmill.server import answering, fleet
answering.write_stream_error = lambda *args, **more: b""
fleet.STALL_S = 1e9
supervisor.EngineProcess._tick = lambda self, tick_s, has_work: ""
"""


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """`cases` faults, all kinds in turn; then probes of a full server, and drains of 100 streams."""
    begun_s = time.perf_counter()
    draw = random.Random(seed)
    found, figures = Counter[str](), Figures()
    trials = [pair for _ in range(-(-cases // 15)) for pair in product(_FAULTS, _PARTS)][:cases]
    with tempfile.TemporaryDirectory(prefix="s7-") as made:
        folder = Path(made)
        engine_faults = [fault for fault, part in trials if part == "engine"]
        with running(config(seed), folder, sabotage="" if guard else _BLIND) as server:
            for fault in engine_faults if guard else [*engine_faults, "hang", "term"][:4]:
                trial = asyncio.run(engine_trial(server, fault, draw, figures, guard))
                found += _named(trial, fault, "engine")
        for fault, part in trials if guard else ():
            if part != "engine":
                found += _named(front_trial(folder, seed, fault, part, draw, figures), fault, part)
        if guard:
            found += run_probes(folder, seed, min(600.0, 2.0 * cases), figures.values)
        for drain_s in (60.0, 0.5):
            found += run_drain(folder, seed, drain_s, guard, figures.values)
    return Line(
        name="S7",
        what="faults of engine, front end and writer: silent truncations, health, ledger, exit codes",
        cases=cases,
        violations=found.total(),
        seconds=time.perf_counter() - begun_s,
        figures={**figures.summary(), **found},
    )


def _named(found: Counter[str], fault: str, part: str) -> Counter[str]:
    return Counter({f"{name} ({fault}, {part})": num for name, num in found.items()})


class Figures:
    """What was seen, over all trials."""

    def __init__(self) -> None:
        self.ends = Counter[str]()
        self.detected_s: list[float] = []
        self.again_s: list[float] = []
        self.num_lines = 0
        self.num_unwritten = 0
        self.values: dict[str, Any] = {}

    def summary(self) -> dict[str, Any]:
        """In words."""
        return {
            "calls": str(dict(self.ends)),
            "not ready after s, p50, max": _two(self.detected_s),
            "ready again after s, p50, max": _two(self.again_s),
            "ledger lines seen before a fault": self.num_lines,
            "whole answers whose line the fault prevented": self.num_unwritten,
            **self.values,
        }


def _two(values: list[float]) -> str:
    return f"{percentile(values, 0.5):.2f}, {max(values, default=0.0):.2f}"


def config(seed: int, drain_s: float = 10.0, step_s: float = 0.02, **more: Any) -> dict[str, Any]:
    """A server whose engine hangs or exits at what no text has; `more` is of its engine."""
    faults = [{"kind": "hang", "marker": [_HANG]}, {"kind": "exit", "marker": [_EXIT]}]
    mock = {"step_s": step_s, "seed": seed, "faults": faults}
    return deployment(mock=mock, engine={"max_batch": 64, **more}, http={"drain_s": drain_s})


async def _load(port: int, number: int, draw: random.Random, heard: list[Heard]) -> None:
    """Calls of both APIs, streamed and plain, one after the other, until cancelled."""
    for turn in range(1 << 30):
        tokens, is_stream = draw.randint(2, 60), number % 3 > 0
        chat = {"model": "mock", "messages": [{"role": "user", "content": f"{number} {turn}"}]}
        call = {**chat, "max_tokens": tokens, "stream": is_stream}
        path = "/v1/messages" if number % 2 else "/v1/chat/completions"
        heard.append(await hear(port, call, path, timeout_s=_AGAIN_S))
        if heard[-1].ended not in ("whole", "error"):
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _calls(port: int, draw: random.Random, heard: list[Heard]) -> Any:
    """The load and the probes for as long as the block lasts; calls that are open then are left."""
    probe = Probe()
    users = [asyncio.create_task(_load(port, each, draw, heard)) for each in range(_NUM_STREAMS)]
    watching = asyncio.create_task(watch(port, probe))
    try:
        yield probe
    finally:
        for each in (*users, watching):
            each.cancel()
        await asyncio.gather(*users, watching, return_exceptions=True)


async def engine_trial(
    server: Server, fault: str, draw: random.Random, figures: Figures, guard: bool
) -> Counter[str]:
    """One fault of the engine process, from health to health."""
    found, heard, patience_s = Counter[str](), list[Heard](), _AGAIN_S if guard else 8.0
    async with _calls(server.port, draw, heard) as probe:
        await asyncio.sleep(0.3 + draw.random())
        pid, at_s = server.engine_pids()[0], time.perf_counter()
        culprit = _harm_engine(server, pid, fault)
        detected_s = await _until(lambda: probe.first(503, at_s), patience_s)
        again_s = await _until(lambda: probe.first(200, at_s + (detected_s or 0.0)), patience_s)
        if culprit is not None:
            with contextlib.suppress(TimeoutError):
                heard.append(await asyncio.wait_for(culprit, patience_s))
            again_s = await _until(lambda: probe.first(200, time.perf_counter() - 0.3), patience_s)
        await asyncio.sleep(0.3)
    if fault == "stop" and not guard:
        os.kill(pid, signal.SIGKILL)
    if detected_s is None or detected_s > _DETECT_S:
        found["ready beside an engine that is gone"] += 1
    figures.detected_s += [detected_s] if detected_s is not None else []
    figures.again_s += [again_s] if again_s is not None else []
    if again_s is None:
        found["not ready again"] += 1
    return found + _ends(heard, figures, may_break=False)


def _harm_engine(server: Server, pid: int, fault: str) -> "asyncio.Task[Heard] | None":
    """Do it; a call that does it comes back as its task."""
    token = {"hang": _HANG, "memory": _EXIT}.get(fault)
    if token is None:
        sent = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[fault]
        os.kill(pid, sent)
        return None
    call = {"model": "mock", "prompt": [65, token, 66], "max_tokens": 4, "stream": True}
    return asyncio.create_task(hear(server.port, call, timeout_s=_AGAIN_S))


async def _until(what: Any, seconds: float) -> float | None:
    """What this says once it says something."""
    deadline_s = time.perf_counter() + seconds
    while (said := what()) is None and time.perf_counter() < deadline_s:
        await asyncio.sleep(0.02)
    return said if said is None else float(said)


def _ends(heard: list[Heard], figures: Figures, *, may_break: bool) -> Counter[str]:
    """Count how calls ended, and what may not be."""
    counts = Counter(str(each.ended) for each in heard)
    figures.ends += counts
    wrong = ("truncated", "late") if may_break else ("truncated", "late", "broken")
    return Counter({f"{name} answers": counts[name] for name in wrong if counts[name]})


def front_trial(
    folder: Path, seed: int, fault: str, part: str, draw: random.Random, figures: Figures
) -> Counter[str]:
    """One fault of the front end on a store that all trials share."""
    with running(config(seed, step_s=0.002 if part == "writer" else 0.02), folder) as server:
        found = asyncio.run(_harm_front(server, fault, part, draw, figures))
    if fault == "term" and server.process.returncode != 0:
        found[f"exit code {server.process.returncode} after SIGTERM"] += 1
    for name, is_wrong in _checks(server.store).items():
        found[name] += is_wrong
    return +found


async def _harm_front(
    server: Server, fault: str, part: str, draw: random.Random, figures: Figures
) -> Counter[str]:
    heard = list[Heard]()
    is_over = fault in ("kill", "memory", "term")
    async with _calls(server.port, draw, heard) as probe:
        await asyncio.sleep(0.3 + draw.random())
        await _until(lambda: 1.0 if any(each.ended == "whole" for each in heard) else None, _AGAIN_S)
        children, before, seen = server.engine_pids(), len(heard), await _some_lines(server.store)
        whole = {each.request_id for each in heard[:before] if each.ended == "whole"}
        await asyncio.to_thread(_harm, server, fault, part, children)
        if not is_over:
            at_s = time.perf_counter()
            if await _until(lambda: probe.first(200, at_s), _AGAIN_S) is None:
                return Counter({f"not ready after {fault} of the {part}": 1})
            await asyncio.sleep(0.3)
        elif fault == "term":
            await asyncio.to_thread(server.process.wait, 60.0)
        await asyncio.sleep(0.2)
    found = _ends(heard, figures, may_break=is_over and fault != "term")
    if is_over and fault != "term":
        found += await asyncio.to_thread(_outlived, children)
    after = _lines(server.store)
    figures.num_lines += len(seen)
    figures.num_unwritten += len(whole - {name for name, _, _ in after})
    if lost := len(seen - after):
        found["lines of the ledger lost"] += lost
    return found


def _harm(server: Server, fault: str, part: str, children: list[int]) -> None:
    """In a thread: do it, and undo what can be undone."""
    if fault == "hang" and part == "writer":
        with _locked(server.store):
            time.sleep(2.0)
        return
    if fault in ("stop", "hang"):
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(2.0 if fault == "stop" else 6.5)
        server.process.send_signal(signal.SIGCONT)
        return
    if fault == "term":
        server.process.send_signal(signal.SIGTERM)
        return
    # The kernel ends a whole group of processes that has no memory left.
    for pid in (server.pid, *(children if fault == "memory" else ())):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.wait()


def _outlived(children: list[int]) -> Counter[str]:
    """Engines that are there 5 s after their front end."""
    deadline_s = time.monotonic() + 5.0
    while any(map(_is_there, children)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return Counter({"engines that outlived their server": sum(map(_is_there, children))})


def _is_there(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep the file from being written by others."""
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(5000)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def _lines(path: Path) -> set[tuple[str, int, str]]:
    """The lines that the ledger has, as anybody who reads the file sees them."""
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.set_busy_timeout(5000)
        return set(connection.execute("SELECT request_id, attempt, kind FROM ledger"))


async def _some_lines(path: Path) -> set[tuple[str, int, str]]:
    """The lines, once there are some: a line follows its answer."""
    for _ in range(100):
        if found := _lines(path):
            return found
        await asyncio.sleep(0.05)
    return set()


def _checks(path: Path) -> dict[str, int]:
    """What may be wrong with a file whose server is gone."""
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.set_busy_timeout(5000)
        twice = "SELECT count(*) - count(DISTINCT request_id || '/' || attempt || '/' || kind) FROM ledger"
        sums = (
            "SELECT (SELECT coalesce(sum(price_nano_usd), 0) FROM ledger) "
            "<> (SELECT coalesce(sum(price_nano_usd), 0) FROM days)"
        )
        return {
            "damaged files": connection.execute("PRAGMA integrity_check").get != "ok",
            "lines that are there twice": connection.execute(twice).get,
            "sums of days that are not those of their lines": connection.execute(sums).get,
        }


def run_probes(folder: Path, seed: int, seconds: float, figures: dict[str, Any]) -> Counter[str]:
    """Probes of a server that has all that it can do."""
    with running(config(seed, step_s=0.05), folder) as server:
        heard, probe = asyncio.run(_full(server, seconds))
    live = [took_s for _, _, took_s in probe.live]
    not_ready = sum(status != 200 for _, status, _ in probe.ready)
    figures["full server: live p99, max ms"] = (
        f"{1e3 * percentile(live, 0.99):.1f}, {1e3 * max(live):.1f} in {len(live)} probes"
    )
    figures["full server: answers, false not-ready"] = f"{len(heard)}, {not_ready}"
    return +Counter(
        {
            "false not-ready": not_ready + sum(status != 200 for _, status, _ in probe.live),
            "slow live": int(percentile(live, 0.99) > _LIVE_S),
            "calls of a full server without an answer": sum(each.ended != "whole" for each in heard),
        }
    )


async def _full(server: Server, seconds: float) -> tuple[list[Heard], Probe]:
    heard, probe, end_s = list[Heard](), Probe(), time.perf_counter() + seconds

    async def user() -> None:
        while time.perf_counter() < end_s:
            call = {"model": "mock", "prompt": "full", "max_tokens": 50, "ignore_eos": True, "stream": True}
            heard.append(await hear(server.port, call))

    watching = asyncio.create_task(watch(server.port, probe, every_s=0.02))
    await asyncio.gather(*(user() for _ in range(80)))
    watching.cancel()
    return heard, probe


def run_drain(
    folder: Path, seed: int, drain_s: float, guard: bool, figures: dict[str, Any], num: int = 100
) -> Counter[str]:
    """SIGTERM with so many streams that need 2 s more."""
    served = config(seed, drain_s=drain_s, step_s=0.05, max_batch=num)
    with running(served, folder, sabotage="" if guard else _BLIND) as server:
        heard, took_s, code = asyncio.run(_drained(server, num))
    counts = Counter(str(each.ended) for each in heard)
    figures[f"SIGTERM with {num} streams, drain_s {drain_s:g}"] = f"{dict(counts)}, {took_s:.1f} s"
    found = Counter({f"{name} answers at SIGTERM": counts[name] for name in ("truncated", "broken", "late")})
    found[f"exit code {code}"] += code != 0
    found["errors before the deadline"] += counts["error"] if drain_s > 10.0 else 0
    found["a drain beyond its deadline"] += took_s > drain_s + 15.0
    return +found


async def _drained(server: Server, num: int) -> tuple[list[Heard], float, int]:
    begun = 0
    ready = asyncio.Event()

    def first() -> None:
        nonlocal begun
        begun += 1
        if begun == num:
            ready.set()

    call = {"model": "mock", "max_tokens": 60, "ignore_eos": True, "stream": True}
    tasks = [
        asyncio.create_task(hear(server.port, {**call, "prompt": f"drain {number}"}, on_first=first))
        for number in range(num)
    ]
    await asyncio.wait_for(ready.wait(), 60.0)
    begun_s = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    heard = await asyncio.gather(*tasks)
    code = await asyncio.to_thread(server.process.wait, 90.0)
    return list(heard), time.perf_counter() - begun_s, code


if __name__ == "__main__":
    sys.exit(main("s7", run, 200, __doc__))
