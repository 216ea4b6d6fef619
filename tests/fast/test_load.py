"""The load generator against a scripted target in virtual time: every figure is known beforehand."""

import asyncio
import math
from collections.abc import AsyncIterator

import numpy as np
import pytest

from tests.fast.load_fakes import ScriptedTarget, in_virtual_time, requests
from tokenmill.core import ResourceError, UsageError
from tokenmill.evals.load import (
    ClosedLoop,
    DriveConfig,
    LoadProgress,
    LoadRequest,
    LoadRun,
    OpenLoop,
    Slo,
    StreamEvent,
    Summary,
    at_rate,
    drive,
    find_highest,
    summarize,
)
from tokenmill.evals.load.driver import ClientStats

CLOSE = 2e-3
"""Milliseconds: the scripted loop's own rounding (epoll counts whole milliseconds, up)."""


def run(target: ScriptedTarget, num: int, arrivals: OpenLoop | ClosedLoop, **config: float) -> LoadRun:
    bounds = DriveConfig(**config)  # type: ignore[arg-type]
    return in_virtual_time(drive(target, requests(num), arrivals, bounds))


def test_percentiles_are_those_of_the_script() -> None:
    target = ScriptedTarget(ttft_s=lambda number: 0.001 * (number + 1), itl_s=0.02)
    figures = summarize(run(target, 101, ClosedLoop(concurrency=1)))
    assert figures.ttft_ms and figures.tpot_ms and figures.itl_ms and figures.e2e_ms
    for level, quantile in ((50, figures.ttft_ms.p50), (90, figures.ttft_ms.p90), (99, figures.ttft_ms.p99)):
        assert quantile.value == pytest.approx(1 + level, abs=1.0 + CLOSE)
    assert figures.tpot_ms.p50.value == pytest.approx(20, abs=1)
    assert figures.itl_ms.n == 4 * 101 and figures.itl_ms.p99.value == pytest.approx(20, abs=1)
    assert figures.e2e_ms.p50.value == pytest.approx(51 + 80, abs=1)
    assert (figures.num_ok, figures.num_output_tokens, figures.num_input_tokens) == (101, 505, 707)
    assert figures.counted_by == "system"


def test_a_stall_is_seen_by_who_counts_from_the_due_time_and_hidden_from_who_counts_from_sending() -> None:
    """A client with few connections waits with the server: what it sends late, it must count from its
    time.
    """
    target = ScriptedTarget(ttft_s=lambda number: 0.002, itl_s=0.001, stall=(2.0, 3.0))
    times = at_rate(50.0, 400, kind="constant", seed=0)
    found = run(target, 400, OpenLoop(times_s=times, max_in_flight=2))
    honest, hiding = summarize(found), summarize(found, origin="sent")
    assert honest.ttft_ms and hiding.ttft_ms
    assert honest.ttft_ms.p99.value > 800, "about 50 of 400 requests were due during the stall"
    assert honest.ttft_ms.p90.value > 100
    assert hiding.ttft_ms.p99.value < 20, "the control: only two of 400 were in flight when it stalled"
    assert honest.max_late_ms > 900
    assert honest.ttft_from_send_ms == hiding.ttft_ms


def test_an_open_loop_sends_at_the_times_fixed_before() -> None:
    times = at_rate(20.0, 50, kind="poisson", seed=3)
    target = ScriptedTarget(ttft_s=lambda number: 5.0)
    run(target, 50, OpenLoop(times_s=times))
    assert np.abs(np.array(target.sent_s) - times).max() < 2e-3
    assert target.max_at_once > 20, "nobody waited for an answer"


def test_a_closed_loop_keeps_its_concurrency() -> None:
    target = ScriptedTarget()
    figures = summarize(run(target, 40, ClosedLoop(concurrency=8)))
    assert target.max_at_once == 8
    assert figures.mean_concurrency == pytest.approx(8.0, rel=0.02)
    assert figures.duration_s == pytest.approx(5 * 0.14, rel=0.05)
    assert figures.output_tokens_per_s == pytest.approx(200 / figures.duration_s)
    assert figures.total_tokens_per_s == pytest.approx(480 / figures.duration_s)


def test_warmup_is_in_no_figure() -> None:
    target = ScriptedTarget(ttft_s=lambda number: 9.0 if number < 4 else 0.1)
    figures = summarize(run(target, 24, ClosedLoop(concurrency=4), num_warmup=4))
    assert (figures.num_requests, figures.num_warmup) == (20, 4)
    assert figures.ttft_ms and figures.ttft_ms.highest < 110


