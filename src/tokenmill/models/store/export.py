"""Writing a model for other programs: one GGUF file (llama.cpp), or a Hugging Face folder (transformers).

What is written is the model directory's own weights. In a GGUF file a matrix whose exact grid the directory
keeps, and which the asked type can hold, is that grid; any other is the bfloat16 weights, rounded as ggml's
reference rounds. A Hugging Face folder is the directory's files, unchanged, without what only tokenmill
reads. Either appears whole or not at all, and never in the place of something that exists.

Choosing better grids (calibration, importance) is compression, and not here.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from tokenmill.core.errors import ModelFormatError, NotFoundError, StorageError, UsageError
from tokenmill.models.files import check_free_space, copy_file, disk_errors, sync_folder
from tokenmill.models.formats.convert import ROPE_FREQS, gguf_fields, rope_divisors
from tokenmill.models.formats.gguf_names import StoredTensor, interleave_head_rows, stored_tensors
from tokenmill.models.formats.gguf_quants import STORED_TYPES, quantize, store_grid
from tokenmill.models.formats.gguf_vocabulary import vocabulary_fields, vocabulary_notes
from tokenmill.models.formats.gguf_writer import MetadataItem, TensorSpec, write_gguf
from tokenmill.models.hf_config import load_json_object
from tokenmill.models.store.directory import ModelDirectory, layout_files
from tokenmill.models.store.fetch import Progress
from tokenmill.models.weights import WeightSource

__all__ = ["GGUF_TYPES", "Exported", "GgufType", "export_gguf", "export_hf"]

GgufType: TypeAlias = Literal["q8_0", "q4_0", "f16", "bf16"]

GGUF_TYPES: Final[tuple[GgufType, ...]] = get_args(GgufType)

_FILE_TYPES: Final = {"q8_0": 7, "q4_0": 2, "f16": 1, "bf16": 32}
_QUANTISATION_VERSION: Final = 2
_WEIGHTS_AT_ONCE: Final = 1 << 20
_LARGEST: Final = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}
_HEADS: Final = ("token_embd.weight", "output.weight")
_ROUTER: Final = "ffn_gate_inp.weight"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written; `notes` says what is otherwise than asked, one line each."""

    path: Path
    num_bytes: int
    notes: tuple[str, ...] = ()


def _quiet(_: str, __: int, ___: int) -> None:
    pass


