"""A model's weights in the kernels' layout, and their cache on disk.

Packing takes seconds; reading the packed file back takes none, because it is memory-mapped: the kernels
read the file's pages directly, and processes that run the same model share them. The file is a cache:
it may be deleted at any time, and one that does not fit its name is made again.

File: 8 bytes length of the header, the header (JSON: every array's type, shape and offset), then the
arrays, each on a 64-byte border. What the weights are packed *to* is decided in `compile.py`.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.kernels import EmbedTable, F32Array, PackedLinear
from tokenmill.models.files import atomic_file

__all__ = ["PackedModel", "read_packed", "write_packed"]

_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 24
_ARRAYS = ("data", "scales", "mins")


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


def write_packed(path: Path, model: PackedModel) -> None:
    """Write the cache file; it appears whole or not at all."""
    arrays = _named_arrays(model)
    offset = 0
    entries: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        entries[name] = {"dtype": array.dtype.str, "shape": array.shape, "offset": offset}
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    linears = {
        name: [linear.kind, linear.num_out, linear.num_in, linear.group, linear.symmetric]
        for name, linear in model.linears.items()
    }
    header = json.dumps({"arrays": entries, "linears": linears, "num_bytes": offset}).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
            file.write(b"\0" * (-array.nbytes % _ALIGNMENT))


def read_packed(path: Path) -> PackedModel | None:
    """Map a cache file; None if there is none or it is not whole."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    length = int.from_bytes(mapped[:8], "little")
    if length > min(_MAX_HEADER_BYTES, len(mapped) - 8):
        return None
    try:
        header = json.loads(mapped[8 : 8 + length])
        if len(mapped) != 8 + length + header["num_bytes"]:
            return None
        return _from_header(header, mapped, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _named_arrays(model: PackedModel) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {"embed.data": model.embed.data, "embed.scales": model.embed.scales}
    for name, linear in model.linears.items():
        arrays |= {f"{name}.{part}": getattr(linear, part) for part in _ARRAYS}
    arrays |= {f"norm.{name}": weight for name, weight in model.norms.items()}
    return arrays | {f"smoothing.{name}": factors for name, factors in model.smoothing.items()}


def _from_header(header: dict[str, Any], mapped: mmap.mmap, start: int) -> PackedModel:
    def array(name: str) -> npt.NDArray[Any]:
        entry = header["arrays"][name]
        shape = tuple(entry["shape"])
        count = int(np.prod(shape))
        flat = np.frombuffer(mapped, np.dtype(entry["dtype"]), count, start + entry["offset"] if count else 0)
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