def test_errors_are_separate_and_never_fast() -> None:
    target = ScriptedTarget(fails=lambda n: ResourceError("busy") if n % 4 == 0 else None)
    slo = Slo(ttft_ms=1000)
    figures = summarize(run(target, 40, ClosedLoop(concurrency=4)), slo)
    assert (figures.num_ok, figures.num_errors, figures.errors) == (30, 10, {"busy": 10})
    assert figures.ttft_ms and figures.ttft_ms.n == 30 and figures.ttft_ms.lowest > 99
    assert figures.goodput and figures.goodput.share == 0.75 and not figures.goodput.is_met
    assert figures.num_output_tokens == 150


def test_an_unknown_failure_of_our_own_ends_the_run() -> None:
    target = ScriptedTarget(fails=lambda n: ZeroDivisionError("a bug") if n == 3 else None)
    with pytest.raises(ZeroDivisionError):
        run(target, 10, ClosedLoop(concurrency=2))
    assert target.num_at_once == 0


def test_a_request_that_does_not_end_fails_at_its_timeout() -> None:
    target = ScriptedTarget(ttft_s=lambda number: 100.0 if number == 1 else 0.1)
    found = run(target, 4, ClosedLoop(concurrency=4), timeout_s=2.0)
    assert [sample.status for sample in found.samples] == ["ok", "error", "ok", "ok"]
    assert "2 s" in found.samples[1].error and found.samples[1].e2e_s() == pytest.approx(2.0, abs=2e-3)


def test_no_request_is_sent_after_the_bound_and_what_was_due_counts_as_failed() -> None:
    times = at_rate(10.0, 100, kind="constant", seed=0)
    target = ScriptedTarget(ttft_s=lambda number: 30.0)
    found = run(target, 100, OpenLoop(times_s=times, max_in_flight=5), max_seconds=2.0)
    sent = [sample for sample in found.samples if sample.status == "ok"]
    unsent = [sample for sample in found.samples if sample.error.startswith("not sent")]
    assert (len(sent), len(unsent)) == (5, 16), "21 were due within 2 s"
    assert summarize(found).num_errors == 16
    closed = run(ScriptedTarget(), 1000, ClosedLoop(concurrency=1), max_seconds=1.0)
    assert 7 <= len(closed.samples) <= 9, "0.14 s each"


def test_stopping_keeps_what_was_measured() -> None:
    seen: list[LoadProgress] = []

    async def main() -> LoadRun:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(1.05, stop.set)
        arrivals = OpenLoop(times_s=at_rate(10.0, 100, kind="constant", seed=0))
        return await drive(
            ScriptedTarget(ttft_s=lambda n: 0.5), requests(100), arrivals, stop=stop, on_progress=seen.append
        )

    found = in_virtual_time(main())
    figures = summarize(found, Slo(ttft_ms=1000))
    assert found.was_stopped and figures.num_ok == 6 and figures.num_cancelled == 5
    assert figures.goodput and figures.goodput.share == 1.0, "what we cancelled says nothing of the system"
    assert len(seen) == 11 and seen[0].num_requests == 100


def test_a_storm_of_streams() -> None:
    target = ScriptedTarget(ttft_s=lambda number: 0.2 + 0.001 * (number % 7), itl_s=0.005)
    found = run(target, 600, OpenLoop(times_s=(0.0,) * 600))
    assert target.max_at_once == 600 and target.num_at_once == 0
    assert all(sample.status == "ok" and len(sample.piece_times_s) == 5 for sample in found.samples)


def test_a_burst_is_served_in_turn() -> None:
    """Ten at once on a server of one place: the k-th waits for k - 1 others."""
    free_at = [0.0]

    def ttft(number: int) -> float:
        begins = max(free_at[0], 0.0)
        free_at[0] = begins + 0.14
        return begins + 0.1

    figures = summarize(run(ScriptedTarget(ttft_s=ttft), 10, OpenLoop(times_s=(0.0,) * 10)))
    assert figures.ttft_ms is not None
    assert figures.ttft_ms.p50.value == pytest.approx(1e3 * (4.5 * 0.14 + 0.1), abs=5)
    assert figures.ttft_ms.highest == pytest.approx(1e3 * (9 * 0.14 + 0.1), abs=5)
    assert figures.requests_per_s == pytest.approx(10 / 1.4, rel=0.02)


