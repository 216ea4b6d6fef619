"""The main job with the real model on a few rows: as it is, with examples and grammar, fine-tuned, distilled.

So few rows prove nothing about quality; what is held is that every kind of candidate is made, served,
measured and written down, and that the deployment serves what was measured.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tokenmill.compress import DistilConfig
from tokenmill.core import UsageError
from tokenmill.models.store.library import Library
from tokenmill.optimize import Candidate, Machine, OptimizeConfig, Problem, SearchConfig, optimize, problem_of
from tokenmill.optimize.local import local_candidates
from tokenmill.optimize.trained import StudentRecipe, TeacherRecipe, TrainedCandidate
from tokenmill.optimize.verify import verify
from tokenmill.optimize.write import write_outcome
from tokenmill.server.config import read_deployment
from tokenmill.server.deploy import check_deployment
from tokenmill.train import TrainConfig
from tokenmill.workload import read_rows, read_workload, split_rows

ROOT = Path(__file__).parents[2]
NUM_ROWS = 60
FAST = TrainConfig(learning_rate=2e-4, num_epochs=1, tokens_per_step=1024)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp("slots")
    with gzip.open(ROOT / "examples/slots/log.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [next(file) for _ in range(NUM_ROWS)]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    config = replace(read_workload(ROOT / "examples/slots/workload.yaml"), log=folder / "log.jsonl")
    log = read_rows(config)
    return problem_of(config, log, split_rows(config, log))


def test_every_kind_of_candidate_is_made_served_and_measured(problem: Problem, tmp_path: Path) -> None:
    try:
        directory = Library().find("smollm2-135m")
    except UsageError:
        pytest.skip("smollm2-135m is not pulled")
    plain, *_, formed = local_candidates(directory, formats=("w8a8",), shots=2, has_form=True)
    tuned = TrainedCandidate(
        name="tuned",
        path=str(directory.path),
        digest=directory.digest,
        num_params=directory.architecture.num_params,
        teacher=TeacherRecipe(train=FAST),
    )
    distil = DistilConfig(train=replace(FAST, learning_rate=2e-3, num_epochs=2))
    student = replace(tuned, name="student", student=StudentRecipe(preset="mill-2M", distil=distil))
    candidates: list[Candidate] = [plain, formed, tuned, student]
    settings = OptimizeConfig(budget_s=1e6, search=SearchConfig(max_finalists=4), with_cascades=False)
    folder = tmp_path / "run"
    found = optimize(problem, folder, candidates, Machine(usd_per_hour=0.1), settings)
    assert set(found.entries) >= {each.name for each in candidates}, found.lost
    for name, entry in found.entries.items():
        assert entry.figures.num_errors == 0 or name == plain.name
        assert entry.figures.requests_per_s > 0 and entry.figures.memory_bytes > 1 << 20
    entry = found.entries[formed.name]
    limit = entry.artefact.settings["max_tokens"]  # an answer cut off there is half an object
    whole = [item for item in entry.items if not item.error and item.num_output_tokens < limit]
    assert all(item.answer.lstrip().startswith("{") for item in entry.items if not item.error)
    assert all(isinstance(json.loads(item.answer), dict) for item in whole), "the grammar holds"
    sizes = {name: entry.figures.artefact_bytes for name, entry in found.entries.items()}
    assert sizes["student"] < sizes["tuned"] / 10
    write_outcome(found, folder, {"cpu_model": "", "num_usable_cpus": 2})
    assert all(each.outcome != "does not hold" for each in verify(folder))
    again = optimize(problem, folder, candidates, Machine(usd_per_hour=0.1), settings)
    assert again.judged == found.judged and again.num_looks == found.num_looks
    for name in ("student", formed.name):
        entry = found.entries[name]
        parts = entry.candidate.deployment(entry.artefact, "w")
        (tmp_path / f"{name[:3]}.yaml").write_text(json.dumps(parts))
        assert check_deployment(read_deployment(tmp_path / f"{name[:3]}.yaml"))
