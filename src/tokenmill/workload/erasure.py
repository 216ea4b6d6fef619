"""Erasing an end user from workload files, with a proof that can be checked later.

Each file that has lines of the end user is written anew without them, and takes the old one's place. The log
gets a line: hashes of every file before and after, how many lines went, and the hash of the log's line
before, so that no line of the log can be changed or taken out unseen. The end user is a pseudonym in it.

What other people wrote about an end user is not found, nor what is in a backup of the folder.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from tokenmill.core import UsageError
from tokenmill.workload.folder import ERASURES_NAME, WorkloadFolder, disk_errors, sync_folder

__all__ = ["ErasedFile", "Erasure", "erase", "erased_until", "read_erasures", "verify_erasures"]

_FIRST: Final = "0" * 64
_BLOCK: Final = 1 << 20


class ErasedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that was read: hashes and sizes before and after, and its lines."""

    path: str
    sha256_before: str
    sha256_after: str
    num_bytes_after: int
    num_lines_before: int
    num_lines_removed: int


class Erasure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The proof of one erasure. `at` is Unix time, `previous` the `sha256` of the log's line before.

    `ledger_rows` are lines of the ledger whose end user was replaced; their counts stay.
    """

    number: int
    at: float
    project: str
    end_user: str
    files: tuple[ErasedFile, ...]
    ledger_rows: int
    previous: str
    sha256: str = ""

    @property
    def num_lines_removed(self) -> int:
        """Of all files."""
        return sum(each.num_lines_removed for each in self.files)

    def sealed(self) -> "Erasure":
        """With the hash of all other fields."""
        plain = msgspec.structs.replace(self, sha256="")
        digest = hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()
        return msgspec.structs.replace(self, sha256=digest)


def erase(
    folder: WorkloadFolder,
    *,
    project: str,
    end_user: str,
    also: Sequence[Path] = (),
    ledger_rows: int = 0,
) -> Erasure:
    """Remove an end user's lines from the folder's files, and from the files in `also` made of them.

    A server may go on writing to the folder. Raises UsageError for an empty id and for a line that is no JSON
    object (nothing is changed then), StorageError.
    """
    if not end_user:
        raise UsageError("an erasure has no end user", hint="give the id that calls had as `user`")
    names = (folder.pseudonym(project, end_user), end_user)
    with folder.locked():
        log = read_erasures(folder)
        paths = [*folder.files(), *also]
        for path in paths:
            for _ in _lines(path, project, names):  # what cannot be read stops it before anything is changed
                pass
        erasure = Erasure(
            number=len(log) + 1,
            at=time.time(),
            project=project,
            end_user=names[0],
            files=tuple(_rewrite(path, project, names) for path in paths),
            ledger_rows=ledger_rows,
            previous=log[-1].sha256 if log else _FIRST,
        ).sealed()
        with disk_errors(folder.path):
            _append_durably(folder.path / ERASURES_NAME, msgspec.json.encode(erasure) + b"\n")
            sync_folder(folder.path)
    return erasure


def read_erasures(folder: WorkloadFolder) -> list[Erasure]:
    """The log, the oldest first. Raises UsageError for one that is damaged, StorageError."""
    path = folder.path / ERASURES_NAME
    with disk_errors(path):
        data = path.read_bytes() if path.exists() else b""
    try:
        return [msgspec.json.decode(line, type=Erasure) for line in data.splitlines()]
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} is damaged ({error})", hint="compare it with a backup") from None


def verify_erasures(folder: WorkloadFolder) -> list[str]:
    """What is wrong with the log and the files; empty if every proof holds.

    The chain must be whole, each file must begin as the last erasure left it (or be gone), and have no line
    of an end user from before their erasure. Raises what `read_erasures` does.
    """
    with folder.locked():
        log = read_erasures(folder)
        wrong = list(_chain_faults(log))
        last = {each.path: each for erasure in log for each in erasure.files}
        for path, known in last.items():
            if Path(path).exists() and _hash(Path(path), known.num_bytes_after) != known.sha256_after:
                wrong.append(f"{path} does not begin as the last erasure left it")
        for name in sorted({*last, *map(str, folder.files())}):
            wrong += _left_lines(Path(name), log)
    return wrong


def erased_until(erasures: Sequence[Erasure]) -> Callable[[str, str], float]:
    """For a writer: until when calls of (project, pseudonym) must not be written; -inf for others."""
    known = {(each.project, each.end_user): each.at for each in erasures}
    return lambda project, end_user: known.get((project, end_user), -math.inf)


def _chain_faults(log: Sequence[Erasure]) -> Iterator[str]:
    before = _FIRST
    for number, each in enumerate(log, start=1):
        if each.sealed().sha256 != each.sha256:
            yield f"erasure {number} was changed"
        if each.previous != before or each.number != number:
            yield f"erasure {number} does not follow the one before it"
        before = each.sha256


def _left_lines(path: Path, log: Sequence[Erasure]) -> Iterator[str]:
    """A fault for each end user who has lines in a file from before their erasure."""
    if not path.exists():
        return
    until = erased_until(log)
    counts: dict[str, int] = {}
    for line in _records(path):
        record = _object(line, path)
        project, end_user = str(record.get("project", "")), str(record.get("end_user", ""))
        if end_user and float(record.get("created", 0.0)) <= until(project, end_user):
            counts[end_user] = counts.get(end_user, 0) + 1
    for end_user, count in counts.items():
        yield f"{path} has {count} lines of {end_user} from before the erasure"


def _rewrite(path: Path, project: str, names: Collection[str]) -> ErasedFile:
    """Write a file anew without the lines of an end user; left as it is where there are none."""
    num_lines = num_removed = num_bytes = 0
    before, after = hashlib.sha256(), hashlib.sha256()
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, path.stat().st_mode & 0o777)
            with os.fdopen(handle, "wb") as file:
                for line, is_theirs in _lines(path, project, names):
                    num_lines += 1
                    before.update(line)
                    if is_theirs:
                        num_removed += 1
                        continue
                    after.update(line)
                    num_bytes += file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if num_removed:
                temporary.replace(path)
                sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return ErasedFile(
        path=str(path.resolve()),
        sha256_before=before.hexdigest(),
        sha256_after=after.hexdigest(),
        num_bytes_after=num_bytes,
        num_lines_before=num_lines,
        num_lines_removed=num_removed,
    )


def _lines(path: Path, project: str, names: Collection[str]) -> Iterator[tuple[bytes, bool]]:
    """Each line, and whether it is of this end user. Raises UsageError."""
    for line in _records(path):
        yield line, _is_of(_object(line, path), project, names)


def _records(path: Path) -> Iterator[bytes]:
    """The lines; half a line at the end of a file, from a crash, has no answer and is none."""
    with disk_errors(path), path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") or _is_json(line):
                yield line


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _is_of(record: dict[str, Any], project: str, names: Collection[str]) -> bool:
    """By pseudonym or by the id itself, where a file that somebody made has that."""
    if record.get("project", project) != project:
        return False
    request = record.get("request")
    user = request.get("user") if isinstance(request, dict) else None
    return any(each in names for each in (record.get("end_user"), record.get("user"), user))


def _object(line: bytes, path: Path) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(line) if line.strip() else {}
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{path} has a line that is no JSON object", hint="erase works on JSON lines")
    return value


def _hash(path: Path, num_bytes: int) -> str:
    """SHA-256 of a file's first bytes."""
    digest = hashlib.sha256()
    with disk_errors(path), path.open("rb") as file:
        while num_bytes and (block := file.read(min(_BLOCK, num_bytes))):
            digest.update(block)
            num_bytes -= len(block)
    return digest.hexdigest()


def _append_durably(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
