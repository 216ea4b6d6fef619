"""Disks that fail, for the store's tests: SQLite file systems in Python over the real one.

`FaultyDisk` counts what is written and lets the Nth operation fail. `PowerDisk` knows what was synced: at a
power cut every file is what it was at its last sync, and of what was written since any 512-byte sectors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final, Literal, TypeAlias

import apsw

__all__ = ["FAULTS", "Fault", "FaultyDisk", "PowerDisk"]

Fault: TypeAlias = Literal["eio", "enospc", "short", "dead"]
"""An I/O error once, a full disk once, half a write once, and an I/O error from then on."""

FAULTS: Final[tuple[Fault, ...]] = ("eio", "enospc", "short", "dead")

_SECTOR: Final = 512

_Before: TypeAlias = Callable[["_File | None", str, int, bytes], None]


class _File(apsw.VFSFile):
    """A file that asks its disk before every write, sync and truncation."""

    def __init__(
        self, path: str, name: "str | apsw.URIFilename | None", flags: list[int], ask: _Before
    ) -> None:
        self.path = path
        self._ask = ask
        super().__init__("", name, flags)

    def xWrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self._ask(self, "write", offset, bytes(data))
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._ask(self, "sync", 0, b"")
        super().xSync(flags)

    def xTruncate(self, newsize: int) -> None:
        self._ask(self, "truncate", newsize, b"")
        super().xTruncate(newsize)

    def write_through(self, data: bytes, offset: int) -> None:
        """Write without asking."""
        super().xWrite(data, offset)

    def excepthook(self, *_: object) -> bool:
        """What is raised here is meant."""
        return True


class _Disk(apsw.VFS):
    """`before` is called before each operation; it raises what the operation is to fail with."""

    def __init__(self, name: str, before: _Before) -> None:
        self.name = name
        self._before = before
        super().__init__(name, "")

    def xOpen(self, name: "str | apsw.URIFilename | None", flags: list[int]) -> apsw.VFSFile:
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._before(None, "open", 0, path.encode())
        return _File(path, name, flags, self._before)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        self._before(None, "delete", int(syncdir), filename.encode())
        super().xDelete(filename, syncdir)

    def excepthook(self, *_: object) -> bool:
        """What is raised here is meant."""
        return True


class FaultyDisk(_Disk):
    """Fails at operation number `at`, counted from 1; `has_failed` says whether it came to that."""

    def __init__(self, name: str, fault: Fault, at: int) -> None:
        super().__init__(name, self.before)
        self._fault = fault
        self._at = at
        self.num_operations = 0
        self.has_failed = False

    def before(self, file: _File | None, what: str, offset: int, data: bytes) -> None:
        """Count, and fail if it is time."""
        self.num_operations += 1
        if self.num_operations < self._at or (self.num_operations > self._at and self._fault != "dead"):
            return
        self.has_failed = True
        if self._fault == "short" and file is not None and what == "write":
            file.write_through(data[: len(data) // 2], offset)
        raise (apsw.FullError if self._fault == "enospc" else apsw.IOError)(f"{what} number {self._at}")


@dataclass
class _Image:
    """A file: what is surely on the disk, and what was written since, in order."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for what, offset, data in self.pending:
            _apply(self.durable, what, offset, data)
        self.pending.clear()

    def after_power_cut(self, rng: Random) -> bytes:
        image = bytearray(self.durable)
        for what, offset, data in self.pending:
            fate = rng.random()
            if what == "truncate":
                if fate < 0.5:
                    _apply(image, what, offset, data)
                continue
            for start in range(0, len(data), _SECTOR):
                if fate < 0.3 or (fate < 0.7 and rng.random() < 0.5):
                    _apply(image, what, offset + start, data[start : start + _SECTOR])
        return bytes(image)


def _apply(image: bytearray, what: str, offset: int, data: bytes) -> None:
    if what == "truncate":
        del image[offset:]
        return
    image.extend(b"\0" * max(0, offset + len(data) - len(image)))
    image[offset : offset + len(data)] = data


class PowerDisk(_Disk):
    """Its power is cut at operation number `at`; from then on nothing works. Files lie in `folder`."""

    def __init__(self, name: str, folder: Path, at: int) -> None:
        super().__init__(name, self.before)
        self._at = at
        self._num_operations = 0
        self._new: set[str] = set()
        self._ghosts: dict[str, _Image] = {}
        self._images = {
            str(path): _Image(durable=bytearray(path.read_bytes()))
            for path in folder.iterdir()
            if path.name.endswith((".db", ".db-wal", ".db-journal"))
        }

    @property
    def is_cut(self) -> bool:
        """Whether it came to the cut."""
        return self._num_operations >= self._at

    def before(self, file: _File | None, what: str, offset: int, data: bytes) -> None:
        """Remember what was written and what is durable; fail without power."""
        self._num_operations += 1
        if self.is_cut:
            raise apsw.IOError("no power")
        if file is None:
            self._change_folder(what, data.decode(), is_synced=bool(offset))
            return
        image = self._images.setdefault(file.path, _Image())
        if what == "sync":
            image.sync()
            # With the first sync of a new log or journal SQLite syncs the folder.
            if file.path in self._new and not file.path.endswith(".db"):
                self._new.discard(file.path)
                self._ghosts.clear()
        else:
            image.pending.append((what, offset, data))

    def _change_folder(self, what: str, path: str, *, is_synced: bool) -> None:
        """A file that is deleted may come back until the folder is synced."""
        if what == "open" and not Path(path).exists():
            self._new.add(path)
        elif what == "delete":
            image = self._images.pop(path, None)
            if is_synced:
                self._ghosts.clear()
            elif image is not None:
                self._ghosts[path] = image

    def leave(self, folder: Path, rng: Random) -> None:
        """Write what is found after the cut into another folder."""
        ghosts = {path: image for path, image in self._ghosts.items() if rng.random() < 0.5}
        for path, image in (ghosts | self._images).items():
            (folder / Path(path).name).write_bytes(image.after_power_cut(rng))
