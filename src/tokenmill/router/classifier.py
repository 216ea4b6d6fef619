"""A linear classifier as a backend: it answers the last message of the user with a label.

It has no tokens: a call counts none in and one out, and what it cost is its time at the machine's price. Its
probability of the label comes as the log-probability of that one token, so that a cascade can read it.
"""

import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenmill.core import Usage, UsageError
from tokenmill.router.backend import Job, Prepared, Spent
from tokenmill.router.labeller import Labeller
from tokenmill.router.linear import LabelGuess, LinearClassifier
from tokenmill.wire import Begin, Call, Finish, Piece, TextPiece, TokenText, Totals

__all__ = ["ClassifierAttempt", "ClassifierBackend", "ClassifierConfig"]

_USAGE: Final = Usage(num_prompt_tokens=0, num_cached_tokens=0, num_output_tokens=1)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """`name` is what clients ask for, `folder` holds the classifier's two files."""

    name: str
    folder: str

    def __post_init__(self) -> None:
        if not self.name or not self.folder:
            raise UsageError("a classifier needs a name and a folder", hint="give both")


class ClassifierBackend(Labeller):
    """One classifier of this machine."""

    def __init__(self, name: str, classifier: LinearClassifier, *, usd_per_hour: float = 0.0) -> None:
        super().__init__(name, usd_per_hour=usd_per_hour)
        self._classifier = classifier

    @classmethod
    def open(cls, config: ClassifierConfig, *, usd_per_hour: float = 0.0) -> "ClassifierBackend":
        """Read it from its folder. Errors as of `LinearClassifier.load`."""
        classifier = LinearClassifier.load(Path(config.folder))
        return cls(config.name, classifier, usd_per_hour=usd_per_hour)

    def start(self, prepared: Prepared, job: Job) -> "ClassifierAttempt":
        """Answer. Raises ResourceError once drained."""
        self.check_open()
        begun_ns = time.perf_counter_ns()
        guess = self._classifier.guess(self.text_of(prepared.call))
        return ClassifierAttempt(self, job, prepared.call, guess, time.perf_counter_ns() - begun_ns)

    async def drain(self, deadline_s: float) -> None:
        """Take no more calls; none is ever open."""
        self._is_drained = True

    async def close(self) -> None:
        """As `drain`."""
        self._is_drained = True


class ClassifierAttempt:
    """An answer that is there from the beginning."""

    def __init__(
        self, backend: ClassifierBackend, job: Job, call: Call, guess: LabelGuess, nanoseconds: int
    ) -> None:
        self._backend = backend
        self._job = job
        self._call = call
        self._guess = guess
        self._nanoseconds = nanoseconds
        self._created = int(time.time())

    async def __aiter__(self) -> AsyncIterator[Piece]:
        label, probability = self._guess
        logprobs: tuple[TokenText, ...] = ()
        if self._call.params.logprobs is not None:
            logprobs = (TokenText(label, math.log(probability)),)
        yield Begin(self._job.request_id, self._backend.model, self._created)
        yield TextPiece(label, logprobs=logprobs)
        yield Finish("completed")
        yield Totals(_USAGE)

    def cancel(self) -> None:
        """It has ended already."""

    async def spent(self) -> Spent:
        """One token, and the time that it took."""
        return Spent(
            usage=_USAGE,
            finish="completed",
            nanoseconds=self._nanoseconds,
            cost_nano_usd=self._backend.cost_of(self._nanoseconds),
        )
