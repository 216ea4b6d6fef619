"""Embeddings and charges over the engine process: exact, bounded, ended once."""

import asyncio
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from tests.server.async_tools import BOUNDS, CONFIG, MARKS, answer, request, started, until
from tokenmill.core import Tier, UsageError
from tokenmill.costs.metering import Charge
from tokenmill.engine import LLM
from tokenmill.engine.embedding import EmbeddingRequest
from tokenmill.engine.mock import MockFault, MockModel, MockScript
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.messages import Embedded, EngineSpec, encode

LONG = 3000


def texts(
    name: str, prompts: tuple[tuple[int, ...], ...] = ((1, 2, 3), (9,)), **more: float
) -> EmbeddingRequest:
    return EmbeddingRequest(request_id=name, prompts=prompts, timeout_s=more.get("timeout_s"))


def test_vectors_are_those_of_the_offline_engine() -> None:
    words = ["one text", "another text, which is longer than a block of the cache is", "x"]

    async def body() -> None:
        async with started() as (engine, ends):
            prompts = tuple(tuple(word.encode()) for word in words)
            handle, beside = engine.embed(texts("a", prompts)), engine.submit(request("b"))
            embedding = await handle.result()
            assert embedding.finish_reason == "completed" and embedding.error == ""
            model = MockModel(MockScript())
            assert np.array_equal(embedding.vectors_ND, LLM(model, create=model.create).embed(words))
            assert embedding.vectors_ND.shape == (3, 8) and embedding.vectors_ND.dtype == np.float32
            assert embedding.usage.num_prompt_tokens == sum(map(len, words))
            assert embedding.charge.input[0] > 0 and embedding.charge.output[0] == 0
            assert (await beside.result())[0].token_ids == answer(b"go", 8)
            assert set(ends.of) == {"b"} and engine.stats.num_ended == {"completed": 1, "length": 1}

    asyncio.run(body())


def test_what_cannot_be_embedded_is_refused_and_leaves_nothing() -> None:
    async def body() -> None:
        async with started() as (engine, _):
            for prompts in (((1,), ()), ((1, 2), (1,) * 5000), ((1,), (260,))):
                with pytest.raises(UsageError, match="a text"):
                    await engine.embed(texts("a", prompts)).result()
            kept = engine.embed(texts("kept"))
            with pytest.raises(UsageError, match="in flight"):
                engine.embed(texts("kept"))
            with pytest.raises(UsageError, match="in flight"):
                engine.submit(request("kept"))
            await kept.result()
            await until(lambda: engine.stats.num_blocks_in_use == 0)

    asyncio.run(body())
    for bad in ({"prompts": ()}, {"prompts": ((1,),) * 2049}, {"pooling": "sum"}, {"tier": "slow"}):
        with pytest.raises(UsageError):
            EmbeddingRequest(**{"request_id": "a", "prompts": ((1,),), **bad})  # type: ignore[arg-type]


def test_more_texts_than_may_wait_are_refused_together() -> None:
    async def body() -> None:
        few = EngineSpec(mock=MockScript(), config=type(CONFIG)(max_batch=2, kv_tokens=4096, max_waiting=3))
        async with started(few) as (engine, _):
            embedding = await engine.embed(texts("few", ((1,),) * 3)).result()
            assert embedding.finish_reason == "completed"
            with pytest.raises(Exception, match="waiting already"):
                await engine.embed(texts("many", ((1,),) * 9)).result()
            await until(lambda: engine.stats.num_blocks_in_use == 0)
            assert (await engine.submit(request("next")).result())[0].token_ids == answer(b"go", 8)

    asyncio.run(body())


def slow(num_texts: int = 40) -> tuple[tuple[int, ...], ...]:
    """Texts that take some steps."""
    return tuple((each, *range(100)) for each in range(num_texts))


def slow_spec() -> EngineSpec:
    return EngineSpec(mock=MockScript(step_s=0.05), config=type(CONFIG)(max_batch=2, kv_tokens=4096))


def test_a_cancelled_one_ends_with_what_it_took() -> None:
    async def body() -> None:
        async with started(slow_spec()) as (engine, _):
            handle = engine.embed(texts("a", slow()))
            await asyncio.sleep(0.2)
            handle.cancel()
            embedding = await handle.result()
            assert embedding.finish_reason == "cancelled" and embedding.vectors_ND.size == 0
            assert embedding.charge.input[0] > 40_000_000
            waiter = asyncio.create_task(engine.embed(texts("b", slow())).result())
            await asyncio.sleep(0.1)
            waiter.cancel()
            await until(lambda: engine.stats.num_ended.get("cancelled") == 2)
            engine.embed(texts("dropped", slow()))
            await until(lambda: engine.stats.num_ended.get("cancelled") == 3)
            await until(lambda: engine.stats.num_blocks_in_use == 0)

    asyncio.run(body())


