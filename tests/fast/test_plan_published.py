"""The planner on published throughput: the bars that it must hold, and what the fit does."""

import math
from dataclasses import replace

import numpy as np
import pytest

from scripts import validate_plan
from scripts.validate_plan import Row
from tokenmill.core import UsageError
from tokenmill.costs.calibration import (
    Observation,
    calibrate,
    fit_constants,
    interval_width,
    predict,
)
from tokenmill.costs.catalogue import find_shape, load_shapes
from tokenmill.costs.defaults import class_calibration, class_constants
from tokenmill.costs.step import Constants, Form, MachinePeak, decode_load, step_seconds

TRUE = Constants(weights=0.7, kv=0.4, compute=0.3, layer_s=4e-5, comm_s=2e-5, row_s=2e-5)
PEAK = MachinePeak(flops=300e12, bytes_per_s=2e12)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    if not validate_plan.FILE.is_file():
        pytest.skip("published_throughput.csv of ../shared/data/hardware is not here")
    return validate_plan.read_rows()


def test_the_rows_are_those_of_the_rules(rows: list[Row]) -> None:
    assert len(rows) == 98
    assert len({row.machine[0] for row in rows}) == 18
    assert [len(group) for group in validate_plan.same_machines(rows)] == [16, 23, 16]


def test_uncalibrated_median_error_is_at_most_20_percent(rows: list[Row]) -> None:
    assert validate_plan.errors_of(validate_plan.class_errors(rows)).median <= 20
    assert validate_plan.errors_of(validate_plan.machine_out_errors(rows)).median <= 20


def test_calibrated_a_new_model_is_within_12_percent(rows: list[Row]) -> None:
    assert validate_plan.errors_of(validate_plan.calibrated_errors(rows)).median <= 12


def test_intervals_cover_what_they_say(rows: list[Row]) -> None:
    for inside in (validate_plan.covered(rows), validate_plan.class_covered(rows)):
        assert 0.7 <= sum(inside) / len(inside) <= 0.9


def test_no_measurement_is_faster_than_its_bound(rows: list[Row]) -> None:
    assert validate_plan.above_bound(rows) == []


def test_the_stated_errors_of_the_classes_are_the_measured_ones(rows: list[Row]) -> None:
    log_errors = validate_plan.class_errors(rows)
    errors, stated = validate_plan.errors_of(log_errors), class_calibration("gpu", "graph")
    assert stated.log_width == pytest.approx(interval_width(log_errors), abs=0.001)
    assert 100 * stated.median_error == pytest.approx(errors.median, abs=0.1)
    assert 100 * stated.p90_error == pytest.approx(errors.p90, abs=0.1)
    assert stated.num_points == len(rows)


def observations(count: int, noise: float = 0.0) -> list[Observation]:
    draw = np.random.default_rng(7)
    shapes = [find_shape(load_shapes(), name) for name in ("Llama-3-8B", "Qwen3-14B", "Mixtral-8x7B")]
    made = []
    for at in range(count):
        shape = shapes[at % 3]
        batch, context = float(2 ** draw.integers(0, 9)), float(draw.integers(100, 8000))
        load = decode_load(
            shape, bits=16, batch=batch, context=context, num_devices=int(1 + draw.integers(0, 2))
        )
        seconds = step_seconds(load, PEAK, TRUE) * math.exp(noise * draw.standard_normal())
        made.append(Observation(load=load, peak=PEAK, seconds=seconds, group=shape.name))
    return made


def test_the_fit_finds_what_made_the_points() -> None:
    points = observations(60)
    found = fit_constants(points, class_constants("gpu", "graph"))
    for each in points:
        assert step_seconds(each.load, PEAK, found) == pytest.approx(each.seconds, rel=0.01)


def test_one_odd_point_hardly_moves_the_fit() -> None:
    points = observations(60)
    points[5] = replace(points[5], seconds=5 * points[5].seconds)
    found = fit_constants(points, class_constants("gpu", "graph"))
    others = [each for at, each in enumerate(points) if at != 5]
    errors = [abs(step_seconds(each.load, PEAK, found) / each.seconds - 1) for each in others]
    assert float(np.median(errors)) < 0.01


@pytest.mark.parametrize("form", ["sum", "max"])
def test_both_forms_fit_better_than_the_prior(form: Form) -> None:
    points, prior = observations(30, noise=0.05), class_constants("gpu", "graph")
    found = fit_constants(points, prior, form)
    before, after = (
        sum(abs(math.log(step_seconds(each.load, PEAK, c, form) / each.seconds)) for each in points)
        for c in (prior, found)
    )
    assert after < 0.4 * before


def test_without_points_the_prior_stays() -> None:
    prior = class_constants("cpu", "graph")
    assert fit_constants([], prior) == prior
    with pytest.raises(UsageError, match="2 measured points"):
        calibrate(observations(2), prior, "x")


def test_a_prediction_has_three_parts() -> None:
    points = observations(30, noise=0.1)
    found = calibrate(points, class_constants("gpu", "graph"), "30 points")
    assert 0.02 < found.median_error < 0.2 and found.num_points == 30
    made = predict(points[0].load, PEAK, found)
    assert made.bound_s < made.estimate_s and made.low_s < made.estimate_s < made.high_s
    assert made.high_s / made.estimate_s == pytest.approx(math.exp(found.log_width))
    fast = replace(found, constants=replace(found.constants, weights=9.0, kv=9.0, compute=9.0, layer_s=0.0))
    best = predict(points[0].load, PEAK, fast)
    assert best.estimate_s >= best.bound_s


def test_the_width_of_an_interval_is_a_rank() -> None:
    assert interval_width([0.1, -0.2, 0.3, -0.4, 0.5, 0.6, 0.7, 0.8, 0.9]) == 0.8
    assert interval_width([0.1, -0.4]) == 0.4


def test_unknown_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="no constants"):
        class_constants("abacus", "graph")  # type: ignore[arg-type]
