"""Scorers against the packages that others use, where these are installed."""

import random

import pytest

from tokenmill.evals.rouge import rouge

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "The", "dog", "ran", "3.5", "km,")


def test_rouge_equals_the_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    draw = random.Random(0)
    for _ in range(500):
        left, right = (" ".join(draw.choices(WORDS, k=draw.randrange(40))) for _ in range(2))
        theirs = {name: score.fmeasure for name, score in scorer.score(left, right).items()}
        assert rouge(left, right) == pytest.approx(theirs, abs=1e-12)
