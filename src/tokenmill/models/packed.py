"""A model's weights in the kernels' layout, and their cache on disk.

Packing takes seconds; reading the packed file back takes none, because it is memory-mapped: the kernels
read the file's pages directly, and processes that run the same model share them. The file is a cache:
it may be deleted at any time, and one that does not fit its name is made again.

A file is written piece by piece, as the pieces are packed, so that a model larger than memory can be packed.

File: 8 bytes place of the header, then the arrays, each on a 64-byte border, then to the end the header
(JSON: every array's type, shape and offset). What the weights are packed *to* is decided in `pack.py`.
"""

import json
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.kernels import EmbedTable, F32Array, PackedLinear
from tokenmill.models.files import atomic_file

__all__ = ["PackedModel", "Piece", "read_packed", "scratch_packed", "write_packed"]

_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 24
_ARRAYS = ("data", "scales", "mins")

Piece: TypeAlias = EmbedTable | PackedLinear | F32Array
"""A part of a packed model: the table is named `embed`, vectors `norm.` or `smoothing.` and their name."""


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """Everything a step plan points to. Linears: `blocks.0.qkv`, `.out`, `.gate_up`, `.down`, and `head`.

    Norm weights, float32: `blocks.0.ln1`, `blocks.0.ln2`, `ln_final`. `smoothing` is that of the `StepPlan`.
    """

    embed: EmbedTable
    linears: Mapping[str, PackedLinear]
    norms: Mapping[str, F32Array]
    smoothing: Mapping[str, F32Array] = field(default_factory=dict)

    @property
    def num_linear_bytes(self) -> int:
        """Bytes of weights that one decode step reads."""
        return sum(linear.num_bytes for linear in self.linears.values())

    @classmethod
    def from_pieces(cls, pieces: Iterable[tuple[str, Piece]]) -> "PackedModel":
        """A model in memory from its pieces, which come in any order."""
        linears: dict[str, PackedLinear] = {}
        vectors: dict[str, dict[str, F32Array]] = {"norm": {}, "smoothing": {}}
        embed: EmbedTable | None = None
        for name, piece in pieces:
            if isinstance(piece, PackedLinear):
                linears[name] = piece
            elif isinstance(piece, EmbedTable):
                embed = piece
            else:
                kind, _, rest = name.partition(".")
                vectors[kind][rest] = piece
        assert embed is not None, "a model without embeddings"
        return cls(embed=embed, linears=linears, norms=vectors["norm"], smoothing=vectors["smoothing"])

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """The model's pieces by name: what `from_pieces` and `write_packed` take."""
        yield "embed", self.embed
        yield from self.linears.items()
        yield from ((f"norm.{name}", weight) for name, weight in self.norms.items())
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
    entries: dict[str, dict[str, Any]] = {}
    linears: dict[str, list[Any]] = {}
    file.write(bytes(_ALIGNMENT))
    offset = _ALIGNMENT
    for name, piece in pieces:
        if isinstance(piece, PackedLinear):
            linears[name] = [piece.kind, piece.num_out, piece.num_in, piece.group, piece.symmetric]
        for full_name, array in _arrays(name, piece):
            entries[full_name] = {"dtype": array.dtype.str, "shape": array.shape, "offset": offset}
            file.write(np.ascontiguousarray(array).data)
            file.write(bytes(-array.nbytes % _ALIGNMENT))
            offset += array.nbytes + -array.nbytes % _ALIGNMENT
    file.write(json.dumps({"arrays": entries, "linears": linears, "start": offset}).encode())
    file.seek(0)
    file.write(offset.to_bytes(8, "little"))


def _arrays(name: str, piece: Piece) -> list[tuple[str, npt.NDArray[Any]]]:
    if isinstance(piece, EmbedTable):
        return [(f"{name}.data", piece.data), (f"{name}.scales", piece.scales)]
    if isinstance(piece, PackedLinear):
        return [(f"{name}.{part}", getattr(piece, part)) for part in _ARRAYS]
    return [(name, piece)]


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

    linears = {
        name: PackedLinear(
            kind=kind,
            num_out=num_out,
            num_in=num_in,
            group=group,
            symmetric=symmetric,
            **{part: array(f"{name}.{part}") for part in _ARRAYS},
        )
        for name, (kind, num_out, num_in, group, symmetric) in header["linears"].items()
    }

    def group(prefix: str) -> dict[str, npt.NDArray[Any]]:
        names = [name for name in header["arrays"] if name.startswith(prefix)]
        return {name.removeprefix(prefix): array(name) for name in names}

    embed = EmbedTable(data=array("embed.data"), scales=array("embed.scales"))
    return PackedModel(embed=embed, linears=linears, norms=group("norm."), smoothing=group("smoothing."))
