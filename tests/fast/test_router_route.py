"""Who is asked, in which order, how often, and what every attempt is recorded as. In virtual time."""

import asyncio
from collections import Counter
from contextlib import aclosing
from random import Random
from typing import Any

import pytest

from benchmarks.reliability.scripted_backend import Script, ScriptedBackend
from benchmarks.reliability.virtual_time import run_virtual
from tests.fast.router_tools import HI, Bench, text_of
from tokenmill.core import (
    BudgetError,
    EndpointError,
    ExpiredError,
    NotFoundError,
    ResourceError,
    TokenmillError,
    UsageError,
)
from tokenmill.router import (
    Backend,
    BreakerConfig,
    BudgetConfig,
    BusyError,
    Job,
    Prepared,
    RouteConfig,
    Router,
    TargetConfig,
)
from tokenmill.wire import Begin, Finish, Totals

DOWN = EndpointError("it is down", hint="up")


def failing(name: str, *script: Any) -> ScriptedBackend:
    return ScriptedBackend(name, lambda number: script or (DOWN,))


def test_an_answer_passes_as_it_is() -> None:
    bench = Bench([ScriptedBackend("a", lambda number: ("He", 0.5, "llo"))])

    async def run() -> None:
        routed = bench.open().start(await bench.router.prepare(HI), Job(request_id="r"))
        pieces = [piece async for piece in routed]
        kinds = [type(piece) for piece in pieces]
        assert kinds[0] is Begin and kinds[-2:] == [Finish, Totals] and text_of(pieces) == "Hello"
        (record,) = await routed.spent()
        assert (record.number, record.backend, record.error) == (1, "a", "")
        assert record.spent.finish == "completed" and record.spent.usage.num_output_tokens == 4

    run_virtual(run())


def test_the_next_answers_if_the_first_fails_before_its_first_token() -> None:
    backends = [failing("a", 0.1, DOWN), failing("b"), ScriptedBackend("c")]
    bench = Bench(backends)

    async def run() -> None:
        bench.open()
        text, records = await bench.ask()
        assert text == "answer 1"
        assert [(r.number, r.backend, r.spent.finish, bool(r.error)) for r in records] == [
            (1, "a", "failed", True),
            (2, "b", "failed", True),
            (3, "c", "completed", False),
        ]
        assert bench.counts["fallback"] == 2 and bench.counts["failure"] == 2
        assert bench.last.backend is backends[2]

    run_virtual(run())


def test_after_the_first_token_nobody_else_is_asked() -> None:
    bench = Bench([failing("a", "He", DOWN), ScriptedBackend("b")])

    async def run() -> None:
        routed = bench.open().start(await bench.router.prepare(HI), Job(request_id="r"))
        pieces = []
        with pytest.raises(EndpointError, match="down"):
            async for piece in routed:
                pieces.append(piece)
        assert text_of(pieces) == "He" and not any(isinstance(piece, Finish) for piece in pieces)
        (record,) = await routed.spent()
        assert record.error and record.spent.usage.num_output_tokens == 2
        assert not bench.backends[1].jobs

    run_virtual(run())


def test_weights_draw_the_first() -> None:
    bench = Bench([ScriptedBackend("a"), ScriptedBackend("b"), ScriptedBackend("c")], [3.0, 1.0, 0.0])

    async def run() -> None:
        bench.open()
        found = Counter([(await bench.ask())[1][0].backend for _ in range(600)])
        assert 400 < found["a"] < 500 and found["b"] == 600 - found["a"]

    run_virtual(run())


def test_what_is_not_ready_or_full_is_passed_over() -> None:
    away, full = ScriptedBackend("a", state="live"), ScriptedBackend("b", is_full=True)
    bench = Bench([away, full, ScriptedBackend("c")])

    async def run() -> None:
        bench.open()
        for _ in range(20):
            _, records = await bench.ask()
            assert [r.backend for r in records] == ["b", "c"] and records[0].spent.cost_nano_usd == 0
        assert not away.jobs and bench.counts["skipped"] == 20
        assert bench.router.breaker_state("b") == "closed", "full is not broken"

    run_virtual(run())


def test_nobody_there_is_busy_and_says_for_how_long() -> None:
    bench = Bench([failing("a", BusyError("slow down", wait_s=40.0))])

    async def run() -> None:
        bench.open()
        for message in ("slow down", "no deployment of alias"):
            with pytest.raises(BusyError, match=message) as caught:
                await bench.ask()
            assert caught.value.wait_s == 40.0
        assert len(bench.backends[0].jobs) == 1 and bench.records == ()

    run_virtual(run())


def test_a_request_that_cannot_be_answered_is_asked_once() -> None:
    refused = UsageError("temperature is 3", hint="less")
    bench = Bench([failing("a", refused), ScriptedBackend("b")])

    async def run() -> None:
        bench.open()
        for _ in range(9):
            with pytest.raises(UsageError, match="temperature"):
                await bench.ask()
            assert [r.backend for r in bench.records] == ["a"]
        assert bench.router.breaker_state("a") == "closed"

    run_virtual(run())


