"""HumanEval and MBPP: pass@k in closed form, the prompts, and the data's own solutions in the sandbox."""

import gzip
import json
from math import comb
from pathlib import Path

import pytest

from tests.fast.eval_tools import data_folder, prompt_of, written
from tokenmill.core import UsageError
from tokenmill.evals.task import Generate
from tokenmill.evals.tasks.code import HUMANEVAL, HUMANEVAL_CHAT, MBPP, pass_at_k, sampled


def test_pass_at_k_is_the_closed_form() -> None:
    for n in range(1, 13):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), abs=1e-12)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    for bad in ((5, 6, 1), (5, 1, 6), (5, 1, 0)):
        with pytest.raises(UsageError):
            pass_at_k(*bad)


def solutions(folder: Path, name: str, field: str) -> dict[str, str]:
    with gzip.open(folder / name, "rt", encoding="utf-8") as file:
        return {str(row["task_id"]): row[field] for row in map(json.loads, file)}


def test_humaneval_solutions_pass_and_broken_ones_fail() -> None:
    folder = data_folder("humaneval")
    right = solutions(folder, "HumanEval.jsonl.gz", "canonical_solution")
    questions = list(HUMANEVAL.questions(folder))
    assert len(questions) == 120
    for question in questions[::30]:
        assert prompt_of(question) == question.target["prompt"]
        broken = "    return None\n"
        scores = HUMANEVAL.score(question, written(right[question.id], broken))
        assert scores == {"pass@1": 0.5, "pass@2": 1.0}


def test_humaneval_in_a_conversation() -> None:
    question = next(iter(HUMANEVAL_CHAT.questions(data_folder("humaneval"))))
    right = solutions(data_folder("humaneval"), "HumanEval.jsonl.gz", "canonical_solution")[question.id]
    block = f"Here it is:\n```python\n{question.target['prompt']}{right}\n```\nIt works."
    assert HUMANEVAL_CHAT.score(question, written(block)) == {"pass@1": 1.0}
    assert HUMANEVAL_CHAT.score(question, written("I cannot.")) == {"pass@1": 0.0}


def test_mbpp_prompts_and_solutions() -> None:
    folder = data_folder("mbpp")
    right = solutions(folder, "mbpp.jsonl.gz", "code")
    questions = list(MBPP.questions(folder))
    assert [question.id for question in questions] == [str(number) for number in range(11, 511)]
    prompt = prompt_of(questions[0])
    assert prompt.count("[BEGIN]\n") == 4
    assert prompt.count("\n[DONE]\n\n") == 3
    assert prompt.startswith(
        "You are an expert Python programmer, and here is your task: Write a function to find"
    )
    by_id = {question.id: question for question in questions}
    for number in ("11", "126", "300"):  # 126 is asked for a function named `sum`
        fenced = f"```python\n{right[number]}\n```"
        assert MBPP.score(by_id[number], written(fenced)) == {"pass@1": 1.0}
        assert MBPP.score(by_id[number], written("def nothing(): pass")) == {"pass@1": 0.0}


def test_samples_are_drawn_apart(tmp_path: Path) -> None:
    row = {
        "task_id": "a/1",
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": "def check(f): assert f() == 1",
    }
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(row))
    (question,) = sampled(HUMANEVAL, 4).questions(tmp_path)
    assert isinstance(question.ask, Generate)
    assert (question.ask.params.n, question.ask.params.temperature) == (4, 0.8)
    scores = HUMANEVAL.score(
        question, written("    return 1", "    return 2", "    return 2", "    return 2")
    )
    assert scores == {"pass@1": 0.25, "pass@2": 0.5, "pass@3": 0.75, "pass@4": 1.0}


@pytest.mark.parametrize(
    ("row", "why"),
    [("{", "no JSON"), ('{"task_id": "a"}', "prompt is missing"), ("[]", "JSON object")],
)
def test_bad_data_is_named_by_line(tmp_path: Path, row: str, why: str) -> None:
    (tmp_path / "HumanEval.jsonl").write_text(f"\n{row}\n")
    with pytest.raises(UsageError, match=rf"HumanEval.jsonl:2: .*{why}"):
        list(HUMANEVAL.questions(tmp_path))
