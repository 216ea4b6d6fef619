"""The engine process dies, stops, hangs, talks nonsense: noticed in bounded time, and every request ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.async_tools import BOUNDS, CONFIG, MARKS, answer, is_running, request, spec, started, until
from tokenmill.core import Completion, ResourceError, Usage
from tokenmill.engine.core import StepResult
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.mock import MockFault, MockModel, MockScript
from tokenmill.engine.sequence import SequenceState
from tokenmill.engine.serving import supervisor
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.messages import (
    Advance,
    Beat,
    Cancel,
    End,
    EngineSpec,
    FrameReader,
    FromEngine,
    Refused,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
)
from tokenmill.engine.serving.process import EngineServer, Link
from tokenmill.engine.serving.supervisor import EngineProcess

LONG = 3000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_process_that_is_gone_or_stopped_is_replaced(number: int) -> None:
    async def body() -> None:
        async with started() as (engine, ends):
            pid = engine.stats.pid
            begun = engine.submit(request("begun", max_tokens=LONG))
            reading = aiter(begun)
            await anext(reading)
            os.kill(pid, number)
            fresh = engine.submit(request("fresh"))
            noticed_s = await until(lambda: engine.state == "live")
            assert noticed_s < 4.0
            (completion,) = await begun.result()
            assert completion.finish_reason == "failed" and "engine process" in completion.error
            assert completion.token_ids == answer(b"go", len(completion.token_ids))
            assert (await fresh.result())[0].token_ids == answer(b"go", 8)
            await until(lambda: engine.state == "ready" and len(ends.of) == 2)
            assert engine.stats.num_restarts == 1 and engine.stats.pid != pid and not is_running(pid)

    asyncio.run(body())


def test_a_process_that_stops_is_noticed_without_work_too() -> None:
    async def body() -> None:
        async with started() as (engine, _):
            os.kill(engine.stats.pid, signal.SIGSTOP)
            await until(lambda: engine.state == "live")
            assert (await engine.submit(request("a")).result())[0].finish_reason == "length"
            assert "said nothing for 1.5 s" in engine.stats.failure

    asyncio.run(body())


@pytest.mark.parametrize(
    ("kind", "why"), [("hang", "made no step for 1.5 s"), ("exit", "ended with exit code 70")]
)
def test_a_request_that_takes_the_process_down_is_tried_twice_and_fails(kind: str, why: str) -> None:
    async def body() -> None:
        async with started() as (engine, _):
            poison = engine.submit(request("poison", prompt=(MARKS[kind], 0, 1)))  # type: ignore[index]
            (completion,) = await poison.result()
            assert completion.finish_reason == "failed" and why in completion.error
            assert not completion.token_ids
            assert (await engine.submit(request("next")).result())[0].token_ids == answer(b"go", 8)
            assert engine.stats.num_restarts == 2 and engine.stats.num_resubmitted == 1

    asyncio.run(body())


def test_while_the_engine_restarts_requests_wait_within_bounds() -> None:
    async def body() -> None:
        slow = replace(BOUNDS, backoff_s=0.6)
        async with started(config=slow, max_requests=3) as (engine, ends):
            os.kill(engine.stats.pid, signal.SIGKILL)
            await until(lambda: engine.state == "live")
            late = engine.submit(request("late", timeout_s=0.1))
            gone = engine.submit(request("gone"))
            kept = engine.submit(request("kept", timeout_s=30.0))
            with pytest.raises(ResourceError, match="3 requests are in flight"):
                engine.submit(request("more"))
            gone.cancel()
            assert (await gone.result())[0].finish_reason == "cancelled"
            began = time.monotonic()
            assert (await late.result())[0].finish_reason == "expired"
            assert time.monotonic() - began < 1.0 and engine.state == "live"
            assert (await kept.result())[0].finish_reason == "length"
            assert len(ends.of) == 3

    asyncio.run(body())


def test_a_deadline_holds_while_the_engine_hangs() -> None:
    async def body() -> None:
        config = replace(BOUNDS, stall_s=30.0, grace_s=0.1)
        async with started(config=config) as (engine, _):
            begun = engine.submit(request("hangs", prompt=(MARKS["hang"], 0), timeout_s=0.2))
            began = time.monotonic()
            assert (await begun.result())[0].finish_reason == "expired"
            assert time.monotonic() - began < 5.0

    asyncio.run(body())


def test_a_process_that_is_told_to_end_drains() -> None:
    async def body() -> None:
        async with started() as (engine, _):
            pid = engine.stats.pid
            begun = engine.submit(request("begun", max_tokens=200))
            reading = aiter(begun)
            await anext(reading)
            os.kill(pid, signal.SIGTERM)
            await until(lambda: engine.state == "live")
            assert is_running(pid), "it finishes what it has"
            after = engine.submit(request("after"))
            assert (await begun.result())[0].finish_reason == "length"
            assert (await after.result())[0].finish_reason == "length"
            assert engine.stats.pid != pid and "exit code 0" in engine.stats.failure

    asyncio.run(body())


def test_a_drain_of_the_process_ends_at_its_deadline() -> None:
    async def body() -> None:
        async with started(spec(drain_s=0.1)) as (engine, _):
            begun = engine.submit(request("begun", max_tokens=LONG))
            reading = aiter(begun)
            await anext(reading)
            os.kill(engine.stats.pid, signal.SIGTERM)
            (completion,) = await begun.result()
            assert completion.finish_reason == "failed" and "exit code 0" in completion.error
            await until(lambda: engine.state == "ready")

    asyncio.run(body())


@pytest.mark.parametrize("hang_s", [0.6, 30.0])
def test_a_hang_is_noticed_long_before_the_longest_step(hang_s: float) -> None:
    """The second is the control: without a bound of its own a step hangs after `stall_s` only."""

    async def body() -> None:
        config = replace(BOUNDS, stall_s=3.0, hang_s=hang_s)
        async with started(config=config) as (engine, _):
            await engine.submit(request("fine", prompt=(1, 2, 3))).result()
            poison = engine.submit(request("poison", prompt=(MARKS["hang"], 0, 1)))
            noticed_s = await until(lambda: engine.state == "live")
            assert noticed_s < 2.0 if hang_s < 1.0 else noticed_s > 2.5
            poison.cancel()
            assert (await poison.result())[0].finish_reason == "cancelled"

    asyncio.run(body())


def test_a_long_step_after_short_ones_is_no_hang() -> None:
    async def body() -> None:
        config = replace(BOUNDS, stall_s=30.0, hang_s=0.2)
        slow = EngineSpec(mock=MockScript(step_s=0.01, row_s=0.004), config=CONFIG)
        async with started(slow, config) as (engine, _):
            await engine.submit(request("short", prompt=(1, 2, 3))).result()
            (completion,) = await engine.submit(request("long", prompt=(1,) * 400, max_tokens=2)).result()
            assert completion.finish_reason == "length" and completion.total_s > 1.2
            assert engine.stats.num_restarts == 0

    asyncio.run(body())


def test_a_request_cancelled_in_a_process_that_hangs_ends_as_cancelled() -> None:
    async def body() -> None:
        async with started() as (engine, _):
            handle = engine.submit(request("a", prompt=(MARKS["hang"], 0)))
            await asyncio.sleep(0.1)
            handle.cancel()
            (completion,) = await handle.result()
            assert (completion.finish_reason, completion.error) == ("cancelled", "")
            assert "made no step" in engine.stats.failure and engine.stats.num_resubmitted == 0

    asyncio.run(body())


def children_of_this_process() -> set[str]:
    return {
        child
        for listed in Path("/proc/self/task").glob("*/children")
        for child in listed.read_text("ascii").split()
    }


def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    before = children_of_this_process()  # other tests of this worker may keep theirs

    async def body() -> None:
        for delay_s in (0.0, 0.001, 0.1):
            task = asyncio.create_task(AsyncEngine.start(spec(), BOUNDS))
            await asyncio.sleep(delay_s)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())
    assert children_of_this_process() <= before


def test_an_engine_that_never_comes_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        monkeypatch.setattr(supervisor, "_MODULE", "tokenmill.no_such_module")
        with pytest.raises(ResourceError, match="No module named tokenmill"):
            await AsyncEngine.start(spec(), replace(BOUNDS, max_failures=2))
        monkeypatch.undo()
        with pytest.raises(ResourceError, match="did not open the model within"):
            await AsyncEngine.start(spec(), replace(BOUNDS, start_s=0.01, max_failures=1))

    asyncio.run(body())


def test_requests_that_wait_for_an_engine_that_never_comes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with started(config=replace(BOUNDS, max_failures=2)) as (engine, _):
            monkeypatch.setattr(supervisor, "_MODULE", "tokenmill.no_such_module")
            os.kill(engine.stats.pid, signal.SIGKILL)
            await until(lambda: engine.state == "live")
            (completion,) = await engine.submit(request("a")).result()
            assert completion.finish_reason == "failed" and "No module named" in completion.error
            with pytest.raises(ResourceError, match="does not run"):
                engine.submit(request("b"))

    asyncio.run(body())


def completion_of(name: str, token_ids: tuple[int, ...], index: int = 0) -> Completion:
    usage = Usage(num_prompt_tokens=1, num_cached_tokens=0, num_output_tokens=0)
    return Completion(
        request_id=name,
        text="",
        token_ids=token_ids,
        index=index,
        finish_reason="length",
        usage=usage,
        ttft_s=0.0,
        total_s=0.0,
    )


@pytest.mark.parametrize(
    "message",
    [
        End(key=0, completion=completion_of("a", (1, 2, 3))),
        End(key=0, completion=completion_of("b", ())),
        End(key=0, completion=completion_of("a", (), index=1)),
        End(key=0, completion=completion_of("a", (), index=-1)),
        Advance(key=0, index=1, text="", token_ids=(1,)),
        Advance(key=0, index=0, text="", token_ids=(1,) * 9),
    ],
)
def test_news_that_make_no_sense_condemn_the_process(message: FromEngine) -> None:
    async def body() -> None:
        config = replace(BOUNDS, backoff_s=5.0)
        async with started(config=config) as (engine, _):
            handle = engine.submit(request("a", prompt=(MARKS["hang"], 0)))
            link = engine._process
            assert link is not None
            link.data_received(encode(message))
            await until(lambda: engine.state == "live")
            await until(lambda: "what is no message" in engine.stats.failure)
            handle.cancel()
            assert (await handle.result())[0].finish_reason == "cancelled"

    asyncio.run(body())


def test_bytes_that_are_no_message_condemn_the_process() -> None:
    async def body() -> None:
        heard: list[FromEngine] = []
        link = EngineProcess(BOUNDS, heard.append)
        for data in (b"\xff" * 8, encode(Beat())):
            link.data_received(data)
        assert "what is no message" in link._why and not heard

    asyncio.run(body())


PARENT = """
import asyncio, os, sys
from tests.server.async_tools import BOUNDS, request, spec
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.core import StepResult

