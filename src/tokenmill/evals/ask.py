"""Asking a model the questions of a task, many at once.

A question that cannot be answered (too long for the model, refused, broken off) is an item with an error; the
others of its batch are asked again without it. Only a model that answers nothing at all ends the run.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from tokenmill.core import Completion, Generator, SamplingParams, Score, Scorer, TokenmillError, UsageError
from tokenmill.evals.task import Answer, Choose, Generate, ItemResult, Question, Read, Task

__all__ = ["Asker", "EvaluatedModel", "Reader"]

# Failures without any answer before, after which it is the model that fails, not the questions.
_MOST_FAILURES: Final = 16


class Reader(Protocol):
    """Scores long texts in windows."""

    def score_text(self, text: str, *, window: int) -> list[Score]:
        """One score for each window of that many tokens; windows do not overlap."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model, as what it can do. `about` is what decides its answers, such as digest and weight format."""

    name: str
    about: Mapping[str, Any] = field(default_factory=dict)
    generator: Generator | None = None
    scorer: Scorer | None = None
    reader: Reader | None = None
    window: int = 2048


class Asker:
    """Asks one model. Raises UsageError if it cannot do what a question asks for at all."""

    def __init__(self, model: EvaluatedModel, task: Task) -> None:
        self._model = model
        self._task = task
        self._num_answered = 0
        self._num_failed = 0

    def ask(self, questions: Sequence[Question]) -> list[ItemResult]:
        """The results, in order. Raises TokenmillError where nothing is ever answered."""
        for question in questions:
            self._check_able(question)
        return self._ask(questions)

    def _ask(self, questions: Sequence[Question]) -> list[ItemResult]:
        if not questions:
            return []
        try:
            items = self._answer(questions)
        except TokenmillError as error:
            if len(questions) > 1:
                middle = len(questions) // 2
                return [*self._ask(questions[:middle]), *self._ask(questions[middle:])]
            self._num_failed += 1
            if not self._num_answered and self._num_failed >= _MOST_FAILURES:
                raise
            return [_failed(questions[0], str(error))]
        self._num_answered += sum(not item.error for item in items)
        return items

    def _answer(self, questions: Sequence[Question]) -> list[ItemResult]:
        """Ask all of them, kind by kind."""
        answers: dict[int, Answer] = {}
        for kind in (self._generate, self._choose, self._read):
            answers |= kind(questions)
        return [self._item(question, answers[index]) for index, question in enumerate(questions)]

    def _generate(self, questions: Sequence[Question]) -> dict[int, Answer]:
        asks = {i: each.ask for i, each in enumerate(questions) if isinstance(each.ask, Generate)}
        texts = {i: ask.prompt for i, ask in asks.items() if isinstance(ask.prompt, str)}
        chats = {i: ask.prompt for i, ask in asks.items() if not isinstance(ask.prompt, str)}
        params = {i: _seeded(ask.params, questions[i].id) for i, ask in asks.items()}
        generator = self._model.generator
        answers: dict[int, Answer] = {}
        if texts and generator is not None:
            each = [params[i] for i in texts]
            answers |= _families(texts, each, generator.generate(list(texts.values()), each))
        if chats and generator is not None:
            each = [params[i] for i in chats]
            answers |= _families(chats, each, generator.chat(list(chats.values()), each))
        return answers

    def _choose(self, questions: Sequence[Question]) -> dict[int, Answer]:
        asks = {i: each.ask for i, each in enumerate(questions) if isinstance(each.ask, Choose)}
        if not asks:
            return {}
        assert self._model.scorer is not None
        pairs = [
            _move_spaces(*pair)
            for ask in asks.values()
            for pair in zip(ask.contexts, ask.continuations, strict=True)
        ]
        scores = iter(self._model.scorer.score([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
        return {i: Answer(scores=tuple(next(scores) for _ in ask.contexts)) for i, ask in asks.items()}

    def _read(self, questions: Sequence[Question]) -> dict[int, Answer]:
        reader = self._model.reader
        return {
            i: Answer(scores=tuple(reader.score_text(each.ask.text, window=self._model.window)))
            for i, each in enumerate(questions)
            if isinstance(each.ask, Read) and reader is not None
        }

    def _check_able(self, question: Question) -> None:
        model = self._model
        needs = {
            Generate: ("write", model.generator),
            Choose: ("score", model.scorer),
            Read: ("read", model.reader),
        }
        verb, able = needs[type(question.ask)]
        if able is None:
            raise UsageError(
                f"{model.name} cannot {verb} text, and {self._task.name} asks for that",
                hint="use a model of this machine, or another task (`tokenmill tasks`)",
            )

    def _item(self, question: Question, answer: Answer) -> ItemResult:
        broken = [
            each for each in answer.completions if each.finish_reason in ("failed", "cancelled", "expired")
        ]
        if broken:
            self._num_failed += 1
            return _failed(question, broken[0].error or f"the request was {broken[0].finish_reason}")
        usages = [each.usage for each in answer.completions]
        return ItemResult(
            id=question.id,
            slice=question.slice,
            metrics=self._task.score(question, answer),
            answer=_shown(question, answer),
            # The completions of one request have one prompt.
            num_input_tokens=sum(each.num_input_tokens for each in answer.scores)
            + (usages[0].num_prompt_tokens if usages else 0),
            num_cached_tokens=sum(each.num_cached_tokens for each in answer.scores)
            + (usages[0].num_cached_tokens if usages else 0),
            num_output_tokens=sum(usage.num_output_tokens for usage in usages),
        )


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of a context belongs to what follows, as tokens have it."""
    kept = context.rstrip()
    return (kept, context[len(kept) :] + continuation) if kept else (context, continuation)


def _seeded(params: SamplingParams, id: str) -> SamplingParams:
    """A draw that depends on the question only, so that a run that goes on draws the same."""
    if params.greedy or params.seed is not None:
        return params
    return replace(params, seed=int.from_bytes(hashlib.sha256(id.encode()).digest()[:7], "big"))


def _families(
    asks: Mapping[int, object], params: Sequence[SamplingParams], completions: Sequence[Completion]
) -> dict[int, Answer]:
    """The completions of each question."""
    if len(completions) != sum(each.n for each in params):
        raise UsageError(f"the model gave {len(completions)} answers to {len(params)} questions")
    left = iter(completions)
    return {
        i: Answer(completions=tuple(next(left) for _ in range(each.n)))
        for i, each in zip(asks, params, strict=True)
    }


def _shown(question: Question, answer: Answer) -> Any:
    """What the model said, as JSON can hold it."""
    if isinstance(question.ask, Read):
        return [(len(score.logprobs), score.total) for score in answer.scores]
    if isinstance(question.ask, Choose):
        return [score.total for score in answer.scores]
    return [completion.text for completion in answer.completions]


def _failed(question: Question, error: str) -> ItemResult:
    return ItemResult(
        id=question.id,
        slice=question.slice,
        metrics={},
        answer=None,
        num_input_tokens=0,
        num_cached_tokens=0,
        num_output_tokens=0,
        error=error,
    )
