"""`tokenmill eval` and `tokenmill tasks`, with a tiny model."""

import json
from pathlib import Path

import pytest

from tests.fast.cli_tools import Runner, make_home, make_runner


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Runner:
    return make_runner(monkeypatch, capsys, home)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks' folders."""
    folder = tmp_path / "data"
    (folder / "piqa").mkdir(parents=True)
    docs = [{"goal": f"goal {i}", "sol1": "the one", "sol2": "a hell", "label": i % 2} for i in range(6)]
    (folder / "piqa/valid.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2/test.txt").write_text("the hell of the hell " * 20)
    return folder


def test_several_tasks_are_kept_and_go_on(run: Runner, data: Path, tmp_path: Path) -> None:
    words = ("eval", "--model", "tiny", "--task", "piqa", "wikitext2", "--data", str(data), "--window", "16")
    out = tmp_path / "out"
    result = run(*words, "--out", str(out), "--json")
    assert result.code == 0, result.err
    first, second = result.document["results"]
    assert (first["task"], first["num_answered"]) == ("piqa", 6)
    assert second["value"]["low"] < second["value"]["estimate"] < second["value"]["high"]
    assert first["machine"]["tokenmill"] and first["model"]["digest"]
    assert json.loads((out / "piqa/result.json").read_text()) == first
    again = run(*words, "--out", str(out))
    assert again.code == 2 and "--resume" in again.err
    again = run(*words, "--out", str(out), "--resume")
    assert again.code == 0 and "6 of 6 items" in again.out and "95 % interval" in again.out


def test_what_is_not_kept_is_said(run: Runner, data: Path) -> None:
    result = run("eval", "--model", "tiny", "--task", "piqa", "--data", str(data), "--limit", "2")
    assert result.code == 0 and "2 chosen of 6" in result.out
    assert "--out DIR keeps them" in result.err


def test_too_long_is_named_and_not_counted(run: Runner, data: Path) -> None:
    long = {"goal": "the hell " * 3000, "sol1": "a", "sol2": "b", "label": 0}
    with (data / "piqa/valid.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    result = run("eval", "--model", "tiny", "--task", "piqa", "--data", str(data))
    assert result.code == 0 and "6 of 7 items" in result.out
    assert "1 items were not answered" in result.err and "7: a text has" in result.err


def test_nothing_answered_is_no_success(run: Runner, data: Path) -> None:
    long = {"goal": "the hell " * 3000, "sol1": "a", "sol2": "b", "label": 0}
    (data / "piqa/valid.jsonl").write_text(json.dumps(long) + "\n")
    result = run("eval", "--model", "tiny", "--task", "piqa", "--data", str(data), "--json")
    assert result.code == 1 and result.document["results"][0]["num_answered"] == 0


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--task", "mmul"), 3, "no task 'mmul'"),
        (("--task", "piqa", "--data", "nowhere"), 3, "nowhere does not exist"),
        (("--task", "gsm8k"), 3, "has no test.jsonl"),
        (("--task", "piqa", "--limit", "0"), 2, "--limit"),
        (("--task", "piqa", "--resume"), 2, "name it with --out"),
    ],
)
def test_errors(run: Runner, data: Path, words: tuple[str, ...], code: int, told: str) -> None:
    result = run("eval", "--model", "tiny", "--data", str(data), *words)
    assert result.code == code and told in result.err


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": "x"}\n{"text":\n',
            "a.jsonl:2: is no JSON (Expecting value, column 9)",
        ),
        ("a.csv", "foo,bar\n1,2\n", "a.csv:2: text is missing, expected text; the fields are foo, bar"),
    ],
)
def test_bad_rows(run: Runner, tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    result = run("eval", "--model", "tiny", "--task", "classify", "--data", str(tmp_path / name))
    assert result.code == 2 and told in result.err


def test_rows_of_what_is_no_file(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n")
    missing = run("decontaminate", str(tmp_path / "nowhere"), str(tmp_path / "a.csv"))
    assert missing.code == 3 and "nowhere does not exist" in missing.err
    folder = run("decontaminate", str(tmp_path), str(tmp_path / "a.csv"))
    assert folder.code == 2 and "is a folder" in folder.err


def test_the_list_of_tasks(run: Runner) -> None:
    table = run("tasks")
    assert table.code == 0 and "arc-challenge" in table.out
    listed = {entry["name"]: entry for entry in run("tasks", "--json").document["tasks"]}
    assert listed["piqa"]["chance"] == 0.5 and listed["wikitext2"]["chance"] is None
