"""The store: names, places, atomic changes, locks, crashes."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fast.model_files import tiny_gguf
from tokenmill.core import NotFoundError, StorageError, UsageError
from tokenmill.models.store.assemble import Origin, from_gguf
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library, default_home

BAD_NAMES = ["", "..", "../x", "a/b", "/etc/passwd", "a\x00b", "-x", ".x", "x" * 200, "nul", "a\\..\\b"]


def quiet(_: str, __: int, ___: int) -> None:
    pass


def fill(staging: Path, name: str) -> None:
    (staging / "model.gguf").write_bytes(tiny_gguf())
    from_gguf(staging, Origin(name=name, source="a test"), quiet)


def add(library: Library, name: str) -> ModelDirectory:
    with library.lock(name), library.staging(name) as staging:
        fill(staging, name)
        return library.place(staging, name)


def tree(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if "locks" not in path.parts}


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "home")


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert default_home() == tmp_path / "a"
    monkeypatch.delenv("TOKENMILL_HOME")
    assert default_home() == tmp_path / "b" / "tokenmill"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_home() == tmp_path / "c" / ".local" / "share" / "tokenmill"
    monkeypatch.setenv("TOKENMILL_HOME", "~/d")
    assert default_home() == tmp_path / "c" / "d"


def test_an_empty_store_is_not_created(library: Library) -> None:
    assert library.names() == []
    assert library.models() == []
    with pytest.raises(NotFoundError):
        library.find("tiny")
    assert not library.home.exists()


def test_add_find_remove(library: Library) -> None:
    add(library, "tiny")
    add(library, "b.2")
    assert library.names() == ["b.2", "tiny"]
    assert [model.name for model in library.models()] == ["b.2", "tiny"]
    found = library.find("tiny")
    found.verify()
    assert library.find(str(found.path)).path == found.path
    library.remove("tiny")
    assert library.names() == ["b.2"]
    assert list((library.home / "staging").iterdir()) == []
    with pytest.raises(NotFoundError, match="no model named 'tiny'"):
        library.remove("tiny")


def test_unknown_names_get_the_next_step(library: Library) -> None:
    add(library, "my-tiny-model")
    for name, hint in (
        ("my-tinny-model", "did you mean my-tiny-model"),
        ("smollm2-135m", "tokenmill pull smollm2-135m"),
        ("smolm2-135", "did you mean smollm2-135m"),
        ("zzz", "tokenmill models"),
    ):
        with pytest.raises(NotFoundError) as caught:
            library.find(name)
        assert hint in caught.value.hint
    with pytest.raises(NotFoundError, match="no model directory"):
        library.find("./absent")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_store(library: Library, name: str) -> None:
    for use in (library.path_of, library.remove):
        with pytest.raises(UsageError, match="model name"):
            use(name)
    with pytest.raises(UsageError), library.staging(name):
        pass
    with pytest.raises(UsageError), library.lock(name):
        pass
    assert not library.home.exists()


def test_place_refuses_a_taken_name_and_replaces_if_asked(library: Library) -> None:
    add(library, "tiny")
    before = tree(library.home)
    with pytest.raises(StorageError, match="exists already"):
        add(library, "tiny")
    assert tree(library.home) == before
    (library.path_of("tiny") / "config.json").write_text("damaged")
    with library.lock("tiny"), library.staging("tiny") as staging:
        fill(staging, "tiny")
        library.place(staging, "tiny", replace=True).verify()
    assert tree(library.home) == before


def test_a_failure_leaves_the_store_as_it_was(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    add(library, "old")
    before = tree(library.home)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, target, full)
            with pytest.raises(StorageError, match="No space left"):
                add(library, "new")
        assert tree(library.home) == before
    assert library.names() == ["old"]


def test_a_killed_change_leaves_the_store_as_it_was(library: Library) -> None:
    add(library, "old")
    script = (
        "import pathlib, sys, time\n"
        "from tokenmill.models.store.library import Library\n"
        "library = Library(pathlib.Path(sys.argv[1]))\n"
        "with library.lock('new'), library.staging('new') as staging:\n"
        "    (staging / 'config.json').write_text('half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(library.home)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    add(library, "other")
    assert (library.home / "staging" / "new").exists(), "another process is still making it"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert library.names() == ["old", "other"]
    add(library, "third")
    assert not (library.home / "staging" / "new").exists(), "what the crash left is gone"


def hold_lock(home: Path, seconds: float, started: "multiprocessing.synchronize.Event") -> None:
    with Library(home).lock("tiny"):
        started.set()
        time.sleep(seconds)


def test_one_at_a_time(library: Library) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    other = context.Process(target=hold_lock, args=(library.home, 0.7, started))
    other.start()
    assert started.wait(20)
    waited = []
    begin = time.monotonic()
    with library.lock("other"):
        pass
    with library.lock("tiny", waiting=lambda: waited.append(True)):
        assert time.monotonic() - begin > 0.3
    other.join()
    assert waited == [True]


def test_a_read_only_home(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    library = Library(tmp_path / "file")
    with pytest.raises(StorageError, match="file") as caught, library.lock("tiny"):
        pass
    assert "TOKENMILL_HOME" in caught.value.hint
    shutil.rmtree(tmp_path)
