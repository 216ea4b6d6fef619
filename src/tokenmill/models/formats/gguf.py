"""A bounded reader for GGUF files.

GGUF files come from strangers, and readers that trust their counts hang, allocate without end or read
outside the file. Here every count, length, type, dimension and offset is checked against the bytes that
are really there before anything is allocated or looped over, so that a hostile file costs at most time
and memory in proportion to its own size.

Covers versions 2 and 3, little-endian, with tensors of the types in `gguf_quants.py`. It does not cover
writing (see `gguf_writer.py`), split files, other types or nested arrays. A file must not be truncated
while it is open: it is memory-mapped.
Source: the GGUF specification, docs/gguf.md of the ggml project.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.formats.bfloat16 import F32Array, round_to_bf16
from tokenmill.models.formats.gguf_quants import STORED_TYPES, Grid, dequantize, exact_grid

__all__ = ["GgufFile", "GgufTensor", "MetadataValue"]

_MAX_METADATA_KEYS: Final = 4096
_MAX_TENSORS: Final = 1 << 14
_MAX_KEY_BYTES: Final = 256
_MAX_STRING_BYTES: Final = 1 << 20
_MAX_ARRAY_ITEMS: Final = 1 << 21
_MAX_ALIGNMENT: Final = 1 << 16
_MAX_DIMS: Final = 4
_ROWS_AT_ONCE: Final = 1 << 22
_LENGTH: Final = struct.Struct("<Q")
_NAME: Final = re.compile(r"[\x21-\x7e]+")

_SCALARS: Final[Mapping[int, str]] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

_NAMES: Final[Mapping[int, str]] = {each.type_id: name for name, each in STORED_TYPES.items()}
_OTHER_TYPES: Final[Mapping[int, str]] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_T = TypeVar("_T", bound=np.generic)
_Scalar: TypeAlias = int | float | bool | str
MetadataValue: TypeAlias = _Scalar | list[str] | list[bool] | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where a tensor is: `shape` is row-major ([outputs, inputs]), `offset` from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile:
    """An open GGUF file: checked metadata and tensor table, tensors read on demand. A context manager."""

    def __init__(
        self,
        path: Path,
        view: mmap.mmap,
        metadata: Mapping[str, MetadataValue],
        tensors: Mapping[str, GgufTensor],
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._view = view

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Map and check `path`. Raises ModelFormatError naming the file and the field that is wrong."""
        try:
            with path.open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelFormatError(f"{path}: cannot be read as GGUF ({error})") from error
        try:
            metadata, tensors = _Parser(path, view).parse()
        except BaseException:
            view.close()
            raise
        return cls(path, view, metadata, tensors)

    def close(self) -> None:
        """Unmap the file. Arrays handed out before are copies and stay valid."""
        self._view.close()

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tensor(self, name: str) -> GgufTensor:
        """The tensor's place. Raises ModelFormatError if the file has none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFormatError(f"{self.path}: tensor {name} is missing") from None

    def float32(self, name: str, rows: slice | None = None) -> F32Array:
        """The tensor de-quantised, in its shape, or its rows [start, stop) of the last dimension.

        Bounded: the result, and temporaries of a few million weights.
        """
        return self._read(name, rows, np.dtype(np.float32), lambda weights: weights)

    def bf16(self, name: str, rows: slice | None = None) -> npt.NDArray[np.uint16]:
        """As `float32`, rounded to bfloat16 (nearest, ties to even), as 16-bit patterns."""
        return self._read(name, rows, np.dtype(np.uint16), round_to_bf16)

    def grid(self, name: str, rows: slice | None = None) -> Grid | None:
        """The exact quantised form of a matrix, or of some of a tensor's rows; None if its type has none."""
        tensor = self.tensor(name)
        if len(tensor.shape) == 1 or (rows is None and len(tensor.shape) > 2):
            return None
        stored = rows or slice(0, _num_rows(tensor))
        return exact_grid(tensor.dtype, self._row_bytes(tensor, stored))

    def _read(
        self,
        name: str,
        rows: slice | None,
        dtype: "np.dtype[_T]",
        convert: Callable[[F32Array], npt.NDArray[_T]],
    ) -> npt.NDArray[_T]:
        tensor = self.tensor(name)
        wanted = rows or slice(0, _num_rows(tensor))
        out = np.empty((wanted.stop - wanted.start, tensor.shape[-1]), dtype)
        step = max(1, _ROWS_AT_ONCE // tensor.shape[-1])
        for first in range(wanted.start, wanted.stop, step):
            part = slice(first, min(first + step, wanted.stop))
            weights = dequantize(tensor.dtype, self._row_bytes(tensor, part))
            out[part.start - wanted.start : part.stop - wanted.start] = convert(weights)
        return out.reshape(tensor.shape) if rows is None else out

    def _row_bytes(self, tensor: GgufTensor, rows: slice) -> npt.NDArray[np.uint8]:
        """The stored bytes of rows [start, stop), copied out of the mapping: [rows, bytes a row]."""
        assert 0 <= rows.start <= rows.stop <= _num_rows(tensor)
        width = tensor.num_bytes // _num_rows(tensor)
        first = tensor.offset + rows.start * width
        data = self._view[first : tensor.offset + rows.stop * width]
        return np.frombuffer(data, np.uint8).reshape(rows.stop - rows.start, width)


class _Parser:
    """Walks the header once, front to back; `at` never passes the end of the file."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path = path
        self.view = view
        self.size = len(view)
        self.at = 0
        self.items_left = _MAX_ARRAY_ITEMS

    def parse(self) -> tuple[dict[str, MetadataValue], dict[str, GgufTensor]]:
        if self.take(4, "magic") != b"GGUF":
            self.fail("magic", "is not GGUF")
        version = self.unsigned("I", "version")
        if version not in (2, 3):
            self.fail("version", f"is {version}; 2 and 3 little-endian are supported")
        num_tensors = self.count("Q", "tensor count", _MAX_TENSORS, 24)
        num_keys = self.count("Q", "metadata count", _MAX_METADATA_KEYS, 13)
        metadata: dict[str, MetadataValue] = {}
        for index in range(num_keys):
            key = self.name(f"key {index}")
            if key in metadata:
                self.fail(key, "appears twice")
            metadata[key] = self.value(key, self.unsigned("I", f"type of {key}"))
        tensors = self.tensor_table(num_tensors, self.alignment(metadata))
        return metadata, tensors

    def fail(self, field: str, problem: str) -> NoReturn:
        raise ModelFormatError(
            f"{self.path}: {field} {problem}", hint="the file is damaged or of a kind that is not supported"
        )

    def take(self, num_bytes: int, field: str) -> bytes:
        if num_bytes > self.size - self.at:
            self.fail(field, f"needs {num_bytes} bytes at {self.at}, the file ends at {self.size}")
        data = self.view[self.at : self.at + num_bytes]
        self.at += num_bytes
        return data

    def unsigned(self, code: str, field: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), field))[0]
        return value

    def count(self, code: str, field: str, limit: int, min_bytes_each: int) -> int:
        """A count that the rest of the file can hold."""
        value = self.unsigned(code, field)
        if value > limit or value * min_bytes_each > self.size - self.at:
            self.fail(field, f"is {value}, more than the file or the limit of {limit} allows")
        return value

    def text(self, field: str, limit: int) -> str:
        data = self.take(self.count("Q", f"length of {field}", limit, 1), field)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(field, "is not UTF-8")

    def name(self, field: str) -> str:
        name = self.text(field, _MAX_KEY_BYTES)
        if not _NAME.fullmatch(name):
            self.fail(field, f"has the name {name!r}; names are printable ASCII without spaces")
        return name

    def value(self, key: str, kind: int) -> MetadataValue:
        if kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            number: int | float = struct.unpack(code, self.take(struct.calcsize(code), key))[0]
            return number
        if kind == _BOOL:
            return self.flag(key)
        if kind == _STRING:
            return self.text(key, _MAX_STRING_BYTES)
        if kind != _ARRAY:
            self.fail(key, f"has the unknown type {kind}")
        return self.array(key)

    def flag(self, key: str) -> bool:
        byte = self.unsigned("B", key)
        if byte > 1:
            self.fail(key, f"is a boolean of value {byte}")
        return bool(byte)

    def array(self, key: str) -> MetadataValue:
        kind = self.unsigned("I", f"item type of {key}")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind])
            count = self.count("Q", f"length of {key}", _MAX_ARRAY_ITEMS, dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        if kind not in (_BOOL, _STRING):
            self.fail(key, f"is an array of type {kind}, which is not supported")
        count = self.count("Q", f"length of {key}", self.items_left, 8 if kind == _STRING else 1)
        self.items_left -= count
        if kind == _BOOL:
            return self.flags(key, count)
        return self.strings(key, count)

    def flags(self, key: str, count: int) -> list[bool]:
        flags = np.frombuffer(self.take(count, key), np.uint8)
        if count and flags.max() > 1:
            self.fail(key, f"has a boolean of value {flags.max()}")
        items: list[bool] = flags.astype(bool).tolist()
        return items

    def strings(self, key: str, count: int) -> list[str]:
        """`count` strings; a loop of its own, because vocabularies have a hundred thousand."""
        view, at, last = self.view, self.at, self.size - 8
        items = []
        for _ in range(count):
            if at > last:
                self.fail(key, f"needs a string at {at}, the file ends at {self.size}")
            length = _LENGTH.unpack_from(view, at)[0]
            at += 8
            if length > _MAX_STRING_BYTES or length > self.size - at:
                self.fail(key, f"has a string of {length} bytes at {at}")
            items.append(view[at : at + length])
            at += length
        self.at = at
        try:
            return [item.decode("utf-8") for item in items]
        except UnicodeDecodeError:
            self.fail(key, "is not UTF-8")

    def alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
            self.fail("general.alignment", f"is {value!r}, expected a power of two up to {_MAX_ALIGNMENT}")
        return value

    def tensor_table(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        """Read all entries, then place them: the data starts at the next aligned byte after the table."""
        tensors: dict[str, GgufTensor] = {}
        for index in range(count):
            tensor = self.tensor_entry(index, alignment)
            if tensor.name in tensors:
                self.fail(f"tensor {tensor.name}", "appears twice")
            tensors[tensor.name] = tensor
        start = -(-self.at // alignment) * alignment
        end = start
        for tensor in sorted(tensors.values(), key=lambda each: each.offset):
            if start + tensor.offset < end:
                self.fail(f"tensor {tensor.name}", "overlaps another tensor")
            gap = start + tensor.offset - end
            end = start + tensor.offset + tensor.num_bytes
            if end > self.size:
                self.fail(f"tensor {tensor.name}", f"ends at {end}, the file at {self.size}")
            if gap >= alignment:
                self.fail(f"tensor {tensor.name}", "leaves a gap before it")
        if tensors and self.size - end >= alignment:  # the file may be something else as well, such as a ZIP
            self.fail("file", f"has {self.size} bytes, its last tensor ends at {end}")
        return {name: _moved(tensor, start) for name, tensor in tensors.items()}

    def tensor_entry(self, index: int, alignment: int) -> GgufTensor:
        name = self.name(f"tensor {index}")
        field = f"tensor {name}"
        num_dims = self.count("I", f"dimensions of {field}", _MAX_DIMS, 8)
        dims = tuple(self.unsigned("Q", f"shape of {field}") for _ in range(num_dims))
        if not dims or min(dims) < 1 or math.prod(dims) > 2 * self.size:
            self.fail(field, f"has the shape {dims}, which the file cannot hold")
        dtype, num_bytes = self.storage(field, self.unsigned("I", f"type of {field}"), dims)
        offset = self.unsigned("Q", f"offset of {field}")
        if offset % alignment:
            self.fail(field, f"starts at {offset}, which is not aligned to {alignment}")
        return GgufTensor(name=name, dtype=dtype, shape=dims[::-1], offset=offset, num_bytes=num_bytes)

    def storage(self, field: str, kind: int, dims: tuple[int, ...]) -> tuple[str, int]:
        """Type name and size in bytes. GGUF lists the innermost dimension first."""
        if kind not in _NAMES:
            name = _OTHER_TYPES.get(kind, f"unknown ({kind})")
            raise ModelFormatError(
                f"{self.path}: {field} has the type {name}", hint=f"use a file with {', '.join(STORED_TYPES)}"
            )
        dtype = _NAMES[kind]
        block = STORED_TYPES[dtype].block_weights
        if dims[0] % block:
            self.fail(field, f"has rows of {dims[0]}, {dtype} needs a multiple of {block}")
        return dtype, STORED_TYPES[dtype].num_bytes(math.prod(dims))


def _moved(tensor: GgufTensor, start: int) -> GgufTensor:
    return GgufTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        offset=start + tensor.offset,
        num_bytes=tensor.num_bytes,
    )


def _num_rows(tensor: GgufTensor) -> int:
    return math.prod(tensor.shape[:-1])
