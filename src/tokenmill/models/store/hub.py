"""Asking a model hub (huggingface.co, or `HF_ENDPOINT`) what a repository holds, and fetching a model.

    hf:OWNER/NAME[@REVISION]             a folder of safetensors in the Hugging Face layout
    hf:OWNER/NAME/FILE.gguf[@REVISION]   one GGUF file

Only the files of our layout are fetched: never code, never pickles. A revision is a commit; without one the
newest is asked for first, and all files are of that commit, whatever moves meanwhile. Every file has the
hash that the commit gives it: SHA-256 for large files, git's own for small ones. Large files go on where
they stopped (`transfer.py`). The token of `HF_TOKEN` goes to the hub alone, not where it redirects to.

This is the hub's plain HTTP interface and not the `huggingface_hub` package, which brings eight more, keeps a
cache of its own and does not check hashes. Not covered: other kinds of repository, branches, the Xet protocol
(the hub serves such files over HTTP also), split GGUF files.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from tokenmill.core.errors import DownloadError, ModelFormatError, NotFoundError, TokenmillError, UsageError
from tokenmill.models.files import atomic_file, check_free_space, disk_errors, hash_file
from tokenmill.models.formats.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    is_shard_name,
    read_index,
    shard_faults,
)
from tokenmill.models.store.directory import LAYOUT, ModelDirectory
from tokenmill.models.store.manifest import is_plain_name
from tokenmill.models.store.transfer import RemoteFile, download, wait_before_retry
from tokenmill.models.store.web import Broken, NotUsable, Web, check_passing, follow, read_some

__all__ = ["Hub", "HubFile", "HubModel", "HubSource"]

_ENDPOINT: Final = "https://huggingface.co"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_TOKEN: Final = re.compile(r"[!-~]{1,1024}")
_PATH: Final = re.compile(r"(?!/)(?!.*(?:^|/)\.{1,2}(?:/|$))[^\\\x00-\x1f\x7f]{1,1024}(?<!/)")
_SPLIT_GGUF: Final = re.compile(r".*-\d{5}-of-\d{5}\.gguf")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")
_MAX_LIST_BYTES: Final = 16 << 20
_MAX_FILES: Final = 20_000
_MAX_SMALL_BYTES: Final = 32 << 20
_SPARE_BYTES: Final = 64 << 20
_MAX_TRIES: Final = 4
_FORM: Final = "hf:OWNER/NAME, hf:OWNER/NAME/FILE.gguf, and @ with 40 hex digits for a revision"


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """What a user asks for. `file` is empty for a folder, `revision` for the newest commit."""

    owner: str
    name: str
    file: str = ""
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> "HubSource":
        """Read `hf:OWNER/NAME[/FILE.gguf][@REVISION]`. Raises UsageError."""
        path, at, revision = text.removeprefix("hf:").partition("@")
        parts = path.split("/")
        if not 2 <= len(parts) <= 3 or not all(map(is_plain_name, parts)):
            raise UsageError(f"{text[:200]!r} names no model of the hub", hint=f"the form is {_FORM}")
        if at and not _COMMIT.fullmatch(revision):
            raise UsageError(
                f"{revision[:100]!r} is no revision", hint="give all 40 hex digits of a commit: branches move"
            )
        file = parts[2] if len(parts) == 3 else ""
        if file and (not file.endswith(".gguf") or _SPLIT_GGUF.fullmatch(file)):
            raise UsageError(f"{file!r} is no whole GGUF file", hint=f"the form is {_FORM}")
        return cls(owner=parts[0], name=parts[1], file=file, revision=revision)

    @property
    def repository(self) -> str:
        """`OWNER/NAME`."""
        return f"{self.owner}/{self.name}"

    def at(self, commit: str) -> str:
        """The source in its longest form: what a manifest says."""
        return f"hf:{self.repository}{f'/{self.file}' if self.file else ''}@{commit}"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a commit; `sha256` is empty for a small one, which has git's hash of a blob instead."""

    name: str
    num_bytes: int
    sha256: str = ""
    blob_id: str = ""


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """What is to be fetched: the files of one commit that a model needs."""

    source: HubSource
    commit: str
    files: tuple[HubFile, ...]
    licences: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def label(self) -> str:
        """The source with its commit."""
        return self.source.at(self.commit)


