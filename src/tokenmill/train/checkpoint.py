"""The state of a training run on disk, whole or not there: a killed run goes on as if it had not been.

    checkpoint.json                    step, figures, and which files belong to them
    weights-STEP.safetensors           float32 weights, both moments of AdamW, the moving average
    best-STEP.safetensors              the weights with the best validation loss

The document is written last and names its files, so it is the moment at which a checkpoint exists; files that
it does not name are removed. Nothing random is stored: the order of examples follows from the seed and the
number of the epoch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tokenmill.core import StorageError
from tokenmill.models.files import disk_errors
from tokenmill.models.formats.safetensors import SafetensorsFile, write_safetensors
from tokenmill.runs import RunFolder

__all__ = ["discard_checkpoint", "load_tensors", "read_checkpoint", "save_best", "save_checkpoint"]

_DOCUMENT: Final = "checkpoint"


def save_checkpoint(
    folder: RunFolder, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Write the state after `step` steps; `state["best"]` names the file of the best weights, or is empty."""
    name = f"weights-{step:08d}.safetensors"
    _write(folder.path / name, tensors)
    folder.write(_DOCUMENT, {**state, "step": step, "weights": name})
    _remove_others(folder.path, {name, state["best"]})


def save_best(folder: RunFolder, step: int, weights: Tensor) -> str:
    """Write the best weights so far, in float32; returns the file's name, for the next checkpoint."""
    name = f"best-{step:08d}.safetensors"
    _write(folder.path / name, {"weights": weights.float()})
    return name


def read_checkpoint(folder: RunFolder) -> dict[str, Any] | None:
    """The last state that was written, without its tensors; None if there is none."""
    return folder.read(_DOCUMENT)


def load_tensors(folder: RunFolder, name: str, into: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a checkpoint's file. Raises StorageError if they are others than these."""
    with SafetensorsFile.open(folder.path / name) as file:
        for key, tensor in into.items():
            if key not in file.names() or file.shape(key) != tuple(tensor.shape):
                raise StorageError(
                    f"{file.path} is not of this model: {key} differs", hint="begin with another run folder"
                )
            tensor.copy_(torch.from_numpy(file.float32(key)))


def discard_checkpoint(folder: RunFolder) -> None:
    """Remove the weights of a run whose model is saved elsewhere; its log stays."""
    with disk_errors(folder.path):
        (folder.path / f"{_DOCUMENT}.json").unlink(missing_ok=True)
    _remove_others(folder.path, set())


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(path, shapes, "F32", lambda name: tensors[name].numpy())


def _remove_others(path: Path, kept: set[str]) -> None:
    with disk_errors(path):
        for pattern in ("weights-*.safetensors", "best-*.safetensors"):
            for each in path.glob(pattern):
                if each.name not in kept:
                    each.unlink()
