"""Classification: which of these labels has a text? Asked in two ways.

`NAME` lets the model write: the labels are listed, and what it wrote is taken as the label that it equals,
or the only one that it mentions. `NAME-scored` lets it choose: the label with the highest likelihood after
the text, which also works for models that follow no instructions. Own data: `items.jsonl` with `text` and
`label`; the labels are those that occur there, or the list in `labels.json` beside it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from tokenmill.evals.data import Place, find_file, read_json, read_rows
from tokenmill.evals.multiple_choice import ChoiceItem, choice_question, score_choice
from tokenmill.evals.task import Answer, Question, Task
from tokenmill.evals.tasks.items import item_id, items, said, user_ask

__all__ = ["TASKS", "LabelledText", "classification", "label_said"]

_MAX_LABELS: Final = 1000


class LabelledText(NamedTuple):
    """A text with its label."""

    id: str
    text: str
    label: str


_Reader = Callable[[Path], tuple[Sequence[str], Sequence[LabelledText]]]


def classification(
    name: str, folder: str, what: str, read: _Reader, chance: float | None = None
) -> tuple[Task, Task]:
    """The two tasks of a data set: `read` gives its labels and its items, `what` names what is classified."""
    written = Task(
        name=name,
        version=1,
        summary=f"{what}: the label is written, and read without regard to case and marks",
        folder=folder,
        metric="accuracy",
        chance=chance,
        questions=partial(_written, read=read),
        score=_score_written,
    )
    scored = Task(
        name=f"{name}-scored",
        version=1,
        summary=f"{what}: the most likely label after the text",
        folder=folder,
        metric="acc",
        chance=chance,
        questions=partial(_scored, read=read),
        score=score_choice,
    )
    return written, scored


def label_said(text: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives: its first line, or the only label in it. None if there is none, or
    many.
    """
    plain = {_plain(label): label for label in labels}
    first = next((line for line in text.splitlines() if line.strip()), "")
    first = _plain(re.sub(r"(?i)^\W*(label|category|intent|answer)\W*:", "", first))
    if first in plain:
        return plain[first]
    whole = f" {_plain(text)} "
    found = [label for label in plain if f" {label} " in whole]
    # A label inside of a longer one that is there, too, is not meant.
    found = [label for label in found if not any(label != other and label in other for other in found)]
    return plain[found[0]] if len(found) == 1 else None


def _plain(text: str) -> str:
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    return " ".join(re.findall(r"\w+", words.replace("_", " ").lower()))


def _written(path: Path, *, read: _Reader) -> Iterator[Question]:
    labels, rows = read(path)
    listed = ", ".join(labels)
    for row in rows:
        content = (
            f"Classify the text with one of these labels: {listed}.\n\nText: {row.text}\n\n"
            "Answer with the label only."
        )
        target = {"label": row.label, "labels": list(labels)}
        yield Question(id=row.id, ask=user_ask(content, max_tokens=32), target=target)


def _scored(path: Path, *, read: _Reader) -> Iterator[Question]:
    labels, rows = read(path)
    choices = tuple(_plain(label) for label in labels)
    for row in rows:
        gold = labels.index(row.label)
        prompt = f"Text: {row.text}\nLabel:"
        yield choice_question(ChoiceItem(id=row.id, prompt=prompt, choices=choices, gold=gold))


def _score_written(question: Question, answer: Answer) -> Mapping[str, float]:
    label = label_said(said(answer), question.target["labels"])
    return {"accuracy": float(label == question.target["label"]), "named_a_label": float(label is not None)}


def _own(path: Path) -> tuple[Sequence[str], Sequence[LabelledText]]:
    rows = [(row, LabelledText(item_id(row), row.text("text"), row.text("label"))) for row in items(path)]
    listed = (path.parent if path.is_file() else path) / "labels.json"
    labels = _label_list(listed) if listed.is_file() else sorted({each.label for _, each in rows})
    if len(labels) > _MAX_LABELS:
        Place(path).refuse(f"has {len(labels)} labels", hint=f"use at most {_MAX_LABELS}")
    for row, _ in rows:
        row.one_of("label", labels)
    return labels, [each for _, each in rows]


def _label_list(path: Path) -> list[str]:
    labels = read_json(path)
    if not isinstance(labels, list) or not labels or not all(isinstance(each, str) for each in labels):
        Place(path).refuse("is no list of labels")
    return labels


def _banking77(path: Path) -> tuple[Sequence[str], Sequence[LabelledText]]:
    labels = _label_list(find_file(path, "categories.json"))
    rows = enumerate(read_rows(find_file(path, "test.csv")), start=1)
    return labels, [
        LabelledText(str(number), row.text("text"), labels[row.one_of("category", labels)])
        for number, row in rows
    ]


def _clinc150(path: Path) -> tuple[Sequence[str], Sequence[LabelledText]]:
    file = find_file(path, "data_full.json")
    data = read_json(file)
    try:
        pairs = [(str(text), str(label)) for part in ("test", "oos_test") for text, label in data[part]]
    except (KeyError, TypeError, ValueError):
        Place(file).refuse("has no lists test and oos_test of [text, intent]")
    texts = [LabelledText(str(number), text, label) for number, (text, label) in enumerate(pairs, start=1)]
    return sorted({label for _, label in pairs}), texts


TASKS: Final = (
    *classification("classify", "items", "own texts and labels", _own),
    *classification("banking77", "banking77", "77 intents of a bank's customers", _banking77, 1 / 77),
    *classification("clinc150", "clinc150", "150 intents and out of scope (oos)", _clinc150, 1 / 151),
)
