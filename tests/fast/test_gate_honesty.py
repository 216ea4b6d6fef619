"""The short form of `python -m scripts.gate_honesty`: rates hold, and wrong ways to judge are caught."""

import numpy as np
import pytest

from scripts import gate_honesty as honesty
from tokenmill.evals.statistics import items_needed

NUM_RUNS = 150


def test_the_two_errors_keep_their_rates() -> None:
    for num in (1, 20):
        draw = honesty.counts(200, -honesty.MARGIN)
        for row in honesty.errors("short", draw, num, NUM_RUNS):
            assert row.holds, row


def test_an_equal_candidate_passes_at_the_planned_size() -> None:
    for num in (1, 20):
        planned = items_needed(0.1, disagreement=0.1, num_candidates=num)
        rng = np.random.default_rng(num)
        alpha = 0.05 / num
        passed = sum(honesty.counts(planned, 0.0)(rng).p_above(-0.1) <= alpha for _ in range(NUM_RUNS))
        row = honesty.at_least("planned", passed, NUM_RUNS, 0.8)
        assert row.holds, row


def test_intervals_cover() -> None:
    rows = list(honesty.coverage_rows(20))
    assert len(rows) == 10
    for row in rows:
        assert row.holds, row


def test_wrong_ways_to_judge_are_caught() -> None:
    caught = {row.name: not row.holds for row in honesty.wrong_rows(NUM_RUNS)}
    assert caught == {name: True for name in caught}


@pytest.mark.parametrize(("hits", "holds"), [(5, True), (8, True), (25, False)])
def test_a_rate_that_is_broken_does_not_hold(hits: int, holds: bool) -> None:
    assert honesty.at_most("", hits, 100, 0.05).holds is holds
    assert honesty.at_least("", 100 - hits, 100, 0.95).holds is holds