async def main():
    engine = await AsyncEngine.start(spec(), BOUNDS)
    handle = engine.submit(request("a", max_tokens=3000))
    print(engine.stats.pid, flush=True)
    await handle.result()

asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_the_process_ends_with_its_parent(stopped: bool) -> None:
    path = os.pathsep.join(each for each in sys.path if each)
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    deadline = time.monotonic() + 10.0
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


class ScriptedLink(Link):
    """A link that says to the server what a test wants said before each step, and then hangs up."""

    def __init__(self, says: Sequence[Sequence[ToEngine]]) -> None:
        self.says = list(says)
        self.sent: list[FromEngine] = []

    def receive(self, timeout_s: float) -> list[ToEngine]:
        if not self.says:
            raise EOFError
        return list(self.says.pop(0))

    def send(self, messages: Sequence[FromEngine]) -> None:
        self.sent += messages


@pytest.fixture
def served() -> Iterator[tuple[LocalEngine, MockModel]]:
    model = MockModel(MockScript(faults=(MockFault(kind="raise", at_step=99),)))
    yield LocalEngine(model, CONFIG, create=model.create), model


def serve(engine: LocalEngine, says: Sequence[Sequence[ToEngine]]) -> ScriptedLink:
    link = ScriptedLink(says)
    with pytest.raises(EOFError):
        EngineServer(engine, link, beat_s=60.0, drain_s=1.0).run()
    return link