def test_goodput_by_hand() -> None:
    """TTFT is 10, 20, ..., 100 ms; TPOT 10 ms; E2E 40 ms more: 5 keep TTFT <= 55, of these 3 E2E <= 75."""
    target = ScriptedTarget(ttft_s=lambda number: 0.01 * (number + 1))
    found = run(target, 10, ClosedLoop(concurrency=1))
    for slo, num_good in (
        (Slo(ttft_ms=55), 5),
        (Slo(ttft_ms=55, e2e_ms=75), 3),
        (Slo(ttft_ms=55, tpot_ms=5), 0),
        (Slo(tpot_ms=15), 10),
    ):
        good = summarize(found, slo).goodput
        assert good and good.num_good == num_good
        assert good.requests_per_s == pytest.approx(num_good / summarize(found).duration_s)
    half = summarize(found, Slo(ttft_ms=55, percentile=50)).goodput
    assert half and half.is_met and 0.2 < half.low < 0.25 and 0.75 < half.high < 0.8


def test_an_empty_or_broken_answer_is_an_error() -> None:
    class Broken(ScriptedTarget):
        async def stream(self, request: LoadRequest) -> AsyncIterator[StreamEvent]:
            events = [event async for event in super().stream(request)]
            for event in events[:-1] if request.id == "load-0" else events[-1:]:
                yield event

    found = run(Broken(), 2, ClosedLoop(concurrency=1))
    assert [sample.error for sample in found.samples] == [
        "the stream broke off before its end",
        "the answer has no text",
    ]


def test_arrivals_have_their_rate_and_their_seed() -> None:
    poisson = np.array(at_rate(8.0, 20000, kind="poisson", seed=1))
    gaps = np.diff(poisson)
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03) and gaps.std() == pytest.approx(1 / 8, rel=0.03)
    assert at_rate(8.0, 100, kind="poisson", seed=1) == tuple(poisson[:100].tolist())
    assert at_rate(8.0, 100, kind="poisson", seed=2) != tuple(poisson[:100].tolist())
    assert at_rate(4.0, 3, kind="constant", seed=0) == (0.0, 0.25, 0.5)
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError):
            at_rate(rate, 1, kind="poisson", seed=0)
    with pytest.raises(UsageError):
        OpenLoop(times_s=(1.0, 0.5))


@pytest.mark.parametrize(("limit", "whole"), [(0.3, False), (7.0, False), (7.0, True), (900.0, True)])
def test_the_search_finds_the_highest_value_that_is_kept(limit: float, whole: bool) -> None:
    tried: list[float] = []

    async def keeps(value: float) -> bool:
        tried.append(value)
        return value <= limit

    best = asyncio.run(find_highest(keeps, 4.0, whole=whole, is_stopped=lambda: False))
    assert best is not None and limit / (1.3 if whole else 1.1) <= best <= limit and len(tried) <= 12


def test_a_search_in_which_nothing_is_kept_says_so() -> None:
    async def never(value: float) -> bool:
        return False

    assert asyncio.run(find_highest(never, 4.0, whole=True, is_stopped=lambda: False)) is None


def test_a_saturated_client_is_named() -> None:
    assert ClientStats(wall_s=10, cpu_s=9, max_delay_s=0.001, p99_delay_s=0.001).is_saturated
    assert ClientStats(wall_s=10, cpu_s=1, max_delay_s=0.5, p99_delay_s=0.1).is_saturated
    assert not ClientStats(wall_s=10, cpu_s=1, max_delay_s=0.5, p99_delay_s=0.002).is_saturated


def test_a_client_that_is_held_up_shows_it() -> None:
    async def main() -> LoadRun:
        loop = asyncio.get_running_loop()

        def hold_up() -> None:
            end = loop.time() + 0.05
            while loop.time() < end:
                pass
            loop.call_soon(hold_up) if end < begin + 0.2 else None

        begin = loop.time()
        loop.call_later(0.01, hold_up)
        arrivals = ClosedLoop(concurrency=1)
        return await drive(ScriptedTarget(ttft_s=lambda n: 0.2), requests(1), arrivals)

    client = asyncio.run(main()).client
    assert client.max_delay_s > 0.04 and client.is_saturated


def figures_of_nothing() -> Summary:
    client = ClientStats(wall_s=1, cpu_s=0, max_delay_s=0, p99_delay_s=0)
    return summarize(LoadRun(samples=(), started_at=0.0, was_stopped=True, client=client), Slo(ttft_ms=1))


def test_a_run_without_a_sample_has_no_figures_and_no_goodput() -> None:
    figures = figures_of_nothing()
    assert figures.ttft_ms is None and figures.itl_ms is None and figures.requests_per_s == 0
    assert figures.goodput and not figures.goodput.is_met
