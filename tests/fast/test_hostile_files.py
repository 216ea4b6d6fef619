"""Hostile model files: a part of each family of the corpus, a control, and what the probe itself must see."""

import json
from pathlib import Path

import pytest

from scripts import fuzz_models
from scripts.scorecard import s18
from scripts.scorecard.hostile_files import HostileCase
from scripts.scorecard.import_child import Answer
from scripts.scorecard.import_probe import ImportProbe, faults
from tests.fast.model_files import tiny_gguf
from tokenmill.cli.main import main as cli


def test_the_corpus_is_large_enough_and_names_what_errors_must_name() -> None:
    files = s18.all_files()
    num_gguf = sum(case.family.startswith("gguf") for case in files)
    assert num_gguf >= 1000 and len(files) - num_gguf >= 900
    assert len({case.title for case in files}) == len(files)
    families = {case.family for case in files if case.expected == "loads"}
    assert {"gguf sound", "safetensors sound", "folder sound", "link"} <= families


def test_a_part_of_every_family() -> None:
    with ImportProbe() as probe:
        _, violations, figures = s18.tally(probe.run(s18.sample(s18.all_files(), 1)))
    assert not violations, figures


def test_without_a_guard_the_files_are_noticed() -> None:
    chosen = {"only a head", "alignment 3", "zeros", "general.architecture is array"}
    with ImportProbe("gguf checks") as probe:
        tried = list(probe.run([case for case in s18.all_files() if case.name in chosen]))
    assert any(each.faults for each in tried)


def test_the_probe_sees_what_an_import_must_not_do(tmp_path: Path) -> None:
    case = HostileCase(family="x", name="y", files={}, target="in/x", field="hidden_size")
    good = Answer(outcome="refused", message=f"{tmp_path}: hidden_size is 0", hint="h", exit_code=4)
    assert not faults(case, good, tmp_path)
    bad: dict[str, dict[str, object]] = {
        "x has": {"message": f"{tmp_path}: x has"},
        "file": {"message": "hidden_size"},
        "hint": {"hint": ""},
        "exit code": {"exit_code": 1},
        "line": {"message": f"{tmp_path}: hidden_size\n"},
        "took": {"cpu_s": 1.5},
        "needed": {"grew_bytes": 65 << 20},
        "os.system": {"events": ["os.system touch"]},
        "left": {"left": ["left home/x"]},
        "loads": {"outcome": "loads"},
        "ValueError": {"outcome": "broke", "error": "ValueError"},
    }
    for name, changes in bad.items():
        assert faults(case, Answer(**{**vars(good), **changes}), tmp_path), name


def test_the_command_line_names_file_and_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(tiny_gguf(tokenizer__ggml__pre="\x1b[31m" + "x" * 5000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
        assert cli(["pull", str(path)]) == 4
    printed = capsys.readouterr().err
    assert f"{path}: tokenizer.ggml.pre" in printed and "staging" not in printed
    assert "\x1b" not in printed and len(printed) < 1500


@pytest.mark.parametrize("name", fuzz_models.NAMES)
def test_mutations_by_structure(name: str, tmp_path: Path) -> None:
    arguments = ["--plain", "--child", name, "--runs", "30", "--folder", str(tmp_path)]
    assert fuzz_models.main(arguments) == 0


def test_a_finding_is_written_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.models.formats.safetensors._are_sizes", lambda _: True)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = ["--plain", "--child", "safetensors", "--runs", "2000", "--folder", str(tmp_path)]
    assert fuzz_models.main(arguments) == 1
    (found,) = tmp_path.glob("safetensors-plain-*")
    assert str(found) in capsys.readouterr().out
    assert json.loads(found.read_bytes()[8:].partition(b"\0")[0].rpartition(b"}")[0] + b"}")
