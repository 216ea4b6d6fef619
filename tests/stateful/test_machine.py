"""A Hypothesis state machine over the engine's core: 40,000 events, and the proof that it would notice."""

from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from scripts.scorecard import s4
from scripts.scorecard.machine import Machine, Sizes
from tokenmill.core import Tier

NUM_EXAMPLES = 100
NUM_EVENTS = 400


class EngineMachine(RuleBasedStateMachine):
    """What can happen to an engine, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine()

    @initialize(seed=st.integers(0, 1 << 30))
    def open(self, seed: int) -> None:
        self.machine = Machine(Sizes.drawn(Random(seed)), seed=seed)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.machine.step()

    @rule(
        num_prompt=st.sampled_from((1, 5, 31, 32, 33, 64, 100)),
        num_new=st.sampled_from((1, 2, 40, 90)),
        n=st.sampled_from((1, 1, 2, 4)),
        tier=st.sampled_from(("fast", "standard", "batch")),
        timeout_s=st.sampled_from((None, None, 3.0, 40.0)),
    )
    def submit(self, num_prompt: int, num_new: int, n: int, tier: Tier, timeout_s: float | None) -> None:
        self.machine.submit(num_prompt, num_new, n=n, tier=tier, timeout_s=timeout_s)

    @rule(num_requests=st.sampled_from((4, 20)))
    def exhaust(self, num_requests: int) -> None:
        self.machine.exhaust(num_requests)

    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        self.machine.abort(which)

    @rule(seconds=st.sampled_from((0.0, 1.0, 30.0)))
    def wait(self, seconds: float) -> None:
        self.machine.wait(seconds)

    def teardown(self) -> None:
        self.machine.drain()


def test_forty_thousand_events_break_nothing() -> None:
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=NUM_EVENTS,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_kind_of_event_and_end_is_met() -> None:
    line = s4.run(cases=20_000, seed=1, guard=True)
    assert line.violations == 0, line.figures
    wanted = ("adapted", "tapped", "guesses", "refused", "preempted 4 times", "steps with swapped requests")
    ends = ("completed", "length", "cancelled", "expired", "failed")
    assert all(line.figures.get(name, 0) for name in (*wanted, *ends)), line.figures


def test_without_its_guards_it_is_noticed() -> None:
    line = s4.run(cases=48_000, seed=3, guard=False)
    assert "violation: preempted too often" in line.figures, line.figures
    assert "violation: another answer than its tokens demand" in line.figures, line.figures