def test_deadlines_and_failures_end_it_once() -> None:
    async def body() -> None:
        faults = (MockFault(kind="raise", marker=(MARKS["raise"], 0)),)
        script = MockScript(step_s=0.05, faults=faults)
        async with started(EngineSpec(mock=script, config=CONFIG)) as (engine, _):
            late = await engine.embed(texts("late", slow(), timeout_s=0.12)).result()
            assert late.finish_reason == "expired" and late.charge.input[0] > 0
            bad = await engine.embed(texts("bad", ((1, 2), (MARKS["raise"], 0, 1), (3,)))).result()
            assert bad.finish_reason == "failed" and "told to fail" in bad.error
            await until(lambda: engine.stats.num_blocks_in_use == 0)

    asyncio.run(body())


def test_a_process_that_dies_begins_it_anew_once() -> None:
    async def body() -> None:
        async with started(slow_spec()) as (engine, _):
            handle = engine.embed(texts("a", slow(10)))
            await asyncio.sleep(0.1)
            os.kill(engine.stats.pid, signal.SIGKILL)
            assert (await handle.result()).finish_reason == "completed"
            assert engine.stats.num_resubmitted == 1
            poison = await engine.embed(texts("b", ((255, 0),))).result()
            assert poison.finish_reason == "completed"
        async with started() as (engine, _):
            poison = await engine.embed(texts("b", ((MARKS["exit"], 0),))).result()
            assert poison.finish_reason == "failed" and "exit code 70" in poison.error

    asyncio.run(body())


@pytest.mark.parametrize(
    "message",
    [
        Embedded(key=0, finish_reason="completed", num_cached_tokens=0, data=b"123"),
        Embedded(key=0, finish_reason="completed", num_cached_tokens=0),
        Embedded(key=0, finish_reason="failed", num_cached_tokens=0, data=bytes(8)),
        Embedded(key=1, finish_reason="completed", num_cached_tokens=0, data=bytes(8)),
    ],
)
def test_vectors_that_make_no_sense_condemn_the_process(message: Embedded) -> None:
    async def body() -> None:
        async with started(slow_spec()) as (engine, _):
            handles = engine.embed(texts("a", slow())), engine.submit(request("b", max_tokens=LONG))
            assert engine._process is not None
            engine._process.data_received(encode(message))
            await until(lambda: "what is no message" in engine.stats.failure)
            for handle in handles:
                handle.cancel()
                await handle.result()

    asyncio.run(body())


def test_every_completion_brings_what_it_took() -> None:
    async def body() -> None:
        async with started() as (engine, _):
            handles = [engine.submit(request(f"{i}", bytes([i]) * (9 * i + 1), 30)) for i in range(9)]
            for handle in handles:
                assert (await handle.result())[0].finish_reason == "length"
                assert handle.charge.input[0] > 0 and handle.charge.output[0] > 0
            gone = engine.submit(request("gone", max_tokens=LONG))
            pieces = aiter(gone)
            await anext(pieces)
            await anext(
                pieces
            )  # the first token is the prompt's: only a second one is output that was paid for
            gone.cancel()
            await gone.result()
            assert gone.charge.output[0] > 0
            never = engine.submit(request("never", prompt=(1,) * 5000))
            with pytest.raises(UsageError):
                await never.result()
            assert never.charge == Charge()
            await until(lambda: engine.stats.num_blocks_in_use == 0)
            stats = engine.stats
            assert sum(each.charge.total()[0] for each in (*handles, gone)) == stats.busy_ns
            assert (
                stats.idle_ns > 0 and stats.counts.num_prompt_tokens == sum(9 * i + 1 for i in range(9)) + 2
            )
            assert stats.counts.num_output_tokens == 9 * 30 + len((await gone.result())[0].token_ids)
            assert stats.running_by_tier == stats.waiting_by_tier == {"fast": 0, "standard": 0, "batch": 0}

    asyncio.run(body())


def test_counts_are_by_tier_while_it_works() -> None:
    async def body() -> None:
        async with started(slow_spec()) as (engine, _):
            tiers: list[Tier] = ["fast", "standard", "standard", "batch"]
            handles = [
                engine.submit(replace(request(f"{i}", max_tokens=60), tier=t)) for i, t in enumerate(tiers)
            ]
            assert all(not handle.done for handle in handles)
            await until(lambda: engine.stats.waiting_by_tier == {"fast": 0, "standard": 1, "batch": 1})
            assert engine.stats.running_by_tier == {"fast": 1, "standard": 1, "batch": 0}
            for handle in handles:
                handle.cancel()
                await handle.result()

    asyncio.run(body())


def test_draining_lets_embeddings_end() -> None:
    async def body() -> None:
        engine = await AsyncEngine.start(slow_spec(), BOUNDS)
        handle = engine.embed(texts("a", slow(6)))
        await engine.drain(10.0)
        assert (await handle.result()).finish_reason == "completed" and engine.state == "drained"
        await engine.close()

    asyncio.run(body())
