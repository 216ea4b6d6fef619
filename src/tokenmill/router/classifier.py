"""A linear classifier as a backend: it answers the last message of the user with a label.

It has no tokens: a call counts none in and one out, and what it cost is its time at the machine's price. Its
probability of the label comes as the log-probability of that one token, so that a cascade can read it.
"""

import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenmill.core import Message, ResourceError, Usage, UsageError
from tokenmill.router.backend import BackendState, Embedded, Job, Prepared, Spent
from tokenmill.router.linear import LabelGuess, LinearClassifier
from tokenmill.wire import Begin, Call, FieldError, Finish, Piece, Prompt, TextPiece, TokenText, Totals

__all__ = ["ClassifierAttempt", "ClassifierBackend", "ClassifierConfig", "classified_text"]

_USAGE: Final = Usage(num_prompt_tokens=0, num_cached_tokens=0, num_output_tokens=1)
_NANO: Final = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """`name` is what clients ask for, `folder` holds the classifier's two files."""

    name: str
    folder: str

    def __post_init__(self) -> None:
        if not self.name or not self.folder:
            raise UsageError("a classifier needs a name and a folder", hint="give both")


def classified_text(messages: Sequence[Message]) -> str:
    """What is classified: the last message of the user. Raises UsageError without one."""
    text = next((each.content for each in reversed(messages) if each.role == "user" and each.content), None)
    if text is None:
        raise UsageError("there is no message of the user", hint="a classifier labels the last one")
    return text


class ClassifierBackend:
    """One classifier of this machine."""

    def __init__(
        self, name: str, classifier: LinearClassifier, *, usd_per_hour: float = 0.0, fingerprint: str = ""
    ) -> None:
        self._name = name
        self._classifier = classifier
        self._usd_per_hour = usd_per_hour
        self._is_drained = False
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, config: ClassifierConfig, *, usd_per_hour: float = 0.0) -> "ClassifierBackend":
        """Read it from its folder. Errors as of `LinearClassifier.load`."""
        classifier = LinearClassifier.load(Path(config.folder))
        return cls(config.name, classifier, usd_per_hour=usd_per_hour)

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self._name

    @property
    def model(self) -> str:
        """The same."""
        return self._name

    @property
    def is_local(self) -> bool:
        """True."""
        return True

    @property
    def state(self) -> BackendState:
        """It takes calls until it is drained."""
        return "drained" if self._is_drained else "ready"

    async def prepare(self, call: Call) -> Prepared:
        """Check a call. Raises UsageError for one that a label is no answer to."""
        if call.tools:
            raise FieldError("tools", "are nothing that a classifier can call", hint="leave them out")
        if call.params.n != 1 or len(call.prompts) > 1:
            raise FieldError("n", "is more than one, and a classifier has one answer", hint="ask once")
        if call.params.grammar is not None:
            raise FieldError("response_format", "is not kept by a classifier", hint="leave it out")
        self._text(call)
        return Prepared(call=call, num_prompt_tokens=0, max_output_tokens=1)

    def start(self, prepared: Prepared, job: Job) -> "ClassifierAttempt":
        """Answer. Raises ResourceError once drained."""
        if self._is_drained:
            raise ResourceError(f"{self._name} takes no more calls", hint="ask another deployment")
        begun_ns = time.perf_counter_ns()
        guess = self._classifier.guess(self._text(prepared.call))
        return ClassifierAttempt(self, job, prepared.call, guess, time.perf_counter_ns() - begun_ns)

    async def embed(self, texts: Sequence[Prompt], job: Job) -> Embedded:
        """Raises UsageError: it has no vectors."""
        raise UsageError(f"{self._name} has no embeddings", hint="ask a model that has")

    async def drain(self, deadline_s: float) -> None:
        """Take no more calls; none is ever open."""
        self._is_drained = True

    async def close(self) -> None:
        """As `drain`."""
        self._is_drained = True

    def cost_of(self, nanoseconds: int) -> int:
        """Nanodollars of so much time of this machine, rounded up."""
        return -(-nanoseconds * round(self._usd_per_hour * _NANO) // (3600 * _NANO))

    def _text(self, call: Call) -> str:
        if call.is_chat:
            return classified_text(call.messages)
        prompt = call.prompts[0]
        if not isinstance(prompt, str):
            raise FieldError("prompt", "is tokens, and a classifier reads text", hint="give text")
        return prompt


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
        backend = self._backend
        yield Begin(self._job.request_id, backend.model, self._created, backend.fingerprint)
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
