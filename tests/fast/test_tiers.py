"""Three tiers on one loaded engine, in simulated time: who gets which steps, and what it costs the others."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest

from tokenmill.core import Request, SamplingParams, Tier
from tokenmill.engine import LLMConfig
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.mock import MockClock, MockModel, MockScript
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.steady import SteadyRun

# As a 135M model on two cores: 7 ms for the weights, 0.65 ms for a row that decodes.
STEP_S, ROW_S = 7e-3, 6.5e-4


def engine_of(**config: Any) -> tuple[LocalEngine, MockClock]:
    clock = MockClock()
    model = MockModel(MockScript(step_s=STEP_S, row_s=ROW_S), sleep=clock.sleep)
    return LocalEngine(model, LLMConfig(**config), create=model.create, clock=clock), clock


def request(name: str, tier: Tier, prompt: Sequence[int] = (1, 2), max_tokens: int = 2000) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt=tuple(prompt), params=params, tier=tier)


def submit(engine: LocalEngine, tier: Tier, count: int, **more: Any) -> list[GenerationState]:
    return [engine.submit(request(f"{tier}{i}", tier, **more))[0] for i in range(count)]


def speeds(
    engine: LocalEngine, clock: MockClock, states: Sequence[GenerationState], steps: int = 300
) -> list[float]:
    """Tokens a second of each, once all have begun."""
    while any(not state.num_output for state in states):
        engine.step()
    before, began = [state.num_output for state in states], clock()
    for _ in range(steps):
        engine.step()
    passed = clock() - began
    return [(state.num_output - old) / passed for state, old in zip(states, before, strict=True)]


@pytest.mark.parametrize("num_fast", [1, 4])
@pytest.mark.parametrize("num_standard", [26, 60])
def test_a_fast_user_is_at_least_two_and_a_half_times_as_fast(num_standard: int, num_fast: int) -> None:
    engine, clock = engine_of()
    states = submit(engine, "standard", num_standard) + submit(engine, "fast", num_fast)
    each = speeds(engine, clock, states)
    fast, standard = each[num_standard:], each[:num_standard]
    assert min(fast) >= 2.5 * max(standard)
    assert min(standard) > 0.9 * max(standard), "turns are even"
    peak = 64 / (STEP_S + 64 * ROW_S)
    assert sum(each) > (0.75 if num_standard == 60 else 0.5) * peak
    engine, clock = engine_of(fast_ratio=1.0)
    each = speeds(engine, clock, submit(engine, "standard", 26) + submit(engine, "fast", 1))
    assert each[-1] < 1.1 * each[0], "the control: without turns everybody has the same"


def test_nobody_rests_for_long_and_answers_stay_the_same() -> None:
    def answers(**config: Any) -> list[list[int]]:
        engine, _ = engine_of(**config)
        states = submit(engine, "standard", 9, max_tokens=40) + submit(engine, "fast", 2, max_tokens=90)
        longest = dict.fromkeys(states, 0)
        while engine.has_work:
            before = {state: len(state.tokens) for state in states}
            engine.step()
            for state in states:
                waits = not state.finished and len(state.tokens) == before[state]
                longest[state] = longest[state] + 1 if waits else 0
                assert longest[state] <= 4
        return [list(state.tokens) for state in states]

    assert answers() == answers(fast_ratio=1.0)


def test_without_fast_work_everybody_takes_part_in_steady_steps() -> None:
    engine, _ = engine_of()
    submit(engine, "standard", 9, max_tokens=30)
    with patch.object(SteadyRun, "step", autospec=True, side_effect=SteadyRun.step) as steady:
        while engine.has_work:
            assert engine.step().stats.num_rows in (9, 18)
    assert steady.call_count > 20


def test_batch_work_fills_steps_only_as_far_as_they_stay_short() -> None:
    """The second is the control: with time enough all of it takes part."""
    for batch_step_s, is_bounded in ((0.02, True), (1.0, False)):
        engine, clock = engine_of(batch_step_s=batch_step_s, fast_ratio=1.0)
        standard = submit(engine, "standard", 8)
        speeds(engine, clock, standard, 200)
        batch = submit(engine, "batch", 40)
        for _ in range(40):
            engine.step()
        began = clock()
        for _ in range(50):
            engine.step()
        assert ((clock() - began) / 50 < 0.025) == is_bounded
        assert all(state.num_output > 280 for state in standard), "each step has a row for each of them"
        made = sum(state.num_output for state in batch)
        assert made > 100, "and some for batch work"
        for state in standard:
            engine.abort(state)
        for _ in range(80):
            engine.step()
        assert all(state.num_output > 20 for state in batch), "idle rows are theirs"


def test_who_waits_displaces_batch_work_and_nothing_else() -> None:
    for tier, is_displaced in (("batch", True), ("standard", False)):
        engine, _ = engine_of(max_batch=2)
        running = submit(engine, tier, 2, max_tokens=60)  # type: ignore[arg-type]
        for _ in range(10):
            engine.step()
        (late,) = engine.submit(request("late", "standard", max_tokens=5))
        for _ in range(3):
            engine.step()
        assert bool(late.num_output) == is_displaced
        assert sum(state.num_preemptions for state in running) == is_displaced
        while engine.has_work:
            engine.step()
        assert all(state.finish_reason == "length" for state in (*running, late))


def test_guesses_for_fast_requests_leave_the_others_steady() -> None:
    engine, _ = engine_of(speculation="lookup", guesses_for="fast")
    with patch.object(SteadyRun, "step", autospec=True, side_effect=SteadyRun.step) as steady:
        submit(engine, "standard", 4, prompt=[7] * 40, max_tokens=30)
        while engine.has_work:
            engine.step()
        assert steady.call_count > 20 and engine.counts.num_draft_tokens == 0
        steady.reset_mock()
        engine.submit(request("fast", "fast", prompt=[7, 8, 9] * 40, max_tokens=200))
        submit(engine, "standard", 4, prompt=[7] * 40, max_tokens=30)
        while engine.has_work:
            engine.step()
        assert steady.call_count == 0
