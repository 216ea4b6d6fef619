"""Intervals, paired tests, verdicts and plans: closed forms, known tables, every outcome enumerated."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.core import UsageError
from tokenmill.evals.statistics import (
    Interval,
    MeanBootstrap,
    PairedCounts,
    chance_corrected,
    cost_per_pass,
    exact_interval,
    holm,
    items_needed,
    mcnemar,
    mean_interval,
    noise_floor,
    paired,
    provable_margin,
    quantile_interval,
    ratio_interval,
    retention,
    verdict,
    verdicts,
    wilson_interval,
)
from tokenmill.evals.statistics.interval import binomial_tail


def coverage(maker: Callable[[int, int], Interval], num: int, share: float) -> float:
    """How probable it is that the interval holds the share: a sum over all outcomes."""
    total = 0.0
    for hits in range(num + 1):
        found = maker(hits, num)
        if found.low <= share <= found.high:
            total += math.comb(num, hits) * share**hits * (1 - share) ** (num - hits)
    return total


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.01, 0.99))
def test_the_binomial_tail_is_the_sum_of_its_terms(first: int, rest: int, share: float) -> None:
    num = first + rest
    terms = [math.comb(num, k) * share**k * (1 - share) ** (num - k) for k in range(first, num + 1)]
    assert binomial_tail(first, num, share) == pytest.approx(math.fsum(terms), rel=1e-10, abs=1e-14)


def test_known_intervals() -> None:
    # 8 of 10: Wilson's closed form and the published exact interval.
    found = wilson_interval(8, 10)
    assert (found.low, found.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    found = exact_interval(8, 10)
    assert (found.low, found.high) == pytest.approx((0.443905, 0.974789), abs=1e-6)
    # 0 of n has the closed form 1 - (alpha / 2) ** (1 / n).
    assert exact_interval(0, 30).high == pytest.approx(1 - 0.025 ** (1 / 30), abs=1e-9)
    assert exact_interval(30, 30).low == pytest.approx(0.025 ** (1 / 30), abs=1e-9)
    assert (wilson_interval(0, 0).low, wilson_interval(0, 0).high) == (0.0, 1.0)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.37, 0.5, 0.85, 0.99])
def test_the_exact_interval_never_covers_too_little(share: float) -> None:
    assert coverage(exact_interval, 40, share) >= 0.95


def test_wilson_covers_on_average() -> None:
    shares = np.linspace(0.005, 0.995, 100)
    mean = np.mean([coverage(wilson_interval, 40, float(share)) for share in shares])
    assert 0.945 < mean < 0.96


@given(st.integers(1, 200), st.data())
def test_the_exact_interval_holds_wilsons_estimate(num: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, num))
    for found in (exact_interval(hits, num), wilson_interval(hits, num)):
        assert 0 <= found.low <= hits / num <= found.high <= 1
    mirrored = exact_interval(num - hits, num)
    assert exact_interval(hits, num).low == pytest.approx(1 - mirrored.high, abs=1e-9)


@pytest.mark.parametrize(("num", "quantile"), [(100, 0.5), (400, 0.99), (1000, 0.99), (50, 0.9)])
def test_quantile_ranks_cover_exactly(num: int, quantile: float) -> None:
    found = quantile_interval(np.arange(1, num + 1, dtype=np.float64), quantile)
    low = int(found.low) if math.isfinite(found.low) else 0
    high = int(found.high) if math.isfinite(found.high) else num + 1
    # X_(low) <= q and q < X_(high): the number of values below q is in [low, high).
    covered = binomial_tail(low, num, quantile) - binomial_tail(high, num, quantile)
    assert covered >= 0.95
    # One rank less on either side would be too little.
    assert binomial_tail(low + 1, num, quantile) < 0.975
    assert high > num or binomial_tail(high - 1, num, quantile) > 0.025


def test_a_p99_of_few_values_has_no_upper_end() -> None:
    assert quantile_interval(np.arange(367.0), 0.99).high == math.inf
    assert "368 are needed" in quantile_interval(np.arange(367.0), 0.99).note
    assert quantile_interval(np.arange(368.0), 0.99).high == 367.0
    assert quantile_interval([5.0], 0.5).to_json()["high"] is None
    with pytest.raises(UsageError, match="of 0 values"):
        quantile_interval([], 0.5)


def test_mcnemar_is_the_sign_test() -> None:
    # Fagerland, Lydersen and Laake 2013, table 1: 1 and 7 of 21 pairs.
    assert mcnemar(1, 7).exact == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar(1, 7).mid == pytest.approx(0.0391, abs=5e-5)
    assert mcnemar(4, 4) == (1.0, 1.0)
    assert mcnemar(0, 0) == (1.0, 1.0)
    assert mcnemar(3, 9) == mcnemar(9, 3)


@pytest.mark.parametrize("disagreement", [0.11, 0.16, 0.3])
@pytest.mark.parametrize("alpha", [0.05, 0.0025])
def test_the_paired_test_keeps_its_rate_for_every_share_of_disagreement(
    disagreement: float, alpha: float
) -> None:
    # Every outcome of 60 pairs whose difference is exactly at the margin, by its probability.
    num, margin = 60, 0.1
    shares = ((disagreement - margin) / 2, (disagreement + margin) / 2)
    passed = failed = 0.0
    for wins, losses in itertools.product(range(26), range(34)):
        same = num - wins - losses
        if same < 0:
            continue
        ways = math.comb(num, wins) * math.comb(num - wins, losses)
        chance = ways * shares[0] ** wins * shares[1] ** losses * (1 - disagreement) ** same
        if chance < 1e-9:
            continue
        counts = PairedCounts(wins, losses, num)
        passed += chance * (counts.p_above(-margin) <= alpha)
        failed += chance * (counts.p_below(-margin) <= alpha)
    assert passed <= alpha
    assert failed <= alpha
    assert passed > alpha / 20, "a test that never passes anything is no test"


def test_without_any_disagreement_the_p_value_is_at_least_what_losses_hide_with() -> None:
    for num in (50, 149, 400):
        assert 0.98**num <= PairedCounts(0, 0, num).p_above(-0.02) <= 3 * 0.98**num
    assert PairedCounts(0, 0, 148).p_above(-0.02) > 0.05 > PairedCounts(0, 0, 149).p_above(-0.02)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 100), st.floats(-0.3, 0.3))
@settings(max_examples=40, deadline=None)
def test_the_paired_test_is_the_same_from_either_side(
    wins: int, losses: int, same: int, value: float
) -> None:
    counts = PairedCounts(wins, losses, wins + losses + same + 1)
    turned = PairedCounts(losses, wins, wins + losses + same + 1)
    assert counts.p_above(value) == turned.p_below(-value)
    assert counts.interval(0.95).low == pytest.approx(-turned.interval(0.95).high, abs=1e-9)
    found = counts.interval(0.95)
    assert -1 <= found.low <= counts.mean <= found.high <= 1


def test_tangos_interval_is_the_published_one() -> None:
    # Tango 1998: 43 pairs of which one disagrees.
    found = PairedCounts(0, 1, 43).interval(0.95)
    assert (found.low, found.high) == pytest.approx((-0.1212, 0.0610), abs=2e-3)


def test_large_counts_agree_with_the_sum() -> None:
    exact = PairedCounts(1950, 2010, 20000).p_above(-0.01)
    score = PairedCounts(1980, 2041, 20000).p_above(-0.01)
    assert exact == pytest.approx(score, rel=0.25)


def test_the_bootstrap_of_a_normal_mean_is_students() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=200)
    found = mean_interval(values, seed=3)
    half = 1.972 * values.std(ddof=1) / math.sqrt(200)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert mean_interval(values, seed=3) == found
    assert mean_interval(values, seed=4) != found


def test_bootstrap_chunks_do_not_change_their_moments() -> None:
    # One cluster size, more clusters than a chunk holds: the memory is bounded, the figure is the same kind.
    values = np.random.default_rng(2).exponential(size=200_000)
    found = MeanBootstrap.of(values, num_resamples=60).interval(0.8)
    assert found.low < values.mean() < found.high
    assert found.high - found.low == pytest.approx(2 * 1.2816 / math.sqrt(200_000), rel=0.4)


def test_copies_in_a_cluster_add_nothing() -> None:
    values = np.random.default_rng(5).normal(size=60)
    alone = mean_interval(values, list(range(60)), seed=1)
    copied = mean_interval(np.repeat(values, 9), np.repeat(np.arange(60), 9).tolist(), seed=1)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
    as_if_alone = mean_interval(np.repeat(values, 9), seed=1)
    assert as_if_alone.high - as_if_alone.low < 0.5 * (copied.high - copied.low)


def test_means_of_odd_data() -> None:
    assert mean_interval([0.0, 1.0, 1.0]).method == "wilson"
    assert mean_interval([0.5], bounds=(0.0, 1.0)).high == 1.0
    assert mean_interval([2.5]).high == math.inf
    assert "equal" in mean_interval([2.5] * 20).note
    for bad in ([], [math.nan], [math.inf]):
        with pytest.raises(UsageError, match="finite"):
            mean_interval(bad)
    with pytest.raises(UsageError, match="2 values, 1 clusters"):
        mean_interval([1.0, 2.0], ["a"])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts_in_words() -> None:
    passed = verdict(PairedCounts(20, 21, 1000), margin=0.02)
    assert passed.outcome == "pass"
    assert passed.words.startswith("pass: at most 0.0")
    failed = verdict(PairedCounts(10, 80, 1000), margin=0.02)
    assert failed.outcome == "fail"
    undecided = verdict(PairedCounts(8, 14, 300), margin=0.02)
    assert undecided.outcome == "undecided"
    assert undecided.more_items is None
    undecided = verdict(PairedCounts(10, 10, 300), margin=0.02)
    assert undecided.more_items == items_needed(0.02, disagreement=20 / 300) - 300
    assert f"undecided: about {undecided.more_items} more items needed" in undecided.words
    assert verdict(PairedCounts(0, 0, 10), margin=0.02).outcome == "undecided"


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.1, math.nan])
def test_a_margin_must_mean_something(margin: float) -> None:
    with pytest.raises(UsageError, match="margin"):
        verdict(PairedCounts(1, 1, 10), margin=margin)


def test_verdict_and_bounds_agree() -> None:
    for wins, losses in ((10, 12), (20, 31), (4, 30)):
        found = verdict(PairedCounts(wins, losses, 700), margin=0.02, num_candidates=3)
        assert (found.outcome == "pass") == (found.lower > -0.02)
        assert (found.outcome == "fail") == (found.upper < -0.02)


def test_many_candidates_need_more_proof() -> None:
    one = PairedCounts(18, 20, 500)
    assert verdict(one, margin=0.03).outcome == "pass"
    assert verdict(one, margin=0.03, num_candidates=20).outcome == "undecided"
    # Holm's second step is easier than Bonferroni's: the first that passes is counted off.
    strong, weak = PairedCounts(30, 10, 500), PairedCounts(18, 21, 500)
    assert 0.025 < verdict(weak, margin=0.03).p_pass < 0.05
    found = verdicts({"strong": strong, "weak": weak}, margin=0.03)
    assert found["strong"].alpha == pytest.approx(0.025)
    assert found["weak"].alpha == pytest.approx(0.05)
    assert found["weak"].outcome == "pass"


def test_no_difference_seen_in_graded_items_is_not_proof() -> None:
    few = paired(np.full(50, 0.4), np.full(50, 0.4))
    assert verdict(few, margin=0.05).outcome == "undecided"
    many = paired(np.full(90, 0.4), np.full(90, 0.4))
    assert verdict(many, margin=0.05).outcome == "pass"


def test_pairs_choose_their_test() -> None:
    assert isinstance(paired([1, 0, 1], [0, 0, 1]), PairedCounts)
    assert isinstance(paired([1, 0.5, 1], [0, 0, 1]), MeanBootstrap)
    assert isinstance(paired([1, 0, 1], [0, 0, 1], ["a", "a", "b"]), MeanBootstrap)
    with pytest.raises(UsageError, match="3 and 2 items"):
        paired([1, 0, 1], [1, 0])


def test_plans() -> None:
    # z = 1.645 + 0.842: about 2.486 ** 2 * disagreement / margin ** 2, and some for the steps of a count.
    assert items_needed(0.02, disagreement=0.1) == pytest.approx(2.486**2 * 0.1 / 0.02**2, rel=0.08)
    assert 149 <= items_needed(0.02, disagreement=0.0) <= 200
    assert items_needed(0.02, disagreement=0.1, num_candidates=20) > items_needed(0.02, disagreement=0.1)
    with pytest.raises(UsageError, match="no plan"):
        items_needed(0.02, disagreement=0.1, difference=-0.02)
    with pytest.raises(UsageError, match="prove nothing"):
        provable_margin(3, disagreement=0.1)


@given(st.integers(40, 5000), st.floats(0.0, 0.5))
@settings(max_examples=30, deadline=None)
def test_a_provable_margin_needs_that_many_items(num: int, disagreement: float) -> None:
    margin = provable_margin(num, disagreement=disagreement)
    assert items_needed(margin * 1.001, disagreement=disagreement) <= num
    assert items_needed(margin * 0.98, disagreement=disagreement) >= num


def test_chance_correction() -> None:
    found = chance_corrected(wilson_interval(70, 100), 0.25)
    assert found.estimate == pytest.approx((0.7 - 0.25) / 0.75)
    assert found.low == pytest.approx((wilson_interval(70, 100).low - 0.25) / 0.75)
    with pytest.raises(UsageError, match="chance"):
        chance_corrected(found, 1.0)


def test_the_ratio_of_independent_normals_is_fiellers() -> None:
    def normal(mean: float, error: float) -> Interval:
        low, high = mean - 1.96 * error, mean + 1.96 * error
        return Interval(estimate=mean, low=low, high=high, confidence=0.95, method="normal")

    found = ratio_interval(normal(10.0, 1.0), normal(5.0, 0.5))
    # Fieller: the roots of (10 - 5 r)^2 = 1.96^2 (1 + 0.25 r^2).
    a, b, c = 25 - 1.96**2 * 0.25, -100.0, 100 - 1.96**2
    root = math.sqrt(b * b - 4 * a * c)
    assert (found.low, found.high) == pytest.approx(((-b - root) / (2 * a), (-b + root) / (2 * a)))
    assert ratio_interval(normal(10.0, 1.0), normal(1.0, 0.9)).high == math.inf
    assert math.isnan(ratio_interval(normal(10.0, 1.0), normal(-1.0, 0.1)).estimate)
    below = ratio_interval(normal(-1.0, 1.0), normal(5.0, 0.5))
    assert below.low < -0.2 < below.high


def test_cost_per_pass() -> None:
    found = cost_per_pass(np.full(100, 0.002), [1.0] * 50 + [0.0] * 50)
    share = wilson_interval(50, 100)
    assert found.estimate == pytest.approx(0.004)
    assert (found.low, found.high) == pytest.approx((0.002 / share.high, 0.002 / share.low), rel=1e-6)
    nothing = cost_per_pass(np.full(100, 0.002), np.zeros(100))
    assert math.isnan(nothing.estimate)
    assert nothing.low == pytest.approx(0.002 / exact_interval(0, 100).high)
    assert nothing.high == math.inf
    assert "none of 100" in nothing.note
    assert nothing.to_json()["estimate"] is None
    with pytest.raises(UsageError, match="costs and passes"):
        cost_per_pass([1.0], [0.5])


def test_retention() -> None:
    rng = np.random.default_rng(0)
    teacher = (rng.random(2000) < 0.8).astype(float)
    assert retention(teacher, teacher, chance=0.25).estimate == 1.0
    same = retention(teacher, teacher, chance=0.25)
    assert same.high - same.low < 0.01, "a student that is its teacher keeps all of it"
    student = np.where(rng.random(2000) < 0.9, teacher, 0.0)
    found = retention(student, teacher, chance=0.25)
    assert found.low < (0.72 - 0.25) / 0.55 < found.high
    assert "not above zero" in retention(student, np.zeros(2000), chance=0.25).note


def test_noise_floor() -> None:
    first, second = np.zeros(200), np.zeros(200)
    second[:10] = 1.0
    found = noise_floor(first, second)
    assert found.flips.estimate == 0.05
    assert found.flips == found.size
    assert noise_floor(first, first).flips.low == 0.0
