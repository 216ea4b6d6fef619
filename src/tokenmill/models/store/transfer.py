"""Downloading one file so that nothing that has arrived is lost: to a killed process, a broken connection or
an interrupt.

    FILE.part        what has arrived; it only grows, or goes
    FILE.part.json   the SHA-256 it is to have, and the server's name for this content (ETag)

The next download asks for the rest (RFC 9110, Range and If-Range). The hash is checked over the whole file
at the end, and it alone decides; a server that cannot send a part sends it all again. The caller holds the
lock of the folder.
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Final

from tokenmill.core.errors import DownloadError
from tokenmill.models.files import atomic_file, check_free_space, disk_errors, hash_file, sync_folder
from tokenmill.models.store.web import Broken, NotUsable, Web, check_passing, read_some

__all__ = ["RemoteFile", "download", "wait_before_retry"]

_CHUNK: Final = 1 << 16
_MAX_TRIES: Final = 20
_MAX_FRUITLESS: Final = 3
_PAUSE_SECONDS: Final = 1.0
_MAX_WAIT_SECONDS: Final = 300.0


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on a server: where it is and what must arrive; `num_bytes` is 0 if the server does not say.

    `server` is what errors call the server.
    """

    name: str
    url: str
    sha256: str
    num_bytes: int
    server: str = "the configured package index"

    @property
    def wrong_file(self) -> str:
        """What it means that another file arrives."""
        return f"{self.server} does not serve the original file"


def download(
    file: RemoteFile,
    web: Web,
    folder: Path,
    max_bytes: int,
    progress: Callable[[int, int], None],
    *,
    has_other_way: bool = True,
) -> Path:
    """The file in `folder`, complete and with its hash; `progress` gets (bytes there, bytes), at first also.

    Raises DownloadError with what was kept, or if the file is longer than `max_bytes` or its hash is wrong;
    StorageError; NotUsable if the server does not serve the file in this way, or, where the caller
    `has_other_way`, if nothing at all arrives.
    """
    part = _Part(folder / f"{file.name}.part", file)
    fruitless = 0
    for _ in range(_MAX_TRIES):
        before = part.num_bytes
        try:
            _receive(file, web, part, max_bytes, progress)
            return part.finish(folder / file.name)
        except Broken as error:
            broken = error
        if has_other_way and before == part.num_bytes == 0:
            raise NotUsable(str(broken)) from broken
        fruitless = 0 if part.num_bytes > before else fruitless + 1
        if fruitless == _MAX_FRUITLESS:
            break
        if not wait_before_retry(broken, fruitless):
            break
    raise DownloadError(
        f"{file.name}: the connection broke again and again ({broken}); "
        f"the {part.num_bytes / 1e6:.1f} MB that arrived are kept",
        hint="check the network, then pull again: it goes on from there",
    )


def wait_before_retry(broken: Broken, fruitless: int) -> bool:
    """Sleep as the server asks, at least a little; False, at once, if it asks for more than some minutes."""
    if broken.wait_seconds > _MAX_WAIT_SECONDS:
        return False
    time.sleep(max(broken.wait_seconds, _PAUSE_SECONDS * (fruitless + 1)))
    return True


def _receive(
    file: RemoteFile, web: Web, part: "_Part", max_bytes: int, progress: Callable[[int, int], None]
) -> None:
    """One request for what is missing. Raises Broken if something is still missing then."""
    done = part.num_bytes
    if 0 < file.num_bytes <= done:
        return
    headers = {"Range": f"bytes={done}-"} if done else {}
    if done and part.validator:
        headers["If-Range"] = part.validator
    with web.open(file.url, headers) as response:
        if response.status == 416 and done:
            return  # there is no more of it; the hash decides
        check_passing(response)
        start, size = _extent(response)
        validator = _validator(response)
        if start and (start != done or part.validator not in ("", validator)):
            part.discard()
            raise Broken("the server sent another part than asked for")
        size = size or file.num_bytes
        if not size:
            raise NotUsable("the size is not known")
        if size > max_bytes:
            raise DownloadError(
                f"{file.name} has {size / 1e6:.0f} MB on the server, expected: {max_bytes / 1e6:.0f} at most",
                hint=file.wrong_file,
            )
        check_free_space(part.path.parent, size - start)
        if not start:
            part.restart(validator)
        part.append(response, size, progress)


def _extent(response: HTTPResponse) -> tuple[int, int]:
    """Where the body starts in the file, and the file's size (0 if not said)."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") == "identity":
        text = headers.get("Content-Range", "")
        if response.status == 206 and (match := re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", text)):
            return int(match[1]), int(match[2])
        text = headers.get("Content-Length", "0")
        if response.status == 200 and re.fullmatch(r"\d{1,18}", text):
            return 0, int(text)
    code = headers.get("X-Error-Code", "")
    raise NotUsable(f"HTTP status {response.status}", status=response.status, code=code)


def _validator(response: HTTPResponse) -> str:
    """What If-Range may be asked with: a strong ETag; empty if there is none."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else ""


class _Part:
    """What has arrived of a file that is to have the given SHA-256; of another file, it is removed."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self.path = path
        self.validator = ""
        self._file = file
        self._state = path.with_name(f"{path.name}.json")
        try:
            state = json.loads(self._state.read_text("utf-8"))
            is_same, self.validator = state["sha256"] == file.sha256, str(state["validator"])
        except (OSError, ValueError, KeyError, TypeError):
            is_same = False
        if not is_same:
            self.discard()

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def discard(self) -> None:
        self.validator = ""
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)
            self._state.unlink(missing_ok=True)

    def restart(self, validator: str) -> None:
        """Begin with nothing; the state is on the disk before the first byte."""
        self.discard()
        self.validator = validator
        state = {"sha256": self._file.sha256, "validator": validator}
        with atomic_file(self._state) as file:
            file.write(json.dumps(state).encode())

    def append(self, response: HTTPResponse, size: int, progress: Callable[[int, int], None]) -> None:
        """Add the body until there are `size` bytes. Raises Broken if it ends before; all is kept then."""
        done = self.num_bytes
        with disk_errors(self.path), self.path.open("ab") as file:
            try:
                progress(done, size)
                while done < size and (chunk := read_some(response, min(_CHUNK, size - done))):
                    file.write(chunk)
                    done += len(chunk)
                    progress(done, size)
            finally:
                file.flush()
                os.fsync(file.fileno())
        if done < size:
            raise Broken("the server closed the connection")

    def finish(self, target: Path) -> Path:
        """Check the hash and take the file's own name. Raises DownloadError, with nothing kept."""
        if hash_file(self.path) != self._file.sha256:
            self.discard()
            raise DownloadError(
                f"{target.name} does not match the SHA-256 of {self._file.server}; "
                "what arrived was discarded",
                hint=f"pull again; if it stays so, {self._file.wrong_file}",
            )
        with disk_errors(target):
            self.path.replace(target)
            self._state.unlink(missing_ok=True)
            sync_folder(target.parent)
        return target
