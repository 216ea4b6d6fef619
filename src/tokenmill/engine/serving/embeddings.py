"""Requests for embeddings in the engine process: each is as many sequences as it has texts, and ends once.

The texts of a request are submitted together, and share steps with everything else. A text that fails ends
its request; so do a cancellation and the deadline, and then the other texts' blocks are free at once.
"""

from dataclasses import dataclass, field

import numpy as np

from tokenmill.core import FinishReason, TokenmillError
from tokenmill.costs.metering import Charge
from tokenmill.engine.embedding import EmbeddingRequest, EmbeddingState, embeddings
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.serving.messages import Embedded

__all__ = ["EmbeddingJobs"]


@dataclass(eq=False)
class _Job:
    """A request whose end was not collected yet: its texts, and how it ended if it was ended early."""

    request: EmbeddingRequest
    states: tuple[EmbeddingState, ...]
    reason: FinishReason | None = None
    error: str = field(default="")


class EmbeddingJobs:
    """The requests for embeddings that one engine has. Everything is done between two of its steps."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._jobs: dict[int, _Job] = {}

    def put(self, key: int, request: EmbeddingRequest) -> None:
        """Submit all texts of a request, or none.

        Raises UsageError for a text that cannot be read, ResourceError if the cache could never hold one or
        too many are waiting.
        """
        job = _Job(request, self._engine.prepare_embeddings(request))
        try:
            for state in job.states:
                self._engine.submit_state(state)
        except TokenmillError:
            self._abort(job)
            raise
        self._jobs[key] = job

    def cancel(self, key: int) -> None:
        """Give a request up. No-op if there is none."""
        if (job := self._jobs.get(key)) is not None:
            self._end(job, "cancelled")

    def collect(self) -> list[Embedded]:
        """What has ended since the last call."""
        for job in self._jobs.values():
            failed = next((state for state in job.states if state.error), None)
            if failed is not None:
                self._end(job, "failed", failed.error)
            elif self._engine.is_late(job.states[0]):
                self._end(job, "expired")
        over = {k: job for k, job in self._jobs.items() if job.reason or all(s.finished for s in job.states)}
        for key in over:
            del self._jobs[key]
        return [self._message(key, job) for key, job in over.items()]

    def _end(self, job: _Job, reason: FinishReason, error: str = "") -> None:
        """End a request early, unless it has ended."""
        if job.reason is None and not all(state.finished and not state.error for state in job.states):
            job.reason, job.error = reason, error
            self._abort(job)

    def _abort(self, job: _Job) -> None:
        for state in job.states:
            self._engine.abort(state)

    def _message(self, key: int, job: _Job) -> Embedded:
        data = b""
        if job.reason is None:
            size = self._engine.plan.shape.hidden_size
            try:
                rows_ND = embeddings(job.states, hidden_size=size, normalize=job.request.normalize)
                data = rows_ND.astype(np.dtype("<f4")).tobytes()
            except TokenmillError as error:
                job.reason, job.error = "failed", str(error)
        return Embedded(
            key=key,
            finish_reason=job.reason or "completed",
            num_cached_tokens=sum(state.num_cached for state in job.states),
            data=data,
            charge=sum((state.charge for state in job.states), Charge()),
            error=job.error,
        )
