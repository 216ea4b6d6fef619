"""A backend that needs no engine: what it answers is known, when is random."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

from tokenmill.core import Usage, UsageError
from tokenmill.router import Attempt, BackendState, Embedded, Job, Prepared, Spent
from tokenmill.wire import Begin, Call, Finish, Piece, Prompt, TextPiece, Totals

__all__ = ["Mirror"]


def _nothing(_: str) -> None:
    """Let it go on."""


class _Reversed:
    """An attempt that reverses its text."""

    def __init__(self, text: str, delay_s: float) -> None:
        self._text = text
        self._delay_s = delay_s
        self.done: asyncio.Future[Spent] = asyncio.get_running_loop().create_future()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        yield Begin("x", "m", 1)
        await asyncio.sleep(self._delay_s)
        yield TextPiece(self._text[::-1])
        yield Finish("completed")
        self._end(len(self._text))
        yield Totals((await self.spent()).usage)

    def cancel(self) -> None:
        """End it with nothing."""
        self._end(0)

    async def spent(self) -> Spent:
        """What it used: a token a character."""
        return await asyncio.shield(self.done)

    def _end(self, num_output_tokens: int) -> None:
        if not self.done.done():
            usage = Usage(
                num_prompt_tokens=len(self._text), num_cached_tokens=0, num_output_tokens=num_output_tokens
            )
            finish: Literal["completed", "cancelled"] = "completed" if num_output_tokens else "cancelled"
            self.done.set_result(Spent(usage=usage, finish=finish, nanoseconds=1000))


class Mirror:
    """A backend without an engine: answers a text with the text reversed, within `delay_s` seconds.

    Texts that begin with `bad` cannot be asked. `on_start` is told each text before it is answered, and may
    raise. `most_running` is how many were answered at once.
    """

    name = "m"
    model = "m"
    is_local = True
    state: BackendState = "ready"

    def __init__(
        self, seed: int = 1, *, delay_s: float = 0.004, on_start: Callable[[str], None] = _nothing
    ) -> None:
        self._random = random.Random(seed)
        self._delay_s = delay_s
        self._on_start = on_start
        self.num_running = 0
        self.most_running = 0

    async def prepare(self, call: Call) -> Prepared:
        """Count characters."""
        text = call.prompts[0]
        assert isinstance(text, str)
        if text.startswith("bad"):
            raise UsageError("this cannot be asked")
        return Prepared(call=call, num_prompt_tokens=len(text), max_output_tokens=len(text))

    def start(self, prepared: Prepared, job: Job) -> Attempt:
        """Begin."""
        text = prepared.call.prompts[0]
        assert isinstance(text, str)
        self._on_start(text)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        attempt = _Reversed(text, self._random.uniform(0.0, self._delay_s))
        attempt.done.add_done_callback(self._ended)
        return attempt

    def _ended(self, _: object) -> None:
        self.num_running -= 1

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """There are none."""
        raise UsageError("no embeddings")

    async def drain(self, deadline_s: float) -> None:
        """Nothing to wait for."""

    async def close(self) -> None:
        """Nothing to end."""
