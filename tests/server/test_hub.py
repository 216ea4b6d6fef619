"""Pulling from a hub on the loopback interface: what arrives, what goes on, what is refused, what is left."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fast.model_files import tiny_gguf
from tests.fast.shard_files import sharded_copy
from tests.fast.test_directory import make
from tests.server.hub_server import COMMIT, NEXT_COMMIT, HubSite, serve_hub
from tokenmill.cli.main import main
from tokenmill.core import DownloadError, ModelFormatError, NotFoundError, StorageError, UsageError
from tokenmill.core.errors import TokenmillError
from tokenmill.models.store import hub as hub_module
from tokenmill.models.store import transfer
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.hub import Hub, HubModel, HubSource
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import pull_from_hub

SOURCE = HubSource(owner="owner", name="name")
GGUF = HubSource(owner="owner", name="name", file="tiny.Q4_1.gguf")
CANARY = b"raise SystemExit('code of the repository ran')"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sharded repository with everything in it that must never be fetched."""
    folder = tmp_path_factory.mktemp("repository")
    make(folder / "whole", tiny_gguf())
    sharded_copy(folder / "whole", folder / "shards", 2)
    files = {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
    others = {
        name: CANARY for name in ("modeling_name.py", "pytorch_model.bin", "onnx/model.onnx", "README.md")
    }
    return {**files, **others, "tiny.Q4_1.gguf": tiny_gguf()}


@pytest.fixture
def site(model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubSite]:
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy") or name.endswith("CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(transfer, "_PAUSE_SECONDS", 0.0)
    with serve_hub(HubSite(commits={COMMIT: dict(model_files)})) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        yield site


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "home")