class Hub:
    """A hub and who asks it; `token` may be empty. Raises UsageError for what cannot be either."""

    def __init__(self, endpoint: str, token: str) -> None:
        self.endpoint = endpoint.rstrip("/")
        if token and not _TOKEN.fullmatch(token):
            raise UsageError("HF_TOKEN has characters that no token has", hint="set it again")
        try:
            follow(self.endpoint, "")
            self._web = Web([self.endpoint], os.environ.get("REQUESTS_CA_BUNDLE", ""), token=token)
        except (NotUsable, ValueError, OSError) as error:
            raise UsageError(
                f"HF_ENDPOINT {endpoint[:200]!r} cannot be used ({error})", hint="give an https URL"
            ) from error
        self._host = urlsplit(self.endpoint).hostname or ""
        self._has_token = bool(token)

    @classmethod
    def from_environment(cls) -> "Hub":
        """The hub of `HF_ENDPOINT`, asked with `HF_TOKEN`."""
        return cls(os.environ.get("HF_ENDPOINT") or _ENDPOINT, os.environ.get("HF_TOKEN", "").strip())

    def find(self, source: HubSource) -> HubModel:
        """What fetching `source` would fetch, and of which commit.

        Raises NotFoundError if the hub or the repository has no such thing, ModelFormatError for one that is
        of no kind we read, DownloadError.
        """
        url = (
            f"{self.endpoint}/api/models/{source.repository}/revision/{source.revision or 'main'}?blobs=true"
        )
        data = self._read(url, source, _MAX_LIST_BYTES, "the list of files")
        try:
            answer = json.loads(data)
            commit, rows = answer["sha"], answer["siblings"]
            if not isinstance(rows, list) or not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
                raise ValueError("no commit or no files")
            if len(rows) > _MAX_FILES:
                raise ModelFormatError(
                    f"{source.repository}: {len(rows)} files, at most {_MAX_FILES}", hint="this is no model"
                )
            files = {file.name: file for file in map(_file, rows)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DownloadError(
                f"{self._host} does not answer as a hub does ({str(error)[:200]})", hint="check HF_ENDPOINT"
            ) from error
        if source.revision not in ("", commit):
            raise DownloadError(f"{self._host} answers with another revision, {commit}", hint="pull again")
        names = [source.file] if source.file else _model_files(source, files)
        if source.file and source.file not in files:
            near = difflib.get_close_matches(source.file, files, n=3) or _some_ggufs(files)
            raise NotFoundError(
                f"{source.repository} has no {source.file}",
                hint=f"it has {', '.join(near) or 'no GGUF file'}",
            )
        chosen = tuple(files[name] for name in names)
        for file in chosen:
            if not file.sha256 and (not file.blob_id or file.num_bytes > _MAX_SMALL_BYTES):
                raise DownloadError(f"{source.repository}: the hub gives no SHA-256 for {file.name}")
        return HubModel(source=source, commit=commit, files=chosen, licences=_licences(answer))

    def fetch(self, model: HubModel, folder: Path, progress: Callable[[int, int], None]) -> None:
        """Fetch all files into `folder`, the small ones first; what is there and has its hash stays.

        Raises DownloadError and NotFoundError as `find`, ModelFormatError for a model that is not supported
        (before its weights are fetched), StorageError. Call it under one lock a folder.
        """
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        missing = [file for file in model.files if not _is_there(folder / file.name, file)]
        check_free_space(
            folder, sum(file.num_bytes for file in missing) + _SPARE_BYTES - _kept(folder, missing)
        )
        done = model.num_bytes - sum(file.num_bytes for file in missing)
        small = [file for file in missing if file.num_bytes <= _MAX_SMALL_BYTES]
        for file in small:
            self._fetch(model, file, folder, _shifted(progress, done, model.num_bytes))
            done += file.num_bytes
        if not model.source.file:
            _check_small_files(model, folder)
        for file in missing:
            if file not in small:
                self._fetch(model, file, folder, _shifted(progress, done, model.num_bytes))
                done += file.num_bytes

    def _fetch(
        self, model: HubModel, file: HubFile, folder: Path, progress: Callable[[int, int], None]
    ) -> None:
        url = f"{self.endpoint}/{model.source.repository}/resolve/{model.commit}/{quote(file.name)}"
        if not file.sha256:
            data = self._read(url, model.source, file.num_bytes, file.name)
            if _blob_id(data) != file.blob_id:
                raise DownloadError(
                    f"{file.name} does not match its hash in the commit; nothing was kept",
                    hint=f"pull again; if it stays so, {self._host} does not serve the original file",
                )
            with atomic_file(folder / file.name) as target:
                target.write(data)
            progress(len(data), len(data))
            return
        remote = RemoteFile(
            name=file.name, url=url, sha256=file.sha256, num_bytes=file.num_bytes, server=self._host
        )
        try:
            download(remote, self._web, folder, file.num_bytes, progress, has_other_way=False)
        except NotUsable as error:
            raise self._refusal(error, model.source, file.name) from error

    def _read(self, url: str, source: HubSource, limit: int, what: str) -> bytes:
        """A small answer as a whole. Raises what `find` raises, a DownloadError if it is over `limit`."""
        for attempt in range(_MAX_TRIES):
            try:
                return self._read_once(url, limit, what)
            except NotUsable as error:
                raise self._refusal(error, source, what) from error
            except Broken as error:
                broken = error
            if attempt == _MAX_TRIES - 1 or not wait_before_retry(broken, attempt):
                break
        wait = f"; it asks to wait {broken.wait_seconds:.0f} s" if broken.wait_seconds else ""
        raise DownloadError(
            f"{self._host}: {what} cannot be read ({broken.message}){wait}",
            hint="check the network, or pull again later",
        )

    def _read_once(self, url: str, limit: int, what: str) -> bytes:
        data = bytearray()
        with self._web.open(url, {"Accept-Encoding": "identity"}) as response:
            check_passing(response)
            if response.status != 200:
                code = response.headers.get("X-Error-Code", "")
                raise NotUsable(f"HTTP status {response.status}", status=response.status, code=code)
            while chunk := read_some(response, 1 << 16):
                data += chunk
                if len(data) > limit:
                    raise NotUsable(f"{what} is longer than {limit} bytes")
            length = response.headers.get("Content-Length", "")
        if length.isdigit() and len(data) < int(length):
            raise Broken("the server closed the connection")
        return bytes(data)

    def _refusal(self, error: NotUsable, source: HubSource, what: str) -> TokenmillError:
        """What an answer other than the thing itself means to the user."""
        repository, page = source.repository, f"{self.endpoint}/{source.repository}"
        if error.status in (401, 403) and error.code == "GatedRepo":
            hint = f"ask for access on {page}, then set HF_TOKEN to a token of that account"
            return DownloadError(f"{repository} is gated: its authors decide who may read it", hint=hint)
        if error.status == 404 and error.code == "RevisionNotFound":
            return NotFoundError(
                f"{repository} has no revision {source.revision or 'main'}", hint=f"see {page}"
            )
        if error.status == 404 and error.code == "EntryNotFound":
            return NotFoundError(f"{repository} has no {what}", hint=f"see {page}")
        if error.status in (401, 403, 404):
            hint = "check the name; a private one needs HF_TOKEN"
            if self._has_token:
                hint = "check the name, and whether HF_TOKEN is valid and may read it"
            return NotFoundError(f"{self._host} has no model {repository}, or it is private", hint=hint)
        return DownloadError(f"{self._host}: {what} cannot be read ({error.message})", hint=f"see {page}")


def _file(row: dict[str, Any]) -> HubFile:
    """One row of the list. Raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    name, lfs = row["rfilename"], row.get("lfs") or {}
    if not isinstance(name, str) or not _PATH.fullmatch(name):
        raise ValueError(f"a file is called {str(name)[:80]!r}")
    size, sha256, blob_id = (
        lfs.get("size", row.get("size") or 0),
        lfs.get("sha256", ""),
        row.get("blobId") or "",
    )
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
        raise ValueError(f"the size of {name[:80]!r} is none")
    if sha256 and not _SHA256.fullmatch(sha256):
        raise ValueError(f"the SHA-256 of {name[:80]!r} is none")
    if blob_id and not _COMMIT.fullmatch(blob_id):
        raise ValueError(f"the hash of {name[:80]!r} is none")
    return HubFile(name=name, num_bytes=size, sha256=sha256, blob_id=blob_id)


def _model_files(source: HubSource, files: dict[str, HubFile]) -> list[str]:
    """Names of the files to fetch. Raises NotFoundError or ModelFormatError if they make no model."""
    shards = {name for name in files if is_shard_name(name)}
    if WEIGHTS_NAME in files:
        weights = {WEIGHTS_NAME}
    elif INDEX_NAME in files and shards:
        weights = {INDEX_NAME, *shards}
        if fault := shard_faults(shards):
            raise ModelFormatError(f"{source.repository}: the list of files {fault}")
    elif ggufs := _some_ggufs(files):
        raise UsageError(
            f"{source.repository} has GGUF files ({', '.join(ggufs)})",
            hint=f"name one: tokenmill pull hf:{source.repository}/{ggufs[0]}",
        )
    elif pickles := [name for name in files if name.endswith(_PICKLES)]:
        raise ModelFormatError(
            f"{source.repository} has its weights in {pickles[0]} only, which runs code when it is read",
            hint="look for a repository with safetensors, or convert it yourself and pull the folder",
        )
    else:
        raise NotFoundError(f"{source.repository} has no {WEIGHTS_NAME} and no GGUF file")
    for name in ("config.json", "tokenizer.json"):
        if name not in files:
            raise NotFoundError(f"{source.repository} has no {name}", hint="this is no model that can be run")
    others = [
        name for name in LAYOUT if name in files and name not in (WEIGHTS_NAME, INDEX_NAME, "model.gguf")
    ]
    return [*others, *sorted(weights)]


def _some_ggufs(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.endswith(".gguf") and is_plain_name(name)][:12]


def _licences(answer: dict[str, Any]) -> tuple[str, ...]:
    """What the repository's card says; a few short words, or nothing."""
    card = answer.get("cardData")
    value = card.get("license") if isinstance(card, dict) else None
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values[:8] if isinstance(each, str) and is_plain_name(each))


def _check_small_files(model: HubModel, folder: Path) -> None:
    """Refuse what cannot be run before its weights are fetched."""
    ModelDirectory.open(folder).tokenizer()
    listed = {file.name for file in model.files if is_shard_name(file.name)}
    if listed and set(read_index(folder / INDEX_NAME).values()) != listed:
        raise ModelFormatError(f"{model.source.repository}: {INDEX_NAME} names other shards than there are")


def _is_there(path: Path, file: HubFile) -> bool:
    """Whether the file is complete and has its hash; one that has another goes."""
    if not path.is_file():
        return False
    is_same = path.stat().st_size == file.num_bytes
    if is_same and file.sha256:
        is_same = hash_file(path) == file.sha256
    elif is_same:
        is_same = _blob_id(path.read_bytes()) == file.blob_id
    if not is_same:
        path.unlink()
    return is_same


def _kept(folder: Path, files: Iterable[HubFile]) -> int:
    """Bytes of the files that an earlier run has fetched in part."""
    parts = (folder / f"{file.name}.part" for file in files)
    return sum(part.stat().st_size for part in parts if part.is_file())


def _blob_id(data: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _shifted(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return partial(_report, progress, before, total)


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)