def test_blocks_of_a_cancelled_request_are_back_before_the_next_step(
    served: tuple[LocalEngine, MockModel],
) -> None:
    engine, model = served
    long = Submit(key=1, request=request("a", prompt=bytes(100), max_tokens=LONG))
    other = Submit(key=2, request=request("b", max_tokens=LONG))
    link = serve(engine, [[long, other], [], [Cancel(key=1), Cancel(key=77)]])
    ends = [each for each in link.sent if isinstance(each, End)]
    assert [each.completion.finish_reason for each in ends] == ["cancelled"]
    assert model.executor.num_steps == 3 and engine.num_running == 1
    assert engine.num_blocks_in_use == 1, "only the other request holds a block"
    assert serve(engine, [[Cancel(key=2)]]).sent == [], "another server does not know its keys"


def test_the_last_beat_of_an_idle_engine_has_no_block_in_use(served: tuple[LocalEngine, MockModel]) -> None:
    engine, _ = served
    link = serve(engine, [[Submit(key=1, request=request("a", max_tokens=2))], [], []])
    assert isinstance(link.sent[-1], Beat) and link.sent[-1].num_blocks_in_use == 0
    assert link.sent[-1].num_steps == 2 and isinstance(link.sent[-2], End)


class Broken(LocalEngine):
    """Raises where it should not: beyond the step that a request spoils."""

    def step(self) -> StepResult:
        raise RuntimeError("step")

    def submit_state(self, state: SequenceState) -> None:
        if state.request_id == "bad":
            raise RuntimeError("submit")
        super().submit_state(state)


