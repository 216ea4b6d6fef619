"""The store of models under the user's data folder.

    $TOKENMILL_HOME/models/NAME/      one model directory each
                   /staging/          models in the making; renamed into place when complete
                   /downloads/        downloads that are not finished
                   /locks/            one lock file a name

A model appears and disappears by one rename, so a crash at any point leaves the store as it was; what it
leaves in `staging` is removed by the next change to the store. The store serves one user on one
machine: locks are advisory and need a local file system.
"""

import difflib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmill.core.errors import NotFoundError, StorageError, UsageError
from tokenmill.models.files import disk_errors, sync_folder
from tokenmill.models.store.catalog import CATALOG
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.manifest import is_plain_name

__all__ = ["Library", "check_name", "default_home"]

_LOCK_POLL_SECONDS = 0.2


def default_home() -> Path:
    """`TOKENMILL_HOME`, else `XDG_DATA_HOME/tokenmill`, else `~/.local/share/tokenmill`."""
    if home := os.environ.get("TOKENMILL_HOME"):
        return Path(home).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    base = Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share"
    return base / "tokenmill"


def check_name(name: str) -> None:
    """Raise UsageError unless `name` can be a model's name: letters, digits, `.`, `_`, `-`, at most 100."""
    if not is_plain_name(name):
        raise UsageError(
            f"{name[:100]!r} cannot be a model name", hint="use letters, digits, '.', '_' and '-'"
        )


class Library:
    """The models of one home folder. Creating one touches nothing on the disk."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = (home or default_home()).absolute()

    @property
    def downloads(self) -> Path:
        """Where unfinished downloads are kept."""
        return self.home / "downloads"

    def path_of(self, name: str) -> Path:
        """Where the model of that name is or would be. Raises UsageError for an impossible name."""
        check_name(name)
        return self.home / "models" / name

    def names(self) -> list[str]:
        """Names of all models, sorted; folders that are no model directory do not count."""
        folder = self.home / "models"
        if not folder.is_dir():
            return []
        with disk_errors(folder):
            return sorted(each.name for each in folder.iterdir() if (each / "config.json").is_file())

    def models(self) -> list[ModelDirectory]:
        """All models, by name. Raises ModelFormatError if one is damaged; `names` lists it even so."""
        return [ModelDirectory.open(self.path_of(name)) for name in self.names()]

    def find(self, name_or_path: str) -> ModelDirectory:
        """Open a model by its name in the store, or by a path (anything with a `/`, or starting with `.`).

        Raises NotFoundError that lists near names and how to get the model.
        """
        if "/" in name_or_path or name_or_path.startswith((".", "~")):
            return ModelDirectory.open(Path(name_or_path).expanduser())
        path = self.path_of(name_or_path)
        if (path / "config.json").is_file():
            return ModelDirectory.open(path)
        raise NotFoundError(f"no model named {name_or_path!r}", hint=self._how_to_get(name_or_path))

    def remove(self, name: str) -> None:
        """Delete a model. Raises NotFoundError if there is none of that name."""
        path = self.path_of(name)
        if not path.is_dir():
            raise NotFoundError(f"no model named {name!r}", hint=self._how_to_get(name))
        with self.lock(name), self.staging(name) as staging, disk_errors(path):
            path.rename(staging / "removed")
            sync_folder(path.parent)

    def place(self, staging: Path, name: str, replace: bool = False) -> ModelDirectory:
        """Move a finished model from `staging` into the store, by one rename, flushed to the disk.

        Call it under `lock(name)`, with a folder from `staging(name)`. With `replace`, a model of that name
        goes first, by a rename of its own. Raises StorageError if one is there already or the disk refuses.
        """
        path = self.path_of(name)
        with disk_errors(path):
            for file in staging.iterdir():
                _sync_file(file)
            sync_folder(staging)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and replace:
                path.rename(staging.parent / "replaced")
            if path.exists():
                raise StorageError(f"{path} exists already", hint=f"remove it first: tokenmill rm {name}")
            staging.rename(path)
            sync_folder(path.parent)
        return ModelDirectory.open(path)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A new folder for making model `name`; removed at the end unless it was placed.

        Call it under `lock(name)`: it also removes what crashes left behind.
        """
        check_name(name)
        parent = self.home / "staging" / name
        with disk_errors(parent):
            shutil.rmtree(parent, ignore_errors=True)
            self._remove_stale_staging()
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=parent))
            folder.chmod(0o755)
        try:
            yield folder
        finally:
            shutil.rmtree(parent, ignore_errors=True)

    @contextmanager
    def lock(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock of one name; `waiting` is called once if another process holds it. Not re-entrant."""
        check_name(name)
        path = self.home / "locks" / f"{name}.lock"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = _open_lock(path)
        try:
            if not _try_lock(handle):
                waiting()
                while not _try_lock(handle):
                    time.sleep(_LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(handle)  # releases the lock; the file stays, for removing it would be a race

    def _remove_stale_staging(self) -> None:
        """Remove staging folders whose name nobody holds the lock of."""
        for folder in (self.home / "staging").glob("*"):
            handle = _open_lock(self.home / "locks" / f"{folder.name}.lock")
            try:
                if _try_lock(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)

    def _how_to_get(self, name: str) -> str:
        known = sorted({*self.names(), *CATALOG})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        if name in CATALOG:
            return f"get it: tokenmill pull {name}"
        if near:
            return f"did you mean {' or '.join(near)}? `tokenmill models` lists what is here"
        return (
            f"`tokenmill models` lists what is here, `tokenmill pull {next(iter(CATALOG))}` gets a first one"
        )


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
