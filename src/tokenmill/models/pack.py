"""Which form each matrix of a model takes in a weight format, and what is done to it on the way.

`w8a8`: 8-bit weights, one scale an output, after smoothing (see `smoothing.py`). `w4a8`: the file's own
4-bit grid where the directory keeps one, exactly, its 8-bit head included; else rounding to nearest on
asymmetric groups of 32. `bf16`: as stored. Compression that looks at data, and makes a new model
directory, is not here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.kernels import EmbedTable, F32Array, PackedLinear
from tokenmill.kernels.packing import pack_bf16, pack_i4g, pack_i8c, pack_i8g, quantize_groups
from tokenmill.models.architecture import Architecture
from tokenmill.models.gguf import Grid
from tokenmill.models.layout import compile_plan
from tokenmill.models.packed import PackedModel, Piece
from tokenmill.models.smoothing import activation_peaks, smoothing_factors
from tokenmill.models.weights import WeightSource, bf16_parts, float32_parts

__all__ = [
    "FUSED",
    "WEIGHT_FORMATS",
    "WeightFormat",
    "gate_up_turns",
    "input_peaks",
    "pack_model",
    "pack_pieces",
]

WeightFormat: TypeAlias = Literal["w8a8", "w4a8", "bf16"]
_RowOrder: TypeAlias = npt.NDArray[np.intp]

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)

_GROUP = 32
_NO_SCALES = np.zeros(0, np.float16)
_EMBED = "model.embed_tokens.weight"

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Matrices that are computed in one go, by their Hugging Face names."""


def pack_model(architecture: Architecture, source: WeightSource, weights: WeightFormat) -> PackedModel:
    """Pack every matrix of a model, in memory (for w8a8 in bf16 first). `pack_pieces` is for large models."""
    peaks = None
    if weights == "w8a8":
        peaks = input_peaks(architecture, pack_model(architecture, source, "bf16"))
    return PackedModel.from_pieces(pack_pieces(architecture, source, weights, peaks))


def input_peaks(architecture: Architecture, plain: PackedModel) -> dict[str, F32Array]:
    """Largest magnitude of each input channel by linear, of a model packed in bf16: what w8a8 asks for."""
    return dict(zip(plain.linears, activation_peaks(compile_plan(architecture, plain)), strict=True))


def pack_pieces(
    architecture: Architecture,
    source: WeightSource,
    weights: WeightFormat,
    peaks: Mapping[str, F32Array] | None = None,
) -> Iterator[tuple[str, Piece]]:
    """Pack a model piece by piece. Peak memory: some times the largest matrix of a block, or the embeddings.

    `peaks` is what `input_peaks` found; w8a8 needs it.
    """
    yield "embed", _embed_table(source, weights)
    if weights == "w8a8":
        assert peaks is not None, "w8a8 is smoothed"
        yield from _smoothed_pieces(architecture, source, peaks)
        return
    for name, parts in _linear_parts(architecture).items():
        yield name, _pack_head(source, parts[0], weights) if name == "head" else _pack(source, parts, weights)
    yield from ((f"norm.{name}", weight) for name, weight in _norms(architecture, source).items())


def _linear_parts(architecture: Architecture) -> dict[str, list[str]]:
    """Every fused matrix in order of use, and the tensors that it stacks by outputs."""
    parts = {
        f"blocks.{layer}.{name}": [f"model.layers.{layer}.{tensor}.weight" for tensor in tensors]
        for layer in range(architecture.num_layers)
        for name, tensors in FUSED.items()
    }
    return parts | {"head": [_EMBED if architecture.tied_embeddings else "lm_head.weight"]}


def _norms(architecture: Architecture, source: WeightSource) -> dict[str, F32Array]:
    norms = {"ln_final": source.float32("model.norm.weight")}
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}"
        norms[f"blocks.{layer}.ln1"] = source.float32(f"{prefix}.input_layernorm.weight")
        norms[f"blocks.{layer}.ln2"] = source.float32(f"{prefix}.post_attention_layernorm.weight")
    return norms