def test_an_engine_that_raises_ends_the_process_but_for_a_submission() -> None:
    model = MockModel()
    broken = Broken(model, CONFIG, create=model.create)
    link = ScriptedLink([[Submit(key=1, request=request("bad"))], [Submit(key=2, request=request("good"))]])
    with pytest.raises(RuntimeError, match="step"):
        EngineServer(broken, link, beat_s=60.0, drain_s=1.0).run()
    assert [(each.key, each.kind) for each in link.sent if isinstance(each, Refused)] == [
        (1, "TokenmillError")
    ]


def test_a_draining_server_sends_requests_back(served: tuple[LocalEngine, MockModel]) -> None:
    engine, _ = served
    link = ScriptedLink(
        [[Submit(key=1, request=request("a"))], [Submit(key=2, request=request("b"))], *[[]] * 9]
    )
    server = EngineServer(engine, link, beat_s=60.0, drain_s=60.0)
    real = link.receive

    def receive(timeout_s: float) -> list[ToEngine]:
        server.tell_to_end()
        return real(timeout_s)

    link.receive = receive  # type: ignore[method-assign]
    server.run()
    assert [(each.key, each.again) for each in link.sent if isinstance(each, Refused)] == [(2, True)]
    assert [each.key for each in link.sent if isinstance(each, End)] == [1]


def test_a_completion_too_long_for_a_frame_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr("tokenmill.engine.serving.messages.MAX_FRAME_BYTES", 400)
        end = End(key=5, completion=completion_of("a", tuple(range(300))))
        Link(theirs).send([end, Beat()])
        got = [decode_from_engine(each) for each in FrameReader().feed(ours.recv(9999))]
    assert isinstance(got[0], Refused) and (got[0].key, got[0].kind) == (5, "ResourceError")
    assert got[1] == Beat()