def left(library: Library) -> set[str]:
    return {path.name for path in library.home.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_sharded_model_is_pulled(site: HubSite, library: Library) -> None:
    announced: list[HubModel] = []
    stages: list[tuple[str, int, int]] = []
    model = pull_from_hub(
        SOURCE, library, progress=lambda *each: stages.append(each), announce=announced.append
    )
    model.verify()
    assert model.manifest is not None
    assert model.manifest.source == f"hf:owner/name@{COMMIT}" and model.manifest.licences == ("apache-2.0",)
    assert set(model.manifest.files) == {file.name for file in announced[0].files}
    assert announced[0].num_bytes == sum(len(site.commits[COMMIT][name]) for name in model.manifest.files)
    wanted = [path for path in site.paths("hub") if "resolve" in path]
    assert not [path for path in wanted if path.endswith((".py", ".bin", ".onnx", ".md", ".gguf"))]
    assert all(f"/resolve/{COMMIT}/" in path for path in wanted)
    downloads = [each for each in stages if each[0] == "download"]
    assert downloads[-1][1:] == (announced[0].num_bytes,) * 2
    assert [each[1] for each in downloads] == sorted(each[1] for each in downloads)
    assert left(library) == {*model.manifest.files, "tokenmill.json"}
    stages.clear()
    assert pull_from_hub(SOURCE, library, progress=lambda *each: stages.append(each)).digest == model.digest
    assert stages[-1][0] == "present"


def test_a_pinned_model_that_is_here_needs_no_hub(site: HubSite, library: Library) -> None:
    pinned = HubSource(owner="owner", name="name", revision=COMMIT)
    pull_from_hub(pinned, library)
    count = len(site.requests)
    pull_from_hub(pinned, library)
    assert len(site.requests) == count
    (library.path_of("name") / "tokenizer.json").write_text("{}")
    pull_from_hub(pinned, library).verify()
    assert len(site.requests) > count


def test_one_gguf_file_is_pulled(site: HubSite, library: Library) -> None:
    model = pull_from_hub(GGUF, library)
    model.verify()
    assert model.name == "tiny.Q4_1" and model.manifest is not None
    assert model.manifest.source == f"hf:owner/name/tiny.Q4_1.gguf@{COMMIT}" and model.manifest.grid_file
    assert [path for path in site.paths("store")] == [f"/{COMMIT}/tiny.Q4_1.gguf?signature=x"]


def test_an_interrupted_download_goes_on(
    site: HubSite, library: Library, model_files: dict[str, bytes]
) -> None:
    site.cut = [10_000, 20_000]
    pull_from_hub(GGUF, library).verify()
    ranges = [headers.get("Range", "") for where, _, headers in site.requests if where == "store"]
    assert ranges == ["", "bytes=10000-", "bytes=30000-"]


def test_a_killed_pull_goes_on(site: HubSite, library: Library) -> None:
    body = random.Random(0).randbytes(8_000_000)
    site.commits[COMMIT]["tiny.Q4_1.gguf"] = body
    site.cut = [3_000_000]
    program = "import sys; from tokenmill.cli.main import main; sys.exit(main(['pull', sys.argv[1]]))"
    environment = {**os.environ, "TOKENMILL_HOME": str(library.home)}
    child = subprocess.Popen(
        [sys.executable, "-c", program, "hf:owner/name/tiny.Q4_1.gguf"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    part = library.downloads / f"tiny.Q4_1@{COMMIT}" / "tiny.Q4_1.gguf.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    arrived = part.stat().st_size
    assert 0 < arrived <= 3_000_000
    site.requests.clear()
    with pytest.raises(ModelFormatError, match="GGUF"):  # it is none, but it is what was to arrive
        pull_from_hub(GGUF, library)
    ranges = [headers.get("Range") for where, _, headers in site.requests if where == "store"]
    assert ranges == [f"bytes={arrived}-"]
    assert library.names() == []


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_wrong_file_is_discarded(site: HubSite, library: Library, name: str) -> None:
    data = bytearray(site.commits[COMMIT][name])
    data[-3] ^= 1
    site.swapped[name] = bytes(data)
    with pytest.raises(DownloadError, match=f"{name} does not match"):
        pull_from_hub(SOURCE, library)
    assert name not in left(library) and f"{name}.part" not in left(library) and library.names() == []
    site.swapped.clear()
    pull_from_hub(SOURCE, library).verify()


def test_a_file_damaged_between_two_runs_is_fetched_again(site: HubSite, library: Library) -> None:
    site.swapped[SHARD] = b"x" * len(site.commits[COMMIT][SHARD])
    with pytest.raises(DownloadError):
        pull_from_hub(SOURCE, library)
    folder = library.downloads / f"name@{COMMIT}"
    (folder / "config.json").write_text("{}")
    site.swapped.clear()
    pull_from_hub(SOURCE, library).verify()


def test_the_token_is_seen_by_the_hub_alone(
    site: HubSite, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    pull_from_hub(SOURCE, library).verify()
    seen: dict[str, set[str | None]] = {where: set() for where in ("hub", "store")}
    for where, _, headers in site.requests:
        seen[where].add(headers.get("Authorization"))
    assert seen == {"hub": {"Bearer hf_secret"}, "store": {None}}


def test_a_branch_that_moves_between_two_files_changes_nothing(
    site: HubSite, library: Library, model_files: dict[str, bytes]
) -> None:
    def move(_: str) -> None:
        other = {name: data[::-1] for name, data in model_files.items()}
        site.commits[NEXT_COMMIT] = other

    site.on_file = move
    model = pull_from_hub(SOURCE, library)
    assert model.manifest is not None and model.manifest.source.endswith(COMMIT)
    for name in model.manifest.files:
        assert (model.path / name).read_bytes() == model_files[name]
    with pytest.raises(StorageError, match="is another model"):
        pull_from_hub(SOURCE, library)


def test_a_hub_that_answers_with_another_commit_is_refused(site: HubSite, library: Library) -> None:
    site.answer_commit = NEXT_COMMIT
    with pytest.raises(DownloadError, match="another revision"):
        pull_from_hub(HubSource(owner="owner", name="name", revision=COMMIT), library)


def test_it_waits_as_the_hub_asks(site: HubSite, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    site.busy = [(429, {"Retry-After": "7"}), (503, {})]
    pull_from_hub(GGUF, library).verify()
    assert slept == [7.0, 0.0]
    slept.clear()
    site.busy = [(429, {"Retry-After": "100000"})]
    with pytest.raises(DownloadError, match=r"429.*wait 100000 s"):
        pull_from_hub(SOURCE, library)
    assert not slept


def test_a_hub_that_stays_busy_is_given_up(site: HubSite, library: Library) -> None:
    site.busy = [(500, {})] * 50
    with pytest.raises(DownloadError, match="HTTP status 500"):
        pull_from_hub(SOURCE, library)
    assert len(site.requests) == 4


PATHS = ("../evil", "/etc/passwd", "a/../../b", "a\\b", "a\0b", "", "a/", "..", "./a", 7, "x" * 2000)


@pytest.mark.parametrize("path", PATHS)
def test_a_list_that_leads_elsewhere_is_refused(site: HubSite, library: Library, path: Any) -> None:
    site.extra_rows = [{"rfilename": path, "size": 1, "blobId": "0" * 40}]
    with pytest.raises(DownloadError, match="does not answer as a hub does"):
        pull_from_hub(SOURCE, library)
    assert left(library) == set()


ROWS: tuple[Any, ...] = (
    None,
    [],
    {"size": 1},
    {"rfilename": "config.json", "size": -1},
    {"rfilename": "config.json", "size": True},
    {"rfilename": "config.json", "size": 1 << 60},
    {"rfilename": "config.json", "size": 1, "lfs": 3},
    {"rfilename": "config.json", "lfs": {"size": 1, "sha256": "../../x"}},
    {"rfilename": "config.json", "lfs": {"size": 1, "sha256": 5}},
    {"rfilename": "config.json", "size": 1, "blobId": "x"},
)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_malformed_row_is_refused(site: HubSite, library: Library, row: Any) -> None:
    site.extra_rows = [row]
    with pytest.raises(DownloadError, match="does not answer as a hub does"):
        pull_from_hub(SOURCE, library)


def test_a_list_without_end_is_refused(
    site: HubSite, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.extra_rows = [{"rfilename": f"data/{number}"} for number in range(100_000)]
    started = time.monotonic()
    with pytest.raises(ModelFormatError, match=r"1000\d\d files, at most"):
        pull_from_hub(SOURCE, library)
    monkeypatch.setattr(hub_module, "_MAX_LIST_BYTES", 1 << 20)
    with pytest.raises(DownloadError, match="longer than 1048576 bytes"):
        pull_from_hub(SOURCE, library)
    assert time.monotonic() - started < 10


def only(site: HubSite, *names: str) -> None:
    site.commits[COMMIT] = {name: site.commits[COMMIT].get(name, CANARY) for name in names}


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (("config.json", "tokenizer.json", "pytorch_model.bin"), ModelFormatError, "runs code"),
        (("config.json", "tiny.Q4_1.gguf"), UsageError, "hf:owner/name/tiny.Q4_1.gguf"),
        (("config.json", "tokenizer.json"), NotFoundError, "no model.safetensors"),
        (("model.safetensors", "config.json"), NotFoundError, "no tokenizer.json"),
        (("model.safetensors", "tokenizer.json"), NotFoundError, "no config.json"),
        (
            ("config.json", "model.safetensors.index.json", SHARD),
            ModelFormatError,
            "does not name model-00001",
        ),
    ],
)
def test_what_makes_no_model_is_refused_before_anything_is_fetched(
    site: HubSite, library: Library, names: tuple[str, ...], error: type[TokenmillError], says: str
) -> None:
    only(site, *names)
    with pytest.raises(error) as caught:
        pull_from_hub(SOURCE, library)
    assert says in str(caught.value) and len(site.requests) == 1 and left(library) == set()


def test_a_model_that_is_not_supported_is_refused_before_its_weights(site: HubSite, library: Library) -> None:
    site.commits[COMMIT]["config.json"] = json.dumps({"model_type": "mamba"}).encode()
    site.commits[COMMIT][SHARD] = bytes(40 << 20)
    with pytest.raises(ModelFormatError, match="mamba"):
        pull_from_hub(SOURCE, library)
    assert not [path for path in site.paths() if SHARD in path]


def test_an_index_of_other_shards_is_refused_before_the_weights(site: HubSite, library: Library) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    site.commits[COMMIT]["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(ModelFormatError, match="names other shards"):
        pull_from_hub(SOURCE, library)


def test_refusals_say_what_to_do(site: HubSite, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: HubSource = SOURCE) -> str:
        with pytest.raises(TokenmillError) as caught:
            pull_from_hub(source, library)
        return str(caught.value)

    assert "no model owner/other, or it is private" in refused(HubSource(owner="owner", name="other"))
    assert "has no revision" in refused(HubSource(owner="owner", name="name", revision="c" * 40))
    assert "it has tiny.Q4_1.gguf" in refused(HubSource(owner="owner", name="name", file="tiny.Q8.gguf"))
    site.token = "hf_right"
    assert "needs HF_TOKEN" in refused()
    site.gated = True
    assert f"ask for access on {site.url}/owner/name" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"ask for access on {site.url}/owner/name" in refused() and "hf_wrong" not in refused()
    assert f"ask for access on {site.url}/owner/name" in refused(GGUF)
    assert library.names() == []


def test_a_full_disk_is_said_before(site: HubSite, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, num_bytes: int) -> None:
        raise StorageError(f"{num_bytes} are needed")

    monkeypatch.setattr(hub_module, "check_free_space", full)
    with pytest.raises(StorageError):
        pull_from_hub(SOURCE, library)
    assert not [path for path in site.paths() if "resolve" in path]


@pytest.mark.parametrize(
    "text",
    [
        "hf:",
        "hf:name",
        "hf:owner/name@main",
        "hf:owner/name@" + "a" * 39,
        "hf:owner/name@" + "A" * 40,
        "hf:../name",
        "hf:owner/..",
        "hf:owner/name/../x.gguf",
        "hf:owner/name/x.bin",
        "hf:owner/name/x/y.gguf",
        "hf:owner/name/x-00001-of-00002.gguf",
        "hf:owner/na me",
        "hf:owner/name?x",
        "hf://owner/name",
    ],
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        HubSource.parse(text)


def test_names_that_are_some() -> None:
    assert HubSource.parse("hf:owner/name") == SOURCE
    assert HubSource.parse(f"hf:owner/name/tiny.Q4_1.gguf@{COMMIT}").at(COMMIT) == GGUF.at(COMMIT)


@pytest.mark.parametrize("endpoint", ["http://example.invalid", "ftp://127.0.0.1", "example", "file:///etc"])
def test_a_hub_that_is_not_https_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        Hub(endpoint, "")


def test_a_token_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="HF_TOKEN"):
        Hub("https://example.invalid", "a\r\nHost: b")


def test_the_command(
    site: HubSite, library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENMILL_HOME", str(library.home))
    assert main(["pull", "hf:owner/name", "--name", "mine", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["name"] == "mine" and document["source"] == f"hf:owner/name@{COMMIT}"
    assert captured.err.startswith(f"owner/name at {COMMIT}: ")
    assert ModelDirectory.open(Path(document["path"])).weights().names()
    assert main(["pull", "hf:owner/name@main"]) == 2
    assert "branches move" in capsys.readouterr().err
