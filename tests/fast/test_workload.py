"""Workload files: appending, bounds, crashes in the middle of a line, and erasures that can be proven."""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from tokenmill.core import NotFoundError, UsageError
from tokenmill.costs.traffic import read_traffic
from tokenmill.evals.load.prompts import read_prompts
from tokenmill.workload import (
    FolderConfig,
    Origin,
    WorkloadCall,
    WorkloadFolder,
    erase,
    read_calls,
    read_erasures,
    verify_erasures,
    write_call,
)
from tokenmill.workload.folder import ERASURES_NAME

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def call(
    number: int, end_user: str = "", *, project: str = "p", text: str = "hello", at: float = 0.0
) -> bytes:
    record = WorkloadCall(
        id=f"req_{number}",
        created=at or float(number),
        project=project,
        end_user=end_user,
        request={"model": "m", "messages": [{"role": "user", "content": text}]},
        response={"choices": [{"message": {"role": "assistant", "content": "hi"}}], "usage": USAGE},
        deployment="d",
        origin=Origin(model="m"),
        terms=("apache-2.0",),
    )
    return write_call(record)


def written(folder: WorkloadFolder, lines: Sequence[bytes]) -> None:
    with folder.locked():
        folder.append(lines)


def test_lines_come_back_and_files_are_private(tmp_path: Path) -> None:
    folder = WorkloadFolder(tmp_path / "captures")
    written(folder, [call(1), call(2)])
    written(folder, [call(3)])
    (path,) = folder.files()
    assert [each.id for each in read_calls(path)] == ["req_1", "req_2", "req_3"]
    assert path.stat().st_mode & 0o777 == 0o600 and folder.path.stat().st_mode & 0o777 == 0o700


def test_other_readers_take_the_lines(tmp_path: Path) -> None:
    folder = WorkloadFolder(tmp_path)
    completion = json.loads(call(2)) | {"request": {"model": "m", "prompt": "Once"}}
    written(folder, [call(1, text="a question"), json.dumps(completion).encode() + b"\n"])
    (path,) = folder.files()
    traffic = read_traffic(path)
    assert traffic.counted and [(each.input, each.output) for each in traffic.calls] == [(7, 3), (7, 3)]
    assert read_prompts(path) == ("a question", "Once")


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    folder = WorkloadFolder(tmp_path)
    written(folder, [call(1)])
    (path,) = folder.files()
    with path.open("ab") as file:
        file.write(call(2)[:-30])
    with pytest.raises(UsageError, match=r"jsonl:2"):
        list(read_calls(path))
    written(folder, [call(3)])
    assert [each.id for each in read_calls(path)] == ["req_1", "req_3"]
    with pytest.raises(NotFoundError):
        list(read_calls(tmp_path / "none"))


def test_size_and_age_are_bounded(tmp_path: Path) -> None:
    folder = WorkloadFolder(tmp_path, FolderConfig(max_bytes=20_000, max_file_bytes=5_000, keep_days=2))
    for number in range(100):
        written(folder, [call(number)])
    assert len(folder.files()) > 5, "files are bounded"
    with folder.locked():
        assert folder.trim() > 0
    assert sum(path.stat().st_size for path in folder.files()) <= 20_000
    newest = [each.id for each in read_calls(folder.files()[-1])]
    assert newest[-1] == "req_99", "the oldest go first"
    with folder.locked():
        assert folder.trim(time.time() + 1.9 * 86400) == 0
        folder.trim(time.time() + 2.1 * 86400)
    assert not folder.files()
    with pytest.raises(UsageError):
        FolderConfig(max_bytes=1)
    with pytest.raises(UsageError):
        FolderConfig(keep_days=0)


def test_pseudonyms_need_the_key(tmp_path: Path) -> None:
    one, two = WorkloadFolder(tmp_path / "1"), WorkloadFolder(tmp_path / "2")
    assert one.pseudonym("p", "ann") == WorkloadFolder(tmp_path / "1").pseudonym("p", "ann")
    names = {one.pseudonym("p", "ann"), one.pseudonym("pa", "nn"), two.pseudonym("p", "ann")}
    assert len(names) == 3 and not any("ann" in name for name in names) and one.pseudonym("p", "") == ""


