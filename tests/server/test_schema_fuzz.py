"""Schemathesis against the server: the short form of the scorecard's line, and its control."""

import json

import pytest

pytest.importorskip("schemathesis", reason="a tool of development")

from benchmarks.reliability import s12


def test_nothing_is_found() -> None:
    line = s12.run(1, seed=1, phases="examples,fuzzing")
    assert line.violations == 0, json.dumps(line.figures, indent=1)
    assert line.figures["operations skipped"] == 0 and line.cases > 30
    assert int(line.figures["operations"]) > 20


def test_without_bounds_it_finds_a_server_error() -> None:
    line = s12.run(1, guard=False, phases="coverage", path="/v1/batches", most=1)
    assert line.violations > 0, line.figures
    assert any("500" in str(value) for value in line.figures.values()), line.figures
