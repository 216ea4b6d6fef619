"""The scripts behind the Makefile: what they print is what their callers need."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts import grammar_cost, requirements, test_all
from tests.fast.test_house import TORCH_ROOMS
from tokenmill import __version__

ROOT = Path(__file__).parents[2]


def test_requirements_come_from_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = requirements.requirements(["build"])
    assert set(project["build-system"]["requires"]) < set(build)
    assert requirements.requirements(["train"]) == project["project"]["optional-dependencies"]["train"]
    with pytest.raises(KeyError):
        requirements.requirements(["nothing"])


def test_the_cost_of_a_grammar_is_against_none_of_the_same_round() -> None:
    plain = [grammar_cost.Cost(1.0, 1.0, 10.0), grammar_cost.Cost(2.0, 1.0, 10.0)]
    text = "\n".join(grammar_cost.lines({"none": plain, "g": [each._replace(wall_ms=3.0) for each in plain]}))
    assert "takes 10.0 ms (median of 2 rounds)" in text
    assert "| g | 1.50 (1.00-2.00) | 15.0% | 0.00 (0.00-0.00) | 0.0% |" in text


def test_a_failed_step_is_shown_as_failed() -> None:
    step = test_all.Step(name="one", markers="fast")
    left_out = test_all.Step(name="two", markers="fast", cannot="this machine has no amx_int8")
    outcomes = [
        test_all.Outcome(step=step, passed=False, summary="exit code 1: 1 failed", seconds=1.0),
        test_all.run_step(left_out),
    ]
    text = test_all.page("2026-01-02", outcomes, 3)
    assert "| one | exit code 1: 1 failed | 1 | **no** |" in text
    assert "| two | this machine has no amx_int8 | 0 | not here |" in text


def test_a_failed_sanitizer_build_is_a_failed_step() -> None:
    step = test_all.Step(name="s", markers="fast", broken="the build failed")
    assert not test_all.run_step(step).passed


def test_sanitizers_run_the_tests_of_the_kernels() -> None:
    assert "tests/fast/test_executor.py" in test_all.native_tests()
    assert "tests/fast/test_house_scripts.py" not in test_all.native_tests()


def test_make_alone_prints_every_target() -> None:
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "test-fast", "test-all", "check", "bench", "wheel"):
        assert re.search(rf"^make {target}\s", done.stdout, flags=re.MULTILINE), target


def test_the_running_side_needs_no_extra() -> None:
    """Every module but those that make models imports with the libraries of the extras blocked."""
    modules = sorted(
        path.relative_to(ROOT / "src").with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in (ROOT / "src").rglob("*.py")
        if path.name != "__main__.py"
    )
    optional = {entry["where"] for entry in _optional_modules()}
    optional |= {each for each in modules if each.startswith(TORCH_ROOMS)}
    code = (
        "import importlib, sys\n"
        "for name in ('torch', 'sklearn', 'transformers', 'safetensors', 'gguf'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {[m for m in modules if m not in optional]}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _optional_modules() -> list[dict[str, str]]:
    allowed = tomllib.loads((ROOT / "tests/fast/house_allow.toml").read_text(encoding="utf-8")).get(
        "allow", []
    )
    return [entry for entry in allowed if entry["rule"] == "optional-import"]


def test_the_version_is_that_of_the_changelog_or_newer() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", __version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in changelog or "## [Unreleased]" in changelog
