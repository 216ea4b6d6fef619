"""MATH: which answers are the same, and what is taken as the answer."""

import time

import pytest

from tests.fast.eval_tools import data_folder, prompt_of, written
from tokenmill.evals.latex import boxed_answer, normalised, same_answer
from tokenmill.evals.tasks.maths import MATH, MATH500

SAME = [
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", r"2^{-1}"),
    ("x+y", "y + x"),
    (r"(x+1)^2", r"x^2+2x+1"),
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("[2,5)", r"\left[2, 5\right)"),
    ("(1,2)", r"(1, \frac42)"),
    (r"10\text{ cm}", "10"),
    ("1,000", "1000"),
    (r"90^\circ", "90"),
    (r"x = 5", "5"),
    (r"\$18.90", "18.90"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"3\pi", r"\pi \cdot 3"),
    (r"\sin^2 x + \cos^2 x", "1"),
    ("5!", "120"),
]
DIFFERENT = [
    ("1", "2"),
    (r"\frac12", r"\frac13"),
    ("(1,2)", "(2,1)"),
    ("[2,5)", "[2,5]"),
    ("(1,2)", "(1,2,3)"),
    ("x+1", "x+2"),
    ("x", "y"),
    ("1000000007", "1000000008"),
    (r"\text{tea}", r"\text{eat}"),
    ("", "1"),
    ("1,3", "13"),
    ("4,6", "46"),
    ("", ""),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_same_answers(left: str, right: str) -> None:
    assert same_answer(left, right)
    assert same_answer(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_answers(left: str, right: str) -> None:
    assert not same_answer(left, right)


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9^9}}}",
        "(" * 100_000,
        r"\sqrt" * 10_000,
        "-" * 10_000 + "1",
        r"\frac" * 10_000,
        "1" * 100_000,
        "100000!",
        r"\frac{1}{0}",
        "x_{" * 5000,
        "|" * 999,
    ],
)
def test_hostile_answers_take_no_time(text: str) -> None:
    started = time.monotonic()
    assert not same_answer(text, "7")
    assert time.monotonic() - started < 2


def test_the_last_boxed_answer_counts() -> None:
    assert boxed_answer(r"\boxed{1} so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed_answer(r"$\boxed 7$ is it") == "7"
    assert boxed_answer(r"\boxed{1") is None
    assert boxed_answer("none") is None
    assert normalised(r"\frac12 \text{ cm}") == r"\frac{1}{2}"


def test_the_prompt_ends_where_the_model_begins() -> None:
    question = next(iter(MATH.questions(data_folder("math"))))
    prompt = prompt_of(question)
    assert prompt.startswith("Problem:\nFind the domain of the expression  $")
    assert prompt.count("I hope it is correct.\n\nProblem:\n") == 4
    assert prompt.endswith("have?\n\nSolution:")
    assert question.target == "2"


def test_answers_are_read_strictly_and_flexibly() -> None:
    question = next(iter(MATH.questions(data_folder("math"))))
    said = {
        "So. Final Answer: The final answer is $2$. I hope it is correct.": (1.0, 1.0),
        r"It is $\boxed{2}$.": (0.0, 1.0),
        "Final Answer: The final answer is $3$. I hope it is correct.": (0.0, 0.0),
        "": (0.0, 0.0),
    }
    for text, (exact, flexible) in said.items():
        assert MATH.score(question, written(text)) == {"exact_match": exact, "flexible": flexible}


def test_every_reference_equals_itself() -> None:
    folder = data_folder("math")
    for question in MATH500.questions(folder):
        assert MATH500.score(question, written(rf"\boxed{{{question.target}}}"))["accuracy"] == 1.0