def test_an_end_user_is_erased_and_nobody_else(tmp_path: Path) -> None:
    folder = WorkloadFolder(tmp_path / "captures", FolderConfig(max_file_bytes=4096))
    ann, bob = folder.pseudonym("p", "ann"), folder.pseudonym("p", "bob")
    for number in range(40):
        written(folder, [call(number, ann if number % 4 == 0 else bob), call(number, ann, project="q")])
    derived = tmp_path / "train.jsonl"
    derived.write_bytes(call(1, ann) + call(2, bob) + b'{"messages": [], "user": "ann"}\n')
    inodes = {path: path.stat().st_ino for path in folder.files()}
    proof = erase(folder, project="p", end_user="ann", also=[derived], ledger_rows=7)
    assert proof.num_lines_removed == 10 + 2 and proof.ledger_rows == 7 and "ann" not in str(proof)
    kept = [each for path in folder.files() for each in read_calls(path)]
    assert sum(each.end_user == bob for each in kept) == 30
    assert sum(each.project == "q" for each in kept) == 40, "the same id in another project is somebody else"
    assert not any(each.project == "p" and each.end_user == ann for each in kept)
    assert [each.end_user for each in read_calls(derived)] == [bob]
    assert any(path.stat().st_ino != inode for path, inode in inodes.items())
    assert not list(folder.path.glob("*.tmp")) and verify_erasures(folder) == []
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.files())
    assert erase(folder, project="p", end_user="ann").num_lines_removed == 0, "twice changes nothing"
    written(folder, [call(100, ann, at=time.time() + 1)])
    assert verify_erasures(folder) == [], "an end user may come back"


def test_what_was_changed_afterwards_is_seen(tmp_path: Path) -> None:
    folder = WorkloadFolder(tmp_path)
    ann = folder.pseudonym("p", "ann")
    for user in ("ann", "bob", "eve"):
        written(folder, [call(1, folder.pseudonym("p", user)), call(2, "other")])
        erase(folder, project="p", end_user=user)
    log = tmp_path / ERASURES_NAME
    lines = log.read_bytes().splitlines(keepends=True)
    assert verify_erasures(folder) == []
    for damaged in (
        lines[1:],
        [lines[0], lines[2]],
        [lines[0].replace(b'"ledger_rows":0', b'"ledger_rows":9')],
    ):
        log.write_bytes(b"".join(damaged))
        assert verify_erasures(folder) != []
    log.write_bytes(b"".join(lines))
    (path,) = folder.files()
    kept = path.read_bytes()
    path.write_bytes(kept + call(5, ann))
    assert any("before the erasure" in each for each in verify_erasures(folder))
    path.write_bytes(b"x" * 10 + b"\n")
    with pytest.raises(UsageError):
        verify_erasures(folder)
    path.unlink()
    assert verify_erasures(folder) == [], "files go with their time"


def test_nothing_is_changed_if_a_file_cannot_be_read(tmp_path: Path) -> None:
    folder = WorkloadFolder(tmp_path / "captures")
    written(folder, [call(1, folder.pseudonym("p", "ann"))])
    before = folder.files()[0].read_bytes()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no json\n")
    with pytest.raises(UsageError, match="no JSON object"):
        erase(folder, project="p", end_user="ann", also=[bad])
    assert folder.files()[0].read_bytes() == before and read_erasures(folder) == []
    with pytest.raises(UsageError, match="no end user"):
        erase(folder, project="p", end_user="")


def test_writing_and_erasing_take_turns(tmp_path: Path) -> None:
    folder = WorkloadFolder(tmp_path)
    ann = folder.pseudonym("p", "ann")

    def write() -> None:
        for number in range(100):
            written(folder, [call(number, ann), call(number, "bob")])

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        erase(folder, project="p", end_user="ann")
    thread.join()
    erase(folder, project="p", end_user="ann")
    (path,) = folder.files()
    assert [each.end_user for each in read_calls(path)] == ["bob"] * 100
    assert sum(each.num_lines_removed for each in read_erasures(folder)) == 100


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(msgspec.json.encode(json.loads(call(1)) | {"more": 1}) + b"\n")
    with pytest.raises(UsageError, match=r"x.jsonl:1.*more"):
        list(read_calls(path))
