"""A short storm, and its control. The full form is `python -m scripts.storm`."""

import asyncio

from scripts.storm import StormConfig, run_storm


def test_every_request_ends_once_though_the_engine_is_killed() -> None:
    report = asyncio.run(run_storm(StormConfig(num_requests=500, num_kills=3, concurrency=64, seed=2)))
    assert report.faults == ()
    assert report.num_restarts >= report.num_kills == 3 and report.num_resubmitted > 0
    assert set(report.ended) >= {"cancelled", "failed", "expired", "length"}
    assert len(report.callers) == 7


def test_without_the_guard_requests_are_left_without_an_end() -> None:
    config = StormConfig(num_requests=300, num_kills=2, concurrency=64, patience_s=2.0, guard=False)
    report = asyncio.run(run_storm(config))
    assert any("did not end" in fault for fault in report.faults)
