"""A run that is killed with SIGKILL, in a process of its own, and goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fast.eval_fakes import FakeModel
from tests.fast.test_eval_runner import figures, numbers, run, third
from tokenmill.evals.runner import EvalOptions


def killed_run(folder: Path, calls: int) -> None:
    """Run until the model was asked this many times, then die without a chance to tidy up."""
    model = FakeModel(third)

    def say(prompt: str) -> str:
        if model.num_calls > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return third(prompt)

    model._say = say
    run(model, numbers(40), folder)


@pytest.mark.parametrize("calls", [0, 1, 7])
def test_the_figures_are_the_same_after_a_kill(tmp_path: Path, calls: int) -> None:
    code = (
        "from pathlib import Path; from tests.server.test_eval_kill import killed_run; "
        f"killed_run(Path({str(tmp_path / 'killed')!r}), {calls})"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60)
    assert child.returncode == -signal.SIGKILL
    again = FakeModel(third)
    result = run(again, numbers(40), tmp_path / "killed", EvalOptions(window=4, resume=True))
    assert again.num_calls == 10 - calls
    assert figures(result) == figures(run(FakeModel(third), numbers(40), tmp_path / "whole"))
