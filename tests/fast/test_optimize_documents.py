"""What a run leaves: report, page, certificate, deployment, JUnit; and what verify and gate make of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.fast.cli_tools import Runner, make_runner
from tests.fast.optimize_fakes import FakeCandidate, right, workload, wrong
from tokenmill.core import UsageError
from tokenmill.optimize import Machine, Outcome, optimize
from tokenmill.optimize.charts import Curve, Mark, latency_chart, pareto_chart
from tokenmill.optimize.classifier import ClassifierCandidate
from tokenmill.optimize.documents import seal
from tokenmill.optimize.verify import Check, gate_outcome, read_certificate, verify
from tokenmill.optimize.write import write_outcome
from tokenmill.server.config import read_deployment
from tokenmill.workload import Slo

MACHINE = {"cpu_model": "a test's", "num_usable_cpus": 2}
BAD = FakeCandidate(name="bad <b>", answer=lambda text: (wrong(text), 0.4))
"""Wrong everywhere, and with a name that a page must not take for its own text."""


def finished(folder: Path, *candidates: Any) -> Outcome:
    problem = workload(folder, slice_by="answer", slo=Slo(e2e_ms=500.0))
    found = optimize(problem, folder / "run", candidates, Machine(usd_per_hour=0.1, energy_note="none"))
    write_outcome(found, folder / "run", MACHINE)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the classifier wins."""
    folder = tmp_path_factory.mktemp("done")
    finished(folder, ClassifierCandidate(), BAD, FakeCandidate(name="slow", delay_s=0.2))
    return folder / "run"


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def failed(checks: list[Check]) -> set[str]:
    return {each.name for each in checks if each.outcome == "does not hold"}


def test_the_certificate_says_what_is_claimed(done: Path) -> None:
    certificate = read_certificate(done)
    assert certificate["verdict"] == "pass" and certificate["choice"]["winner"] == "classifier"
    assert certificate["seal"] == seal(certificate) and certificate["num_looks"] == 3
    assert set(certificate["digests"]) >= {
        "log",
        "splits",
        "certify",
        "rules",
        "engine",
        "run",
        "certify_lines",
    }
    winner = certificate["winner"]
    assert winner["kind"] == "classifier" and winner["artefact"]["num_trained_on"] > 100
    assert "trained_on" not in winner["artefact"]
    assert winner["figures"]["usd_per_pass"]["high"] is not None
    assert set(winner["judged"]["slices"]) == {"refund", "balance", "transfer", "card"}


def test_the_page_needs_nothing_else(done: Path) -> None:
    page = (done / "report.html").read_text(encoding="utf-8")
    for foreign in ("<script", "http://", "https://", "<link", "@import", "url("):
        assert foreign not in page, foreign
    assert "Deploy classifier" in page and page.count("<svg") == 2
    assert "bad &lt;b&gt;" in page and "bad <b>" not in page
    assert "Where classifier and the incumbent disagree" in page or "0 rows in which it is worse" not in page


def test_verify_holds_for_a_run_as_it_was_made(done: Path, copy: Path) -> None:
    assert failed(verify(done)) == set()
    checks = {each.name: each.outcome for each in verify(copy)}  # moved, with its log elsewhere still there
    assert set(checks.values()) == {"holds"}


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def better(line: str) -> str:
    value = json.loads(line)
    value["item"] |= {"score": 1.0, "passed": True}
    return json.dumps(value)


def test_verify_names_what_was_changed(copy: Path) -> None:
    change(copy / "certificate.json", lambda value: value.update(verdict="fail"))
    assert failed(verify(copy)) == {"seal"}


def test_verify_finds_better_answers_than_there_were(copy: Path) -> None:
    lines = (copy / "certify.jsonl").read_text().splitlines()
    (copy / "certify.jsonl").write_text("\n".join(map(better, lines)) + "\n")
    found = failed(verify(copy))
    assert {"lines of certify", "verdicts"} <= found


def test_verify_finds_another_winner_even_if_it_is_sealed_again(copy: Path) -> None:
    def crown(value: dict[str, Any]) -> None:
        value["choice"]["winner"] = "slow"
        value["seal"] = seal(value)

    change(copy / "certificate.json", crown)
    checks = verify(copy)
    assert failed(checks) == {"choice"}
    assert "the certificate says slow" in next(each.words for each in checks if each.name == "choice")


def test_verify_finds_other_weights_and_other_rows(copy: Path) -> None:
    folder = next(each.parent for each in copy.glob("candidates/*/classifier.json"))
    (folder / "classifier.npz").write_bytes(b"other")
    log = Path(json.loads((copy / "workload.json").read_text())["log"])
    other = copy / "log.jsonl"
    other.write_text("".join(log.read_text().splitlines(keepends=True)[:-5]))
    change(copy / "workload.json", lambda value: value.update(log=str(other)))
    assert failed(verify(copy)) >= {"the winner's files", "the log", "the splits"}
    other.unlink()
    assert next(each for each in verify(copy) if each.name == "workload").outcome == "not checked"


