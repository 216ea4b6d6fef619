"""`tokenmill optimize` from a log to a decision, without a model: the classifier is what there is to try."""

import json
from pathlib import Path

import pytest

from tests.fast.cli_tools import Runner, make_runner
from tests.fast.optimize_fakes import LABELS, write_log
from tokenmill.cli.optimize import seconds

YAML = """
log: log.jsonl
incumbent: {{name: openai/gpt-5-mini, price_in: 0.25, price_out: 2.0, price_date: 2026-08-05}}
quality: {{scorer: label, margin: 0.05}}
price_per_hour: 0.1
labels: [{labels}]
terms: {{answers: [own]}}
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    return make_runner(monkeypatch, capsys, tmp_path / "home")


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    write_log(tmp_path / "log.jsonl", 500)
    path = tmp_path / "workload.yaml"
    path.write_text(YAML.format(labels=", ".join(LABELS)))
    return path


def test_a_workload_goes_in_and_a_deployment_comes_out(run: Runner, workload: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    found = run("optimize", str(workload), "--output", str(folder), "--watts", "50")
    assert found.code == 0, found.err
    assert "classifier is the cheapest that passes" in found.out and "expected: about" in found.err
    names = {each.name for each in folder.iterdir()}
    assert names >= {"report.html", "report.json", "certificate.json", "deployment.yaml", "junit.xml"}
    report = json.loads((folder / "report.json").read_text())
    figures = report["candidates"][0]["figures"]
    assert figures["energy_label"] in ("estimated", "measured") and figures["joules_per_token"] > 0
    assert run("gate", str(folder)).code == 0
    assert run("verify", str(folder)).code == 0
    assert run("serve", str(folder / "deployment.yaml"), "--check").code == 0
    again = run("optimize", str(workload), "--output", str(folder), "--watts", "50", "--json")
    assert again.document["num_looks"] == 1
    assert again.document["candidates"][0]["figures"] == figures  # measured once


def test_the_plan_alone_does_nothing(run: Runner, workload: Path, tmp_path: Path) -> None:
    found = run("optimize", str(workload), "--plan", "--budget", "2m", "--json")
    plan = found.document["plan"]
    assert plan["budget_s"] == 120.0 and [each["name"] for each in plan["candidates"]] == ["classifier"]
    assert not (tmp_path / "workload.run").exists()


def test_a_log_alone_is_enough(run: Runner, tmp_path: Path) -> None:
    log = write_log(tmp_path / "calls.jsonl", 500)
    found = run("optimize", str(log), "--output", str(tmp_path / "out"))
    assert found.code == 0 and "guessed scorer" in found.err
    assert "classifier" in found.out


def test_another_workload_in_the_same_folder_is_refused(run: Runner, workload: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run("optimize", str(workload), "--output", str(folder)).code == 0
    write_log(tmp_path / "log.jsonl", 400)
    found = run("optimize", str(workload), "--output", str(folder))
    assert found.code == 2 and "holds a run of something else" in found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "soon"), "no time"),
        (("--watts", "-3"), "--watts is -3"),
        (("--model", "nothing-of-that-name"), "no model named"),
    ],
)
def test_wrong_words_are_one_clear_error(
    run: Runner, workload: Path, words: tuple[str, ...], said: str
) -> None:
    found = run("optimize", str(workload), *words)
    assert found.code in (2, 3) and said in found.err.splitlines()[-1]


def test_without_anything_to_try_it_says_what_to_get(run: Runner, tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", 100)
    path = tmp_path / "workload.yaml"
    path.write_text("log: log.jsonl\nterms: {answers: [own]}\n")
    found = run("optimize", str(path), "--output", str(tmp_path / "out"))
    assert found.code == 2 and "pull a model" in found.err


def test_times_are_read_with_their_unit() -> None:
    assert [seconds(each) for each in ("90s", "30m", "2h", "45")] == [90.0, 1800.0, 7200.0, 45.0]
