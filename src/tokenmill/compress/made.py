"""How a model directory that was made from another one is written: whole or not at all, with its lineage.

The new directory has the small files of its source (tokenizer, template, what ends an answer) but for those
that are given anew, bf16 weights, and a manifest that names source and recipe. It stands beside nothing that
existed before. Which weights it has is for the callers.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenmill.core import NotFoundError, UsageError
from tokenmill.models.architecture import Architecture
from tokenmill.models.files import atomic_file
from tokenmill.models.formats.bfloat16 import U16Array
from tokenmill.models.formats.checkpoint import WEIGHTS_NAME
from tokenmill.models.formats.safetensors import write_safetensors
from tokenmill.models.hf_config import architecture_to_config
from tokenmill.models.store.assemble import write_manifest
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.manifest import DeclaredCosts, Manifest
from tokenmill.train.save import new_folder

__all__ = ["MadeModel", "check_target", "write_made"]

_SMALL_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class MadeModel:
    """A model that is to be written: its shape, its tensors by canonical name as bf16 bits, how it was made.

    `texts` are small files that differ from those of the source, by name.
    """

    architecture: Architecture
    load: Callable[[str], U16Array]
    recipe: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)


def check_target(folder: Path) -> None:
    """Raise an error if `folder` exists, or the folder that it is to stand in does not."""
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already", hint="remove it first, or choose another place")
    if not folder.absolute().parent.is_dir():
        raise NotFoundError(f"{folder.absolute().parent} is no folder", hint="make it first")


def write_made(made: MadeModel, source: ModelDirectory, folder: Path) -> ModelDirectory:
    """Write the model directory `folder`, a child of `source`. Raises StorageError; then nothing is there."""
    with new_folder(folder, 2 * made.architecture.num_params) as staging:
        _write_small_files(made, source, staging)
        _write_weights(made, staging)
        write_manifest(staging, _manifest(made, source, folder.name))
    return ModelDirectory.open(folder)


def _write_small_files(made: MadeModel, source: ModelDirectory, staging: Path) -> None:
    config: dict[str, Any] = architecture_to_config(made.architecture)
    texts = {"config.json": json.dumps(config, indent=2)}
    for name in _SMALL_FILES:
        if (source.path / name).is_file():
            texts[name] = (source.path / name).read_text("utf-8")
    for name, text in {**texts, **made.texts}.items():
        with atomic_file(staging / name) as file:
            file.write(text.encode())


def _write_weights(made: MadeModel, staging: Path) -> None:
    """The tensors under the names of the family's checkpoints, which stack some of them."""
    parts = made.architecture.stored_parts()

    def load(name: str) -> U16Array:
        loaded = [made.load(part) for part in parts[name]]
        return loaded[0] if len(loaded) == 1 else np.concatenate(loaded)

    write_safetensors(staging / WEIGHTS_NAME, made.architecture.stored_shapes(), "BF16", load)


def _manifest(made: MadeModel, source: ModelDirectory, name: str) -> Manifest:
    parent = source.manifest
    return Manifest(
        name=name,
        source=parent.source if parent is not None else str(source.name),
        licences=parent.licences if parent is not None else (),
        files={},
        costs=DeclaredCosts.of(made.architecture),
        parent=f"sha256:{source.digest}",
        recipe=made.recipe,
    )
