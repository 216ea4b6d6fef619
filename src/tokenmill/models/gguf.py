"""A bounded reader for GGUF files.

GGUF files come from strangers, and readers that trust their counts hang, allocate without end or read
outside the file. Here every count, length, type, dimension and offset is checked against the bytes that
are really there before anything is allocated or looped over, so that a hostile file costs at most time
and memory in proportion to its own size.

Covers versions 2 and 3, little-endian, with tensors in F32, F16, BF16, Q4_0, Q4_1 and Q8_0. It does not
cover writing, split files, other quantisations or nested arrays. A file must not be truncated while it
is open: it is memory-mapped.
Source: the GGUF specification, docs/gguf.md of the ggml project.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.bfloat16 import F32Array, round_to_bf16, widen_bf16

__all__ = ["GROUP", "GgufFile", "GgufTensor", "Grid", "MetadataValue"]

GROUP: Final = 32
"""Weights in one quantised block."""

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

_FLOATS: Final[Mapping[int, str]] = {0: "F32", 1: "F16", 30: "BF16"}
_QUANTISED: Final[Mapping[int, tuple[str, int]]] = {2: ("Q4_0", 18), 3: ("Q4_1", 20), 8: ("Q8_0", 34)}
_FLOAT_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_OTHER_TYPES: Final[Mapping[int, str]] = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_Scalar: TypeAlias = int | float | bool | str
MetadataValue: TypeAlias = _Scalar | list[str] | list[bool] | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A quantised matrix exactly as the file stores it: w[n, k] = scale * value (+ minimum).

    `values` is [N, K], uint8 in 0..15 with minima, else int8 (-8..7 for 4 bits). `scales` and `mins` are
    float16 [N, K/32], one for each group of 32 inputs; `mins` is None for symmetric grids.
    """

    values: npt.NDArray[Any]
    scales: npt.NDArray[np.float16]
    mins: npt.NDArray[np.float16] | None
    bits: int

    def float32(self) -> F32Array:
        """The weights, [N, K]: one float32 product and at most one float32 sum each."""
        num_rows, num_columns = self.values.shape
        out = self.values.reshape(num_rows, -1, GROUP).astype(np.float32)
        with np.errstate(invalid="ignore"):  # a scale that is infinite gives NaN, which conversion refuses
            out *= self.scales.astype(np.float32)[:, :, None]
            if self.mins is not None:
                out += self.mins.astype(np.float32)[:, :, None]
        return out.reshape(num_rows, num_columns)

    def take_rows(self, rows: npt.NDArray[np.intp]) -> "Grid":
        """The same grid with its outputs in another order; stays exact."""
        mins = None if self.mins is None else self.mins[rows]
        return Grid(values=self.values[rows], scales=self.scales[rows], mins=mins, bits=self.bits)


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

    def float32(self, name: str) -> F32Array:
        """The tensor de-quantised, in its shape."""
        tensor = self.tensor(name)
        out = np.empty(tensor.shape, np.float32)
        rows_out = out.reshape(_num_rows(tensor), tensor.shape[-1])
        for rows in self._row_spans(tensor):
            rows_out[rows] = self._float32_rows(tensor, rows)
        return out

    def bf16(self, name: str) -> npt.NDArray[np.uint16]:
        """The tensor rounded to bfloat16 (nearest, ties to even), as 16-bit patterns, in its shape."""
        tensor = self.tensor(name)
        out = np.empty(tensor.shape, np.uint16)
        rows_out = out.reshape(_num_rows(tensor), tensor.shape[-1])
        for rows in self._row_spans(tensor):
            rows_out[rows] = round_to_bf16(self._float32_rows(tensor, rows))
        return out

    def grid(self, name: str) -> Grid | None:
        """The exact quantised form of a matrix; None if the tensor is stored as floats or is no matrix."""
        tensor = self.tensor(name)
        if tensor.dtype in _FLOAT_DTYPES or len(tensor.shape) != 2:
            return None
        return self._grid_rows(tensor, slice(0, tensor.shape[0]))

    def _row_spans(self, tensor: GgufTensor) -> Iterator[slice]:
        """Row ranges of at most a few million weights, so that temporaries stay small."""
        num_rows = _num_rows(tensor)
        step = max(1, _ROWS_AT_ONCE // tensor.shape[-1])
        return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))

    def _row_bytes(self, tensor: GgufTensor, rows: slice) -> npt.NDArray[np.uint8]:
        """The stored bytes of rows [start, stop), copied out of the mapping: [rows, bytes a row]."""
        width = tensor.num_bytes // _num_rows(tensor)
        first = tensor.offset + rows.start * width
        data = self._view[first : tensor.offset + rows.stop * width]
        return np.frombuffer(data, np.uint8).reshape(rows.stop - rows.start, width)

    def _float32_rows(self, tensor: GgufTensor, rows: slice) -> F32Array:
        if tensor.dtype not in _FLOAT_DTYPES:
            return self._grid_rows(tensor, rows).float32()
        stored = self._row_bytes(tensor, rows).view(_FLOAT_DTYPES[tensor.dtype])
        return widen_bf16(stored) if tensor.dtype == "BF16" else stored.astype(np.float32)

    def _grid_rows(self, tensor: GgufTensor, rows: slice) -> Grid:
        num_groups = tensor.shape[-1] // GROUP
        data = self._row_bytes(tensor, rows)
        blocks = data.reshape(len(data), num_groups, -1)
        scales = _halves(blocks, 0)
        if tensor.dtype == "Q8_0":
            values = blocks[:, :, 2:].copy().view(np.int8).reshape(len(data), -1)
            return Grid(values=values, scales=scales, mins=None, bits=8)
        if tensor.dtype == "Q4_1":
            return Grid(values=_nibbles(blocks[:, :, 4:]), scales=scales, mins=_halves(blocks, 2), bits=4)
        values = _nibbles(blocks[:, :, 2:]).view(np.int8)
        values -= 8
        return Grid(values=values, scales=scales, mins=None, bits=4)


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
        if kind in _FLOATS:
            dtype = _FLOATS[kind]
            return dtype, math.prod(dims) * np.dtype(_FLOAT_DTYPES[dtype]).itemsize
        if kind not in _QUANTISED:
            name = _OTHER_TYPES.get(kind, f"unknown ({kind})")
            supported = ", ".join([*_FLOATS.values(), *(each for each, _ in _QUANTISED.values())])
            raise ModelFormatError(
                f"{self.path}: {field} has the type {name}", hint=f"use a file with {supported}"
            )
        dtype, block_bytes = _QUANTISED[kind]
        if dims[0] % GROUP:
            self.fail(field, f"has rows of {dims[0]}, {dtype} needs a multiple of {GROUP}")
        return dtype, math.prod(dims) // GROUP * block_bytes


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


def _halves(blocks: npt.NDArray[np.uint8], at: int) -> npt.NDArray[np.float16]:
    """The float16 at byte `at` of every block: [rows, groups]."""
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0].astype(np.float16)


def _nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """16 bytes a block to 32 values, low halves first: [rows, 32 * groups]."""
    values = np.concatenate([packed & 15, packed >> 4], axis=2)
    return values.reshape(len(packed), -1)
