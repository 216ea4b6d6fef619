"""A trained model as a model directory: bf16 weights, everything else from the model that it was made from.

The directory appears whole or not at all, and never in the place of something that exists. Its manifest
names the parent by digest, the recipe, and the licences: the parent's and those that the data added.
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tokenmill.core import NotFoundError, UsageError
from tokenmill.models.architecture import Architecture
from tokenmill.models.files import atomic_file, check_free_space, disk_errors, sync_folder
from tokenmill.models.formats.checkpoint import INDEX_NAME, WEIGHTS_NAME, is_shard_name
from tokenmill.models.formats.safetensors import StoredArray, write_safetensors
from tokenmill.models.hf_config import architecture_to_config, load_json_object
from tokenmill.models.store.assemble import take_file, write_manifest
from tokenmill.models.store.directory import ModelDirectory, layout_files
from tokenmill.models.store.manifest import DeclaredCosts, Manifest
from tokenmill.models.torch_twin import TorchDecoder

__all__ = ["new_folder", "save_model"]

_CONFIG: Final = "config.json"
_SPARE_BYTES: Final = 64 << 20


def save_model(
    model: TorchDecoder,
    source: ModelDirectory,
    folder: Path,
    *,
    recipe: Mapping[str, str],
    licences: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
    name: str = "",
) -> ModelDirectory:
    """Write `model` as the model directory `folder`, and open it.

    `source` is the parent: its digest, licences, tokenizer and chat template are taken over. `files` are
    small files in the place of the parent's (a trimmed tokenizer). The architecture may differ. Raises
    UsageError if `folder` exists or a weight is not finite, StorageError if the disk refuses.
    """
    given = dict(files or {})
    _check_finite(model)
    with new_folder(folder, 2 * model.architecture.num_params) as staging:
        given.setdefault(_CONFIG, _config(model.architecture, source))
        for each in _small_files(source):
            if each not in given:
                take_file(source.path / each, staging / each, lambda *_: None)
        for each, data in given.items():
            with atomic_file(staging / each) as file:
                file.write(data)
        _write_weights(staging / WEIGHTS_NAME, model)
        parent = source.manifest
        inherited = () if parent is None else parent.licences
        write_manifest(
            staging,
            Manifest(
                name=name or folder.name,
                source=f"made from {source.name}",
                licences=tuple(dict.fromkeys((*inherited, *licences))),
                parent=f"sha256:{source.digest}",
                recipe=dict(recipe),
                costs=DeclaredCosts.of(model.architecture),
                files={},
            ),
        )
        saved = ModelDirectory.open(staging)
        saved.weights()
        saved.tokenizer()
    return ModelDirectory.open(folder)


@contextmanager
def new_folder(path: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to fill, which is at `path` when the block ends without an error, and nowhere otherwise."""
    path = path.absolute()
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists already", hint="remove it first, or choose another place")
    if not path.parent.is_dir():
        raise NotFoundError(f"{path.parent} is no folder", hint="make it first")
    staging = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    check_free_space(path.parent, num_bytes + _SPARE_BYTES)
    with disk_errors(path):
        try:
            staging.mkdir()
            yield staging
            sync_folder(staging)
            staging.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _small_files(source: ModelDirectory) -> list[str]:
    """What is neither weights nor the quantised file that the parent was made from."""
    weights = {WEIGHTS_NAME, INDEX_NAME, "model.gguf"}
    return [name for name in layout_files(source.path) if name not in weights and not is_shard_name(name)]


def _config(architecture: Architecture, source: ModelDirectory) -> bytes:
    """The parent's configuration where it still holds, with the type of the weights that are written."""
    config = architecture_to_config(architecture)
    if architecture == source.architecture:
        config = load_json_object(source.path / _CONFIG)
        config.pop("dtype", None)
        config["torch_dtype"] = "bfloat16"
    return (json.dumps(config, indent=2) + "\n").encode()


def _write_weights(path: Path, model: TorchDecoder) -> None:
    architecture = model.architecture
    parameters, parts = dict(model.named_parameters()), architecture.stored_parts()

    def load(name: str) -> StoredArray:
        values = torch.cat([parameters[part].detach().bfloat16() for part in parts[name]])
        bits: StoredArray = values.view(torch.uint16).numpy()
        return bits

    write_safetensors(path, architecture.stored_shapes(), "BF16", load)


def _check_finite(model: TorchDecoder) -> None:
    for name, weight in model.named_parameters():
        if not _is_finite(weight.detach()):
            raise UsageError(f"the weight {name} is not finite", hint="train with a smaller learning rate")


def _is_finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight.bfloat16()).all())
