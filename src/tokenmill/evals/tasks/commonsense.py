"""ARC, OpenBookQA, PIQA and HellaSwag: no shots, the choices themselves are scored.

Each reads the fields of the original data, as JSON lines or a JSON list: ARC `question`, `choices` (`text`
and `label`) and `answerKey`; OpenBookQA the same with `question_stem`; PIQA `goal`, `sol1`, `sol2`, `label`;
HellaSwag `activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`. Two rewritten forms are read, too: items
that have the choices in one instruction text ("Answer1: ... Answer2: ..."), and HellaSwag as text with six
lines an item, whose context is taken as it is.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from tokenmill.evals.data import DataRow, find_file, read_lines, read_rows
from tokenmill.evals.multiple_choice import ChoiceItem, choice_question, score_choice
from tokenmill.evals.task import Question, Task

__all__ = ["TASKS"]

_INSTRUCTION: Final = re.compile(
    r"Please choose the correct (?:answer|solution) to the question: (?P<question>.*?)\n\n"
    r"(?P<choices>(?:Answer|Solution)1: .*)\n\nAnswer format: [^\n]*",
    flags=re.DOTALL,
)
_CHOICE: Final = re.compile(r"(?:^|(?<=\s))(?:Answer|Solution)(\d+): ?")
_ANSWER: Final = re.compile(r"(?:answer|solution)(\d+)")
_HELLASWAG_LINES: Final = 6


def _lines(
    names: tuple[str, ...], item: Callable[[DataRow, str], ChoiceItem], path: Path
) -> Iterator[Question]:
    """The questions of one file; its items are numbered from 1."""
    for number, row in enumerate(read_rows(find_file(path, *names)), start=1):
        yield choice_question(item(row, str(number)))


def _arc_item(row: DataRow, id: str) -> ChoiceItem:
    question, choices, gold = _stem_and_choices(row, "question")
    return ChoiceItem(id=id, prompt=f"Question: {question}\nAnswer:", choices=choices, gold=gold)


def _openbookqa_item(row: DataRow, id: str) -> ChoiceItem:
    question, choices, gold = _stem_and_choices(row, "question_stem")
    return ChoiceItem(id=id, prompt=question, choices=choices, gold=gold)


def _piqa_item(row: DataRow, id: str) -> ChoiceItem:
    if "instruction" in row.fields:
        goal, choices, gold = _from_instruction(row)
    else:
        goal, choices, gold = row.text("goal"), (row.text("sol1"), row.text("sol2")), row.index("label", 2)
    return ChoiceItem(id=id, prompt=f"Question: {goal}\nAnswer:", choices=choices, gold=gold)


def _stem_and_choices(row: DataRow, name: str) -> tuple[str, tuple[str, ...], int]:
    """Question, choices and which is right."""
    if "instruction" in row.fields:
        return _from_instruction(row)
    fields = row.fields
    if isinstance(fields.get("question"), dict):  # as AI2 publishes it: {"stem": ..., "choices": [...]}
        inner = fields["question"]
        row = DataRow({**fields, name: inner.get("stem"), "choices": inner.get("choices")}, row.place)
    choices: Any = row.fields.get("choices")
    if isinstance(choices, list) and all(isinstance(each, dict) for each in choices):
        choices = {key: [each.get(key) for each in choices] for key in ("text", "label")}
    if not isinstance(choices, dict):
        row.place.refuse("choices is no object with text and label")
    listed = DataRow({**choices, "answerKey": row.fields.get("answerKey")}, row.place)
    texts, labels = listed.texts("text"), listed.texts("label")
    if len(texts) != len(labels):
        row.place.refuse(f"choices has {len(texts)} texts and {len(labels)} labels")
    return row.text(name), texts, listed.one_of("answerKey", labels)


def _from_instruction(row: DataRow) -> tuple[str, tuple[str, ...], int]:
    """The same out of an instruction text with numbered choices."""
    match = _INSTRUCTION.fullmatch(row.text("instruction"))
    if match is None:
        row.place.refuse("instruction has no question and choices of the known form")
    parts = _CHOICE.split(match["choices"])
    numbers, texts = parts[1::2], parts[2::2]
    if numbers != [str(number) for number in range(1, len(numbers) + 1)] or len(numbers) < 2:
        row.place.refuse(f"the choices are numbered {', '.join(numbers)}")
    # What stands between two choices is not part of them; the last one ends where the text does.
    separator = "\n\n" if "\n\nSolution2: " in match["choices"] else " "
    choices = (*(text.removesuffix(separator) for text in texts[:-1]), texts[-1])
    answer = _ANSWER.fullmatch(row.text("answer"))
    if answer is None or not 1 <= int(answer[1]) <= len(choices):
        row.place.refuse(f"answer is {row.text('answer')!r}, expected answer1 to answer{len(choices)}")
    return match["question"], choices, int(answer[1]) - 1


def _hellaswag(path: Path) -> Iterator[Question]:
    file = find_file(path, "hellaswag_val.jsonl", "hellaswag_val_full.txt")
    if ".txt" not in file.suffixes:
        yield from _lines((), _hellaswag_item, file)
        return
    lines = [each for each in read_lines(file) if each[1] or each[0].line == 1]
    for start in range(0, len(lines), _HELLASWAG_LINES):
        group = lines[start : start + _HELLASWAG_LINES]
        place, context = group[0]
        if len(group) < _HELLASWAG_LINES:
            place.refuse(f"begins an item of {len(group)} lines, expected {_HELLASWAG_LINES}")
        label, *endings = (text for _, text in group[1:])
        row = DataRow({"label": label}, group[1][0])
        number = start // _HELLASWAG_LINES + 1
        yield choice_question(
            ChoiceItem(
                id=str(number), prompt=context, choices=tuple(endings), gold=row.index("label", len(endings))
            )
        )


def _hellaswag_item(row: DataRow, id: str) -> ChoiceItem:
    endings = row.texts("endings")
    before, after = row.text("ctx_a"), str(row.fields.get("ctx_b") or "").capitalize()
    return ChoiceItem(
        id=id,
        prompt=_clean(f"{row.text('activity_label')}: {before} {after}"),
        choices=tuple(map(_clean, endings)),
        gold=row.index("label", len(endings)),
    )


def _clean(text: str) -> str:
    """WikiHow's titles become sentences, what is in brackets goes."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _task(
    name: str, summary: str, folder: str, chance: float, questions: Callable[[Path], Iterator[Question]]
) -> Task:
    return Task(
        name=name,
        version=1,
        summary=summary,
        folder=folder,
        metric="acc_norm",
        chance=chance,
        questions=questions,
        score=score_choice,
    )


_ARC_EASY: Final = ("arc_easy_test.json", "ARC-Easy-Test.jsonl", "test.jsonl")
_ARC_CHALLENGE: Final = ("arc_challenge_test.json", "ARC-Challenge-Test.jsonl", "test.jsonl")
_OPENBOOKQA: Final = ("openbookqa.json", "test.jsonl")
_PIQA: Final = ("piqa.json", "valid.jsonl")

TASKS: Final = (
    _task("arc-easy", "school science questions", "arc", 0.25, partial(_lines, _ARC_EASY, _arc_item)),
    _task(
        "arc-challenge",
        "school science questions that are hard to look up",
        "arc",
        0.25,
        partial(_lines, _ARC_CHALLENGE, _arc_item),
    ),
    _task("hellaswag", "which ending continues a scene", "hellaswag", 0.25, _hellaswag),
    _task(
        "openbookqa",
        "science facts that need a second one",
        "openbookqa",
        0.25,
        partial(_lines, _OPENBOOKQA, _openbookqa_item),
    ),
    _task("piqa", "which of two ways works", "piqa", 0.5, partial(_lines, _PIQA, _piqa_item)),
)
"""`arc-easy`, `arc-challenge`, `hellaswag`, `openbookqa`, `piqa`."""
