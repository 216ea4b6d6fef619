"""A run folder: what was finished stays, what was cut off goes, and nothing of another run is mixed in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmill.core import StorageError, UsageError
from tokenmill.runs import RunFolder, content_hash

HEADER = {"task": "t", "version": 1}


def test_lines_and_documents_come_back(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a/b", HEADER) as run:
        run.append("items", [{"id": "1"}, {"id": "é\n"}])
        run.append("items", [])
        run.append("items", [{"id": "3"}])
        run.write("result", {"value": 1})
    with RunFolder(tmp_path / "a/b", HEADER, resume=True) as run:
        assert [line["id"] for line in run.lines("items")] == ["1", "é\n", "3"]
        assert list(run.lines("nothing")) == []
        assert run.read("result") == {"value": 1}
        assert run.read("nothing") is None


def test_half_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", {"name": "\ud83d"}) as run:
        run.append("items", [{"answer": "a \udc00 b"}])
        assert list(run.lines("items")) == [{"answer": "a \udc00 b"}]
    RunFolder(tmp_path / "run", {"name": "\ud83d"}, resume=True).close()


@pytest.mark.parametrize("half", ['{"id": "3', '{"id": "3"}', "x" * 200_000])
def test_a_half_written_line_is_cut_off(tmp_path: Path, half: str) -> None:
    """Also one that happens to be whole: without its end nobody can know."""
    with RunFolder(tmp_path, HEADER) as run:
        run.append("items", [{"id": "1"}, {"id": "2"}])
        with (tmp_path / "items.jsonl").open("a") as file:
            file.write(half)
        run.append("items", [{"id": "4"}])
        with (tmp_path / "items.jsonl").open("a") as file:
            file.write(half)
        assert [line["id"] for line in run.lines("items")] == ["1", "2", "4"]


def test_every_place_where_a_kill_may_cut(tmp_path: Path) -> None:
    whole = '{"id": "1"}\n{"id": "22"}\n'
    for size in range(len(whole) + 1):
        with RunFolder(tmp_path / str(size), HEADER) as run:
            (run.path / "items.jsonl").write_text(whole[:size])
            assert len(list(run.lines("items"))) == whole[:size].count("\n")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path, HEADER) as run:
        (tmp_path / "items.jsonl").write_text('{"id": "1"}\n[1]\n')
        with pytest.raises(UsageError, match=r"items\.jsonl:2"):
            list(run.lines("items"))


def test_a_run_goes_on_only_if_asked_and_only_as_itself(tmp_path: Path) -> None:
    RunFolder(tmp_path, HEADER).close()
    with pytest.raises(UsageError, match="holds this run") as told:
        RunFolder(tmp_path, HEADER)
    assert "--resume" in told.value.hint
    with pytest.raises(UsageError, match="version was 1 and is 2"):
        RunFolder(tmp_path, {"task": "t", "version": 2}, resume=True)
    (tmp_path / "run.json").write_text(json.dumps({"hash": "0", "header": HEADER}))
    with pytest.raises(UsageError, match="its header was changed"):
        RunFolder(tmp_path, HEADER, resume=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path, HEADER), pytest.raises(UsageError, match="another process"):
        RunFolder(tmp_path, HEADER, resume=True)
    RunFolder(tmp_path, HEADER, resume=True).close()


@pytest.mark.parametrize(
    "use",
    [lambda run: run.write("result", {"new": "x" * 99}), lambda run: run.append("items", [{"id": "2"}])],
)
def test_a_disk_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[RunFolder], None]
) -> None:
    """The error is one of ours, and what was there before is untouched."""
    with RunFolder(tmp_path, HEADER) as run:
        run.write("result", {"old": 1})
        run.append("items", [{"id": "1"}])

        def refuse(handle: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", refuse)
            with pytest.raises(StorageError, match="No space left"):
                use(run)
        assert run.read("result") == {"old": 1}
        assert next(run.lines("items")) == {"id": "1"}


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RunFolder(tmp_path / "file", HEADER)


def test_the_hash_depends_on_content_only() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": "1"})
