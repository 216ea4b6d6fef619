"""An event loop whose time passes as fast as it can: where nobody has work, it is later at once.

For what has time-outs and intervals in it and no sockets: a minute takes as long as its work does.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["VirtualLoop", "run_virtual"]

_T = TypeVar("_T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that never waits for its timers. `time` begins at 0."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Seconds since it began, all of them skipped."""
        return self.now_s


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and timeout is not None and timeout > 0.0:
            self._loop.now_s += timeout
        elif not found and timeout is None:
            raise RuntimeError("nothing will ever happen: a task waits for what nobody does")
        return found


def run_virtual(work: Coroutine[Any, Any, _T]) -> _T:
    """What it returns, in a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
