"""MMLU: 57 subjects, four choices. Letters after the choices, or the choices themselves (cloze).

Layout: `dev/SUBJECT_dev.csv` (the shots, the first five) and `test/SUBJECT_test.csv`, without header:
question, four choices, letter. Or one `.jsonl` with question, choices, answer (number or letter) and subject;
its shots come from a `dev.jsonl` beside it.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

from tokenmill.core import NotFoundError
from tokenmill.evals.data import DataRow, find_file, read_rows
from tokenmill.evals.multiple_choice import ChoiceItem, choice_question, score_choice, shots_text
from tokenmill.evals.task import Answer, Question, Task

__all__ = ["TASKS"]

_Style = Literal["letter", "cloze"]

_LETTERS: Final = ("A", "B", "C", "D")
_COLUMNS: Final = ("question", *_LETTERS, "answer")
_NUM_SHOTS: Final = 5
_DESCRIPTIONS: Final[Mapping[_Style, str]] = {
    "letter": "The following are multiple choice questions (with answers) about {}.\n\n",
    "cloze": "The following are questions (with answers) about {}.\n\n",
}


def _questions(style: _Style, num_shots: int) -> Callable[[Path], Iterator[Question]]:
    def questions(path: Path) -> Iterator[Question]:
        for subject, shots, rows in _subjects(path, num_shots):
            before = _DESCRIPTIONS[style].format(subject.replace("_", " "))
            before = shots_text(before, (_item(row, style, subject, 0) for row in shots[:num_shots]))
            for number, row in rows:
                yield choice_question(_item(row, style, subject, number), before)

    return questions


_Rows = Iterator[tuple[int, DataRow]]


def _subjects(path: Path, num_shots: int) -> Iterator[tuple[str, list[DataRow], _Rows]]:
    """Each subject with its shots and its numbered rows."""
    if path.is_file():
        yield from _subjects_of_file(path, num_shots)
        return
    files = sorted((path / "test").glob("*_test.csv*"))
    if not files:
        raise NotFoundError(
            f"{path} has no test/SUBJECT_test.csv", hint="give the folder of MMLU with --data"
        )
    for file in files:
        subject = file.name.partition("_test.csv")[0]
        dev = list(read_rows(find_file(path / "dev", f"{subject}_dev.csv"), _COLUMNS)) if num_shots else []
        if len(dev) < num_shots:
            dev[-1].place.refuse(f"is the last of {len(dev)} items, and {num_shots} are needed as shots")
        yield subject, dev, enumerate(read_rows(file, _COLUMNS), start=1)


def _subjects_of_file(path: Path, num_shots: int) -> Iterator[tuple[str, list[DataRow], _Rows]]:
    shots: dict[str, list[DataRow]] = {}
    if num_shots:
        for row in read_rows(find_file(path.parent, "dev.jsonl")):
            shots.setdefault(row.text("subject"), []).append(row)
    subjects: dict[str, list[tuple[int, DataRow]]] = {}
    for number, row in enumerate(read_rows(path, _COLUMNS if ".csv" in path.suffixes else ()), start=1):
        subject = row.fields.get("subject", path.name.partition("_test")[0])
        if not isinstance(subject, str) or len(shots.get(subject, ())) < num_shots:
            row.place.refuse(
                f"there are no {num_shots} shots for subject {subject!r}", hint="add them to dev.jsonl"
            )
        subjects.setdefault(subject, []).append((number, row))
    for subject, rows in subjects.items():
        yield subject, shots.get(subject, []), iter(rows)


def _item(row: DataRow, style: _Style, subject: str, number: int) -> ChoiceItem:
    question, choices = row.text("question").strip(), _choices(row)
    name = row.fields.get("answer")
    gold = row.index("answer", len(choices)) if isinstance(name, int) else row.one_of("answer", _LETTERS)
    if style == "letter":
        listed = "".join(f"{letter}. {text}\n" for letter, text in zip(_LETTERS, choices, strict=True))
        prompt, choices = f"{question}\n{listed}Answer:", _LETTERS
    else:
        prompt = f"Question: {question}\nAnswer:"
    return ChoiceItem(id=f"{subject}/{number}", prompt=prompt, choices=choices, gold=gold, slice=subject)


def _choices(row: DataRow) -> tuple[str, ...]:
    if "choices" not in row.fields:
        if any(letter not in row.fields for letter in _LETTERS):
            row.place.refuse(f"has neither choices nor all of {', '.join(_LETTERS)}")
        return tuple(str(row.fields[letter]) for letter in _LETTERS)
    choices = row.texts("choices")
    if len(choices) != len(_LETTERS):
        row.place.refuse(f"choices has {len(choices)} entries, expected {len(_LETTERS)}")
    return choices


def _score_letter(question: Question, answer: Answer) -> Mapping[str, float]:
    return {"acc": score_choice(question, answer)["acc"]}


def _task(style: _Style, num_shots: int) -> Task:
    suffix = ("-cloze" if style == "cloze" else "") + ("" if num_shots else "-0shot")
    what = "letters of four choices" if style == "letter" else "likelihood of the choices"
    return Task(
        name=f"mmlu{suffix}",
        version=1,
        summary=f"57 subjects, {what}, {num_shots} shots",
        folder="mmlu",
        metric="acc" if style == "letter" else "acc_norm",
        chance=0.25,
        questions=_questions(style, num_shots),
        score=_score_letter if style == "letter" else score_choice,
    )


TASKS: Final = (
    _task("letter", _NUM_SHOTS),
    _task("letter", 0),
    _task("cloze", _NUM_SHOTS),
    _task("cloze", 0),
)
"""`mmlu`, `mmlu-0shot`, `mmlu-cloze`, `mmlu-cloze-0shot`."""
