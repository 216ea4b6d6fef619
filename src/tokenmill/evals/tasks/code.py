"""HumanEval and MBPP: a model writes a function, hidden tests say whether it works.

Prompts and stops are those of lm-evaluation-harness (`humaneval` 1, `mbpp` 1). One thing is not: MBPP
answers inside of a code fence are read, where the harness's pattern takes the empty text in front of the
fence. Programs run in the sandbox, so what they print or leave behind does not count. With more samples a
question the metric is the unbiased pass@k of Chen et al. 2021 (arXiv:2107.03374).
"""

import builtins
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from tokenmill.core import Message, SamplingParams, UsageError
from tokenmill.evals.data import DataRow, find_file, read_rows
from tokenmill.evals.sandbox import run_python
from tokenmill.evals.task import Answer, Generate, Question, Task

__all__ = ["HUMANEVAL", "HUMANEVAL_CHAT", "MBPP", "TASKS", "pass_at_k", "sampled"]

_HUMANEVAL_STOPS: Final = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_MBPP_SHOTS: Final = (2, 3, 4)
_MBPP_TEST: Final = range(11, 511)
_MBPP_PROMPT: Final = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:"
    "\n\n"
    "{tests}\n[BEGIN]\n"
)
_DEFINED: Final = re.compile(r"^def (\w+)", re.MULTILINE)
_FENCED: Final = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Probability that at least one of `k` samples passes, estimated without bias from `num_samples` >= k.

    1 - C(n - c, k) / C(n, k), as a product that does not overflow.
    """
    if not 0 <= num_passed <= num_samples or not 1 <= k <= num_samples:
        raise UsageError(
            f"pass@{k} of {num_passed} in {num_samples} samples is not defined",
            hint="use 1 <= k <= n, 0 <= c <= n",
        )
    missed = 1.0
    for i in range(num_samples - num_passed + 1, num_samples + 1):
        missed *= max(0.0, 1.0 - k / i)
    return 1.0 - missed if num_samples - num_passed >= k else 1.0


def sampled(task: Task, n: int, *, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0) -> Task:
    """The task with `n` samples a question instead of the greedy one; its metrics are pass@1 up to pass@n."""

    def questions(folder: Path) -> Iterator[Question]:
        for index, question in enumerate(task.questions(folder)):
            assert isinstance(question.ask, Generate)
            params = replace(
                question.ask.params, n=n, temperature=temperature, top_p=top_p, seed=seed + index
            )
            yield replace(question, ask=replace(question.ask, params=params))

    return replace(task, name=f"{task.name}-n{n}", questions=questions)


def _humaneval_questions(path: Path) -> Iterator[Question]:
    params = SamplingParams(max_tokens=1024, stop=_HUMANEVAL_STOPS)
    for row in read_rows(find_file(path, "HumanEval.jsonl")):
        prompt, entry_point = row.text("prompt"), row.text("entry_point")
        if not entry_point.isidentifier():
            row.place.refuse(f"entry_point is {entry_point!r}, expected a name")
        yield Question(
            id=row.text("task_id"),
            ask=Generate(prompt=prompt, params=params),
            target={
                "prompt": prompt,
                "tests": f"{row.text('test')}\ncheck({entry_point})",
                "meant": [entry_point],
            },
        )


def _chat_questions(path: Path) -> Iterator[Question]:
    for question in _humaneval_questions(path):
        prompt = question.target["prompt"]
        content = (
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{prompt}\n```\n"
        )
        message = Message(role="user", content=content)
        yield replace(question, ask=Generate(prompt=(message,), params=SamplingParams(max_tokens=1024)))


def _mbpp_questions(path: Path) -> Iterator[Question]:
    file = find_file(path, "mbpp.jsonl")
    rows = {_mbpp_number(row): row for row in read_rows(file)}
    missing = [number for number in _MBPP_SHOTS if number not in rows]
    if missing:
        raise UsageError(
            f"{file} has no task_id {missing[0]}, which is an example", hint="give the whole of MBPP"
        )
    shots = "".join(f"{_mbpp_prompt(rows[n])}{rows[n].text('code')}\n[DONE]\n\n" for n in _MBPP_SHOTS)
    params = SamplingParams(max_tokens=256, stop=("[DONE]",))
    for number in _MBPP_TEST:
        if number in rows:
            row = rows[number]
            tests = "\n".join(row.texts("test_list", least=1))
            meant = [name for name in _DEFINED.findall(row.text("code")) if hasattr(builtins, name)]
            yield Question(
                id=str(number),
                ask=Generate(prompt=shots + _mbpp_prompt(row), params=params),
                target={"prompt": "", "tests": f"{_setup(row)}\n{tests}", "meant": meant},
            )


def _setup(row: DataRow) -> str:
    """Code that the tests of an item need first; most have none."""
    return str(row.fields.get("test_setup_code") or "")


def _mbpp_number(row: DataRow) -> int:
    return row.index("task_id", 1 << 20)


def _mbpp_prompt(row: DataRow) -> str:
    return _MBPP_PROMPT.format(text=row.text("text"), tests="\n".join(row.texts("test_list", least=1)[:3]))


def _as_it_is(text: str) -> str:
    return text


def _first_block(text: str) -> str:
    """The first fenced block; without a whole one what stands before a fence."""
    match = _FENCED.search(text)
    return match.group(1) if match else text.partition("```")[0]


def _redefined(text: str) -> str:
    """A block that defines the whole function again, after what the problem began with."""
    return "\n" + _first_block(text)


def _score(question: Question, answer: Answer, *, extract: Callable[[str], str]) -> Mapping[str, float]:
    """pass@1 up to pass@n of the n samples; equal samples are run once."""
    programs = [question.target["prompt"] + extract(completion.text) for completion in answer.completions]
    tests, meant = question.target["tests"], question.target["meant"]
    passed = {program: run_python(program, tests, meant=meant).passed for program in set(programs)}
    num_passed = sum(passed[program] for program in programs)
    num_samples = len(programs)
    return {f"pass@{k}": pass_at_k(num_samples, num_passed, k) for k in range(1, num_samples + 1)}


HUMANEVAL: Final = Task(
    name="humaneval",
    version=1,
    summary="complete a Python function from its docstring; hidden tests run in the sandbox",
    folder="humaneval",
    metric="pass@1",
    chance=0.0,
    questions=_humaneval_questions,
    score=partial(_score, extract=_as_it_is),
)
HUMANEVAL_CHAT: Final = replace(
    HUMANEVAL,
    name="humaneval-chat",
    summary="the same in a conversation; the first block of code of the answer counts",
    questions=_chat_questions,
    score=partial(_score, extract=_redefined),
)
MBPP: Final = Task(
    name="mbpp",
    version=1,
    summary="write a Python function from a sentence and three tests, 3-shot; tests run in the sandbox",
    folder="mbpp",
    metric="pass@1",
    chance=0.0,
    questions=_mbpp_questions,
    score=partial(_score, extract=_first_block),
)
TASKS: Final = (HUMANEVAL, HUMANEVAL_CHAT, MBPP)
