"""What a task is: data that becomes questions, and a scorer of the answers.

A question says what to ask a model, in one of three ways: to write, to choose, to read. Who asks, in which
batches and through which model is not the task's business (`runner`), and neither is what the figures of many
items say together (`statistics`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokenmill.core import Completion, Message, SamplingParams, Score

__all__ = ["Answer", "Ask", "Choose", "Generate", "ItemResult", "Question", "Read", "Task"]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write: a text is continued, a conversation is answered with the model's template."""

    prompt: str | tuple[Message, ...]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Choose:
    """How likely is each continuation after its context? One pair a choice; contexts are often equal."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Read:
    """How likely is a text, in windows of the model's context?"""

    text: str


Ask: TypeAlias = Generate | Choose | Read


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item. `id` is stable in its data set; `target` is what the scorer compares with, as JSON holds it.

    `slice` is the part of the data that it is reported under, such as a subject.
    """

    id: str
    ask: Ask
    target: Any
    slice: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered: completions to `Generate` (as many as its `n`), scores to `Choose`, `Read`."""

    completions: tuple[Completion, ...] = ()
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data and a scorer, with a version that changes whenever a figure could.

    `questions` reads the task's folder of data, whatever can be wrong with it named by file and line in a
    `UsageError`. `score` gives each metric of one item, usually 0 or 1. `metric` is the headline one, and
    `chance` what guessing reaches in it, None where that means nothing.

    `aggregate` says how items become one figure: their mean, or, for a task that reads, the perplexity of all
    scored tokens together.
    """

    name: str
    version: int
    summary: str
    folder: str
    metric: str
    chance: float | None
    questions: Callable[[Path], Iterator[Question]]
    score: Callable[[Question, Answer], Mapping[str, float]]
    aggregate: Literal["mean", "perplexity"] = "mean"


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """What became of one item: a line of a result file.

    `answer` is what the model said, short enough to read: texts, log-probabilities of choices, or of windows
    (scored tokens, log-probability). Tokens are those of all calls for this item. An item that was not
    answered has an `error` and no metrics.
    """

    id: str
    slice: str
    metrics: Mapping[str, float]
    answer: Any
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    error: str = ""
