r"""MATH: competition problems whose answer is an expression in LaTeX.

`math` is the 4-shot prompt of the Minerva paper as lm-evaluation-harness has it (`minerva_math` 3): the
metric `exact_match` reads the sentence that the examples end with, `flexible` also the last `\boxed{}`.
`math500` asks in a conversation, without examples, for `\boxed{}`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final

from tokenmill.core import Message, SamplingParams
from tokenmill.evals.data import find_file, read_rows
from tokenmill.evals.latex import boxed_answer, same_answer
from tokenmill.evals.task import Answer, Generate, Question, Task

__all__ = ["MATH", "MATH500", "TASKS"]

_FINAL: Final = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")


def _math_questions(path: Path) -> Iterator[Question]:
    text = files("tokenmill.evals.tasks").joinpath("minerva_shots.json").read_text("utf-8")
    shots = "".join(
        f"Problem:\n{shot['problem']}\n\nSolution: {shot['solution']}\n"
        f"Final Answer: The final answer is ${shot['answer']}$. I hope it is correct.\n\n"
        for shot in json.loads(text)
    )
    params = SamplingParams(max_tokens=256, stop=("Problem:",))
    for row in read_rows(find_file(path, "test.jsonl")):
        answer = boxed_answer(row.text("solution"))
        if answer is None:
            row.place.refuse("the solution has no \\boxed{}")
        yield Question(
            id=str(row.index("idx", 1 << 20)),
            ask=Generate(prompt=f"{shots}Problem:\n{row.text('problem')}\n\nSolution:", params=params),
            target=answer,
            slice=row.text("type"),
        )


def _math500_questions(path: Path) -> Iterator[Question]:
    params = SamplingParams(max_tokens=1024)
    for row in read_rows(find_file(path, "math500.jsonl")):
        message = Message(role="user", content=row.text("prompt"))
        yield Question(
            id=str(row.place.line),
            ask=Generate(prompt=(message,), params=params),
            target=row.text("answer"),
        )


def _score_math(question: Question, answer: Answer) -> Mapping[str, float]:
    text = answer.completions[0].text
    final = _FINAL.search(text + "I hope it is correct.")
    said = final.group(1).strip() if final else None
    exact = said is not None and same_answer(said, question.target)
    boxed = boxed_answer(text)
    flexible = exact or (boxed is not None and same_answer(boxed, question.target))
    return {"exact_match": float(exact), "flexible": float(flexible)}


def _score_math500(question: Question, answer: Answer) -> Mapping[str, float]:
    boxed = boxed_answer(answer.completions[0].text)
    correct = boxed is not None and same_answer(boxed, question.target)
    return {"accuracy": float(correct), "boxed": float(boxed is not None)}


MATH: Final = Task(
    name="math",
    version=1,
    summary="competition maths, 4-shot Minerva prompt; the final answer compared as mathematics",
    folder="math",
    metric="exact_match",
    chance=0.0,
    questions=_math_questions,
    score=_score_math,
)
MATH500: Final = Task(
    name="math500",
    version=1,
    summary="competition maths in a conversation; the last boxed answer compared as mathematics",
    folder="math",
    metric="accuracy",
    chance=0.0,
    questions=_math500_questions,
    score=_score_math500,
)
TASKS: Final = (MATH, MATH500)
