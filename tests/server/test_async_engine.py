"""Callers of the engine process: they stream, wait, cancel, vanish, dawdle, come too late."""

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from tests.server.async_tools import BOUNDS, MARKS, Ends, answer, request, spec, started, until
from tokenmill.core import (
    Completion,
    NotFoundError,
    Request,
    ResourceError,
    SamplingParams,
    UsageError,
)
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.handle import StreamDelta
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.engine.serving.supervisor import SupervisorConfig

LONG = 3000


Body = Callable[[AsyncEngine, Ends], Coroutine[Any, Any, None]]
Run = Callable[[Body], None]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs test bodies one after the other on one engine, which must be idle and whole after each."""
    ends = Ends()
    with asyncio.Runner() as runner:
        engine = runner.run(AsyncEngine.start(spec(), BOUNDS, on_end=ends))

        def run_body(body: Body) -> None:
            ends.of.clear()
            runner.run(body(engine, ends))
            runner.run(idle(engine))
            assert engine.stats.num_restarts == 0 and engine.state == "ready"

        yield run_body
        runner.run(engine.close())


async def read_all(engine: AsyncEngine, which: Request) -> tuple[list[StreamDelta], list[Completion]]:
    news = [each async for each in engine.submit(which)]
    deltas = [each for each in news if isinstance(each, StreamDelta)]
    return deltas, [each for each in news if isinstance(each, Completion)]


async def idle(engine: AsyncEngine) -> None:
    """Wait until nobody holds a block."""
    await until(lambda: engine.stats.num_in_flight == 0 and engine.stats.num_blocks_in_use == 0)


def test_a_stream_is_its_completion_in_pieces(run: Run) -> None:
    async def body(engine: AsyncEngine, ends: Ends) -> None:
        which = request("a", max_tokens=20)
        deltas, (completion,) = await read_all(engine, which)
        assert completion.token_ids == answer(which.prompt, 20)
        assert sum((d.token_ids for d in deltas), ()) == completion.token_ids
        assert "".join(d.text for d in deltas) == completion.text
        assert len(deltas) > 3 and completion.finish_reason == "length"
        assert completion.usage.num_output_tokens == 20
        (other,) = await engine.submit(request("b", b"hi")).result()
        assert other.text.startswith("hello")
        assert [ends.reason(name) for name in "ab"] == ["length", "length"] and engine.state == "ready"

    run(body)


def test_completions_of_one_request_have_their_index(run: Run) -> None:
    async def body(engine: AsyncEngine, _: Ends) -> None:
        params = SamplingParams(max_tokens=6, n=3, temperature=1.0, seed=5, logprobs=2, ignore_eos=True)
        which = Request(request_id="a", prompt=(1, 2), params=params)
        deltas, completions = await read_all(engine, which)
        assert sorted(each.index for each in completions) == [0, 1, 2]
        for each in completions:
            own = [d for d in deltas if d.index == each.index]
            assert sum((d.token_ids for d in own), ()) == each.token_ids
            assert sum((d.logprobs for d in own), ()) == each.logprobs
        again = await engine.submit(which).result()
        assert {each.index: each.token_ids for each in again} == {
            each.index: each.token_ids for each in completions
        }

    run(body)


def test_what_cannot_be_run_is_refused() -> None:
    async def body() -> None:
        async with started(max_requests=3) as (engine, ends):
            kept = engine.submit(request("kept", max_tokens=LONG))
            with pytest.raises(UsageError, match="in flight"):
                engine.submit(request("kept"))
            with pytest.raises(UsageError, match="cannot be sent"):
                engine.submit(request("bad", prompt=(1 << 70,)))
            long = engine.submit(request("long", prompt=(1,) * 5000))
            with pytest.raises(UsageError, match="context"):
                await long.result()
            with pytest.raises(UsageError, match="context"):
                async for _ in long:
                    pass
            await until(lambda: ends.reason("long") == "failed")
            others = [engine.submit(request(f"{i}", max_tokens=LONG)) for i in range(2)]
            with pytest.raises(ResourceError, match="in flight"):
                engine.submit(request("more"))
            for handle in (kept, *others):
                handle.cancel()
            assert (await kept.result())[0].finish_reason == "cancelled"

    asyncio.run(body())


def test_cancelling_ends_a_request_once_with_what_it_has(run: Run) -> None:
    async def body(engine: AsyncEngine, ends: Ends) -> None:
        handle = engine.submit(request("a", max_tokens=LONG))
        tokens: tuple[int, ...] = ()
        async for news in handle:
            if isinstance(news, StreamDelta):
                tokens += news.token_ids
                if len(tokens) > 4:
                    handle.cancel()
                    handle.cancel()
        (completion,) = await handle.result()
        assert completion.finish_reason == "cancelled" and completion.token_ids == tokens
        assert tokens == answer(b"go", len(tokens))
        handle.cancel()
        await idle(engine)
        assert ends.reason("a") == "cancelled"

    run(body)


async def break_off(engine: AsyncEngine, name: str) -> None:
    handle = engine.submit(request(name, max_tokens=LONG))
    async for _ in handle:
        break
    await until(lambda: handle.done)


async def close_generator(engine: AsyncEngine, name: str) -> None:
    handle = engine.submit(request(name, max_tokens=LONG))
    news = aiter(handle)
    await anext(news)
    await news.aclose()
    await until(lambda: handle.done)


async def drop_handle(engine: AsyncEngine, name: str) -> None:
    engine.submit(request(name, max_tokens=LONG))
    gc.collect()


async def cancel_reader(engine: AsyncEngine, name: str) -> None:
    handle = engine.submit(request(name, max_tokens=LONG))

    async def read() -> None:
        async for _ in handle:
            pass

    await cancel_soon(asyncio.create_task(read()))
    await until(lambda: handle.done)


async def cancel_waiter(engine: AsyncEngine, name: str) -> None:
    handle = engine.submit(request(name, max_tokens=LONG))
    await cancel_soon(asyncio.create_task(handle.result()))
    await until(lambda: handle.done)


async def cancel_soon(task: asyncio.Task[Any]) -> None:
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])


def test_a_caller_that_vanishes_cancels_its_request(run: Run) -> None:
    async def body(engine: AsyncEngine, ends: Ends) -> None:
        for vanish in (break_off, close_generator, drop_handle, cancel_reader, cancel_waiter):
            await vanish(engine, vanish.__name__)
            await until(lambda: ends.reason(vanish.__name__) == "cancelled", 2.0)  # noqa: B023
            await idle(engine)

    run(body)


def test_who_reads_late_gets_it_in_one_piece(run: Run) -> None:
    """What nobody reads is kept once, merged: one delta, however many steps it took."""

    async def body(engine: AsyncEngine, _: Ends) -> None:
        handle = engine.submit(request("a", max_tokens=200))
        await until(lambda: handle.done)
        news = [each async for each in handle]
        assert [type(each) for each in news] == [StreamDelta, Completion]
        assert len(news[0].token_ids) == 200
        assert [each async for each in handle] == [] and (await handle.result())[0] is news[1]

    run(body)


def test_a_deadline_ends_a_request_and_not_its_neighbour(run: Run) -> None:
    async def body(engine: AsyncEngine, ends: Ends) -> None:
        late = engine.submit(request("late", max_tokens=LONG, timeout_s=0.1))
        fine = engine.submit(request("fine", max_tokens=60, timeout_s=30.0))
        (completion,) = await late.result()
        assert completion.finish_reason == "expired" and completion.token_ids
        assert (await fine.result())[0].finish_reason == "length"
        assert (ends.reason("late"), ends.reason("fine")) == ("expired", "length")

    run(body)


@pytest.mark.parametrize("kind", ["nan", "raise"])
def test_a_request_that_spoils_a_step_fails_alone(run: Run, kind: str) -> None:
    async def body(engine: AsyncEngine, _: Ends) -> None:
        pid = engine.stats.pid
        good = [engine.submit(request(f"{i}", bytes([i, 7]), 30)) for i in range(6)]
        bad = engine.submit(request("bad", prompt=(MARKS[kind], 0, 1)))  # type: ignore[index]
        (completion,) = await bad.result()
        assert completion.finish_reason == "failed" and completion.error
        for i, handle in enumerate(good):
            assert (await handle.result())[0].token_ids == answer((i, 7), 30)
        assert engine.stats.pid == pid

    run(body)


def test_draining_finishes_what_is_there_and_takes_no_more() -> None:
    async def body() -> None:
        async with started() as (engine, _):
            handle = engine.submit(request("a", max_tokens=100))
            draining = asyncio.create_task(engine.drain(10.0))
            await asyncio.sleep(0.05)
            states = [engine.state]
            with pytest.raises(ResourceError, match="drained"):
                engine.submit(request("b"))
            await draining
            assert [*states, engine.state] == ["live", "drained"]
            assert (await handle.result())[0].finish_reason == "length"

    asyncio.run(body())


def test_a_drain_ends_at_its_deadline() -> None:
    async def body() -> None:
        async with started() as (engine, ends):
            handle = engine.submit(request("a", max_tokens=LONG))
            await asyncio.sleep(0.1)
            await engine.drain(0.1)
            (completion,) = await handle.result()
            assert completion.finish_reason == "failed" and "shut down" in completion.error
            assert completion.token_ids and engine.state == "drained"
            await until(lambda: engine.stats.num_blocks_in_use == 0)
            await engine.close()
            await engine.close()
            assert ends.reason("a") == "failed"

    asyncio.run(body())


def test_an_error_of_the_model_is_raised_by_start() -> None:
    async def body() -> None:
        with pytest.raises(NotFoundError, match="no model directory"):
            await AsyncEngine.start(EngineSpec(model="no/such/folder"), BOUNDS)
        with pytest.raises(UsageError, match="max_requests"):
            await AsyncEngine.start(spec(), max_requests=0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


def test_a_supervisor_that_fails_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with started() as (engine, _):
            monkeypatch.setattr(engine, "_bury", None)
            handle = engine.submit(request("a", max_tokens=LONG))
            os.kill(engine.stats.pid, signal.SIGKILL)
            (completion,) = await handle.result()
            assert completion.finish_reason == "failed" and "supervised" in completion.error
        assert isinstance(complaints[0]["exception"], TypeError)

    asyncio.run(body())


def test_bounds_are_checked() -> None:
    with pytest.raises(UsageError, match="silence_s"):
        SupervisorConfig(beat_s=1.0, silence_s=1.0)
    with pytest.raises(UsageError, match="stall_s"):
        SupervisorConfig(stall_s=0.0)
    with pytest.raises(UsageError, match="max_failures"):
        SupervisorConfig(max_failures=0)


def test_every_end_is_announced_once() -> None:
    async def body() -> None:
        ends = Ends()
        engine = await AsyncEngine.start(spec(), BOUNDS, on_end=ends)
        handles = [engine.submit(request(f"{i}", max_tokens=1 + i)) for i in range(20)]
        await handles[3].result()
        await engine.close()
        await asyncio.sleep(0)
        assert sorted(ends.of) == sorted(f"{i}" for i in range(20))
        assert {ends.reason(f"{i}") for i in range(20)} == {"length", "failed"}

    asyncio.run(body())
