"""A streaming, atomic writer for GGUF files.

The table of tensors comes first in a GGUF file, so sizes are known before any data: tensors are described,
then their bytes are asked for piece by piece and written as they come. A model larger than memory can be
written, and a file that is not whole never appears under its name.

Covers version 3, little-endian. It does not cover split files; what goes into a file is decided in
`export.py`. Source: the GGUF specification, docs/gguf.md of the ggml project.
"""

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.models.files import atomic_file, check_free_space
from tokenmill.models.formats.gguf_quants import STORED_TYPES

__all__ = ["MetadataItem", "TensorSpec", "write_gguf"]

MetadataItem: TypeAlias = bool | int | float | str | Sequence[str] | npt.NDArray[Any]
"""A value to write: whole numbers become uint32, others float32, arrays one of int32, float32 or bool."""

_ALIGNMENT: Final = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_ARRAY_KINDS: Final = {"i": (_INT32, "<i4"), "f": (_FLOAT32, "<f4"), "b": (_BOOL, "u1")}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor to be written: its type by ggml's name, and its shape, row-major ([outputs, inputs])."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data, without padding."""
        return STORED_TYPES[self.dtype].num_bytes(math.prod(self.shape))


def write_gguf(
    path: Path,
    metadata: Mapping[str, MetadataItem],
    tensors: Sequence[TensorSpec],
    load: Callable[[TensorSpec], Iterable[npt.NDArray[np.uint8]]],
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> int:
    """Write a file; `load` gives the bytes of one tensor at a time, in pieces. Returns the file's size.

    Atomic and flushed to the disk. `progress` gets bytes done and bytes. Raises StorageError, for a full
    disk before anything is written where that can be known.
    """
    header = _header(metadata, tensors)
    total = len(header) + sum(_padded(tensor.num_bytes) for tensor in tensors)
    check_free_space(path.parent, total)
    with atomic_file(path) as file:
        file.write(header)
        progress(file.tell(), total)
        for tensor in tensors:
            _write_tensor(file, tensor, load(tensor), lambda done: progress(done, total))
        assert file.tell() == total
    return total


def _write_tensor(
    file: IO[bytes],
    tensor: TensorSpec,
    pieces: Iterable[npt.NDArray[np.uint8]],
    progress: Callable[[int], None],
) -> None:
    done = 0
    for piece in pieces:
        file.write(np.ascontiguousarray(piece).data)
        done += piece.nbytes
        progress(file.tell())
    assert done == tensor.num_bytes, (tensor, done)
    file.write(bytes(_padded(done) - done))


def _header(metadata: Mapping[str, MetadataItem], tensors: Sequence[TensorSpec]) -> bytes:
    """Everything before the data, padded to where the data starts."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]  # GGUF lists the innermost dimension first
        assert dims[0] % STORED_TYPES[tensor.dtype].block_weights == 0, tensor
        parts += [_text(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", STORED_TYPES[tensor.dtype].type_id, offset))
        offset += _padded(tensor.num_bytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _value(value: MetadataItem) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        kind, dtype = _ARRAY_KINDS[value.dtype.kind]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.astype(dtype).tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
