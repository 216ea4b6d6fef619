"""A model's weights in the kernels' layout, and their cache on disk.

Packing takes seconds; reading the packed file back takes none, because it is memory-mapped: the kernels
read the file's pages directly, and processes that run the same model share them. The file is a cache:
it may be deleted at any time, and one that does not fit its name is made again.

A file is written piece by piece, as the pieces are packed, so that a model larger than memory can be packed.

File: 8 bytes place of the header, then the arrays, each on a 64-byte border, then to the end the header
(JSON: every array's type, shape and offset). What the weights are packed *to* is decided in `pack.py`.
"""

import json
import math
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.kernels import EmbedTable, F32Array, PackedExperts, PackedLinear
from tokenmill.models.files import atomic_file

__all__ = ["ExpertParts", "PackedModel", "Piece", "read_packed", "scratch_packed", "write_packed"]

_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 24
_ARRAYS = ("data", "scales")


@dataclass(frozen=True, kw_only=True)
class ExpertParts:
    """One fused matrix of every expert of a layer, packed when it is asked for; all of one kind and shape."""

    num_experts: int
    linears: Iterable[PackedLinear]


Piece: TypeAlias = EmbedTable | PackedLinear | ExpertParts | F32Array
"""A part of a packed model: the table is named `embed`, vectors `float.` or `smoothing.` and their name."""


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """Everything a step plan points to. Linears: `blocks.0.qkv`, `.out`, `.gate_up`, `.down`, and `head`.

    A routed block has `.gate_up` and `.down` among `experts`. `floats`: norms `blocks.0.ln1`, `blocks.0.ln2`,
    `ln_final`, and where there are any `blocks.0.q_norm`, `.k_norm`, `.router`, `.router.norm`, and biases,
    such as `.qkv.bias`, in the order of their matrix. `smoothing` is that of the `StepPlan`.
    """

    embed: EmbedTable
    linears: Mapping[str, PackedLinear]
    floats: Mapping[str, F32Array]
    experts: Mapping[str, PackedExperts] = field(default_factory=dict)
    smoothing: Mapping[str, F32Array] = field(default_factory=dict)

    @property
    def num_linear_bytes(self) -> int:
        """Bytes of the weights that every decode step reads: all but the experts'."""
        return sum(linear.num_bytes for linear in self.linears.values())

    @classmethod
    def from_pieces(cls, pieces: Iterable[tuple[str, Piece]]) -> "PackedModel":
        """A model in memory from its pieces, which come in any order."""
        linears: dict[str, PackedLinear] = {}
        experts: dict[str, PackedExperts] = {}
        vectors: dict[str, dict[str, F32Array]] = {"float": {}, "smoothing": {}}
        embed: EmbedTable | None = None
        for name, piece in pieces:
            if isinstance(piece, PackedLinear):
                linears[name] = piece
            elif isinstance(piece, ExpertParts):
                experts[name] = _stacked(list(piece.linears))
            elif isinstance(piece, EmbedTable):
                embed = piece
            else:
                kind, _, rest = name.partition(".")
                vectors[kind][rest] = piece
        assert embed is not None, "a model without embeddings"
        floats, smoothing = vectors["float"], vectors["smoothing"]
        return cls(embed=embed, linears=linears, experts=experts, floats=floats, smoothing=smoothing)

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """The model's pieces by name: what `from_pieces` and `write_packed` take."""
        yield "embed", self.embed
        yield from self.linears.items()
        for name, each in self.experts.items():
            linears = map(each.expert, range(each.num_experts))
            yield name, ExpertParts(num_experts=each.num_experts, linears=linears)
        yield from ((f"float.{name}", values) for name, values in self.floats.items())
        yield from ((f"smoothing.{name}", factors) for name, factors in self.smoothing.items())


def write_packed(path: Path, pieces: Iterable[tuple[str, Piece]]) -> None:
    """Write the cache file from pieces, one at a time; it appears whole or not at all."""
    with atomic_file(path) as file:
        _write(file, pieces)


