"""The README's commands and its program do what it says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reliability.server import running

README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    \.venv/bin/tokenmill (.*)$", README, flags=re.MULTILINE)
_SERVED = "localhost:8000"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_has_commands_and_programs() -> None:
    assert [shlex.split(command)[0] for command in COMMANDS] == ["run", "doctor"]
    assert len(PROGRAMS) == 4 and sum(_SERVED in program for program in PROGRAMS) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work_and_print_one_json_document(command: str, model_dir: Path) -> None:
    program = Path(sys.executable).with_name("tokenmill")
    done = subprocess.run(
        [program, *shlex.split(command), "--json"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("program", [each for each in PROGRAMS if _SERVED not in each])
def test_programs_run(program: str, model_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout or program != PROGRAMS[0]


def test_the_clients_of_both_apis_are_answered(model_dir: Path, tmp_path: Path) -> None:
    [program] = [each for each in PROGRAMS if _SERVED in each]
    with running({"models": [{"name": "smollm2-135m", "model": str(model_dir)}]}, tmp_path) as server:
        program = program.replace(_SERVED, f"localhost:{server.port}")
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
        )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20
