"""Short forms of S17 and S20, each with its control, as the commands that they are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]


def line(name: str, cases: int, guard: str) -> Any:
    command = [sys.executable, "-m", f"benchmarks.reliability.{name}", "--cases", str(cases), "--json"]
    done = subprocess.run(
        [*command, "--guard", guard], cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "cases"), [("s17", 2500), ("s20", 12)])
def test_short_form(name: str, cases: int) -> None:
    assert line(name, cases, "on")["violations"] == 0


@pytest.mark.parametrize(("name", "cases"), [("s17", 2000), ("s20", 24)])
def test_control(name: str, cases: int) -> None:
    assert line(name, cases, "off")["violations"] > 0
