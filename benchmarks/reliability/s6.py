"""S6: fairness. A long prompt, a huge one, hostile grammars and a flood, each beside ordinary calls.

    python -m benchmarks.reliability.s6 --cases 200

On the mock, with a time for each row of a step. Violations: short calls whose p99 time to the first token
is over 3 times what it is on an idle server, a long prompt that the flood keeps from its answer, and a
silence of 250 ms or more in streams beside any of it, or beside nothing. With the guard off, a step may
take a prompt whole, and threads may not be used for texts.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability.client import post
from benchmarks.reliability.command import main
from benchmarks.reliability.heard import Heard, hear, percentile
from benchmarks.reliability.server import Server, deployment, running
from scripts.scorecard import Line
from scripts.scorecard.hostile_grammars import hostile_grammars

_ROW_S = 0.0005
_STEP_S = 0.005
_MAX_ROWS = 64
_LONG_TOKENS = 8192
_SHORT = {"model": "mock", "prompt": "s" * 200, "max_tokens": 8, "ignore_eos": True, "stream": True}
_SHORTS_PER_S = 4.0
_TIMES_UNLOADED = 3.0
_MAX_GAP_S = 0.25
_NUM_STREAMS = 50
_HUGE_BYTES = (10 << 20, 1 << 20)
"""More than a body may have, and a text that is read and made into tokens."""
_WITHOUT_THREADS = """
import asyncio
from tokenmill.router import local
async def inline(self, executor, work, *args):
    return work(*args)
