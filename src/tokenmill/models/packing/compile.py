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
from tokenmill.models.files import disk_errors
from tokenmill.models.hf_config import architecture_to_config
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WEIGHT_FORMATS, WeightFormat, input_peaks, pack_model, pack_pieces
from tokenmill.models.packing.packed import PackedModel, read_packed, scratch_packed, write_packed
from tokenmill.models.store.directory import ModelDirectory, layout_files

__all__ = ["ExecutorConfig", "ExecutorFactory", "create_executor", "forget_packed", "load_packed"]

_LAYOUT_VERSION = 8
"""Part of every cache file's name: raise it when packing or smoothing changes."""


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """The form and sizes of an executor: rows of a step, rows with logits, KV blocks, adapter slots.

    `expert_cache_bytes` is the memory that the weights of experts may take; None leaves it to the system.
    """

    weights: WeightFormat
    max_rows: int
    max_out_rows: int
    num_blocks: int
    num_threads: int | None = None
    kv_dtype: KvDtype = "bf16"
    max_adapters: int = 0
    expert_cache_bytes: int | None = None


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
        expert_cache_bytes=config.expert_cache_bytes,
    )


def load_packed(directory: ModelDirectory, weights: WeightFormat) -> PackedModel:
    """The packed weights, from the cache where it has them; else packed now, and cached if the disk lets."""
    if weights not in WEIGHT_FORMATS:
        raise UsageError(f"weights is {weights!r}", hint=f"use one of {', '.join(WEIGHT_FORMATS)}")
    path = _cache_path(directory, weights)
    if (cached := read_packed(path)) is not None:
        return cached
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget(_prefix(directory.path, weights))
        _pack_into(path, directory, weights)
    except (OSError, StorageError):
        # A cache that cannot be written costs start-up time and memory only.
        return pack_model(directory.architecture, directory.weights(), weights)
    return read_packed(path) or pack_model(directory.architecture, directory.weights(), weights)


def _pack_into(path: Path, directory: ModelDirectory, weights: WeightFormat) -> None:
    """Pack piece by piece; for w8a8 the bf16 form is a file too, the cached one or one for the moment."""
    architecture, source = directory.architecture, directory.weights()
    peaks = None
    if weights == "w8a8":
        plain = read_packed(_cache_path(directory, "bf16"))
        if plain is not None:
            peaks = input_peaks(architecture, plain)
        else:
            with scratch_packed(path.parent, pack_pieces(architecture, source, "bf16")) as plain:
                peaks = input_peaks(architecture, plain)
    write_packed(path, pack_pieces(architecture, source, weights, peaks))


def forget_packed(path: Path) -> None:
    """Delete the cached packed weights, in every format, of the model folder `path`, damaged or not."""
    with disk_errors(_cache_folder()):
        for weights in WEIGHT_FORMATS:
            _forget(_prefix(path, weights))


def _forget(prefix: str) -> None:
    for path in _cache_folder().glob(f"{prefix}*.packed"):
        path.unlink(missing_ok=True)


def _cache_path(directory: ModelDirectory, weights: WeightFormat) -> Path:
    prefix = _prefix(directory.path, weights)
    return _cache_folder() / f"{prefix}{_fingerprint(directory)}.packed"


def _prefix(path: Path, weights: WeightFormat) -> str:
    """What the names of one model's cache files in one format begin with, whatever it held before."""
    return hashlib.sha256(f"{weights} {path.resolve()}".encode()).hexdigest()[:16] + "-"


def _fingerprint(directory: ModelDirectory) -> str:
    """Changes with the files themselves: a manifest's word for them is not taken."""
    names = [name for name in layout_files(directory.path) if name.partition(".")[0].startswith("model")]
    stats = [(directory.path / name).stat() for name in names]
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
