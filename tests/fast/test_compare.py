"""`tokenmill compare`: pairs, slices, flips, verdict and exit codes; what cannot be compared is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fast.cli_tools import Runner, make_runner
from tokenmill.core import NotFoundError, UsageError
from tokenmill.evals.comparison import compare, judge, noise_between, read_run

RESULT: Mapping[str, Any] = {
    "task": "colours",
    "version": 1,
    "questions": "abc",
    "metric": "acc",
    "model": {"name": "m", "digest": "d"},
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    return make_runner(monkeypatch, capsys, tmp_path / "home")


def item(id: str, acc: float, slice: str = "", answer: Any = "red", **fields: Any) -> dict[str, Any]:
    base = {"id": id, "slice": slice, "metrics": {"acc": acc}, "answer": answer}
    tokens = {"num_input_tokens": 1, "num_cached_tokens": 0, "num_output_tokens": 1}
    return base | tokens | fields


def write(folder: Path, items: Sequence[Mapping[str, Any]], **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({**RESULT, **fields}))
    (folder / "items.jsonl").write_text("".join(json.dumps(each) + "\n" for each in items))
    return folder


def pair(path: Path, wins: int, losses: int, same: int) -> tuple[Path, Path]:
    kinds = [(0, 1)] * wins + [(1, 0)] * losses + [(1, 1)] * same
    first = [item(f"q{at}", a, slice="xy"[at % 2], answer="blue") for at, (a, _) in enumerate(kinds)]
    second = [item(f"q{at}", b, slice="xy"[at % 2]) for at, (_, b) in enumerate(kinds)]
    return write(path / "a", first), write(path / "b", list(reversed(second)))


def test_pairs_slices_and_flips(tmp_path: Path) -> None:
    first, second = pair(tmp_path, 6, 2, 32)
    found = compare(read_run(first), read_run(second))
    figures = found.headline
    assert (figures.wins, figures.losses, figures.num_items) == (6, 2, 40)
    assert figures.difference.estimate == pytest.approx(0.1)
    assert figures.p == pytest.approx(2 * (28 + 8 + 1) / 256)
    assert [each.slice for each in found.slices] == ["x", "y"]
    assert sum(each.num_items for each in found.slices) == 40
    assert found.won == [f"q{at}" for at in range(6)]
    assert found.lost == ["q6", "q7"]
    assert found.example("q6") == {"id": "q6", "first": "blue", "second": "red"}


@pytest.mark.parametrize(
    ("wins", "losses", "same", "code", "word"),
    [(10, 10, 980, 0, "pass: "), (2, 90, 908, 1, "fail: "), (4, 4, 92, 10, "undecided: about")],
)
def test_the_verdict_is_the_exit_code(
    tmp_path: Path, run: Runner, wins: int, losses: int, same: int, code: int, word: str
) -> None:
    first, second = pair(tmp_path, wins, losses, same)
    ran = run("compare", str(first), str(second), "--margin", "0.02")
    assert ran.code == code
    assert word in ran.out
    ran = run("compare", str(first), str(second), "--margin", "0.02", "--json")
    document = json.loads(ran.out)
    assert ran.code == code
    assert document["verdict"]["outcome"] == word.split(":")[0]
    assert len(document["won"]) == min(3, wins)


def test_without_a_margin_there_is_no_verdict(tmp_path: Path, run: Runner) -> None:
    first, second = pair(tmp_path, 0, 300, 10)
    ran = run("compare", str(first), str(second))
    assert ran.code == 0
    assert "fail" not in ran.out


def test_more_candidates_need_more_proof(tmp_path: Path) -> None:
    first, second = pair(tmp_path, 8, 10, 482)
    found = compare(read_run(first), read_run(second))
    assert judge(found, margin=0.02).outcome == "pass"
    assert judge(found, margin=0.02, num_candidates=10).outcome == "undecided"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "shapes"}, "task is colours and shapes"),
        ({"version": 2}, "version is 1 and 2"),
        ({"questions": "abd"}, "the questions are not the same"),
    ],
)
def test_other_data_or_versions_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    first = write(tmp_path / "a", [item("q", 1)])
    second = write(tmp_path / "b", [item("q", 1)], **fields)
    with pytest.raises(UsageError, match=message):
        compare(read_run(first), read_run(second))


def test_other_items_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [item("q", 1), item("r", 1)])
    second = write(tmp_path / "b", [item("q", 1)])
    with pytest.raises(UsageError, match=r"1 items are in only one .* the first is r"):
        compare(read_run(first), read_run(second))


def test_items_without_an_answer_are_counted_and_forbid_a_verdict(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [item("q", 1), item("r", 1)])
    second = write(tmp_path / "b", [item("q", 1), item("r", 0, metrics={}, error="timed out")])
    found = compare(read_run(first), read_run(second))
    assert found.unanswered == ["r"]
    assert found.headline.num_items == 1
    with pytest.raises(UsageError, match="1 items were not answered, the first is r"):
        judge(found, margin=0.02)
    # The line of a second attempt counts.
    lines = (second / "items.jsonl").read_text() + json.dumps(item("r", 0)) + "\n"
    (second / "items.jsonl").write_text(lines)
    assert compare(read_run(first), read_run(second)).unanswered == []


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"holds no result\.json"):
        read_run(tmp_path)
    first = write(tmp_path / "x" / "a", [item("q", 1)])
    assert read_run(tmp_path / "x").path == first
    write(tmp_path / "x" / "b", [item("q", 1)])
    with pytest.raises(UsageError, match="several tasks: a, b"):
        read_run(tmp_path / "x")
    (first / "items.jsonl").write_text(json.dumps(item("q", 1)) + "\n{}\n")
    with pytest.raises(UsageError, match=r"items\.jsonl:2: is no result of an item"):
        read_run(first)
    (first / "result.json").write_text("[1]")
    with pytest.raises(UsageError, match="is no result of an evaluation"):
        read_run(first)
    (first / "result.json").unlink()
    with pytest.raises(NotFoundError, match="not finished"):
        read_run(first)


def test_the_noise_floor_is_of_one_model(tmp_path: Path, run: Runner) -> None:
    first, second = pair(tmp_path, 2, 2, 36)
    found = compare(read_run(first), read_run(second))
    assert noise_between(found, read_run(second)).flips.estimate == pytest.approx(0.1)
    ran = run("compare", str(first), str(second), "--noise", str(first))
    assert "A against itself changes 0.00% of the items" in ran.out
    other = write(tmp_path / "c", [], model={"name": "n"})
    (other / "items.jsonl").write_text((first / "items.jsonl").read_text())
    with pytest.raises(UsageError, match="another model"):
        noise_between(found, read_run(other))


def test_texts_are_compared_by_windows(tmp_path: Path) -> None:
    def text(logprobs: Sequence[float], size: int = 100) -> dict[str, Any]:
        answer = [[size, each] for each in logprobs]
        return item(
            "t", 0, answer=answer, metrics={"logprob_per_token": sum(logprobs) / len(logprobs) / size}
        )

    low = [-300.0 - at for at in range(40)]
    first = write(tmp_path / "a", [text(low)], metric="perplexity")
    second = write(
        tmp_path / "b", [text([each - 5 - at % 3 for at, each in enumerate(low)])], metric="perplexity"
    )
    found = compare(read_run(first), read_run(second))
    difference = found.headline.difference
    assert difference.low < -0.06 < difference.high < -0.05
    with pytest.raises(UsageError, match="does not lie between 0 and 1"):
        judge(found, margin=0.02)
    other = write(tmp_path / "c", [text(low, size=90)], metric="perplexity")
    with pytest.raises(UsageError, match="other windows or tokens"):
        compare(read_run(first), read_run(other))


def test_an_unknown_metric_is_named(tmp_path: Path, run: Runner) -> None:
    first, second = pair(tmp_path, 1, 1, 8)
    ran = run("compare", str(first), str(second), "--metric", "f1")
    assert ran.code == 2
    assert "there is no metric 'f1'; there are acc" in ran.err
