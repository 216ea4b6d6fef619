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

from tokenmill.kernels import EmbedTable, F32Array, PackedExperts, PackedLinear
from tokenmill.models.files import atomic_file

__all__ = ["PackedModel", "read_packed", "write_packed"]

_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 24
_ARRAYS = ("data", "scales", "mins")


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


def write_packed(path: Path, model: PackedModel) -> None:
    """Write the cache file; it appears whole or not at all."""
    arrays = _named_arrays(model)
    offset = 0
    entries: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        entries[name] = {"dtype": array.dtype.str, "shape": array.shape, "offset": offset}
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps(
        {
            "arrays": entries,
            "linears": {name: _fields(linear) for name, linear in model.linears.items()},
            "experts": {
                name: [each.num_experts, *_fields(each.linear)] for name, each in model.experts.items()
            },
            "num_bytes": offset,
        }
    ).encode()
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


def _fields(linear: PackedLinear) -> list[Any]:
    return [linear.kind, linear.num_out, linear.num_in, linear.group, linear.symmetric]


def _named_arrays(model: PackedModel) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {"embed.data": model.embed.data, "embed.scales": model.embed.scales}
    for name, linear in model.linears.items():
        arrays |= {f"{name}.{part}": getattr(linear, part) for part in _ARRAYS}
    for name, experts in model.experts.items():
        arrays |= {f"experts.{name}.{part}": getattr(experts.linear, part) for part in _ARRAYS}
    arrays |= {f"float.{name}": values for name, values in model.floats.items()}
    return arrays | {f"smoothing.{name}": factors for name, factors in model.smoothing.items()}


def _from_header(header: dict[str, Any], mapped: mmap.mmap, start: int) -> PackedModel:
    def array(name: str) -> npt.NDArray[Any]:
        entry = header["arrays"][name]
        shape = tuple(entry["shape"])
        count = int(np.prod(shape))
        flat = np.frombuffer(mapped, np.dtype(entry["dtype"]), count, start + entry["offset"] if count else 0)
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
