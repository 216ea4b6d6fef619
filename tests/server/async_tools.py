"""What the tests of the engine process share: quick bounds, a slow mock, and small waits."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tokenmill.core import Completion, Request, SamplingParams
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import FaultKind, MockFault, MockScript, reference_tokens
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.engine.serving.supervisor import SupervisorConfig

BOUNDS = SupervisorConfig(beat_s=0.05, silence_s=1.5, stall_s=1.5, backoff_s=0.02, grace_s=0.5)
CONFIG = LLMConfig(max_batch=16, kv_tokens=4096)
MARKS: dict[FaultKind, int] = {"nan": 257, "raise": 258, "hang": 259, "exit": 255}


def spec(*, step_s: float = 0.002, drain_s: float = 5.0) -> EngineSpec:
    """A mock whose answers are long, and which goes wrong where a prompt has a token of `MARKS`."""
    faults = tuple(MockFault(kind=kind, marker=(mark, 0)) for kind, mark in MARKS.items())
    script = MockScript(step_s=step_s, answers=((b"hi", b"hello"),), faults=faults)
    return EngineSpec(mock=script, config=CONFIG, drain_s=drain_s)


def request(
    name: str, prompt: bytes | tuple[int, ...] = b"go", max_tokens: int = 8, **more: float
) -> Request:
    """A request that runs to its limit."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt=tuple(prompt), params=params, timeout_s=more.get("timeout_s"))


def answer(prompt: bytes | tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """What such a request must get."""
    return tuple(reference_tokens(prompt, max_tokens, ignore_eos=True))


@dataclass
class Ends:
    """Every end that an engine announced."""

    of: dict[str, list[Completion]] = field(default_factory=dict)

    def __call__(self, request: Request, completions: tuple[Completion, ...]) -> None:
        assert request.request_id not in self.of, "a request ended twice"
        self.of[request.request_id] = list(completions)

    def reason(self, name: str) -> str:
        """The finish reason of a request's first completion; empty while it runs."""
        return self.of[name][0].finish_reason if name in self.of else ""


@contextlib.asynccontextmanager
async def started(
    which: EngineSpec | None = None, config: SupervisorConfig = BOUNDS, *, max_requests: int = 64
) -> AsyncIterator[tuple[AsyncEngine, Ends]]:
    """An engine, and after the test the check that nothing of it is left."""
    ends = Ends()
    engine = await AsyncEngine.start(which or spec(), config, max_requests=max_requests, on_end=ends)
    async with engine, asyncio.timeout(60.0):
        yield engine, ends
    assert engine.state == "drained" and engine.stats.num_in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> float:
    """Wait for it; the seconds it took."""
    began = time.monotonic()
    await asyncio.sleep(0)
    while not condition():
        assert time.monotonic() - began < within_s, "it did not come to pass"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def is_running(pid: int) -> bool:
    """True if there is such a process and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
