"""Conversations of several turns, compared turn by turn with reference answers.

Each turn is a question of its own: what came before it is the conversation with the reference answers, not
with the model's own, so that one bad turn does not spoil the figures of the next and every model is asked
the same. What that cannot show is how a model goes on from its own mistakes. `rougeL` compares words;
`same_number` is, for references that end in a number (maths, counting), whether the answer's last number is
that one. For answers that can be good in many ways a judge (`tokenmill.evals.judge`) is the last resort.
Own data: `items.jsonl` with `turns`, a list of `{"user": ..., "reference": ...}`, and optionally `system`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenmill.core import Message, SamplingParams
from tokenmill.evals.data import DataRow, find_file, read_rows
from tokenmill.evals.rouge import rouge
from tokenmill.evals.task import Answer, Generate, Question, Task
from tokenmill.evals.tasks.items import item_id, items, said

__all__ = ["TASKS"]

_MAX_TOKENS: Final = 512
_NUMBER: Final = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


class _Talk(NamedTuple):
    """A conversation: what the user says and the reference answer, turn by turn."""

    id: str
    system: str
    turns: tuple[tuple[str, str], ...]
    slice: str = ""


_Reader = Callable[[Path], Iterator[_Talk]]


def _questions(path: Path, *, read: _Reader) -> Iterator[Question]:
    params = SamplingParams(max_tokens=_MAX_TOKENS)
    for talk in read(path):
        messages = [Message(role="system", content=talk.system)] if talk.system else []
        for number, (user, reference) in enumerate(talk.turns, start=1):
            messages.append(Message(role="user", content=user))
            yield Question(
                id=f"{talk.id}-{number}",
                ask=Generate(prompt=tuple(messages), params=params),
                target=reference,
                slice=talk.slice or f"turn {number}",
            )
            messages.append(Message(role="assistant", content=reference))


def _score(question: Question, answer: Answer) -> Mapping[str, float]:
    text, reference = said(answer), question.target
    scores = {"rougeL": rouge(reference, text)["rougeL"]}
    wanted = _last_number(reference)
    if wanted is not None and reference.rstrip(" .!*%$)").endswith(wanted):
        scores["same_number"] = float(_last_number(text) == wanted)
    return scores


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _own(path: Path) -> Iterator[_Talk]:
    for row in items(path):
        turns = row.fields.get("turns")
        if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
            row.place.refuse('turns is no list of {"user": text, "reference": text}')
        system = row.text("system") if "system" in row.fields else ""
        yield _Talk(item_id(row), system, tuple((turn["user"], turn["reference"]) for turn in turns))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("user", "reference"))


def _mt_bench(path: Path) -> Iterator[_Talk]:
    """The questions that have a reference: maths, reasoning, coding."""
    rows = read_rows(find_file(path, "mt_bench_reference_gpt-4.jsonl"))
    references = {row.index("question_id", 1 << 20): _reference_turns(row) for row in rows}
    for row in read_rows(find_file(path, "mt_bench_question.jsonl")):
        number, users = row.index("question_id", 1 << 20), row.texts("turns", least=1)
        if number in references:
            if len(references[number]) != len(users):
                row.place.refuse(f"has {len(users)} turns, its reference {len(references[number])}")
            turns = tuple(zip(users, references[number], strict=True))
            yield _Talk(str(number), "", turns, row.text("category"))


def _reference_turns(row: DataRow) -> tuple[str, ...]:
    try:
        return tuple(str(turn) for turn in row.fields["choices"][0]["turns"])
    except (KeyError, IndexError, TypeError):
        row.place.refuse("choices has no turns of a first choice")


def _task(name: str, folder: str, what: str, read: _Reader) -> Task:
    return Task(
        name=name,
        version=1,
        summary=f"{what}: each turn against its reference",
        folder=folder,
        metric="rougeL",
        chance=None,
        questions=partial(_questions, read=read),
        score=_score,
    )


TASKS: Final = (
    _task("chat", "items", "own conversations", _own),
    _task("mt-bench", "mt_bench", "the questions of MT-bench that have a reference, two turns", _mt_bench),
)
