"""The step-time model against machines whose times are known."""

import math
import random
import time

import pytest

from tokenmill.engine.step_time import StepTimeModel, StepTimePrior

MACHINE = StepTimePrior(base_s=2e-2, tile_s=4e-3, row_s=1e-4, out_row_s=3e-4, kv_token_s=6e-6)
Load = tuple[int, int, int]


def loads(num: int, seed: int = 1) -> list[Load]:
    """Decode steps of all sizes, and now and then a part of a prompt."""
    rng = random.Random(seed)
    steps = []
    for _ in range(num):
        batch = rng.choice((1, 2, 8, 16, 17, 40, 64))
        prompt = rng.choice((0, 0, 32, 256))
        steps.append((batch + prompt, batch * rng.randrange(50, 600), batch))
    return steps


def worst_error(model: StepTimeModel, machine: StepTimeModel) -> float:
    return max(abs(model.predict(*load) / machine.predict(*load) - 1) for load in loads(60, seed=2))


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_it_learns_a_machine_quickly_whatever_it_expected(scale: float) -> None:
    machine = StepTimeModel(MACHINE)
    model = StepTimeModel(StepTimePrior(base_s=7e-3 * scale, tile_s=1e-3 * scale, row_s=2e-4 * scale))
    rng = random.Random(3)
    for load in loads(500):
        model.observe(*load, machine.predict(*load) * rng.uniform(0.9, 1.1))
    assert worst_error(model, machine) < 0.15


def test_before_any_data_it_is_the_prior() -> None:
    model = StepTimeModel(MACHINE)
    assert model.costs == MACHINE
    assert model.predict(17, 1000, 3) == pytest.approx(2e-2 + 2 * 4e-3 + 17e-4 + 9e-4 + 6e-3)


def test_rows_of_a_tile_that_runs_anyway_cost_less_than_a_new_tile() -> None:
    model = StepTimeModel(MACHINE)
    assert model.predict(16, 0, 1) - model.predict(2, 0, 1) < model.predict(17, 0, 1) - model.predict(
        16, 0, 1
    )


def test_a_hiccup_moves_nothing_and_many_move_little() -> None:
    machine, model = StepTimeModel(MACHINE), StepTimeModel(MACHINE)
    for load in loads(300):
        model.observe(*load, machine.predict(*load))
    before = worst_error(model, machine)
    model.observe(1, 100, 1, 60.0)
    assert worst_error(model, machine) < before + 0.01
    rng = random.Random(4)
    for load in loads(500):
        model.observe(
            *load, machine.predict(*load) * (rng.choice((10.0, 100.0)) if rng.random() < 0.03 else 1)
        )
    assert worst_error(model, machine) < 0.15


def test_even_the_first_observation_may_be_a_hiccup() -> None:
    machine, model = StepTimeModel(MACHINE), StepTimeModel(MACHINE)
    model.observe(1, 100, 1, 60.0)
    for load in loads(100):
        model.observe(*load, machine.predict(*load))
    assert worst_error(model, machine) < 0.3


def test_a_lasting_change_is_followed() -> None:
    slow = StepTimeModel(
        StepTimePrior(base_s=6e-2, tile_s=12e-3, row_s=3e-4, out_row_s=9e-4, kv_token_s=18e-6)
    )
    model = StepTimeModel(MACHINE)
    for load in loads(300):
        model.observe(*load, StepTimeModel(MACHINE).predict(*load))
    for load in loads(300, seed=5):
        model.observe(*load, slow.predict(*load))
    assert worst_error(model, slow) < 0.25


def test_no_cost_becomes_negative_and_no_time_falls_with_more_work() -> None:
    model, rng = StepTimeModel(), random.Random(6)
    for load in loads(400):
        model.observe(*load, rng.uniform(0.0, 0.1))
        costs = model.costs
        assert min(costs.base_s, costs.tile_s, costs.row_s, costs.out_row_s, costs.kv_token_s) >= 0.0
    assert model.predict(1, 0, 0) <= model.predict(2, 0, 0) <= model.predict(500, 10_000, 9)
    model = StepTimeModel()
    for _ in range(3000):
        model.observe(1, 0, 1, 0.0)
    assert model.predict(1, 0, 1) > 0.0, "a clock that stands still is no division by zero"


def test_a_uniform_load_does_not_spoil_what_is_known_of_others() -> None:
    machine, model = StepTimeModel(MACHINE), StepTimeModel(MACHINE)
    rng = random.Random(7)
    for _ in range(5000):
        model.observe(8, 2000, 8, machine.predict(8, 2000, 8) * rng.uniform(0.9, 1.1))
    assert model.predict(8, 2000, 8) == pytest.approx(machine.predict(8, 2000, 8), rel=0.05)
    assert model.predict(512, 4000, 8) == pytest.approx(machine.predict(512, 4000, 8), rel=0.3)


@pytest.mark.parametrize("seconds", [0.0, 0.025, 0.0301, 0.05, 0.5])
def test_rows_within_is_the_most_rows_that_end_in_time(seconds: float) -> None:
    model = StepTimeModel(MACHINE)
    rows = model.rows_within(seconds, 500, 4)
    assert rows >= 1 and model.predict(rows + 1, 500, 4) > seconds
    assert rows == 1 or model.predict(rows, 500, 4) <= seconds


def test_an_observation_is_cheap() -> None:
    model, steps = StepTimeModel(), loads(500)
    times = []
    for load in steps:
        began = time.perf_counter()
        model.observe(*load, 0.01)
        times.append(time.perf_counter() - began)
    assert sorted(times)[len(times) // 4] < 100e-6, "tens of microseconds"


def test_a_step_hangs_only_long_after_it_should_have_ended() -> None:
    model = StepTimeModel()
    assert model.bound(1, 1, 1) == math.inf, "nothing is known yet"
    for _ in range(20):
        model.observe(4, 40, 4, 0.4)
    assert 1.2 < model.bound(4, 400, 4) < 6.0
    # Of a model so slow a step of all rows may take a minute: small steps do not tell.
    assert model.bound(512, 600, 1) > 150.0
    assert model.bound(4, 20000, 4) > 30.0
    model.observe(512, 600, 1, 60.0)
    assert model.bound(512, 600, 1) > 150.0, "a slow machine from its first long step on"
    for _ in range(600):
        model.observe(4, 40, 4, 0.4)
    assert model.bound(4, 40, 4) < 10.0, "a long step is forgotten"
