"""Making a model directory: from a GGUF file, or from a folder in the Hugging Face layout.

Both work inside a staging folder and end with a manifest; placing the folder in the store is the caller's
part. Tensors pass through memory one at a time. What the directory will need at run time (tokenizer,
template, every tensor) is opened once here, so that a bad file fails at import and not later.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenmill import __version__
from tokenmill.core import Message, ModelFormatError, UsageError
from tokenmill.models.architecture import Architecture
from tokenmill.models.files import atomic_file, copy_file, disk_errors, hash_file
from tokenmill.models.formats.checkpoint import INDEX_NAME, WEIGHTS_NAME, is_shard_name
from tokenmill.models.formats.convert import GgufWeights, gguf_architecture
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.gguf_quants import GRID_TYPES
from tokenmill.models.formats.safetensors import StoredArray, write_safetensors
from tokenmill.models.hf_config import architecture_to_config
from tokenmill.models.store.directory import ModelDirectory, layout_files
from tokenmill.models.store.fetch import Progress
from tokenmill.models.store.manifest import DeclaredCosts, FileEntry, Manifest
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.models.weights import bf16_parts

__all__ = ["Origin", "from_gguf", "from_hf_folder", "hf_files", "take_file", "write_manifest"]

_MAX_SMALL_BYTES: Final = 64 << 20
"""Of a file that is not weights; tokenizers of large vocabularies have half of it."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the manifest says about where a model came from."""

    name: str
    source: str
    licences: tuple[str, ...] = ()


def from_gguf(staging: Path, origin: Origin, progress: Progress) -> None:
    """Turn `staging/model.gguf` into a model directory around it.

    Raises ModelFormatError for a file that is damaged or not supported, StorageError for a full disk.
    """
    path = staging / "model.gguf"
    parent = f"sha256:{hash_file(path)}"
    with GgufFile.open(path) as gguf:
        architecture = gguf_architecture(gguf)
        _convert_weights(staging, gguf, architecture, progress)
        _write_small_files(staging, gguf, architecture)
        kinds = sorted({tensor.dtype for tensor in gguf.tensors.values() if len(tensor.shape) > 1})
        licence = gguf.metadata.get("general.license")
    has_grid = any(kind in GRID_TYPES for kind in kinds)
    if not has_grid:
        with disk_errors(path):
            path.unlink()
    _check(staging)
    write_manifest(
        staging,
        Manifest(
            name=origin.name,
            source=origin.source,
            licences=origin.licences or ((licence,) if isinstance(licence, str) else ()),
            quantisation=_quantisation(kinds, has_grid),
            grid_file=path.name if has_grid else "",
            parent=parent,
            recipe={"step": "convert", "from": "gguf"},
            costs=DeclaredCosts.of(architecture),
            files={},
        ),
    )


def from_hf_folder(
    folder: Path, staging: Path, origin: Origin, progress: Progress, *, link: bool = False
) -> None:
    """Copy the known files of a Hugging Face folder into `staging`, check them, and add a manifest.

    Only files that are ever read are taken, never code. With `link` they become hard links, for a folder
    that nobody writes to any more. Raises ModelFormatError or StorageError.
    """
    names = hf_files(folder)
    _check_sources(folder, names)
    for name in names:
        take_file(folder / name, staging / name, progress, link=link)
    _check(staging)
    _check_finite(staging, progress)
    write_manifest(
        staging,
        Manifest(
            name=origin.name,
            source=origin.source,
            licences=origin.licences,
            recipe={"step": "copy", "from": "hugging face folder"},
            costs=DeclaredCosts.of(ModelDirectory.open(staging).architecture),
            files={},
        ),
    )


def _check_sources(folder: Path, names: Sequence[str]) -> None:
    """Refuse links that leave the folder (or the hub's cache that it is of), and endless small files."""
    root = folder.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in names:
        path = folder / name
        if not any(path.resolve().is_relative_to(each) for each in roots):
            raise ModelFormatError(
                f"{path}: is a link to a file outside the folder", hint="put the file itself into the folder"
            )
        if not name.endswith(".safetensors") and path.stat().st_size > _MAX_SMALL_BYTES:
            raise ModelFormatError(f"{path}: has {path.stat().st_size} bytes, at most {_MAX_SMALL_BYTES}")


