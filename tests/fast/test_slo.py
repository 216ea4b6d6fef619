"""Objectives: which calls are good, and what burn rates they give over which window."""

import pytest

from tokenmill.core import FinishReason, Tier, UsageError
from tokenmill.server.slo import SLOT_S, WINDOWS_S, CallTimes, SloConfig, SloObjective, SloTracker


def call(
    *,
    ttft_s: float | None = 0.1,
    total_s: float = 1.0,
    finish: FinishReason = "completed",
    model: str = "a",
    tier: Tier = "standard",
    num_output_tokens: int = 10,
) -> CallTimes:
    return CallTimes(model, tier, finish, ttft_s, total_s, num_output_tokens)


def tracker(**objective: float | str) -> SloTracker:
    return SloTracker(SloConfig(objectives=(SloObjective(**objective),)))  # type: ignore[arg-type]


def test_a_share_of_slow_calls_burns_as_much_as_it_is_of_the_room() -> None:
    slow = tracker(percentile=99.0, ttft_ms=200.0)
    for number in range(100):
        slow.add(call(ttft_s=0.3 if number < 2 else 0.2), now_s=1000.0)
    (burn,) = slow.burns(1000.0)
    assert burn.rates == pytest.approx((2.0, 2.0, 2.0)) and burn.num_calls == (100, 100, 100)
    assert burn.name == "ttft <= 200 ms for 99 %"


def test_the_limit_itself_is_good_and_the_next_microsecond_is_not() -> None:
    judged = tracker(percentile=50.0, e2e_ms=1000.0)
    judged.add(call(total_s=1.0), 0.0)
    assert judged.burns(0.0)[0].rates[0] == 0.0
    judged.add(call(total_s=1.000001), 0.0)
    assert judged.burns(0.0)[0].rates[0] == pytest.approx(1.0)


def test_windows_forget_what_is_older_than_they_are() -> None:
    judged = tracker(availability=99.0)
    judged.add(call(finish="failed"), 0.0)
    for window in WINDOWS_S:
        at = WINDOWS_S.index(window)
        assert judged.burns(window - SLOT_S)[0].rates[at] == pytest.approx(100.0)
        assert judged.burns(window + SLOT_S)[0].rates[at] is None


def test_six_hours_of_any_load_keep_a_bounded_number_of_slots() -> None:
    judged = tracker(availability=99.9)
    for second in range(0, 8 * 3600, 5):
        judged.add(call(finish="expired" if second < 3600 else "length"), float(second))
    (burn,) = judged.burns(8 * 3600.0)
    assert burn.num_calls[2] == pytest.approx(6 * 3600 / 5, abs=SLOT_S)
    assert burn.rates == (0.0, 0.0, 0.0)
    assert len(judged._accounts[0]._slots) <= WINDOWS_S[-1] // SLOT_S + 1


def test_calls_that_say_nothing_are_not_counted() -> None:
    judged = tracker(ttft_ms=1.0, tpot_ms=1.0, availability=99.0)
    judged.add(call(finish="cancelled"), 0.0)
    assert [burn.num_calls[0] for burn in judged.burns(0.0)] == [0, 0, 0]
    judged.add(call(ttft_s=None, num_output_tokens=0), 0.0)
    assert [burn.num_calls[0] for burn in judged.burns(0.0)] == [0, 0, 1]
    judged.add(call(finish="failed"), 0.0)  # a failure is bad once, as an answer that is not there
    assert [burn.num_calls[0] for burn in judged.burns(0.0)] == [0, 0, 2]


def test_an_objective_is_for_its_model_and_tier() -> None:
    config = SloConfig(
        objectives=(
            SloObjective(model="a", tier="fast", e2e_ms=1.0),
            SloObjective(model="b", e2e_ms=1.0),
            SloObjective(e2e_ms=1.0),
        )
    )
    judged = SloTracker(config)
    judged.add(call(model="a", tier="fast"), 0.0)
    judged.add(call(model="a", tier="batch"), 0.0)
    judged.add(call(model="b", tier="fast"), 0.0)
    assert [burn.num_calls[0] for burn in judged.burns(0.0)] == [1, 1, 3]


def test_the_time_of_a_token_is_the_mean_after_the_first() -> None:
    assert call(ttft_s=0.2, total_s=1.1, num_output_tokens=10).tpot_s == pytest.approx(0.1)
    assert call(num_output_tokens=1).tpot_s is None and call(ttft_s=None).tpot_s is None
    assert call(ttft_s=2.0, total_s=1.0).tpot_s == 0.0  # a slow reader, its clock stopped last


def test_limits_become_edges_of_histograms() -> None:
    config = SloConfig(objectives=(SloObjective(ttft_ms=333.0), SloObjective(ttft_ms=90.0, e2e_ms=5.0)))
    assert config.edges_s("ttft") == (0.09, 0.333) and config.edges_s("tpot") == ()


def test_what_is_promised_twice_is_counted_once() -> None:
    once = SloObjective(ttft_ms=5.0, availability=99.0)
    judged = SloTracker(SloConfig(objectives=(once, once, SloObjective(ttft_ms=5.0))))
    assert [burn.measure for burn in judged.burns(0.0)] == ["ttft", "availability"]


@pytest.mark.parametrize(
    "bad",
    [{}, {"ttft_ms": 0.0}, {"ttft_ms": 5.0, "percentile": 100.0}, {"availability": 100.0}, {"e2e_ms": -1.0}],
)
def test_an_objective_that_means_nothing_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        SloObjective(**bad)  # type: ignore[arg-type]
