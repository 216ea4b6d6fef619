"""Content of files: a folder in which every file has its random id for a name, and is whole or not there.

    draft ─ write, write ─► fsync ─► rename to ID ─► fsync of the folder ─► a row in the store names it

What a client calls its file is text in the store and never part of a path. Content without a row, which a
crash between the last two steps leaves, is removed when the server starts.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from starlette.requests import Request

from tokenmill.core import NotFoundError, StorageError, UsageError
from tokenmill.server.answering import send_json
from tokenmill.server.edge import Receive, Scope_, Send
from tokenmill.server.multipart import FormReader, PartBegin, boundary_of
from tokenmill.wire import FieldError

__all__ = [
    "Draft",
    "FileAnswer",
    "FileFolder",
    "FilesConfig",
    "Upload",
    "new_id",
    "receive_body",
    "receive_form",
]

_ID: Final = re.compile(r"[a-z_]{1,16}[-_][0-9a-f]{32}")
_MAX_FIELD_BYTES: Final = 4096
_CHUNK_BYTES: Final = 256 << 10
_DRAFT: Final = ".draft"


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Bounds of one file, and of all files of a project together."""

    max_bytes: int = 200 << 20
    max_lines: int = 50_000
    max_line_bytes: int = 8 << 20
    max_project_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_lines", "max_line_bytes", "max_project_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="use a whole number from 1")


def new_id(prefix: str) -> str:
    """A name that nobody can guess: 128 random bits."""
    return f"{prefix}{secrets.token_hex(16)}"


class FileFolder:
    """The folder, made if it is missing. Its methods wait for the disk: call them from a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _disk_errors(path):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, file_id: str) -> Path:
        """Where the content of a file lies."""
        if not _ID.fullmatch(file_id):
            raise NotFoundError(f"there is no file {file_id[:80]!r}")
        return self._path / file_id

    def draft(self) -> "Draft":
        """A new content, not yet a file. End it with `keep` or `drop`."""
        return Draft(self._path, self._path / f"{secrets.token_hex(16)}{_DRAFT}")

    def remove(self, file_id: str) -> None:
        """Remove the content of a file. No-op without it."""
        with _disk_errors(self._path):
            self.path(file_id).unlink(missing_ok=True)

    def sweep(self, known: Collection[str]) -> int:
        """Remove drafts, and content whose id is not `known`; returns how many. Only while nobody writes."""
        gone = 0
        with _disk_errors(self._path):
            for each in self._path.iterdir():
                if each.name.endswith(_DRAFT) or (_ID.fullmatch(each.name) and each.name not in known):
                    each.unlink(missing_ok=True)
                    gone += 1
        return gone


class Draft:
    """Content that is being written. `num_bytes`, `num_lines` and `digest` are of what was written."""

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder = folder
        self.path = path
        self._hash = hashlib.sha256()
        self._ends_open = False
        self._num_newlines = 0
        self.num_bytes = 0
        with _disk_errors(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=_CHUNK_BYTES)

    @property
    def num_lines(self) -> int:
        """Lines, the last one also if nothing ends it."""
        return self._num_newlines + self._ends_open

    @property
    def digest(self) -> bytes:
        """SHA-256 of what was written."""
        return self._hash.digest()

    def write(self, data: bytes) -> None:
        """Add content."""
        with _disk_errors(self.path):
            self._file.write(data)
        if data:
            self._hash.update(data)
            self.num_bytes += len(data)
            self._num_newlines += data.count(b"\n")
            self._ends_open = not data.endswith(b"\n")

    def flush(self) -> None:
        """Let others read what was written so far."""
        with _disk_errors(self.path):
            self._file.flush()

    def keep(self, file_id: str) -> None:
        """Make it the content of a file: on the disk when this returns, in the place of what was there."""
        assert _ID.fullmatch(file_id), file_id
        with _disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.path.replace(self._folder / file_id)
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def drop(self) -> None:
        """Remove it. No-op for one that was kept."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A form that was received: its plain fields, and its file, whose content is in a draft."""

    fields: dict[str, str]
    filename: str


async def receive_form(request: Request, draft: Draft, config: FilesConfig) -> Upload:
    """Receive a form with one file, in the field `file`, into a draft. FieldError for anything else."""
    reader = FormReader(boundary_of(request.headers.get("content-type", "")))
    fields: dict[str, str] = {}
    texts: dict[str, bytearray] = {}
    part, filename = "", ""
    is_file = False
    async for chunk in request.stream():
        for event in reader.feed(chunk):
            if isinstance(event, PartBegin):
                part, is_file = event.name, event.filename is not None
                if part in texts or (is_file and filename) or (is_file and part != "file"):
                    raise FieldError(part[:80], "is there twice, or is no file here", hint="send one `file`")
                if is_file:
                    filename = _shown(event.filename or "")
                else:
                    texts[part] = bytearray()
            elif is_file:
                await _write(draft, event, config)
            elif len(texts[part]) + len(event) > _MAX_FIELD_BYTES:
                raise FieldError(part[:80], "is too long")
            else:
                texts[part] += event
    reader.finish()
    fields = {name: bytes(text).decode("utf-8", "replace") for name, text in texts.items()}
    if not filename:
        raise FieldError("file", "is missing", hint="send one, as `curl -F file=@requests.jsonl` does")
    return Upload(fields=fields, filename=filename)


async def receive_body(request: Request, draft: Draft, config: FilesConfig) -> None:
    """Receive a whole body into a draft."""
    async for chunk in request.stream():
        if chunk:
            await asyncio.to_thread(draft.write, chunk)
            if draft.num_bytes > config.max_bytes:
                raise FieldError("", f"the body has over {config.max_bytes} bytes", hint="send less at once")


class FileAnswer:
    """The content of a file as an answer, a piece at a time."""

    def __init__(self, path: Path, content_type: bytes = b"application/jsonl") -> None:
        self._path = path
        self._content_type = content_type

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            file = await asyncio.to_thread(self._path.open, "rb")
        except FileNotFoundError:
            raise NotFoundError("the content of this file is gone") from None
        with file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                await send_json(send, 200, b"")
                return
            headers = [(b"content-type", self._content_type), (b"content-length", str(size).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while size > 0:
                data = await asyncio.to_thread(file.read, min(size, _CHUNK_BYTES))
                size = size - len(data) if data else 0
                await send({"type": "http.response.body", "body": data, "more_body": size > 0})


async def _write(draft: Draft, data: bytes, config: FilesConfig) -> None:
    await asyncio.to_thread(draft.write, data)
    if draft.num_bytes > config.max_bytes:
        raise FieldError("file", f"has over {config.max_bytes} bytes", hint="split it")
    if draft.num_lines > config.max_lines:
        raise FieldError("file", f"has over {config.max_lines} lines", hint="split it")


def _shown(filename: str) -> str:
    """A client's name of a file as text that can be shown; it is never a path."""
    text = "".join(char for char in filename if char.isprintable())[:255]
    return text or "file"


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path.parent.name}: {error.strerror}", hint="look at the disk") from error