def _smoothed_pieces(
    architecture: Architecture, source: WeightSource, peaks: Mapping[str, F32Array]
) -> Iterator[tuple[str, Piece]]:
    """8 bits a weight, the outliers of the activations moved into the weights first."""
    parts, norms = _linear_parts(architecture), _norms(architecture, source)
    smoothing: dict[str, F32Array] = {}

    def factors(linear: str, norm: str, matrix_NK: F32Array) -> F32Array:
        s_K = smoothing_factors(peaks[linear], matrix_NK)
        norms[norm] = norms[norm] / s_K
        smoothing[f"{norm}.hook_normalized"] = s_K
        return s_K

    for layer in range(architecture.num_layers):
        name = f"blocks.{layer}"
        qkv_NK, gate_up_NK = (_matrix(source, parts[f"{name}.{part}"]) for part in ("qkv", "gate_up"))
        qkv_NK *= factors(f"{name}.qkv", f"{name}.ln1", qkv_NK)
        yield f"{name}.qkv", pack_i8c(qkv_NK)
        yield f"{name}.out", pack_i8c(_matrix(source, parts[f"{name}.out"]))
        gate_up_NK *= factors(f"{name}.gate_up", f"{name}.ln2", gate_up_NK)
        down_NK = _matrix(source, parts[f"{name}.down"])
        s_K = smoothing_factors(peaks[f"{name}.down"], down_NK)
        gate_up_NK[architecture.intermediate_size :] /= s_K[:, None]
        smoothing[f"{name}.mlp.hook_post"] = s_K
        yield f"{name}.gate_up", pack_i8c(gate_up_NK[gate_up_turns(2 * len(s_K))])
        yield f"{name}.down", pack_i8c(down_NK * s_K)
    [head] = parts["head"]
    weight_peaks = [np.abs(part).max(axis=0) for part in float32_parts(source, head)]
    s_K = factors("head", "ln_final", np.stack(weight_peaks))
    yield "head", _joined([pack_i8c(part * s_K) for part in float32_parts(source, head)])
    yield from ((f"norm.{name}", weight) for name, weight in norms.items())
    yield from ((f"smoothing.{name}", values) for name, values in smoothing.items())


def _pack_head(source: WeightSource, name: str, weights: WeightFormat) -> PackedLinear:
    """As `_pack`, for a matrix that is often larger than all of a block: some rows at a time."""
    if weights == "bf16":
        return _joined([pack_bf16(part) for part in bf16_parts(source, name)])
    if source.grid(name) is not None:
        return _pack(source, [name], weights)
    return _joined([pack_i8c(part) for part in float32_parts(source, name)])


def _joined(parts: Sequence[PackedLinear]) -> PackedLinear:
    """One matrix of parts of its rows; each but the last has whole pairs of tiles."""
    first = parts[0]
    return replace(
        first,
        num_out=sum(part.num_out for part in parts),
        data=np.concatenate([part.data for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        mins=np.concatenate([part.mins for part in parts]),
    )


def _matrix(source: WeightSource, names: Sequence[str]) -> F32Array:
    return np.concatenate([source.float32(name) for name in names])


def _pack(source: WeightSource, names: Sequence[str], weights: WeightFormat) -> PackedLinear:
    """One matrix, or several stacked by outputs, as stored or on a 4-bit grid."""
    rows = _row_order(source, names)
    if weights == "bf16":
        return pack_bf16(np.concatenate([source.bf16(name) for name in names])[rows])
    grids = [grid for name in names if (grid := source.grid(name)) is not None]
    if len(grids) == len(names) and len({(grid.bits, grid.mins is None) for grid in grids}) == 1:
        return _pack_grids(grids, rows)
    matrix_NK = _matrix(source, names)[rows]
    if matrix_NK.shape[1] % _GROUP:
        return pack_i8c(matrix_NK)
    return pack_i4g(*quantize_groups(matrix_NK, _GROUP, symmetric=False))


def _pack_grids(grids: Sequence[Grid], rows: _RowOrder) -> PackedLinear:
    """A file's own quantised values, exactly; all of one kind."""
    values = np.concatenate([grid.values for grid in grids])[rows]
    scales = np.concatenate([grid.scales for grid in grids])[rows]
    if grids[0].bits == 8:
        return pack_i8g(values, scales)
    if grids[0].mins is None:
        return pack_i4g((values + 8).astype(np.uint8), scales, None)
    mins = np.concatenate([grid.mins for grid in grids if grid.mins is not None])
    return pack_i4g(values, scales, mins[rows])


def _row_order(source: WeightSource, names: Sequence[str]) -> _RowOrder:
    """The order of outputs in the packed matrix."""
    num_out = sum(source.shape(name)[0] for name in names)
    return gate_up_turns(num_out) if "gate_proj" in names[0] else np.arange(num_out)


def gate_up_turns(num_out: int) -> _RowOrder:
    """Outputs stacked as gates, then ups, taken in turns of 16: what a gated linear wants."""
    if num_out % 32:
        raise UsageError(f"a gated unit of width {num_out // 2}", hint="the width must be a multiple of 16")
    return np.arange(num_out).reshape(2, -1, 16).transpose(1, 0, 2).reshape(-1)


def _embed_table(source: WeightSource, weights: WeightFormat) -> EmbedTable:
    grid = source.grid(_EMBED) if weights == "w4a8" else None
    if grid is not None and grid.bits == 8:
        return EmbedTable(data=np.ascontiguousarray(grid.values), scales=np.ascontiguousarray(grid.scales))
    return EmbedTable(data=source.bf16(_EMBED), scales=_NO_SCALES)
