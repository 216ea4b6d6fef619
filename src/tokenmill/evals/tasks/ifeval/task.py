"""The task: prompts of IFEval in a conversation, verdicts strict and loose.

Loose forgives what models put around an answer: it also tries the answer without its first line, without
its last and without asterisks, and takes the best. A prompt is followed if all of its instructions are. The
official accuracy over instructions is that of all instructions together: `instruction_accuracy`.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from tokenmill.core import Message, SamplingParams, UsageError
from tokenmill.evals.data import DataRow, find_file, read_rows
from tokenmill.evals.task import Answer, Generate, ItemResult, Question, Task
from tokenmill.evals.tasks.ifeval.checks import check_arguments, follows

__all__ = ["IFEVAL", "TASKS", "instruction_accuracy"]


def instruction_accuracy(items: Iterable[ItemResult], kind: str = "strict") -> float:
    """Share of all instructions that were followed: the official accuracy at the level of instructions."""
    rows = [item.metrics for item in items]
    total = sum(row["instructions"] for row in rows)
    if not total:
        raise UsageError("there are no instructions", hint="give the results of an IFEval run")
    return sum(row[f"followed_{kind}"] for row in rows) / total


def _questions(path: Path) -> Iterator[Question]:
    params = SamplingParams(max_tokens=1280)
    for row in read_rows(find_file(path, "input_data.jsonl")):
        message = Message(role="user", content=row.text("prompt"))
        yield Question(
            id=str(row.index("key", 1 << 30)),
            ask=Generate(prompt=(message,), params=params),
            target=_instructions(row),
        )


def _instructions(row: DataRow) -> list[dict[str, object]]:
    names, arguments = row.texts("instruction_id_list", least=1), row.fields.get("kwargs")
    if not isinstance(arguments, list) or len(arguments) != len(names):
        row.place.refuse("kwargs is no list as long as instruction_id_list")
    for name, values in zip(names, arguments, strict=True):
        try:
            check_arguments(name, values if isinstance(values, dict) else {"kwargs": values})
        except UsageError as error:
            row.place.refuse(error.message)
    return [{"name": n, "arguments": a} for n, a in zip(names, arguments, strict=True)]


def _score(question: Question, answer: Answer) -> Mapping[str, float]:
    text = answer.completions[0].text
    lines = text.split("\n")
    tried = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    tried += [each.replace("*", "") for each in tried]
    strict, loose = [], []
    for instruction in question.target:
        verdicts = (follows(instruction["name"], instruction["arguments"], each) for each in tried)
        strict.append(next(verdicts))
        loose.append(strict[-1] or any(verdicts))
    return {
        "prompt_strict": float(all(strict)),
        "prompt_loose": float(all(loose)),
        "followed_strict": float(sum(strict)),
        "followed_loose": float(sum(loose)),
        "instructions": float(len(strict)),
    }


IFEVAL: Final = Task(
    name="ifeval",
    version=1,
    summary="instructions that a program can check, such as lengths, formats and forbidden words",
    folder="ifeval",
    metric="prompt_strict",
    chance=None,
    questions=_questions,
    score=_score,
)
TASKS: Final = (IFEVAL,)
