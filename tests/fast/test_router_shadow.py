"""Shadow calls: pairs come out, and the client's answer is never later or worse for them."""

import asyncio
from typing import Any

from benchmarks.reliability.scripted_backend import ScriptedBackend
from benchmarks.reliability.virtual_time import run_virtual
from tests.fast.router_tools import HI, Bench
from tokenmill.core import EndpointError, UsageError
from tokenmill.router import Pair, ShadowConfig

DOWN = EndpointError("it is down", hint="up")


def bench_of(
    shadow: ScriptedBackend, *, share: float = 1.0, max_open: int = 4, primary: ScriptedBackend | None = None
) -> tuple[Bench, list[Pair]]:
    pairs: list[Pair] = []

    async def on_pair(pair: Pair) -> None:
        pairs.append(pair)

    config = ShadowConfig(backend=shadow.name, share=share, max_open=max_open)
    primary = primary or ScriptedBackend("a")
    return Bench([primary, shadow], shadow=config, options={"on_pair": on_pair}), pairs


def test_a_pair_has_both_answers_and_what_the_second_used() -> None:
    bench, pairs = bench_of(ScriptedBackend("s", lambda number: ("from ", "s")))

    async def run() -> None:
        bench.open()
        await bench.ask()
        await bench.router.drain(1.0)
        (pair,) = pairs
        assert (pair.route, pair.primary_backend, pair.shadow_backend) == ("alias", "a", "s")
        assert pair.call == HI and pair.job.request_id == "r1"
        assert pair.primary.choices[0].text == "answer 1"
        assert pair.shadow is not None and pair.shadow.choices[0].text == "from s"
        assert pair.record is not None and pair.record.spent.usage.num_output_tokens == 4
        (job,) = bench.backends[1].jobs
        assert job.tier == "batch" and job.request_id != "r1"

    run_virtual(run())


def test_the_client_does_not_wait_for_it() -> None:
    bench, pairs = bench_of(ScriptedBackend("s", lambda number: (100.0, "late")))

    async def run() -> None:
        bench.open()
        for _ in range(10):
            assert (await bench.ask())[0].startswith("answer")
        assert asyncio.get_running_loop().time() == 0.0 and not pairs
        await bench.router.drain(1000.0)
        assert len(pairs) == 4 and bench.counts["shadow"] == 4 and bench.counts["shadow-dropped"] == 6
        assert bench.backends[1].most_live == 4

    run_virtual(run())


def test_a_shadow_that_fails_is_no_failure_of_the_client() -> None:
    for script in ((DOWN,), ("half", DOWN)):
        bench, pairs = bench_of(ScriptedBackend("s", lambda number, script=script: script))  # type: ignore[misc]

        async def run(bench: Bench = bench, pairs: list[Pair] = pairs) -> None:
            bench.open()
            assert (await bench.ask())[0] == "answer 1"
            await bench.router.drain(1.0)
            (pair,) = pairs
            assert pair.shadow is None and pair.record is not None and pair.record.error
            assert bench.counts["shadow-failure"] == 1 and bench.counts["failure"] == 0

        run_virtual(run())


def test_what_takes_the_pairs_may_fail() -> None:
    async def on_pair(pair: Pair) -> None:
        raise OSError("the disk is full")

    bench, _ = bench_of(ScriptedBackend("s"))
    bench.options["on_pair"] = on_pair

    async def run() -> None:
        bench.open()
        await bench.ask()
        await bench.router.drain(1.0)
        assert [e.error for e in bench.events if e.kind == "shadow-failure"] == ["OSError"]

    run_virtual(run())


def test_only_whole_answers_have_a_shadow() -> None:
    primary = ScriptedBackend("a", lambda number: ("x", DOWN) if number == 1 else ("x", 1.0, "y"))
    bench, pairs = bench_of(ScriptedBackend("s"), primary=primary)

    async def run() -> None:
        bench.open()
        for error in (EndpointError, asyncio.CancelledError):
            asking = asyncio.create_task(bench.ask())
            await asyncio.sleep(0.5)
            asking.cancel()
            assert isinstance((await asyncio.gather(asking, return_exceptions=True))[0], error)
        await bench.router.drain(1.0)
        assert not pairs and not bench.backends[1].jobs

    run_virtual(run())


def test_a_share_is_drawn() -> None:
    bench, pairs = bench_of(ScriptedBackend("s"), share=0.25)

    async def run() -> None:
        bench.open()
        for _ in range(400):
            await bench.ask()
            await asyncio.sleep(1.0)
        assert 75 < len(pairs) < 125

    run_virtual(run())


def test_a_shadow_that_cannot_answer_gives_a_pair_without_it() -> None:
    refusal = UsageError("seed cannot be sent", hint="none")
    bench, pairs = bench_of(ScriptedBackend("s", refusal=refusal))

    async def run() -> None:
        bench.open()
        await bench.ask()
        await bench.router.drain(1.0)
        (pair,) = pairs
        assert pair.shadow is None and pair.record is None

    run_virtual(run())


def test_closing_ends_shadows() -> None:
    bench, pairs = bench_of(ScriptedBackend("s", lambda number: (100.0, "late")))

    async def run() -> None:
        bench.open()
        await bench.ask()
        await asyncio.sleep(1.0)
        await bench.router.close()
        live: Any = bench.backends[1].num_live
        assert not pairs and live == 0 and asyncio.get_running_loop().time() < 2.0
        assert len(asyncio.all_tasks()) == 1

    run_virtual(run())