def test_verify_names_a_file_that_is_damaged(copy: Path) -> None:
    (copy / "certify.jsonl").write_text("no json\n")
    checks = {each.name: each.words for each in verify(copy)}
    assert "certify.jsonl:1: no JSON" in checks["verdicts"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    return make_runner(monkeypatch, capsys, tmp_path / "home")


def test_the_gate_has_three_codes(done: Path, copy: Path, tmp_path: Path, run: Runner) -> None:
    assert run("gate", str(done)).code == 0
    for verdict, code in (("fail", 1), ("undecided", 3)):

        def turn(value: dict[str, Any], verdict: str = verdict) -> None:
            value["verdict"] = verdict
            value["seal"] = seal(value)

        change(copy / "certificate.json", turn)
        assert run("gate", str(copy)).code == code
    change(copy / "certificate.json", lambda value: value.update(verdict="pass"))
    with pytest.raises(UsageError, match="changed"):
        gate_outcome(read_certificate(copy))
    assert run("gate", str(copy)).code == 2
    assert run("gate", str(tmp_path)).code == 2  # no verdict is never taken for one


def test_verify_is_a_command(done: Path, copy: Path, run: Runner) -> None:
    assert run("verify", str(done)).code == 0
    change(copy / "certificate.json", lambda value: value.update(verdict="fail"))
    found = run("verify", str(copy))
    assert found.code == 1 and "does not hold  seal" in found.out


def test_the_deployment_is_one_that_serve_reads(done: Path) -> None:
    deployment = read_deployment(done / "deployment.yaml")
    (classifier,) = deployment.classifiers
    assert Path(classifier.folder).is_dir() and deployment.machine.usd_per_hour == 0.1


def test_without_a_winner_the_incumbent_is_deployed(tmp_path: Path) -> None:
    found = finished(tmp_path, FakeCandidate(name="bad", answer=lambda text: (wrong(text), 0.9)))
    assert found.winner is None
    certificate = read_certificate(tmp_path / "run")
    assert certificate["verdict"] == "fail" and certificate["winner"] is None
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Keep the incumbent" in page
    (upstream,) = read_deployment(tmp_path / "run" / "deployment.yaml").upstreams
    assert upstream.model == "large" and upstream.price.output_usd == 30.0
    assert failed(verify(tmp_path / "run")) == set()


def test_a_cascade_is_deployed_in_front_of_the_incumbent(tmp_path: Path) -> None:
    def unsure(text: str) -> tuple[str, float]:
        return (wrong(text), 0.2) if text[0] in "bd" else (right(text), 0.9)

    problem = workload(tmp_path, 1500)
    candidate = FakeCandidate(name="unsure", answer=unsure)
    found = optimize(problem, tmp_path / "run", [candidate], Machine(usd_per_hour=0.1))
    write_outcome(found, tmp_path / "run", MACHINE)
    assert found.choice.winner == "unsure > incumbent"
    deployment = read_deployment(tmp_path / "run" / "deployment.yaml")
    (cascade,) = deployment.cascades
    assert cascade.second == "incumbent" == deployment.upstreams[0].name
    assert 0.2 < cascade.min_probability <= 0.9
    assert failed(verify(tmp_path / "run")) == set()
    certified = read_certificate(tmp_path / "run")["winner"]["cascade"]["certified"]
    assert certified["is_proven"] and "Clopper-Pearson" in certified["words"]


def test_junit_has_a_suite_for_each_candidate(done: Path) -> None:
    root = ElementTree.fromstring((done / "junit.xml").read_text())
    suites = {each.get("name"): each for each in root}
    assert set(suites) >= {"run", "classifier", "slow"}
    assert suites["run"].get("failures") == "0"
    bad = next(each for name, each in suites.items() if name and name.startswith("bad"))
    assert int(bad.get("failures") or 0) >= 1


def test_charts_without_points_are_empty_and_labels_do_not_meet() -> None:
    assert pareto_chart([], None) == "" and latency_chart([Curve("a", "losing", [])], None) == ""
    marks = [Mark(f"one of many {at}", "losing", (1.0, 0.9, 1.1), (0.9, 0.8, 0.95)) for at in range(6)]
    chart = ElementTree.fromstring(pareto_chart(marks, 0.5))
    places = [
        float(each.get("y") or 0) for each in chart.iter("text") if "label" in (each.get("class") or "")
    ]
    assert len(set(places)) == 6
