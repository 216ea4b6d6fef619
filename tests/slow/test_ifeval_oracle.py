"""Verdicts on IFEval against the official checker as lm-evaluation-harness has it, on answers of many kinds.

Answers are written by rules that follow an instruction or break it, each alone and put together with others.
"""

import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.fast.eval_tools import data_folder, written
from tests.slow.ifeval_oracle import Oracle
from tokenmill.evals.data import read_rows
from tokenmill.evals.tasks.ifeval import IFEVAL
from tokenmill.evals.tasks.ifeval.checks import CHECKS, follows
from tokenmill.evals.tasks.ifeval.language import language_of

# Where the official checker asks models that were learned from text, and we do not. It takes scraps such as
# `word word` or `U.S.` for other languages than English.
LEAST = {
    "length_constraints:number_sentences": 0.98,
    "language:response_language": 0.97,
    "change_case:english_capital": 0.9,
    "change_case:english_lowercase": 0.9,
}
# Article 1 of the Universal Declaration of Human Rights.
ARTICLE: dict[str, str] = json.loads(Path(__file__).with_name("article_one.json").read_text("utf-8"))
MARKS = (
    "*", "**", "***", "******", "- ", "* ", "\n", "\n\n", "\n***\n", '"', "'", "[name]", "[a] [b]",
    "<<A title>>",
    "<< >>", "P.S. more", "p. p. s. more", "P.P.S", "My answer is no.", "Section 1", "SECTION 2",
    '{"a": [1, 2]}',
    "```json\n", "```", "NASA", "U.S.", "WELL-KNOWN", "DON'T", "(A.)", "e.g.", "Dr. Smith", "J. Doe", "1. ",
    "2.5",
    "...", "!!!", "?", ", and", ": ", "*high* **light**", "Audience 3", "PARAGRAPH 1",
)  # fmt: skip


def rows() -> list[Mapping[str, Any]]:
    return [dict(row.fields) for row in read_rows(data_folder("ifeval") / "input_data.jsonl")]


def near(arguments: Mapping[str, Any], draw: random.Random) -> str:
    """Text from what an instruction names, about as often as it asks."""
    words: list[str] = []
    for value in arguments.values():
        words += value if isinstance(value, list) else [value] if isinstance(value, str) else []
    numbers = [value for value in arguments.values() if isinstance(value, int)]
    times = max(0, (numbers[0] if numbers else 1) + draw.randrange(-1, 2))
    words += draw.sample(MARKS, 2)
    unit = draw.choice(["some text", draw.choice(words), draw.choice(words).upper(), f"{words[0]} 1"])
    return draw.choice([" ", "\n", "\n\n", "\n***\n", ". ", ", "]).join([unit] * min(times, 400))


def answers(row: Mapping[str, Any], prose: list[str], draw: random.Random, num: int) -> Iterator[str]:
    for _ in range(num):
        pieces = draw.choices(prose, k=draw.randrange(4)) + draw.choices(MARKS, k=draw.randrange(4))
        pieces += [near(each, draw) for each in row["kwargs"] if each and draw.random() < 0.8]
        pieces += [ARTICLE[draw.choice(list(ARTICLE))]] * (draw.random() < 0.05)
        draw.shuffle(pieces)
        text = draw.choice([" ", "\n", "\n\n", ""]).join(pieces)
        text = draw.choice([text, text, text, text.upper(), text.lower(), text.replace(",", ""), f'"{text}"'])
        yield text[: draw.choice([2000, 2000, 40])]


def is_random(row: Mapping[str, Any]) -> bool:
    """The official checker draws another letter for one that is none."""
    return any("letter" in each and not str(each["letter"]).isalpha() for each in row["kwargs"])


def test_the_official_checker_agrees(tmp_path: Path) -> None:
    logging.disable(logging.ERROR)
    oracle = Oracle(tmp_path)
    draw = random.Random(0)
    data = rows()
    prose = [piece for row in data for piece in row["prompt"].split("\n") if piece]
    questions = list(IFEVAL.questions(data_folder("ifeval")))
    seen, agreed, held = Counter[str](), Counter[str](), Counter[tuple[str, bool]]()
    for row, question in zip(data, questions, strict=True):
        if is_random(row):
            continue
        for text in answers(row, prose, draw, 12):
            strict, loose = oracle.verdicts(row, text)
            own = [follows(each["name"], each["arguments"], text) for each in question.target]
            scores = IFEVAL.score(question, written(text))
            for name, ours, theirs in zip(row["instruction_id_list"], own, strict, strict=True):
                seen[name] += 1
                agreed[name] += ours == theirs
                held[name, theirs] += 1
            if not LEAST.keys() & set(row["instruction_id_list"]):
                assert scores["prompt_strict"] == all(strict)
                assert scores["prompt_loose"] == all(loose)
                assert scores["followed_loose"] == sum(loose)
    share = {name: agreed[name] / seen[name] for name in seen}
    print(
        *(f"{name} {share[name]:.4f} {held[name, True]} of {seen[name]}" for name in sorted(seen)), sep="\n"
    )
    assert seen.keys() == CHECKS.keys()
    assert {name for name in seen if share[name] < LEAST.get(name, 1.0)} == set()
    assert {name for name in seen if not held[name, True] or not held[name, False]} == set()


def test_languages_are_those_of_langdetect(tmp_path: Path) -> None:
    oracle = Oracle(tmp_path)
    assert {code for code, text in ARTICLE.items() if oracle.language(text) != code} == set()
    assert {code for code, text in ARTICLE.items() if language_of(text) != code} == set()