def take_file(source: Path, target: Path, progress: Progress, *, link: bool = False) -> None:
    """Copy a file, or with `link` give it a second name where the file system can. Raises StorageError."""
    if link and _linked(source, target):
        return
    with disk_errors(source), source.open("rb") as reader:
        size = os.fstat(reader.fileno()).st_size
        with atomic_file(target) as writer:
            copy_file(reader, writer, size, partial(_report, progress, size))


def hf_files(folder: Path) -> list[str]:
    """Names of the files that `from_hf_folder` takes: one form of the weights, and what goes with them."""
    names = [name for name in layout_files(folder) if name != "model.gguf"]
    if WEIGHTS_NAME in names:
        return [name for name in names if name != INDEX_NAME and not is_shard_name(name)]
    return names


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` with the hashes of every file that `folder` has now. Raises StorageError."""
    files = {}
    for name in layout_files(folder):
        path = folder / name
        files[name] = FileEntry(sha256=hash_file(path), num_bytes=path.stat().st_size)
    replace(manifest, files=files, made_by=f"tokenmill {__version__}").write(folder)


def _convert_weights(staging: Path, gguf: GgufFile, architecture: Architecture, progress: Progress) -> None:
    weights = GgufWeights(gguf, architecture)
    parts = architecture.stored_parts()
    total = 2 * architecture.num_params
    done = 0

    def load(name: str) -> StoredArray:
        nonlocal done
        values = np.concatenate([weights.bf16(part) for part in parts[name]])
        done += values.nbytes
        progress("convert", done, total)
        return values

    write_safetensors(staging / "model.safetensors", architecture.stored_shapes(), "BF16", load)


def _write_small_files(staging: Path, gguf: GgufFile, architecture: Architecture) -> None:
    tokenizer = Tokenizer.from_gguf(gguf)
    template = gguf.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise ModelFormatError(f"{gguf.path}: tokenizer.chat_template is no text")
    config = architecture_to_config(architecture)
    eos = config["eos_token_id"]
    files = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps({"bos_token_id": config["bos_token_id"], "eos_token_id": eos}),
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(_tokenizer_config(gguf, tokenizer, architecture), indent=2),
    }
    if template:
        files["chat_template.jinja"] = template
    for name, text in files.items():
        with atomic_file(staging / name) as file:
            file.write(text.encode())


def _tokenizer_config(gguf: GgufFile, tokenizer: Tokenizer, architecture: Architecture) -> dict[str, Any]:
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; model-specific ones rebuild it and get it wrong.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": architecture.max_positions,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for field, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < tokenizer.vocab_size:
            config[f"{field}_token"] = tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
    adds_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(adds_bos, bool):
        config["add_bos_token"] = adds_bos
    return config


def _check(staging: Path) -> None:
    """Open everything that running the model will open. Raises ModelFormatError."""
    model = ModelDirectory.open(staging)
    model.weights()
    model.tokenizer()
    template = model.chat_template()
    if template is not None:
        with suppress(UsageError):  # a template may refuse this conversation and still be sound
            template.render([Message(role="user", content="Hello")])


def _check_finite(staging: Path, progress: Progress) -> None:
    """Raise ModelFormatError if a weight is NaN or infinite in bfloat16."""
    weights = ModelDirectory.open(staging).weights()
    names = weights.names()
    for done, name in enumerate(names):
        progress("check", done, len(names))
        for bits in bf16_parts(weights, name):
            if np.any((bits & 0x7F80) == 0x7F80):
                raise ModelFormatError(f"{staging}: tensor {name} is not finite")


def _linked(source: Path, target: Path) -> bool:
    """Give the file a second name; False where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _quantisation(kinds: list[str], has_grid: bool) -> str:
    text = f"source matrices are {', '.join(kinds)}; model.safetensors holds them rounded to bf16"
    return f"{text}; model.gguf keeps the source's exact integers and scales" if has_grid else text


def _report(progress: Progress, total: int, done: int) -> None:
    progress("copy", done, total)
