"""Short forms of S1, S2, S6, S7 and S8, each with its control. The full ones: python -m
benchmarks.reliability.
"""

import asyncio
import random
from pathlib import Path

import pytest

from benchmarks.reliability import s1, s2, s6, s7, s8
from benchmarks.reliability.server import deployment, running
from scripts.serving_keys import PAGE, with_keys
from tokenmill.server.config import read_deployment

_DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_example_deployment_is_read_and_names_what_it_should() -> None:
    found = read_deployment(_DEPLOY / "deployment.yaml")
    assert [each.served_name for each in found.models] == ["small"]
    assert [each.name for each in found.routes] == ["default"]


def test_the_page_names_every_key() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_keys(page), "run python -m scripts.serving_keys"
    for name in ("kv_tokens", "usd_per_hour", "objectives", "first_token_s"):
        assert f"`{name}`" in page or f"{name}[" in page


def test_streams_are_held_and_those_beyond_the_bound_are_seen() -> None:
    assert s2.run(cases=24, seed=1, guard=True, minutes=0.06).violations == 0
    assert s2.run(cases=24, seed=1, guard=False, minutes=0.04).violations >= 12


def test_overload_is_refused_with_a_time_and_without_a_bound_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s1, "_CLOSED_S", 0.5)
    bounded = s1.run(cases=200, seed=1, guard=True).figures
    assert "429" in str(bounded["statuses"]) and "0:" not in str(bounded["statuses"]).replace("200:", "")
    assert "429" not in str(s1.run(cases=60, seed=1, guard=False).figures["statuses"])


def test_long_texts_hold_up_nobody(tmp_path: Path) -> None:
    """Compared with the control only: bounds in milliseconds are for a machine that does nothing else."""
    with_threads, without = (s6.silence_beside_texts(tmp_path, 1, guard) for guard in (True, False))
    assert with_threads < without < float("inf")


def test_an_engine_that_is_killed_is_noticed_and_nothing_is_cut(tmp_path: Path) -> None:
    figures = s7.Figures()
    with running(s7.config(1), tmp_path) as server:
        assert not asyncio.run(s7.engine_trial(server, "kill", random.Random(1), figures, True))
    assert figures.detected_s[0] < 5.0 and figures.ends["whole"]
    assert not s7.run_drain(tmp_path, 1, 0.3, True, {}, num=20)
    assert s7.run_drain(tmp_path, 1, 0.3, False, {}, num=20)["truncated answers at SIGTERM"] == 20


def test_a_front_end_that_is_killed_loses_no_line(tmp_path: Path) -> None:
    figures = s7.Figures()
    assert not s7.front_trial(tmp_path, 1, "kill", "writer", random.Random(1), figures)
    assert figures.num_lines > 0
    with running(deployment(mock={}), tmp_path) as server:
        assert server.engine_pids()


def test_nothing_is_left_after_a_soak() -> None:
    line = s8.run(cases=2, seed=1, guard=True, minutes=0.05)
    assert line.violations == 0, line


def test_a_leak_is_seen_in_the_slope_and_noise_is_not() -> None:
    times = [5.0 * at for at in range(240)]
    noise = [40_000 + (at * 7919) % 300 for at in range(240)]
    leak = [kb + at * 10 for at, kb in enumerate(noise)]
    low, high = s8.slope_mb_per_hour(times, noise)[1:]
    assert low < 0.0 < high
    assert s8.slope_mb_per_hour(times, leak)[1] > 1.0
