"""`tokenmill pull`, `models` and `rm`: the store of models. What `show` prints is in `show.py`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.inputs import stdin_is_terminal
from tokenmill.cli.output import Output, format_bytes, format_count
from tokenmill.core import TokenmillError, UsageError

if TYPE_CHECKING:
    from tokenmill.models.store.directory import ModelDirectory
    from tokenmill.models.store.library import Library

__all__ = ["add_parser"]

_PULL = """\
Get a model into the store: one of the catalogue by its name (`tokenmill models` lists them), a local GGUF
file or Hugging Face folder by its path, or one of the hub:

  hf:OWNER/NAME[@REVISION]             its safetensors, in one file or in shards
  hf:OWNER/NAME/FILE.gguf[@REVISION]   one GGUF file

What is there and verifies is not downloaded again, and a download that was stopped goes on where it was. A
REVISION is a commit, 40 hex digits; without one it is the newest, which `tokenmill show` then names. HF_TOKEN
is a token for gated and private models, HF_ENDPOINT another hub.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `pull`, `models` and `rm`."""
    pull = add_command(subparsers, "pull", _pull, summary="get a model", description=_PULL)
    pull.add_argument(
        "source",
        metavar="NAME|PATH|hf:...",
        help="a name of the catalogue, a file or folder, or a model of the hub",
    )
    pull.add_argument(
        "--name", metavar="NAME", help="what to call it (default: its own name); not for the catalogue"
    )
    add_command(subparsers, "models", _models, summary="list the models that are here, and those to pull")
    remove = add_command(subparsers, "rm", _remove, summary="remove a model from the store")
    remove.add_argument("name", metavar="NAME", help="a name of `tokenmill models`")
    remove.add_argument("--yes", action="store_true", help="do not ask")


def _pull(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.models.store.library import Library

    stages: list[str] = []
    with out.progress() as bar:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages.append(stage)
                if stage == "waiting":
                    out.note("waiting for another tokenmill that works on this model")
            if stage not in ("present", "done"):
                bar(stage, done, total)

        model = _pulled(args, out, Library(), progress)
    is_present = "present" in stages
    num_bytes = _size(model.path)
    state = "is here already and verified" if is_present else "is ready"
    out.text(f"{model.name} {state}: {format_bytes(num_bytes)} in {model.path}")
    out.document(
        {
            "name": model.name,
            "path": str(model.path),
            "num_bytes": num_bytes,
            "digest": model.digest,
            "source": model.manifest.source if model.manifest else "",
            "present": is_present,
        }
    )
    return 0


def _pulled(
    args: argparse.Namespace, out: Output, library: "Library", progress: Callable[[str, int, int], None]
) -> "ModelDirectory":
    """The model from wherever the source says."""
    from tokenmill.models.store.catalog import CATALOG
    from tokenmill.models.store.hub import HubModel, HubSource
    from tokenmill.models.store.pull import import_model, pull, pull_from_hub

    def announce(found: HubModel) -> None:
        size = format_bytes(found.num_bytes)
        out.note(f"{found.source.repository} at {found.commit}: {len(found.files)} files, {size}")

    if args.source.startswith("hf:"):
        return pull_from_hub(HubSource.parse(args.source), library, args.name or "", progress, announce)
    path = Path(args.source).expanduser()
    if args.source not in CATALOG and (path.exists() or _looks_like_path(args.source)):
        _check_source(path)
        return import_model(path, library, args.name or "", progress)
    if args.name is not None:
        hint = "leave it out, or give a path"
        raise UsageError("--name is for a local file or folder or a model of the hub", hint=hint)
    return pull(args.source, library, progress)


def _check_source(path: Path) -> None:
    """Refuse what is no model before anything is copied, so that the error names the user's own file."""
    from tokenmill.models.formats.convert import gguf_architecture
    from tokenmill.models.formats.gguf import GgufFile
    from tokenmill.models.store.directory import ModelDirectory

    if path.is_dir():
        ModelDirectory.open(path).weights()
    elif path.suffix in (".safetensors", ".json"):
        raise UsageError(f"{path} is a part of a model", hint="give the folder that it lies in")
    elif path.is_file():
        with GgufFile.open(path) as gguf:
            gguf_architecture(gguf)


def _looks_like_path(source: str) -> bool:
    return "/" in source or source.startswith((".", "~")) or source.endswith(".gguf")


def _models(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.models.store.catalog import CATALOG
    from tokenmill.models.store.library import Library

    library = Library()
    here = [_entry(library, name) for name in library.names()]
    missing = {name: entry for name, entry in CATALOG.items() if name not in library.names()}
    if here:
        out.table(
            ["name", "parameters", "on disk", "context", "licence", "source"], [_row(each) for each in here]
        )
    else:
        out.text(f"no models in {library.home}")
    for name, entry in missing.items():
        out.note(f"to get {entry.description}, {format_bytes(entry.package_bytes)}: tokenmill pull {name}")
    to_pull = [
        {
            "name": name,
            "description": entry.description,
            "licence": entry.licence,
            "download_bytes": entry.package_bytes,
        }
        for name, entry in missing.items()
    ]
    out.document({"home": str(library.home), "models": here, "to_pull": to_pull})
    return 0


def _entry(library: "Library", name: str) -> dict[str, Any]:
    """What `models` says of one model; a damaged one has `error` instead of figures."""
    path = library.path_of(name)
    fields: dict[str, Any] = {"name": name, "path": str(path), "num_bytes": _size(path)}
    try:
        model = library.find(name)
    except TokenmillError as error:
        return {**fields, "error": str(error)}
    manifest = model.manifest
    return {
        **fields,
        "num_params": model.architecture.num_params,
        "context": model.architecture.max_positions,
        "licences": list(manifest.licences) if manifest else [],
        "source": manifest.source if manifest else "",
    }


def _row(entry: dict[str, Any]) -> list[str]:
    size = format_bytes(entry["num_bytes"])
    if "error" in entry:
        return [entry["name"], "-", size, "-", "-", f"damaged: {entry['error']}"]
    licences = ", ".join(entry["licences"]) or "not stated"
    count = format_count(entry["num_params"])
    return [entry["name"], count, size, str(entry["context"]), licences, entry["source"]]


def _remove(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.models.packing.compile import forget_packed
    from tokenmill.models.store.library import Library

    library = Library()
    path = library.path_of(args.name)
    num_bytes = _size(path)
    is_removed = not path.is_dir() or args.yes or _confirmed(args.name, num_bytes, out)
    if is_removed:
        forget_packed(path)
        library.remove(args.name)
        out.text(f"removed {args.name}, {format_bytes(num_bytes)}")
    else:
        out.text(f"kept {args.name}")
    out.document({"name": args.name, "removed": is_removed, "num_bytes": num_bytes})
    return 0


def _confirmed(name: str, num_bytes: int, out: Output) -> bool:
    if stdin_is_terminal():
        out.stderr.write(f"Remove {name} ({format_bytes(num_bytes)})? [y/N] ")
        out.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    raise UsageError("nobody is there to confirm", hint=f"to remove it: tokenmill rm {name} --yes")


def _size(folder: Path) -> int:
    """Bytes of the files in a model's folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
