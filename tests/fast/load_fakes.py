"""A target that answers by script, and an event loop whose time passes only while it waits: no test
sleeps.
"""

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from tokenmill.core import SamplingParams
from tokenmill.evals.load import Finish, LoadRequest, Piece, StreamEvent

__all__ = ["ScriptedTarget", "in_virtual_time", "requests"]

T = TypeVar("T")

_TURN_S = 1e-5


class _Selector(selectors.DefaultSelector):
    """Does not wait, but says how long it would have."""

    waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is left to wait for"
        self.waited_s += max(_TURN_S, timeout)
        return list(super().select(0))


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Waiting so far, in seconds; a turn of the loop takes 10 us."""
        return self._clock.waited_s


def in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end, at once."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(main)


class ScriptedTarget:
    """`ttft_s` to the first piece and `itl_s` between pieces, both by the request's number.

    It answers nothing in [`stall[0]`, `stall[1]`), seconds of the loop's clock: what would come then comes at
    its end. `fails` says with what a request fails, None if it does not. `num_at_once` is how many it has.
    """

    def __init__(
        self,
        ttft_s: Callable[[int], float] = lambda number: 0.1,
        itl_s: float = 0.01,
        stall: tuple[float, float] = (0.0, 0.0),
        fails: Callable[[int], Exception | None] = lambda number: None,
    ) -> None:
        self.ttft_s, self.itl_s, self.stall, self.fails = ttft_s, itl_s, stall, fails
        self.num_at_once = self.max_at_once = 0
        self.sent_s: list[float] = []

    async def stream(self, request: LoadRequest) -> AsyncIterator[StreamEvent]:
        loop, number = asyncio.get_running_loop(), int(request.id.split("-")[1])
        self.sent_s.append(loop.time())
        self.num_at_once += 1
        self.max_at_once = max(self.max_at_once, self.num_at_once)
        try:
            if (error := self.fails(number)) is not None:
                raise error
            at_s = loop.time() + self.ttft_s(number)
            for _ in range(request.params.max_tokens):
                if self.stall[0] <= at_s < self.stall[1]:
                    at_s = self.stall[1]
                await asyncio.sleep(at_s - loop.time())
                yield Piece(loop.time(), 1)
                at_s += self.itl_s
            yield Finish(loop.time(), "length", request.num_input_tokens, 0, request.params.max_tokens)
        finally:
            self.num_at_once -= 1


def requests(num: int, num_output: int = 5) -> list[LoadRequest]:
    """Requests with short prompts."""
    params = SamplingParams(max_tokens=num_output)
    return [LoadRequest(id=f"load-{i}", text="x", params=params, num_input_tokens=7) for i in range(num)]