asyncio.base_events.BaseEventLoop.run_in_executor = inline
"""


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """`cases` short calls, half of them beside a long prompt; then texts, grammars, a flood."""
    begun_s = time.perf_counter()
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        with running(_rows(seed, guard), Path(folder)) as server:
            figures, late = asyncio.run(_beside_long(server, cases, draw))
            if guard:
                figures |= asyncio.run(_flood(server, min(60.0, cases / 4)))
        with running(_steps(seed), Path(folder), sabotage="" if guard else _WITHOUT_THREADS) as server:
            gaps, num_tried = asyncio.run(_beside_hostile(server, cases, draw))
    starved = int(figures.get("long prompt in a flood") == "no answer")
    violations = late + starved + sum(gap >= _MAX_GAP_S for gap in gaps.values())
    figures |= {f"longest silence beside {name} ms": round(1e3 * gap, 1) for name, gap in gaps.items()}
    return Line(
        name="S6",
        what="calls beside a long prompt, 10 MB of text, hostile grammars, a flood",
        cases=cases + num_tried,
        violations=violations,
        seconds=time.perf_counter() - begun_s,
        figures=figures,
    )


def _rows(seed: int, guard: bool) -> dict[str, Any]:
    """A server on which a row costs time."""
    rows = _MAX_ROWS if guard else 2 * _LONG_TOKENS
    mock = {"step_s": _STEP_S, "row_s": _ROW_S, "seed": seed, "context_length": 4 * _LONG_TOKENS}
    return deployment(mock=mock, engine={"max_rows": rows, "max_batch": 16, "kv_tokens": 1 << 18})


def _steps(seed: int) -> dict[str, Any]:
    """A server for many streams of a token each 50 ms, with room for the tokens of a huge text."""
    mock = {"step_s": 0.05, "seed": seed, "context_length": 1 << 18}
    return deployment(mock=mock, engine={"max_batch": 2 * _NUM_STREAMS, "kv_tokens": 1 << 19})


async def _beside_long(server: Server, cases: int, draw: random.Random) -> tuple[dict[str, Any], int]:
    """Short calls at random times, alone and beside one long prompt after the other."""
    alone = await _shorts(server, cases // 2, draw)
    stop = asyncio.Event()

    async def longs() -> list[Heard]:
        done = list[Heard]()
        while not stop.is_set():
            # Another first letter each time: no prefix of it is in the cache.
            done.append(await hear(server.port, _long(str(len(done))), timeout_s=300.0))
        return done

    task = asyncio.create_task(longs())
    await asyncio.sleep(0.3)
    beside = await _shorts(server, cases - cases // 2, draw)
    stop.set()
    done = await task
    before_s, beside_s = (
        percentile([each.ttft_s for each in group if each.ended == "whole"], 0.99)
        for group in (alone, beside)
    )
    failed = sum(each.ended != "whole" for each in [*alone, *beside, *done])
    return {
        "short calls, p99 ms to the first token, alone": round(1e3 * before_s, 1),
        "beside a long prompt": f"{1e3 * beside_s:.1f}, {beside_s / before_s:.2f} times",
        "long prompts answered": len(done),
        "seconds of one at most": round(max(each.total_s for each in done), 1),
    }, failed + (beside_s > _TIMES_UNLOADED * before_s)


def _long(name: str) -> dict[str, Any]:
    prompt = name + "l" * (_LONG_TOKENS - len(name))
    return {"model": "mock", "prompt": prompt, "max_tokens": 4, "ignore_eos": True, "stream": True}


async def _shorts(server: Server, num: int, draw: random.Random) -> list[Heard]:
    """Short calls that come at random times, each with a text of its own."""
    tasks = []
    for _ in range(num):
        prompt = f"{draw.getrandbits(64):016x}{_SHORT['prompt']}"[:200]
        tasks.append(asyncio.create_task(hear(server.port, {**_SHORT, "prompt": prompt})))
        await asyncio.sleep(draw.expovariate(_SHORTS_PER_S))
    return list(await asyncio.gather(*tasks))


async def _flood(server: Server, seconds: float) -> dict[str, Any]:
    """A long prompt while more short calls than there are places for are always open."""
    stop = asyncio.Event()
    num = 0

    async def user(number: int) -> None:
        nonlocal num
        while not stop.is_set():
            prompt = f"{number:04d}{num:08d}" + "f" * 188
            await hear(server.port, {**_SHORT, "prompt": prompt})
            num += 1

    users = [asyncio.create_task(user(number)) for number in range(32)]
    await asyncio.sleep(0.5)
    # Alone it takes prompt times row; a fair share of a full server is a small part of that.
    heard = await hear(server.port, _long("flood"), timeout_s=max(60.0, 3 * seconds))
    stop.set()
    await asyncio.gather(*users)
    took = f"{heard.total_s:.1f} s, beside {num} short calls"
    return {"long prompt in a flood": took if heard.ended == "whole" else "no answer"}


async def _beside_hostile(server: Server, cases: int, draw: random.Random) -> tuple[dict[str, float], int]:
    """The longest silence in streams alone, beside huge texts, and beside hostile grammars."""
    grammars = draw.sample(
        [each for each in hostile_grammars() if each.kind == "json_schema"], min(300, cases)
    )

    async def nothing() -> None:
        await asyncio.sleep(2.0)

    async def huge() -> None:
        for size in _HUGE_BYTES:
            call = {"model": "mock", "prompt": "x" * size, "max_tokens": 1}
            # What becomes of it is another line's matter; a connection may end before all of it was sent.
            await post(server.port, "/v1/completions", call)
            await asyncio.sleep(0.2)

    async def hostile() -> None:
        await asyncio.gather(*(_try(server, grammars[at::4]) for at in range(4)))

    works = {"nothing": nothing, "10 MB of text": huge, "hostile grammars": hostile}
    gaps = {name: await _silence(server, work) for name, work in works.items() if cases or work is huge}
    return gaps, len(grammars) + len(_HUGE_BYTES)


def silence_beside_texts(folder: Path, seed: int, guard: bool) -> float:
    """The longest silence in streams beside huge texts alone, in seconds."""
    with running(_steps(seed), folder, sabotage="" if guard else _WITHOUT_THREADS) as server:
        gaps, _ = asyncio.run(_beside_hostile(server, 0, random.Random(seed)))
    return gaps["10 MB of text"]


async def _try(server: Server, grammars: list[Any]) -> None:
    """Ask for each of these grammars, one after the other."""
    for each in grammars:
        try:
            schema = json.loads(each.source)
        except (ValueError, RecursionError):
            continue
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        call = {"model": "mock", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        try:
            await post(server.port, "/v1/chat/completions", {**call, "response_format": form}, timeout_s=20.0)
        except RecursionError:
            continue


async def _silence(server: Server, work: Callable[[], Awaitable[None]]) -> float:
    """The longest silence in streams while this goes on. A stream that fails counts as silent for ever."""
    num_open, is_over = 0, False
    worst_s = 0.0

    async def one(number: int) -> None:
        nonlocal num_open, worst_s
        is_first = True

        def began() -> None:
            nonlocal num_open, is_first
            num_open += is_first
            is_first = False

        while not is_over:
            call = {"model": "mock", "prompt": f"stream {number}", "max_tokens": 40, "ignore_eos": True}
            heard = await hear(server.port, {**call, "stream": True}, on_first=began)
            worst_s = max(worst_s, *heard.gaps_s, 0.0 if heard.ended == "whole" else float("inf"))

    tasks = [asyncio.create_task(one(number)) for number in range(_NUM_STREAMS)]
    while num_open < _NUM_STREAMS:
        await asyncio.sleep(0.05)
    worst_s = 0.0
    await work()
    is_over = True
    await asyncio.gather(*tasks)
    return worst_s


if __name__ == "__main__":
    sys.exit(main("s6", run, 400, __doc__))
