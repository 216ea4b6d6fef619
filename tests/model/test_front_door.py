"""The README's commands and its program do what it says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    \.venv/bin/tokenmill (.*)$", README, flags=re.MULTILINE)
PROGRAM = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_has_commands_and_one_program() -> None:
    assert [shlex.split(command)[0] for command in COMMANDS] == ["run", "doctor"]
    assert len(PROGRAM) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work_and_print_one_json_document(command: str, model_dir: Path) -> None:
    program = Path(sys.executable).with_name("tokenmill")
    done = subprocess.run(
        [program, *shlex.split(command), "--json"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_the_program_answers(model_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM[0]], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