def test_who_cannot_be_asked_is_left_out_and_the_first_says_why() -> None:
    refusal = UsageError("seed cannot be sent", hint="none")
    other = UsageError("n cannot be sent", hint="none")
    backends = [ScriptedBackend("a", refusal=refusal), ScriptedBackend("b", refusal=other)]
    bench = Bench([*backends, ScriptedBackend("c")])

    async def run() -> None:
        bench.open()
        assert [r.backend for r in (await bench.ask())[1]] == ["c"]
        bench.backends[2].refusal = other
        with pytest.raises(UsageError, match="seed"):
            await bench.ask()

    run_virtual(run())


def test_the_same_is_asked_again_within_the_budget_and_after_a_wait() -> None:
    flaky = ScriptedBackend("a", lambda number: (DOWN,) if number % 2 else ("ok",))
    bench = Bench([flaky], options={"budget": BudgetConfig(base_s=1.0, cap_s=1.0)})

    async def run() -> None:
        bench.open()
        text, records = await bench.ask()
        assert text == "ok" and [r.number for r in records] == [1, 2] and bench.counts["retry"] == 1
        assert 0.0 < flaky.started_s[1] - flaky.started_s[0] < 1.0

    run_virtual(run())


def test_a_deployment_that_asks_for_time_gets_it() -> None:
    script: list[Script] = [(BusyError("slow down", wait_s=3.0),), ("ok",)]
    backend = ScriptedBackend("a", lambda number: script[number - 1])
    bench = Bench([backend])

    async def run() -> None:
        bench.open()
        assert (await bench.ask())[0] == "ok"
        assert 3.0 <= backend.started_s[1] - backend.started_s[0] < 3.2

    run_virtual(run())


def test_nobody_waits_beyond_the_time_of_the_request() -> None:
    bench = Bench([failing("a", BusyError("slow down", wait_s=3.0))])

    async def run() -> None:
        bench.open()
        with pytest.raises(BusyError):
            await bench.ask(timeout_s=2.0)
        assert asyncio.get_running_loop().time() < 0.1

    run_virtual(run())


def test_each_attempt_has_what_is_left_of_the_time() -> None:
    bench = Bench([failing("a", 4.0, DOWN), ScriptedBackend("b")])

    async def run() -> None:
        bench.open()
        await bench.ask(timeout_s=10.0)
        assert [round(b.jobs[0].timeout_s or 0.0, 3) for b in bench.backends] == [10.0, 6.0]
        bench.backends[0].script = lambda number: (11.0, DOWN)
        with pytest.raises(ExpiredError):
            await bench.ask(timeout_s=10.0)

    run_virtual(run())


def test_a_request_that_fails_by_itself_closes_no_engine() -> None:
    bench = Bench([failing("a", TokenmillError("the request failed: a row is not a number"))])

    async def run() -> None:
        bench.open()
        for _ in range(20):
            with pytest.raises(TokenmillError):
                await bench.ask()
        assert bench.router.breaker_state("a") == "closed"

    run_virtual(run())


def test_attempts_are_bounded() -> None:
    bench = Bench([failing(name) for name in "abcde"], max_attempts=4)

    async def run() -> None:
        bench.open()
        with pytest.raises(EndpointError):
            await bench.ask()
        assert [r.backend for r in bench.records] == ["a", "b", "c", "d"]

    run_virtual(run())


def test_the_hook_comes_before_each_attempt_and_can_end_the_call() -> None:
    bench = Bench([failing("a"), ScriptedBackend("b")])
    seen: list[tuple[int, str, int]] = []

    async def before(number: int, backend: Backend, prepared: Prepared) -> None:
        assert isinstance(backend, ScriptedBackend) and not backend.jobs
        seen.append((number, backend.name, prepared.num_prompt_tokens))
        if len(seen) == 4:
            raise BudgetError("no money", hint="more")

    async def run() -> None:
        bench.open()
        await bench.ask(before=before)
        assert seen == [(1, "a", 10), (2, "b", 10)]
        bench.backends[1].jobs.clear()
        bench.backends[0].jobs.clear()
        with pytest.raises(BudgetError):
            await bench.ask(before=before)
        assert [r.backend for r in bench.records] == ["a"] and not bench.backends[1].jobs

    run_virtual(run())


@pytest.mark.parametrize("when", ["before", "waiting", "streaming"])
def test_a_client_that_leaves_ends_it_and_is_counted(when: str) -> None:
    backend = ScriptedBackend("a", lambda number: (1.0, "He", 1.0, "llo"))
    bench = Bench([backend, ScriptedBackend("b")])

    async def before(number: int, backend: Backend, prepared: Prepared) -> None:
        await asyncio.sleep(0.5)

    async def run() -> None:
        routed = bench.open().start(await bench.router.prepare(HI), Job(request_id="r"), before)

        async def read() -> None:
            async with aclosing(routed.__aiter__()) as pieces:  # type: ignore[type-var]
                async for _ in pieces:
                    pass

        reader = asyncio.create_task(read())
        await asyncio.sleep({"before": 0.2, "waiting": 1.0, "streaming": 2.0}[when])
        reader.cancel()
        (record,) = await routed.spent()
        assert record.backend == "a" and record.spent.finish == "cancelled" and not record.error
        assert record.spent.usage.num_output_tokens == (2 if when == "streaming" else 0)
        assert bool(backend.jobs) == (when != "before") and backend.num_live == 0
        assert not bench.backends[1].jobs and bench.router.breaker_state("a") == "closed"

    run_virtual(run())


