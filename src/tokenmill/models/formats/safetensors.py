"""A bounded reader and a streaming, atomic writer for safetensors files.

The reader is stricter than the format's reference parser, which accepts a JSON key twice and any tensor
name: here names are plain, and every size is checked against the file before anything is allocated. The
writer takes tensors one at a time, so a model larger than memory can be written.

Covers F32, F16 and BF16 for reading as weights, and bfloat16 and float32 for writing. Several files that make
one checkpoint are `checkpoint.py`'s. A file must not be truncated while it is open: it is memory-mapped.
Source: https://github.com/huggingface/safetensors (format section).
"""

import json
import math
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.files import atomic_file
from tokenmill.models.formats.bfloat16 import F32Array, U16Array, round_to_bf16, widen_bf16

__all__ = [
    "TENSOR_NAME",
    "WEIGHT_DTYPES",
    "SafetensorsFile",
    "StoredArray",
    "TensorEntry",
    "load_unique_json",
    "write_safetensors",
]

StoredArray: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.uint16]

_MAX_HEADER_BYTES: Final = 8 << 20
_MAX_TENSORS: Final = 1 << 15
_MAX_DIMS: Final = 8
_MAX_METADATA_CHARS: Final = 1 << 16
TENSOR_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,255}")
_ITEM_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_ALL: Final = slice(None)
WEIGHT_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor's type and place; `offset` counts from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile:
    """An open safetensors file: checked header, tensors read on demand. A context manager."""

    def __init__(self, path: Path, view: mmap.mmap, entries: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self._view = view
        self._entries = entries

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Map and check `path`. Raises ModelFormatError naming the file and the field that is wrong."""
        try:
            with path.open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelFormatError(f"{path}: cannot be read as safetensors ({error})") from error
        try:
            return cls(path, view, _read_header(path, view))
        except BaseException:
            view.close()
            raise

    def close(self) -> None:
        """Unmap the file. Arrays handed out before are copies and stay valid."""
        self._view.close()

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the header."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelFormatError if there is none of that name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Type of a tensor as the file calls it: `BF16`, `F32`, ..."""
        return self._entry(name).dtype

    def float32(self, name: str, rows: slice = _ALL) -> F32Array:
        """The tensor, or some of its rows, widened to float32."""
        stored = self._stored(name, rows)
        return widen_bf16(stored) if stored.dtype == np.uint16 else stored.astype(np.float32, copy=False)

    def bf16(self, name: str, rows: slice = _ALL) -> U16Array:
        """The tensor, or some of its rows, as bfloat16 bits: as stored, or rounded to nearest."""
        stored = self._stored(name, rows)
        return stored if stored.dtype == np.uint16 else round_to_bf16(stored.astype(np.float32))

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise ModelFormatError(f"{self.path}: tensor {name} is missing") from None

    def _stored(self, name: str, rows: slice) -> npt.NDArray[Any]:
        """A copy, so that the file can be unmapped while it lives; only the rows asked for are read."""
        entry = self._entry(name)
        if entry.dtype not in WEIGHT_DTYPES:
            raise ModelFormatError(
                f"{self.path}: tensor {name} has the type {entry.dtype}",
                hint=f"weights may be {', '.join(WEIGHT_DTYPES)}",
            )
        dtype = np.dtype(WEIGHT_DTYPES[entry.dtype])
        if not entry.num_bytes:
            return np.empty(entry.shape, dtype)[rows]
        count = entry.num_bytes // dtype.itemsize
        mapped = np.frombuffer(self._view, dtype, count, entry.offset).reshape(entry.shape)
        copy = mapped[rows].copy()
        # The pages that were read stay in the system's cache, but are this process's no longer.
        first = entry.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._view.madvise(mmap.MADV_DONTNEED, first, entry.offset + entry.num_bytes - first)
        return copy


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    load: Callable[[str], StoredArray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in the order of `shapes`, one at a time from `load`; atomic, flushed to the disk.

    `dtype` is `BF16` (then `load` returns uint16 bits) or `F32`. Raises StorageError, for a full disk too.
    """
    item_type = np.dtype(WEIGHT_DTYPES[dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        assert TENSOR_NAME.fullmatch(name), name
        start, end = end, end + math.prod(shape) * item_type.itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            array = load(name)
            assert array.shape == shape and array.dtype == item_type, (name, array.shape, array.dtype)
            file.write(np.ascontiguousarray(array).data)


def _read_header(path: Path, view: mmap.mmap) -> dict[str, TensorEntry]:
    size = len(view)
    header_bytes = int.from_bytes(view[:8], "little")
    if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
        _fail(path, "header length", f"is {header_bytes} in a file of {size} bytes")
    header = load_unique_json(path, "header", view[8 : 8 + header_bytes])
    _check_metadata(path, header.pop("__metadata__", {}))
    if len(header) > _MAX_TENSORS:
        _fail(path, "header", f"describes {len(header)} tensors, at most {_MAX_TENSORS}")
    start = 8 + header_bytes
    entries = {name: _read_entry(path, name, value, start) for name, value in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            _fail(path, f"tensor {name}", "overlaps another tensor or leaves a gap before it")
        end = entry.offset + entry.num_bytes
    if end != size:
        _fail(path, "file", f"has {size} bytes, its header describes {end}")
    return entries


def load_unique_json(path: Path, field: str, data: bytes) -> dict[str, Any]:
    """A JSON object in which no key comes twice; errors name `path` and `field`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            _fail(path, field, "has a key twice")
        return result

    # Python's objects take many times the text, so those of a sound header are counted before they are made.
    if data.count(b"[") + data.count(b"{") > 4 * _MAX_TENSORS or data.count(b",") > 16 * _MAX_TENSORS:
        _fail(path, "header", f"describes more than {_MAX_TENSORS} tensors")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _fail(path, field, f"is not JSON ({error})")
    if not isinstance(value, dict):
        _fail(path, field, "is not a JSON object")
    return value


def _check_metadata(path: Path, metadata: object) -> None:
    is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not isinstance(metadata, dict) or not is_text:
        _fail(path, "__metadata__", "is not an object of strings")
    if sum(len(key) + len(value) for key, value in metadata.items()) > _MAX_METADATA_CHARS:
        _fail(path, "__metadata__", f"is longer than {_MAX_METADATA_CHARS} characters")


def _read_entry(path: Path, name: str, value: object, start: int) -> TensorEntry:
    if not TENSOR_NAME.fullmatch(name) or ".." in name:
        _fail(path, f"tensor name {name[:80]!r}", "has characters other than letters, digits, _ . -")
    field = f"tensor {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _fail(path, field, "is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        _fail(path, field, f"has the unknown dtype {str(dtype)[:80]!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        _fail(path, field, "has a shape that is no short list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _fail(path, field, "has data_offsets that are no pair of sizes")
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        _fail(path, field, f"needs {num_bytes} bytes, its data_offsets are {offsets}")
    return TensorEntry(dtype=dtype, shape=tuple(shape), offset=start + offsets[0], num_bytes=num_bytes)


def _are_sizes(values: object) -> bool:
    """A list of whole numbers from 0 to 2^48: no product of a few can take long to compute or to print."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 48 for value in values
    )


def _fail(path: Path, field: str, problem: str) -> NoReturn:
    raise ModelFormatError(
        f"{path}: {field} {problem}", hint="the file is damaged or of a kind that is not supported"
    )
