"""Windows of tokens run through an engine for the sake of their taps alone."""

from collections import deque
from collections.abc import Iterable, Sequence

from tokenmill.engine.core import EngineCore
from tokenmill.engine.embedding import EmbeddingState
from tokenmill.engine.taps.tap import Tap

__all__ = ["read_windows"]


def read_windows(
    core: EngineCore, windows: Iterable[Sequence[int]], taps: tuple[Tap, ...], *, max_in_flight: int = 4
) -> None:
    """Run every window with these taps. `windows` is read as it is needed, `max_in_flight` at a time.

    Raises as the engine does for an unknown point, a window that does not fit or a model that fails; whatever
    happens, nothing stays behind.
    """
    running: deque[EmbeddingState] = deque()
    try:
        for number, window in enumerate(windows):
            state = EmbeddingState(f"window-{number}", window, "last")
            state.taps = taps
            core.submit(state)
            running.append(state)
            if len(running) >= max_in_flight:
                _finish(core, running)
        while running:
            _finish(core, running)
    finally:
        for state in running:
            core.abort(state)


def _finish(core: EngineCore, running: "deque[EmbeddingState]") -> None:
    """Step until the first of these is done; a failure of it is raised."""
    while not running[0].finished:
        core.step()
    running.popleft().embedding()