def test_nothing_is_left_when_all_have_ended() -> None:
    bench = Bench([failing("a"), ScriptedBackend("b")])

    async def run() -> None:
        router = bench.open()
        await asyncio.gather(*(bench.ask() for _ in range(50)))
        await router.drain(1.0)
        assert not router._live and router._budget.num_live == router._budget.num_again == 0
        with pytest.raises(BusyError):
            await bench.ask()
        await router.close()
        assert len(asyncio.all_tasks()) == 1

    run_virtual(run())


def test_drain_waits_for_open_calls_and_close_ends_them() -> None:
    bench = Bench([ScriptedBackend("a", lambda number: ("x", 5.0, "y"))])

    async def run() -> None:
        router, loop = bench.open(), asyncio.get_running_loop()
        asking = asyncio.create_task(bench.ask())
        await asyncio.sleep(0.1)
        await router.drain(10.0)
        assert 4.9 < loop.time() < 5.1 and (await asking)[0] == "xy"
        bench.backends[0].state = "ready"
        asking = asyncio.create_task(bench.ask())
        await asyncio.sleep(0.1)
        await router.close()
        assert (await asking)[1][0].spent.finish == "cancelled" and loop.time() < 5.5

    run_virtual(run())


def test_an_unknown_name_is_told_the_known_ones() -> None:
    router = Router(
        [ScriptedBackend("a"), ScriptedBackend("b")],
        [RouteConfig(name="both", targets=(TargetConfig(backend="a"), TargetConfig(backend="b")))],
    )
    assert router.models == ["a", "b", "both"]
    assert [each.backend.name for each, _ in router.resolve("both").targets] == ["a", "b"]
    with pytest.raises(NotFoundError, match=r"no model c; known here: a, b, both"):
        router.resolve("c")
    with pytest.raises(NotFoundError, match="of that name"):
        router.resolve("c\n\x1b[2J")


def test_names_must_fit() -> None:
    with pytest.raises(UsageError, match="two deployments are called a"):
        Router([ScriptedBackend("a"), ScriptedBackend("a")])
    gone = RouteConfig(name="r", targets=(TargetConfig(backend="gone"),))
    with pytest.raises(UsageError, match="names the deployment gone, which is not there; known: a"):
        Router([ScriptedBackend("a")], [gone])
    mine = RouteConfig(name="r", targets=(TargetConfig(backend="a"),))
    with pytest.raises(UsageError, match="two routes are called r"):
        Router([ScriptedBackend("a")], [mine, mine])


def test_vectors_come_from_the_first_that_gives_them() -> None:
    bench = Bench([failing("a"), ScriptedBackend("b")])
    seen: list[int] = []

    async def before(number: int, backend: Backend, prepared: Prepared) -> None:
        seen.append(prepared.num_prompt_tokens)

    async def run() -> None:
        router = bench.open()
        found = await router.embed("alias", ("one", "two"), Job(request_id="r"), before)
        assert found.embedded is not None and len(found.embedded.vectors) == 2 and found.error is None
        assert [(r.number, r.backend, r.spent.finish) for r in found.records] == [
            (1, "a", "failed"),
            (2, "b", "completed"),
        ]
        assert found.records[1].spent.cost_nano_usd == 5 and seen == [22, 22]
        found = await router.embed("a", ("one",), Job(request_id="r"), before)
        assert found.embedded is None and found.error is DOWN

    run_virtual(run())


def test_a_fault_of_ours_reaches_the_reader() -> None:
    class Broken(ScriptedBackend):
        def start(self, prepared: Prepared, job: Job) -> Any:
            raise RuntimeError("a bug")

    bench = Bench([Broken("a")])

    async def run() -> None:
        bench.open()
        with pytest.raises(RuntimeError):
            await bench.ask()
        assert bench.router._budget.num_live == 0

    run_virtual(run())


def test_a_storm_is_not_made_worse() -> None:
    """The control is the same without breaker and budget: then each call is tried three times."""
    most = {}
    loose = BudgetConfig(share=1.0, spare=1000)
    never = BreakerConfig(failures=1 << 20, window=1 << 20, share=1.0)
    for name, options in (
        ("guarded", {}),
        ("no breaker", {"breaker": never}),
        ("no guard", {"breaker": never, "budget": loose}),
    ):
        bench = Bench([failing("a")], options={**options, "random": Random(2)})

        async def run(bench: Bench = bench) -> None:
            bench.open()

            async def one(at: int) -> None:
                await asyncio.sleep(at / 100)
                with pytest.raises((EndpointError, ResourceError)):
                    await bench.ask()

            await asyncio.gather(*(one(at) for at in range(300)))

        run_virtual(run())
        most[name] = len(bench.backends[0].jobs)
    assert most["guarded"] < 20 and most["no breaker"] <= 363 and most["no guard"] > 600
