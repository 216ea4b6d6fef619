"""The full forms of the reliability scorecard (docs/reliability.md), each with its control."""

import pytest

from scripts import storm
from scripts.scorecard.__main__ import LINES, main

CONTROL_CASES = {
    "s4": 48_000,
    "s13": 2_000,
    "s14": 400,
    "s16": 200,
    "s18": 5_000,
    "s21": 200,
    "s24": 400,
}


@pytest.mark.parametrize("name", sorted(LINES))
def test_full_form(name: str) -> None:
    assert main([name, "--seed", "3"]) == 0


@pytest.mark.parametrize("name", sorted(LINES))
def test_control(name: str) -> None:
    assert main([name, "--seed", "3", "--cases", str(CONTROL_CASES[name]), "--guard", "off"]) == 0


def test_storm() -> None:
    assert storm.main(["--requests", "10000", "--kills", "20", "--seed", "3"]) == 0