@contextmanager
def scratch_packed(folder: Path, pieces: Iterable[tuple[str, Piece]]) -> Iterator[PackedModel]:
    """A model on a file in `folder` that has no name, and is gone at the end. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        _write(file, pieces)
        file.flush()
        model = _from_bytes(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        assert model is not None, "just written"
        yield model


def read_packed(path: Path) -> PackedModel | None:
    """Map a cache file; None if there is none or it is not whole."""
    try:
        with path.open("rb") as file:
            return _from_bytes(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        return None


def _write(file: IO[bytes], pieces: Iterable[tuple[str, Piece]]) -> None:
    writer = _Writer(file)
    for name, piece in pieces:
        writer.add(name, piece)
    writer.finish()


class _Writer:
    """Writes the arrays of pieces one after the other, and in the end what they are."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._end = _ALIGNMENT
        self._header: dict[str, dict[str, Any]] = {"arrays": {}, "linears": {}, "experts": {}}

    def add(self, name: str, piece: Piece) -> None:
        if isinstance(piece, ExpertParts):
            self._add_experts(name, piece)
            return
        if isinstance(piece, PackedLinear):
            self._header["linears"][name] = _fields(piece)
        for full_name, array in _arrays(name, piece):
            self._put(self._reserve(full_name, array, array.shape), array)

    def finish(self) -> None:
        self._file.seek(self._end)
        self._file.write(json.dumps({**self._header, "start": self._end}).encode())
        self._file.seek(0)
        self._file.write(self._end.to_bytes(8, "little"))

    def _add_experts(self, name: str, piece: ExpertParts) -> None:
        """Experts come one at a time, but each kind of array lies together for all of them."""
        offsets: list[int] = []
        for index, linear in enumerate(piece.linears):
            arrays = _arrays(f"experts.{name}", linear)
            if not offsets:
                self._header["experts"][name] = [piece.num_experts, *_fields(linear)]
                offsets = [self._reserve(each, a, (piece.num_experts, *a.shape)) for each, a in arrays]
            for offset, (_, array) in zip(offsets, arrays, strict=True):
                self._put(offset + index * array.nbytes, array)

    def _reserve(self, name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> int:
        offset = self._end
        self._header["arrays"][name] = {"dtype": array.dtype.str, "shape": shape, "offset": offset}
        self._end += -(-math.prod(shape) * array.itemsize // _ALIGNMENT) * _ALIGNMENT
        return offset

    def _put(self, offset: int, array: npt.NDArray[Any]) -> None:
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(array).data)


def _arrays(name: str, piece: EmbedTable | PackedLinear | F32Array) -> list[tuple[str, npt.NDArray[Any]]]:
    if isinstance(piece, EmbedTable):
        return [(f"{name}.data", piece.data), (f"{name}.scales", piece.scales)]
    if isinstance(piece, PackedLinear):
        return [(f"{name}.{part}", getattr(piece, part)) for part in _ARRAYS]
    return [(name, piece)]


def _fields(linear: PackedLinear) -> list[Any]:
    return [linear.kind, linear.num_out, linear.num_in, linear.group, linear.symmetric]


def _stacked(each: Sequence[PackedLinear]) -> PackedExperts:
    stacked: dict[str, Any] = {part: np.stack([getattr(linear, part) for linear in each]) for part in _ARRAYS}
    return PackedExperts(num_experts=len(each), linear=replace(each[0], **stacked))


def _from_bytes(mapped: mmap.mmap) -> PackedModel | None:
    """The model in a mapped file; None if that is not whole."""
    start = int.from_bytes(mapped[:8], "little")
    if not _ALIGNMENT <= start <= len(mapped) or len(mapped) - start > _MAX_HEADER_BYTES:
        return None
    try:
        header = json.loads(mapped[start:])
        return _from_header(header, mapped) if header["start"] == start else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _from_header(header: dict[str, Any], mapped: mmap.mmap) -> PackedModel:
    def array(name: str) -> npt.NDArray[Any]:
        entry = header["arrays"][name]
        shape = tuple(entry["shape"])
        count = int(np.prod(shape))
        flat = np.frombuffer(mapped, np.dtype(entry["dtype"]), count, entry["offset"] if count else 0)
        return flat.reshape(shape)

    def linear(name: str, fields: list[Any]) -> PackedLinear:
        kind, num_out, num_in, group, symmetric = fields
        arrays = {part: array(f"{name}.{part}") for part in _ARRAYS}
        return PackedLinear(
            kind=kind, num_out=num_out, num_in=num_in, group=group, symmetric=symmetric, **arrays
        )

    def group(prefix: str) -> dict[str, npt.NDArray[Any]]:
        names = [name for name in header["arrays"] if name.startswith(prefix)]
        return {name.removeprefix(prefix): array(name) for name in names}

    experts = {
        name: PackedExperts(num_experts=num_experts, linear=linear(f"experts.{name}", fields))
        for name, (num_experts, *fields) in header["experts"].items()
    }
    return PackedModel(
        embed=EmbedTable(data=array("embed.data"), scales=array("embed.scales")),
        linears={name: linear(name, fields) for name, fields in header["linears"].items()},
        experts=experts,
        floats=group("float."),
        smoothing=group("smoothing."),
    )
