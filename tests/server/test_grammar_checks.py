"""Grammars that take long to compile, in an engine process that has others to serve meanwhile."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.async_tools import BOUNDS, CONFIG, is_running, request, started, until
from tests.server.test_async_engine_faults import ScriptedLink
from tokenmill.core import Grammar, Request, ResourceError, SamplingParams, UsageError
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.mock import MockModel
from tokenmill.engine.serving.handle import StreamDelta
from tokenmill.engine.serving.messages import Cancel, End, Refused, Submit
from tokenmill.engine.serving.process import EngineServer
from tokenmill.engine.structured.grammar import CheckedGrammar

LONG = 3000
# Would each take many seconds; the compiler gives up after one.
SLOW = [
    Grammar(kind="json_schema", source=json.dumps({"type": "integer", "multipleOf": number}))
    for number in (999983, 999979, 999961, 999959)
]
DIGITS = Grammar(kind="regex", source="[0-9]{5}")


def guided(name: str, grammar: Grammar, *, n: int = 1, timeout_s: float | None = None) -> Request:
    params = SamplingParams(max_tokens=20, grammar=grammar, n=n, temperature=1.0, seed=1)
    return Request(request_id=name, prompt=tuple(b"go"), params=params, timeout_s=timeout_s)


def test_a_stream_does_not_wait_for_the_grammars_of_others() -> None:
    async def body() -> None:
        async with started() as (engine, _):
            stream = aiter(engine.submit(request("stream", max_tokens=LONG)))
            await anext(stream)
            slow = [engine.submit(guided(f"{i}", grammar)) for i, grammar in enumerate(SLOW)]
            gaps, last_s = list[float](), time.monotonic()
            while not all(each.done for each in slow):
                assert isinstance(await anext(stream), StreamDelta)
                gaps.append(time.monotonic() - last_s)
                last_s += gaps[-1]
            for each in slow:
                with pytest.raises(ResourceError, match="takes too much to compile"):
                    await each.result()
            assert sum(gaps) > 1.0 and max(gaps) < 0.25, f"{max(gaps):.3f} s"
            await stream.aclose()

    asyncio.run(body())


def test_what_was_checked_is_followed_and_what_was_refused_is_told() -> None:
    async def body() -> None:
        async with started() as (engine, _):
            for name in ("new", "known"):
                completions = await engine.submit(guided(name, DIGITS, n=3)).result()
                assert [each.finish_reason for each in completions] == ["completed"] * 3
                assert all(len(each.text) == 5 and each.text.isdigit() for each in completions)
                with pytest.raises(UsageError, match="cannot be used"):
                    await engine.submit(guided(name, Grammar(kind="regex", source="("))).result()
            await until(lambda: engine.stats.num_blocks_in_use == 0)

    asyncio.run(body())


def test_a_cancellation_or_a_deadline_ends_a_request_while_its_grammar_is_checked() -> None:
    async def body() -> None:
        async with started(config=replace(BOUNDS, grace_s=30.0)) as (engine, ends):
            handles = [engine.submit(guided(f"{i}", grammar, n=2)) for i, grammar in enumerate(SLOW)]
            late = engine.submit(guided("late", SLOW[0], timeout_s=0.2))
            await asyncio.sleep(0.1)
            assert engine.stats.num_waiting == 5
            began_s = time.monotonic()
            for handle in handles:
                handle.cancel()
            reasons = [each.finish_reason for handle in handles for each in await handle.result()]
            assert reasons == ["cancelled"] * 8
            assert (await late.result())[0].finish_reason == "expired"
            assert time.monotonic() - began_s < 0.6 and len(ends.of) == 5
            assert (await engine.submit(request("next")).result())[0].finish_reason == "length"
            assert engine.stats.num_restarts == 0

    asyncio.run(body())


def test_an_engine_that_only_checks_grammars_does_not_count_as_stalled() -> None:
    async def body() -> None:
        async with started(config=replace(BOUNDS, stall_s=0.4)) as (engine, _):
            for i, grammar in enumerate(SLOW[:2]):
                with pytest.raises(ResourceError, match="takes too much to compile"):
                    await engine.submit(guided(f"{i}", grammar)).result()
            assert engine.stats.num_restarts == 0

    asyncio.run(body())


def children_of(pid: int) -> list[int]:
    texts = [each.read_text("ascii") for each in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in texts for child in text.split()]


@pytest.mark.parametrize("killed", [False, True])
def test_no_compiler_outlives_its_engine(killed: bool) -> None:
    async def body() -> None:
        async with started() as (engine, _):
            pid = engine.stats.pid
            handle = engine.submit(guided("a", SLOW[0]))
            await until(lambda: len(children_of(pid)) == 1)
            (child,) = children_of(pid)
            await until(lambda: len(children_of(child)) == 1)
            if killed:
                os.kill(pid, signal.SIGKILL)
            await engine.close()
            assert handle.done
            await until(lambda: not is_running(child), 2.0 if killed else 0.2)

    asyncio.run(body())


class Patient(LocalEngine):
    """Checks no grammar before it may."""

    may_check = threading.Event()

    def check_grammar(self, grammar: Grammar, tenant: str = "") -> CheckedGrammar:
        self.may_check.wait(10.0)
        return super().check_grammar(grammar, tenant)


@pytest.fixture
def patient() -> Iterator[Patient]:
    model = MockModel()
    Patient.may_check.clear()
    engine = Patient(model, CONFIG, create=model.create)
    yield engine
    Patient.may_check.set()
    engine.close()


def test_checks_that_wait_are_bounded(patient: Patient) -> None:
    """Whoever was cancelled does not count any longer."""
    submissions = [Submit(key=i, request=guided(f"{i}", DIGITS)) for i in range(68)]
    link = ScriptedLink([[each] for each in submissions[:67]] + [[Cancel(key=9)], submissions[67:]])
    with pytest.raises(EOFError):
        EngineServer(patient, link, beat_s=60.0, drain_s=1.0).run()
    refused = [each for each in link.sent if isinstance(each, Refused)]
    assert [(each.key, each.kind, each.hint) for each in refused] == [
        (66, "ResourceError", "try again later")
    ]
    ends = [each for each in link.sent if isinstance(each, End)]
    assert [(each.key, each.completion.finish_reason) for each in ends] == [(9, "cancelled")]


def test_a_drain_waits_for_what_is_checked(patient: Patient) -> None:
    link = ScriptedLink([[Submit(key=1, request=guided("a", DIGITS))], *[[]] * 20])
    server = EngineServer(patient, link, beat_s=60.0, drain_s=60.0)

    def receive(timeout_s: float) -> list[Submit | Cancel]:
        if not link.says:
            Patient.may_check.set()
            time.sleep(0.01)
            return []
        server.tell_to_end()
        return link.says.pop(0)  # type: ignore[return-value]

    link.receive = receive  # type: ignore[method-assign, assignment]
    server.run()
    ends = [each.completion for each in link.sent if isinstance(each, End)]
    assert [each.finish_reason for each in ends] == ["completed"]