def export_gguf(
    model: ModelDirectory, path: Path, gguf_type: GgufType = "q8_0", progress: Progress = _quiet
) -> Exported:
    """Write `model` as the GGUF file `path`.

    Matrices are of the asked type, but with `q4_0` embeddings and head are Q8_0, and a matrix whose rows are
    no whole blocks is F16. Vectors and routers are F32. Peak memory: the largest tensor. Raises UsageError
    for what GGUF cannot say, ModelFormatError for a weight the type cannot hold, StorageError.
    """
    _check_target(path)
    stored = stored_tensors(model.architecture)
    specs = [_spec(name, tensor, gguf_type) for name, tensor in stored.items()]
    weights, metadata = model.weights(), _metadata(model, gguf_type)
    scaling = model.architecture.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        shape = (model.architecture.head_dim // 2,)
        specs.append(TensorSpec(name=ROPE_FREQS, dtype="F32", shape=shape))

    def load(spec: TensorSpec) -> Iterator[npt.NDArray[np.uint8]]:
        if spec.name == ROPE_FREQS:
            return iter([quantize("F32", rope_divisors(model.architecture)[None])])
        return _stored_rows(spec, stored[spec.name], weights)

    with _target_errors():
        num_bytes = write_gguf(path, metadata, specs, load, partial(progress, "export"))
    return Exported(path=path, num_bytes=num_bytes, notes=tuple(_notes(model, specs, gguf_type)))


def export_hf(model: ModelDirectory, path: Path, progress: Progress = _quiet) -> Exported:
    """Write `model` as the folder `path`: its files as they are, checked against the manifest on the way.

    Raises StorageError if the disk refuses or a file is not what the manifest says.
    """
    _check_target(path)
    model.weights()  # the tensors are all there and of the right shape
    sizes = {name: (model.path / name).stat().st_size for name in _hf_files(model)}
    total, done = sum(sizes.values()), 0
    staging = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with _target_errors(), disk_errors(path):
        check_free_space(path.parent, total)
        try:
            staging.mkdir()
            for name, size in sizes.items():
                _copy_checked(model, name, size, staging / name, partial(_report, progress, done, total))
                done += size
            sync_folder(staging)
            staging.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return Exported(path=path, num_bytes=total)


def _check_target(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UsageError(
            f"{path} exists already", hint="remove it first, or choose another place with --output"
        )
    if not path.absolute().parent.is_dir():
        raise NotFoundError(f"{path.absolute().parent} is no folder", hint="make it first")


@contextmanager
def _target_errors() -> Iterator[None]:
    """What goes wrong at the target is mended at the target, not in the store."""
    try:
        yield
    except StorageError as error:
        hint = "free some space, check the permissions there, or choose another place with --output"
        raise StorageError(error.message, hint=hint) from error


def _spec(name: str, tensor: StoredTensor, gguf_type: GgufType) -> TensorSpec:
    dtype = gguf_type.upper()
    if len(tensor.shape) == 1 or name.endswith(_ROUTER):
        dtype = "F32"
    elif gguf_type == "q4_0" and name in _HEADS:
        dtype = "Q8_0"
    if tensor.shape[-1] % STORED_TYPES[dtype].block_weights:
        dtype = "F16"
    return TensorSpec(name=name, dtype=dtype, shape=tensor.shape)


def _stored_rows(
    spec: TensorSpec, tensor: StoredTensor, weights: WeightSource
) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of one tensor, part after part, a million weights at a time."""
    for name in tensor.parts:
        order = _stored_order(tensor, weights.shape(name)[0])
        grid = weights.grid(name)
        exact = (
            None if grid is None else store_grid(spec.dtype, grid if order is None else grid.take_rows(order))
        )
        if exact is not None:
            yield exact
            continue
        values = weights.float32(name)
        rows = (values if order is None else values[order]).reshape(-1, spec.shape[-1])
        step = max(1, _WEIGHTS_AT_ONCE // rows.shape[1])
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            _check_range(part, spec)
            yield quantize(spec.dtype, part)


def _stored_order(tensor: StoredTensor, num_rows: int) -> npt.NDArray[np.intp] | None:
    if not tensor.num_heads:
        return None
    return interleave_head_rows(tensor.num_heads, num_rows // tensor.num_heads)


def _check_range(values: npt.NDArray[np.float32], spec: TensorSpec) -> None:
    """Refuse a weight that is not finite or that the type would make infinite."""
    peak = float(np.abs(values).max())
    if not peak <= _LARGEST.get(spec.dtype, np.finfo(np.float32).max):  # also true for NaN
        raise ModelFormatError(
            f"tensor {spec.name} has a weight of {peak:g}, more than {spec.dtype} holds",
            hint="use --type bf16",
        )


def _metadata(model: ModelDirectory, gguf_type: GgufType) -> dict[str, MetadataItem]:
    architecture, manifest = model.architecture, model.manifest
    fields: dict[str, MetadataItem] = {**gguf_fields(architecture), "general.type": "model"}
    fields["general.name"] = manifest.name if manifest and manifest.name else model.name
    if manifest and manifest.licences:
        fields["general.license"] = ", ".join(manifest.licences)
    fields["general.file_type"] = _FILE_TYPES[gguf_type]
    fields["general.quantization_version"] = _QUANTISATION_VERSION
    path = model.path / "tokenizer_config.json"
    config = load_json_object(path) if path.is_file() else {}
    fields |= vocabulary_fields(model.tokenizer(), config, architecture.vocab_size)
    template = model.chat_template()
    if template is not None:
        fields["tokenizer.chat_template"] = template.source
    return fields


def _notes(model: ModelDirectory, specs: list[TensorSpec], gguf_type: GgufType) -> Iterator[str]:
    odd = [spec for spec in specs if spec.dtype == "F16" and gguf_type != "f16"]
    if odd:
        yield f"{len(odd)} matrices are F16: their rows are no multiple of 32 ({odd[0].name} and others)"
    windows = [layer.window for layer in model.architecture.layers if layer.window is not None]
    if windows:
        yield f"llama.cpp does not keep to the window of {windows[0]} tokens: it differs on longer texts"
    yield from vocabulary_notes(model.tokenizer())
    if len(model.architecture.eos_token_ids) > 3:
        yield "GGUF has room for three end tokens; the others are left out"


def _hf_files(model: ModelDirectory) -> list[str]:
    """The names of the directory's files that are not tokenmill's own."""
    if model.manifest is not None:
        return [name for name in model.manifest.files if name != model.manifest.grid_file]
    return [name for name in layout_files(model.path) if name != "model.gguf"]


def _copy_checked(
    model: ModelDirectory, name: str, size: int, target: Path, progress: "partial[None]"
) -> None:
    with (model.path / name).open("rb") as source, target.open("xb") as file:
        _, digest = copy_file(source, file, size, progress)
        file.flush()
        os.fsync(file.fileno())
    if model.manifest is not None and digest != model.manifest.files[name].sha256:
        raise StorageError(
            f"{model.path / name} does not match its SHA-256 in the manifest", hint="get the model again"
        )


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress("export", before + done, total)
