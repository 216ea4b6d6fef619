"""Verdicts from lines alone: luck among many, slices, bars; and the choice among what passes."""

from dataclasses import replace

import numpy as np
import pytest

from tokenmill.evals.statistics import PairedCounts, verdict
from tokenmill.optimize.choice import choose, pareto, usd
from tokenmill.optimize.records import Figures, Item, Range, from_json, to_json
from tokenmill.optimize.verdict import Bar, Gate, ShareAbove, judge_all

NUM_ROWS = 300
LINE = Item(
    candidate="c",
    id="0",
    slice="",
    cluster="",
    score=1.0,
    passed=True,
    incumbent_score=1.0,
    incumbent_passed=True,
    usd=1e-6,
    incumbent_usd=1e-4,
    e2e_s=0.1,
    ttft_s=0.05,
    num_input_tokens=10,
    num_output_tokens=4,
    probability=0.9,
    answer="x",
)
FIGURES = Figures(
    num_items=10,
    num_errors=0,
    concurrency=4,
    quality=Range(estimate=0.9, low=0.8, high=0.95),
    pass_share=Range(estimate=0.9, low=0.8, high=0.95),
    p50_ms=Range(estimate=10.0, low=9.0, high=11.0),
    p99_ms=Range(estimate=30.0, low=20.0),
    ttft_p50_ms=None,
    ttft_p99_ms=None,
    requests_per_s=10.0,
    output_tokens_per_s=100.0,
    joules_per_token=None,
    joules_per_pass=None,
    energy_label="not measured",
    energy_note="",
    usd_per_request=Range(estimate=1e-6, low=0.9e-6, high=1.1e-6),
    usd_per_pass=Range(estimate=1e-6, low=0.9e-6, high=1.1e-6),
    usd_per_million_out=0.1,
    memory_bytes=1,
    artefact_bytes=1,
    slo_share=None,
    slo_kept=None,
    levels=(),
)


def lines(
    name: str, scores: "np.ndarray[tuple[int], np.dtype[np.float64]]", *, slice: str = ""
) -> list[Item]:
    return [
        replace(LINE, candidate=name, id=f"{slice}{at}", slice=slice, score=float(each), passed=bool(each))
        for at, each in enumerate(scores)
    ]


def drawn(rng: np.random.Generator, loss: float) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return (rng.random(NUM_ROWS) >= loss).astype(float)


def test_good_by_chance_among_twenty_is_rejected() -> None:
    """Twenty candidates that are truly worse by just more than the margin: hardly ever does one pass, but one
    of them mostly would if each were judged alone."""
    rng = np.random.default_rng(7)
    num_runs, margin = 40, 0.05
    lucky = lucky_alone = 0
    for _ in range(num_runs):
        answers = {f"c{at}": drawn(rng, 0.0501) for at in range(20)}
        found = judge_all(
            [item for name, scores in answers.items() for item in lines(name, scores)],
            Bar(margin=margin),
            {},
            {},
        )
        lucky += any(each.outcome == "pass" for each in found.values())
        alone = [PairedCounts(0, int(NUM_ROWS - scores.sum()), NUM_ROWS) for scores in answers.values()]
        lucky_alone += any(verdict(each, margin=margin).outcome == "pass" for each in alone)
    assert lucky <= 4, "the best of twenty is no luckier than one"
    assert lucky_alone >= 10, "without the correction it would be"


def test_a_slice_that_is_worse_decides_and_a_small_one_does_not() -> None:
    items = [*lines("c", np.ones(400), slice="large"), *lines("c", np.ones(5), slice="small")]
    found = judge_all(items, Bar(margin=0.05), {}, {})["c"]
    assert found.outcome == "pass"
    assert {each.slice: each.verdict.outcome for each in found.slices} == {
        "large": "pass",
        "small": "undecided",
    }
    worse = [*lines("c", np.ones(2000), slice="large"), *lines("c", np.zeros(30), slice="small")]
    found = judge_all(worse, Bar(margin=0.05), {}, {})["c"]
    assert found.overall.outcome == "pass" and found.outcome == "fail"
    assert found.reasons[0].startswith("the slice small is worse: fail: at least")


def test_rows_that_hang_together_count_once() -> None:
    alone = lines("c", np.ones(200))
    together = [replace(each, cluster=f"{at // 40}") for at, each in enumerate(alone)]
    bar = Bar(margin=0.05)
    assert judge_all(alone, bar, {}, {})["c"].outcome == "pass"
    assert judge_all(together, bar, {}, {})["c"].outcome == "undecided"


def test_a_gate_that_does_not_hold_is_no_pass() -> None:
    items = lines("c", np.ones(400))
    for outcome in ("fail", "undecided"):
        gates = {"c": [Gate("terms", outcome, "because")]}
        found = judge_all(items, Bar(margin=0.05), {}, gates)["c"]
        assert found.outcome == outcome and found.reasons == ("because",)


@pytest.mark.parametrize(("num_right", "outcome"), [(290, "pass"), (272, "undecided"), (200, "fail")])
def test_an_absolute_bar(num_right: int, outcome: str) -> None:
    scores = np.concatenate([np.ones(num_right), np.zeros(300 - num_right)])
    found = judge_all(lines("c", scores), Bar(margin=0.02, absolute=0.9), {}, {})["c"]
    assert found.outcome == outcome


def test_a_share_above_a_bar_keeps_its_errors() -> None:
    """At the bar itself it is passed and failed in at most a twentieth of draws each."""
    rng = np.random.default_rng(3)
    found = [ShareAbove(int(each), 200, 0.9) for each in rng.binomial(200, 0.9, 2000)]
    assert np.mean([each.p_above(0.0) <= 0.05 for each in found]) <= 0.06
    assert np.mean([each.p_below(0.0) <= 0.05 for each in found]) <= 0.06
    assert found[0].lower(0.05) < found[0].mean < found[0].upper(0.05)


def test_the_choice_is_by_cost_a_passing_answer() -> None:
    items = [item for name in ("dear", "cheap", "odd") for item in lines(name, np.ones(400))]
    judged = judge_all(items, Bar(margin=0.05), {}, {})
    cost = {"dear": 5e-6, "cheap": 1e-6, "odd": None}
    figures = {
        name: replace(FIGURES, usd_per_pass=Range(estimate=usd, low=usd, high=usd))
        for name, usd in cost.items()
    }
    found = choose(judged, figures, Range(estimate=1e-4, low=1e-4, high=1e-4))
    assert found.winner == "cheap" and found.saving == pytest.approx(0.99)
    assert "costs more" in found.lost["dear"] and "not proven cheaper" in found.lost["odd"]
    assert choose(judged, figures, Range(estimate=1e-7, low=1e-7, high=1e-7)).winner == ""
    assert choose(judged, figures, None).winner == "cheap"
    assert choose({}, {}, None).why == "keep the incumbent: no candidate passes"


def test_a_pareto_front_has_no_point_that_another_beats() -> None:
    points = {"a": (1.0, 0.5), "b": (2.0, 0.9), "c": (3.0, 0.8), "d": (2.0, 0.9), "e": (0.5, 0.1)}
    assert pareto(points) == {"a", "b", "d", "e"}


def test_records_come_back_as_they_went() -> None:
    assert from_json(Item, to_json(LINE), "here") == LINE
    assert from_json(Figures, to_json(FIGURES), "here") == FIGURES


def test_dollars_are_short_however_small() -> None:
    assert [usd(each) for each in (None, 1234.5, 0.0123, 0.0000012)] == [
        "unknown",
        "$1,234.50",
        "$0.0123",
        "$1.20e-06",
    ]
