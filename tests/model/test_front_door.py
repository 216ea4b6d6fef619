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
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_has_commands_and_programs() -> None:
    assert [shlex.split(command)[0] for command in COMMANDS] == ["run", "doctor"]
    assert len(PROGRAMS) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work_and_print_one_json_document(command: str, model_dir: Path) -> None:
    program = Path(sys.executable).with_name("tokenmill")
    done = subprocess.run(
        [program, *shlex.split(command), "--json"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program: str, model_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout or program != PROGRAMS[0]
