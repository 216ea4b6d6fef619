"""Questions with choices: the prompt with its shots, and accuracy with and without regard to length.

A choice is the continuation of the prompt after one space. `acc` takes the most likely one, `acc_norm` the
one with the most log-probability a character, as EleutherAI's lm-evaluation-harness does; of equal ones the
first.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenmill.evals.task import Answer, Choose, Question

__all__ = ["ChoiceItem", "choice_question", "score_choice", "shots_text"]


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """What a question comes from: the text that the choices continue, and which of them is right."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    gold: int
    slice: str = ""


def shots_text(description: str, shots: Iterable[ChoiceItem]) -> str:
    """A description, then solved questions, each followed by an empty line."""
    return description + "".join(f"{shot.prompt} {shot.choices[shot.gold]}\n\n" for shot in shots)


def choice_question(item: ChoiceItem, before: str = "") -> Question:
    """The question, with a text in front of it."""
    return Question(
        id=item.id,
        ask=Choose(
            contexts=(before + item.prompt,) * len(item.choices),
            continuations=tuple(f" {choice}" for choice in item.choices),
        ),
        target=item.gold,
        slice=item.slice,
    )


def score_choice(question: Question, answer: Answer) -> Mapping[str, float]:
    """`acc` and `acc_norm`, 0 or 1."""
    assert isinstance(question.ask, Choose), "choices are scored"
    totals = [score.total for score in answer.scores]
    lengths = [len(each) - 1 for each in question.ask.continuations]
    per_char = [total / max(1, length) for total, length in zip(totals, lengths, strict=True)]
    return {
        "acc": float(totals.index(max(totals)) == question.target),
        "acc_norm": float(per_char.index(max(per_char)) == question.target),
    }
