"""BFCL: which functions would you call, with which arguments?

Five single-turn categories of the Berkeley Function Calling Leaderboard (v4): one function or several on
offer, one call or several wanted, and questions of real users. The functions are described in the system
prompt, in the prompting mode of BFCL, so that models without a tool format are asked the same. Multi-turn
is not covered.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tokenmill.core import Message, SamplingParams, UsageError
from tokenmill.evals.data import DataRow, find_file, read_lines
from tokenmill.evals.function_calls import calls_match, parse_calls
from tokenmill.evals.task import Answer, Generate, Question, Task

__all__ = ["BFCL", "TASKS"]

_CATEGORIES: Final = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple")
_SYSTEM: Final = """\
You are an expert in composing functions. You are given a question and a set of possible functions. Based on \
the question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the functions can be used, point it out. If the given question lacks the parameters required by \
the function, also point it out.
You should only return the function calls in your response.

If you decide to invoke any of the function(s), you MUST put it in the format of \
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]
You SHOULD NOT include any other text in the response.

Here is a list of functions in JSON format that you can invoke.
"""


def _questions(path: Path) -> Iterator[Question]:
    params = SamplingParams(max_tokens=512)
    for category in _CATEGORIES:
        name = f"BFCL_v4_{category}.json"
        accepted = {row.text("id"): row for row in _json_lines(find_file(path / "possible_answer", name))}
        for row in _json_lines(find_file(path, name)):
            if row.text("id") not in accepted:
                row.place.refuse(f"there is no possible answer to {row.text('id')!r}")
            functions = _objects(row, "function")
            yield Question(
                id=row.text("id"),
                ask=Generate(prompt=_messages(row, functions), params=params),
                target={
                    "functions": functions,
                    "accepted": _objects(accepted[row.text("id")], "ground_truth"),
                },
                slice=category,
            )


def _messages(row: DataRow, functions: list[Any]) -> tuple[Message, ...]:
    turns = row.fields.get("question")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], list):
        row.place.refuse("question is not one turn of messages")
    try:
        messages = [Message(role=each["role"], content=each["content"]) for each in turns[0]]
    except (KeyError, TypeError, UsageError) as error:
        row.place.refuse(f"question has a bad message ({error})")
    system = _SYSTEM + json.dumps(functions, ensure_ascii=False) + "\n"
    if messages and messages[0].role == "system":
        system += f"\n{messages.pop(0).content}"
    return (Message(role="system", content=system), *messages)


def _json_lines(path: Path) -> Iterator[DataRow]:
    """The rows of a file that is named .json and has an object a line."""
    for place, line in read_lines(path):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                place.refuse(f"is no JSON ({error})")
            if not isinstance(value, dict):
                place.refuse("is no JSON object")
            yield DataRow(value, place)


def _objects(row: DataRow, name: str) -> list[Any]:
    values = row.fields.get(name)
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        row.place.refuse(f"{name} is no list of JSON objects")
    return values


def _score(question: Question, answer: Answer) -> Mapping[str, float]:
    try:
        calls = parse_calls(answer.completions[0].text)
    except UsageError:
        return {"accuracy": 0.0, "parsed": 0.0}
    correct = calls_match(calls, question.target["functions"], question.target["accepted"])
    return {"accuracy": float(correct), "parsed": 1.0}


BFCL: Final = Task(
    name="bfcl",
    version=1,
    summary="function calls compared in structure with accepted ones; five single-turn categories",
    folder="bfcl",
    metric="accuracy",
    chance=0.0,
    questions=_questions,
    score=_score,
)
TASKS: Final = (BFCL,)
