"""A local model that chooses among labels: the likeliest one after the text, not one that it writes.

A model that follows no instructions can do this, and it never answers anything but a label. What is read is
the last message of the user, after a few examples; a call computes its text once and each label after it. The
probability of an answer is the label's share among all labels, as the log-probability of that one token.

Calls are scored one after the other, in a thread of this process: a batch is the labels of one call.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from tokenmill.core import Score, Usage, UsageError
from tokenmill.engine import LLM, LLMConfig
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.library import Library
from tokenmill.router.backend import Job, Prepared, Spent
from tokenmill.router.labeller import Labeller
from tokenmill.router.linear import LabelGuess
from tokenmill.wire import Begin, Call, Finish, Piece, TextPiece, TokenText, Totals

__all__ = ["LabelAttempt", "LabelBackend", "LabelConfig", "LabelExample", "LabelScorer", "likeliest"]

_MAX_LABELS = 1000


@dataclass(frozen=True, kw_only=True)
class LabelExample:
    """A text with its label, shown before every text."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """`name` is what clients ask for, `model` a name of the store or a folder."""

    name: str
    model: str
    labels: tuple[str, ...]
    weights: WeightFormat = "w8a8"
    examples: tuple[LabelExample, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not self.model:
            raise UsageError("scored labels need a name and a model", hint="give both")
        if not 2 <= len(set(self.labels)) == len(self.labels) <= _MAX_LABELS or not all(self.labels):
            raise UsageError(f"{len(self.labels)} labels", hint=f"give 2 to {_MAX_LABELS}, each once")

    def context(self, text: str) -> str:
        """What the model reads before a label."""
        shown = [f"Text: {each.text}\nLabel: {each.label}\n\n" for each in self.examples]
        return "".join([*shown, f"Text: {text}\nLabel:"])


class LabelScorer(Protocol):
    """As `core.Scorer`, and closed at the end."""

    def score(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """Log-probability of each continuation after its context."""
        ...

    def close(self) -> None:
        """End it."""
        ...


def likeliest(labels: Sequence[str], scores: Sequence[Score]) -> LabelGuess:
    """The label with the highest log-probability, and its share of the probability of all."""
    totals = [score.total for score in scores]
    best = max(range(len(labels)), key=totals.__getitem__)
    share = 1.0 / math.fsum(math.exp(total - totals[best]) for total in totals)
    return LabelGuess(labels[best], share)


class LabelBackend(Labeller):
    """One model with one set of labels."""

    def __init__(self, config: LabelConfig, scorer: LabelScorer, *, usd_per_hour: float = 0.0) -> None:
        super().__init__(config.name, usd_per_hour=usd_per_hour)
        self._config = config
        self._scorer = scorer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="labels")

    @classmethod
    def open(cls, config: LabelConfig, *, usd_per_hour: float = 0.0) -> "LabelBackend":
        """Open the model. Errors as of `Library.find` and `LLM`."""
        llm = LLM(Library().find(config.model), LLMConfig(weights=config.weights))
        return cls(config, llm, usd_per_hour=usd_per_hour)

    def start(self, prepared: Prepared, job: Job) -> "LabelAttempt":
        """Begin to score. Raises ResourceError once drained."""
        self.check_open()
        text = self.text_of(prepared.call)
        return LabelAttempt(self, job, prepared.call, self._thread.submit(self._score, text))

    async def drain(self, deadline_s: float) -> None:
        """Take no more calls and wait for those that there are."""
        self._is_drained = True
        await asyncio.to_thread(self._thread.shutdown, True)

    async def close(self) -> None:
        """End everything; what waits is given up."""
        self._is_drained = True
        await asyncio.to_thread(self._thread.shutdown, True, cancel_futures=True)
        self._scorer.close()

    def _score(self, text: str) -> "_Scored":
        """In the thread: the label, the tokens read and the time."""
        begun_ns = time.perf_counter_ns()
        context, labels = self._config.context(text), self._config.labels
        scores = self._scorer.score([context] * len(labels), [f" {label}" for label in labels])
        usage = Usage(
            num_prompt_tokens=sum(score.num_input_tokens for score in scores),
            num_cached_tokens=sum(score.num_cached_tokens for score in scores),
            num_output_tokens=1,
        )
        return _Scored(likeliest(labels, scores), usage, time.perf_counter_ns() - begun_ns)


@dataclass(frozen=True)
class _Scored:
    guess: LabelGuess
    usage: Usage
    nanoseconds: int


class LabelAttempt:
    """A call that waits for its label."""

    def __init__(self, backend: LabelBackend, job: Job, call: Call, scored: "Future[_Scored]") -> None:
        self._backend = backend
        self._job = job
        self._call = call
        self._scored = scored
        self._created = int(time.time())

    async def __aiter__(self) -> AsyncIterator[Piece]:
        yield Begin(self._job.request_id, self._backend.model, self._created)
        found = await asyncio.wrap_future(self._scored)
        label, probability = found.guess
        has_logprobs = self._call.params.logprobs is not None
        yield TextPiece(label, logprobs=(TokenText(label, math.log(probability)),) if has_logprobs else ())
        yield Finish("completed")
        yield Totals(found.usage)

    def cancel(self) -> None:
        """Give it up if it has not begun."""
        self._scored.cancel()

    async def spent(self) -> Spent:
        """The tokens that were read, and the time; nothing if it never began."""
        try:
            found = await asyncio.wrap_future(self._scored)
        except (asyncio.CancelledError, UsageError):
            nothing = Usage(num_prompt_tokens=0, num_cached_tokens=0, num_output_tokens=0)
            return Spent(usage=nothing, finish="cancelled", nanoseconds=0)
        return Spent(
            usage=found.usage,
            finish="completed",
            nanoseconds=found.nanoseconds,
            cost_nano_usd=self._backend.cost_of(found.nanoseconds),
        )
