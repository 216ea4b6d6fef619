"""Speculation on 200 real prompts of 128 tokens, and the scorecard's line on equal answers; takes minutes."""

from pathlib import Path

import pytest

from scripts.scorecard import s14
from tests.model.identity import check_lookup
from tokenmill.models.store.directory import ModelDirectory


@pytest.mark.parametrize("max_batch", [1, 8])
def test_guessing_changes_no_token_of_200_prompts(model_dir: Path, max_batch: int) -> None:
    model = ModelDirectory.open(model_dir)
    check_lookup(model, num_prompts=200, num_tokens=128, max_batch=max_batch)


def test_random_engines_give_the_answers_of_the_oracle() -> None:
    line = s14.run(cases=10_000, seed=1, guard=True)
    assert line.violations == 0
    assert min(float(figure) for figure in line.figures.values()) > 0, line.figures


def test_every_control_is_seen() -> None:
    line = s14.run(cases=1_000, seed=3, guard=False)
    for control in s14.CONTROLS:
        assert line.figures[f"violations, {control}"], control
