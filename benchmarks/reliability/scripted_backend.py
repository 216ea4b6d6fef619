"""A backend that does what a script says: texts, pauses, errors. For tests of whoever sits in front of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from tokenmill.core import FinishReason, ResourceError, TokenmillError, Usage, UsageError
from tokenmill.router import Attempt, BackendState, Embedded, Job, Prepared, Spent
from tokenmill.wire import Begin, Call, Finish, Piece, Prompt, TextPiece, Totals

__all__ = ["Script", "ScriptedBackend"]

Script = Sequence[str | float | TokenmillError]
"""Text to stream, seconds to wait, an error to end with; without one it ends well."""


@dataclass
class ScriptedBackend:
    """Answers by `script`, which is asked with the number of the attempt here, from 1."""

    name: str
    script: Callable[[int], Script] = lambda number: (f"answer {number}",)
    model: str = "m"
    is_local: bool = False
    state: BackendState = "ready"
    refusal: UsageError | None = None
    is_full: bool = False
    jobs: list[Job] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)
    num_live: int = 0
    most_live: int = 0

    async def prepare(self, call: Call) -> Prepared:
        """As of `Backend`."""
        if self.refusal is not None:
            raise self.refusal
        return Prepared(call=call, num_prompt_tokens=10, max_output_tokens=call.params.max_tokens)

    def start(self, prepared: Prepared, job: Job) -> Attempt:
        """As of `Backend`."""
        if self.is_full:
            raise ResourceError(f"{self.name} is full", hint="later")
        self.jobs.append(job)
        self.started_s.append(asyncio.get_running_loop().time())
        return _ScriptedAttempt(self, job, self.script(len(self.jobs)))

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """As of `Backend`: one number a text."""
        self.jobs.append(job)
        for step in self.script(len(self.jobs)):
            if isinstance(step, TokenmillError):
                raise step
        usage = Usage(num_prompt_tokens=len(texts), num_cached_tokens=0, num_output_tokens=0)
        return Embedded(vectors=tuple((1.0,) for _ in texts), usage=usage, cost_nano_usd=5)

    async def drain(self, deadline_s: float) -> None:
        """As of `Backend`."""
        self.state = "drained"

    async def close(self) -> None:
        """As of `Backend`."""
        self.state = "drained"


class _ScriptedAttempt:
    """Does its script while it is read. Two tokens each text."""

    def __init__(self, backend: ScriptedBackend, job: Job, script: Script) -> None:
        self._backend = backend
        self._job = job
        self._script = script
        self._num_texts = 0
        self._finish: FinishReason = "cancelled"
        self._left = asyncio.Event()
        self._ended = asyncio.Event()
        backend.num_live += 1
        backend.most_live = max(backend.most_live, backend.num_live)

    @property
    def _usage(self) -> Usage:
        return Usage(num_prompt_tokens=10, num_cached_tokens=0, num_output_tokens=2 * self._num_texts)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces()

    def cancel(self) -> None:
        self._left.set()
        self._end()

    async def spent(self) -> Spent:
        await self._ended.wait()
        return Spent(usage=self._usage, finish=self._finish, nanoseconds=1, cost_nano_usd=7)

    def _end(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._backend.num_live -= 1

    async def _pieces(self) -> AsyncIterator[Piece]:
        try:
            yield Begin(self._job.request_id, self._backend.model)
            for step in self._script:
                if isinstance(step, TokenmillError):
                    self._finish = "failed"
                    raise step
                if isinstance(step, float):
                    try:
                        async with asyncio.timeout(step):
                            await self._left.wait()
                            return
                    except TimeoutError:
                        continue
                self._num_texts += 1
                yield TextPiece(step)
            self._finish = "completed"
            yield Finish("completed")
            yield Totals(self._usage)
        finally:
            self._end()
