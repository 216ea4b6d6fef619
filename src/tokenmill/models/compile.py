"""From a model directory to an executor: weights packed once and cached, laid out as a plan, handed over.

ModelDirectory ─► pack_model (cached on disk) ─► compile_plan ─► Executor
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tokenmill.core import StorageError, UsageError
from tokenmill.kernels import KV_BLOCK, Executor, KvDtype
from tokenmill.kernels import create_executor as create_plan_executor
from tokenmill.models.directory import ModelDirectory
from tokenmill.models.files import disk_errors
from tokenmill.models.hf_config import architecture_to_config
from tokenmill.models.layout import compile_plan
from tokenmill.models.pack import WEIGHT_FORMATS, WeightFormat, pack_model
from tokenmill.models.packed import PackedModel, read_packed, write_packed

__all__ = ["ExecutorConfig", "ExecutorFactory", "create_executor", "forget_packed", "load_packed"]

_LAYOUT_VERSION = 5
"""Part of every cache file's name: raise it when packing or smoothing changes."""


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """The form and sizes of an executor: rows of a step, rows with logits, KV blocks, adapter slots."""

    weights: WeightFormat
    max_rows: int
    max_out_rows: int
    num_blocks: int
    num_threads: int | None = None
    kv_dtype: KvDtype = "bf16"
    max_adapters: int = 0


ExecutorFactory: TypeAlias = Callable[[ModelDirectory, ExecutorConfig], Executor]
"""Compiles a model directory; `create_executor` is the one that does."""


def create_executor(directory: ModelDirectory, config: ExecutorConfig) -> Executor:
    """The fastest executor available here for a model directory."""
    # No sequence is longer than the cache, so no position beyond it needs its row of sines.
    max_positions = config.num_blocks * KV_BLOCK
    plan = compile_plan(directory.architecture, load_packed(directory, config.weights), max_positions)
    return create_plan_executor(
        plan,
        max_rows=config.max_rows,
        max_out_rows=config.max_out_rows,
        num_blocks=config.num_blocks,
        num_threads=config.num_threads,
        kv_dtype=config.kv_dtype,
        max_adapters=config.max_adapters,
    )


def load_packed(directory: ModelDirectory, weights: WeightFormat) -> PackedModel:
    """The packed weights, from the cache where it has them; else packed now, and cached if the disk lets."""
    if weights not in WEIGHT_FORMATS:
        raise UsageError(f"weights is {weights!r}", hint=f"use one of {', '.join(WEIGHT_FORMATS)}")
    prefix = _prefix(directory.path, weights)
    path = _cache_folder() / f"{prefix}{_fingerprint(directory)}.packed"
    if (cached := read_packed(path)) is not None:
        return cached
    model = pack_model(directory.architecture, directory.weights(), weights)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget(prefix)
        write_packed(path, model)
    except (OSError, StorageError):
        # A cache that cannot be written costs start-up time only.
        return model
    return read_packed(path) or model


def forget_packed(path: Path) -> None:
    """Delete the cached packed weights, in every format, of the model folder `path`, damaged or not."""
    with disk_errors(_cache_folder()):
        for weights in WEIGHT_FORMATS:
            _forget(_prefix(path, weights))


def _forget(prefix: str) -> None:
    for path in _cache_folder().glob(f"{prefix}*.packed"):
        path.unlink(missing_ok=True)


def _prefix(path: Path, weights: WeightFormat) -> str:
    """What the names of one model's cache files in one format begin with, whatever it held before."""
    return hashlib.sha256(f"{weights} {path.resolve()}".encode()).hexdigest()[:16] + "-"


def _fingerprint(directory: ModelDirectory) -> str:
    """Changes with the files themselves: a manifest's word for them is not taken."""
    files = [directory.path / name for name in ("model.safetensors", "model.gguf")]
    stats = [path.stat() for path in files if path.is_file()]
    marks = [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in stats]
    config = json.dumps(architecture_to_config(directory.architecture), sort_keys=True)
    return hashlib.sha256(f"{_LAYOUT_VERSION} {marks} {config}".encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    """`TOKENMILL_HOME/cache`, else the user's cache folder."""
    home = os.environ.get("TOKENMILL_HOME")
    if home:
        return Path(home) / "cache"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tokenmill"
