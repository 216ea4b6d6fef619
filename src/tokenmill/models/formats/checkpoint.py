"""The tensors of a checkpoint: `model.safetensors`, or the shards that an index lists.

    model.safetensors.index.json          {"weight_map": {tensor: shard, ...}}
    model-00001-of-00003.safetensors ...  shards, each a safetensors file

The index is a stranger's word for which file holds what, so it has to agree with the shards exactly: their
names follow one grammar, all of them are there, and every tensor lies in the shard that the index says and
in no other. Where a folder has both forms, the single file counts, as it does for transformers.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NoReturn

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.formats.bfloat16 import F32Array, U16Array
from tokenmill.models.formats.safetensors import TENSOR_NAME, WEIGHT_DTYPES, SafetensorsFile, load_unique_json

__all__ = ["INDEX_NAME", "WEIGHTS_NAME", "Checkpoint", "is_shard_name", "read_index", "shard_faults"]

WEIGHTS_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"

_SHARD: Final = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", flags=re.ASCII)
_MAX_INDEX_BYTES: Final = 16 << 20
_MAX_SHARDS: Final = 1000
_ALL: Final = slice(None)


class Checkpoint:
    """Open safetensors files that hold one model's tensors; each tensor is read on demand."""

    def __init__(self, path: Path, holders: Mapping[str, SafetensorsFile]) -> None:
        self.path = path
        self._holders = holders

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder`. Raises ModelFormatError naming the file and the field that is wrong."""
        if (folder / WEIGHTS_NAME).is_file() or not (folder / INDEX_NAME).is_file():
            file = SafetensorsFile.open(folder / WEIGHTS_NAME)
            checkpoint = cls(file.path, dict.fromkeys(file.names(), file))
        else:
            checkpoint = cls._open_shards(folder)
        for name in checkpoint.names():
            dtype = checkpoint._holders[name].dtype(name)
            if dtype not in WEIGHT_DTYPES:
                checkpoint.close()
                raise ModelFormatError(
                    f"{checkpoint._holders[name].path}: tensor {name} has the type {dtype}",
                    hint=f"weights may be {', '.join(WEIGHT_DTYPES)}",
                )
        return checkpoint

    @classmethod
    def _open_shards(cls, folder: Path) -> "Checkpoint":
        path = folder / INDEX_NAME
        shard_of = read_index(path)
        holders: dict[str, SafetensorsFile] = {}
        shards = sorted(set(shard_of.values()))
        for other in sorted(each.name for each in folder.iterdir() if is_shard_name(each.name)):
            if other not in shards:
                _fail(path, "weight_map", f"does not name {other}, which lies beside it")
        with ExitStack() as files:
            for shard in shards:
                if not (folder / shard).is_file():
                    _fail(path, "weight_map", f"names {shard}, which is missing")
                file = files.enter_context(SafetensorsFile.open(folder / shard))
                for name in file.names():
                    if shard_of.get(name) != shard:
                        said = f"the index says {shard_of[name]}" if name in shard_of else "the index has not"
                        _fail(file.path, f"tensor {name}", f"is here, which {said}")
                    holders[name] = file
            for name in shard_of:
                if name not in holders:
                    _fail(path, f"weight_map: {name}", f"is not in {shard_of[name]}")
            files.pop_all()
        return cls(path, {name: holders[name] for name in shard_of})

    def close(self) -> None:
        """Unmap the files. Arrays handed out before are copies and stay valid."""
        for file in {id(file): file for file in self._holders.values()}.values():
            file.close()

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the header or of the index."""
        return tuple(self._holders)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelFormatError if there is none of that name."""
        return self._holder(name).shape(name)

    def float32(self, name: str, rows: slice = _ALL) -> F32Array:
        """The tensor, or some of its rows, widened to float32."""
        return self._holder(name).float32(name, rows)

    def bf16(self, name: str, rows: slice = _ALL) -> U16Array:
        """The tensor, or some of its rows, as bfloat16 bits: as stored, or rounded to nearest."""
        return self._holder(name).bf16(name, rows)

    def _holder(self, name: str) -> SafetensorsFile:
        try:
            return self._holders[name]
        except KeyError:
            raise ModelFormatError(f"{self.path}: tensor {name} is missing") from None


def is_shard_name(name: str) -> bool:
    """Whether a file of this name is a shard of a checkpoint: `model-00001-of-00003.safetensors`."""
    return _SHARD.fullmatch(name) is not None


def shard_faults(names: set[str]) -> str:
    """What is wrong with a set of shard names; empty if they are exactly 1 to n of n."""
    for name in sorted(names):
        if not is_shard_name(name):
            return f"names {name[:100]!r}, which is no shard"
    totals = {int(match[2]) for name in names if (match := _SHARD.fullmatch(name))}
    if len(totals) != 1 or not 1 <= (total := totals.pop()) <= _MAX_SHARDS:
        return f"names no set of 1 to {_MAX_SHARDS} shards"
    for number in range(1, total + 1):
        if (shard := f"model-{number:05}-of-{total:05}.safetensors") not in names:
            return f"does not name {shard}"
    return "" if len(names) == total else "names a shard beyond the last"


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard name, of a `model.safetensors.index.json`.

    Raises ModelFormatError unless the names are plain and the shards are 1 to n of n.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > _MAX_INDEX_BYTES:
        _fail(path, "file", f"is larger than {_MAX_INDEX_BYTES} bytes")
    shard_of = load_unique_json(path, "file", data).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        _fail(path, "weight_map", "is missing, empty or no object")
    for name, shard in shard_of.items():
        if not TENSOR_NAME.fullmatch(name) or ".." in name:
            _fail(
                path,
                f"weight_map: tensor name {name[:80]!r}",
                "has other characters than letters, digits, _ . -",
            )
        if not isinstance(shard, str):
            _fail(path, f"weight_map: {name}", "is no name of a file")
    if fault := shard_faults(set(shard_of.values())):
        _fail(path, "weight_map", fault)
    return shard_of


def _fail(path: Path, field: str, problem: str) -> NoReturn:
    raise ModelFormatError(
        f"{path}: {field} {problem}", hint="the index and its shards do not belong together: get them again"
    )
