"""Which form each matrix of a model takes in a weight format, and what is done to it on the way.

`w8a8`: 8-bit weights, one scale an output, after smoothing (see `smoothing.py`). `w4a8`: the file's own
4-bit grid where the directory keeps one, exactly, its 8-bit head included; else rounding to nearest on
asymmetric groups of 32, head and embeddings in 8 bits. `bf16`: as stored. Compression that looks at data, and
makes a new model directory, is not here.
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
from tokenmill.models.formats.gguf_quants import Grid
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.packed import ExpertParts, PackedModel, Piece
from tokenmill.models.packing.smoothing import SMOOTHING_TOKENS, activation_peaks, smoothing_factors
from tokenmill.models.weights import WeightSource, bf16_parts, float32_parts

__all__ = [
    "FUSED",
    "WEIGHT_FORMATS",
    "WeightFormat",
    "fused_linears",
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


def input_peaks(architecture: Architecture, plain: PackedModel) -> Mapping[str, F32Array]:
    """Largest magnitudes of what linears read, of a model packed in bf16: what w8a8 asks for."""
    return activation_peaks(compile_plan(architecture, plain, SMOOTHING_TOKENS))


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
        yield from _SmoothedPacker(architecture, source, peaks).pieces()
        return
    for name, parts in _linear_parts(architecture).items():
        yield name, _pack_head(source, parts[0], weights) if name == "head" else _pack(source, parts, weights)
    for name, each in _expert_parts(architecture).items():
        linears = (_pack(source, parts, weights) for parts in each)
        yield name, ExpertParts(num_experts=len(each), linears=linears)
    yield from ((f"float.{name}", values) for name, values in _floats(architecture, source).items())


def _linear_parts(architecture: Architecture) -> dict[str, list[str]]:
    """Every fused matrix that all rows read, in order of use, and the tensors that it stacks by outputs."""
    parts = {
        f"blocks.{layer}.{name}": [f"model.layers.{layer}.{tensor}.weight" for tensor in tensors]
        for layer in range(architecture.num_layers)
        for name, tensors in fused_linears(architecture, layer).items()
    }
    return parts | {"head": [_EMBED if architecture.tied_embeddings else "lm_head.weight"]}


def fused_linears(architecture: Architecture, layer: int) -> Mapping[str, tuple[str, ...]]:
    """The part of FUSED that every row of a layer reads: no gated unit where experts take its place."""
    names = ("qkv", "out") if architecture.layers[layer].routed else tuple(FUSED)
    return {name: FUSED[name] for name in names}


def _expert_parts(architecture: Architecture) -> dict[str, list[list[str]]]:
    """For each layer's fused expert matrix: the tensors of every expert."""
    num_experts = architecture.experts.num_experts if architecture.experts else 0
    return {
        f"blocks.{layer}.{name}": [
            [f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight" for part in parts]
            for expert in range(num_experts)
        ]
        for layer, kind in enumerate(architecture.layers)
        if kind.routed
        for name, parts in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",)))
    }


def _floats(architecture: Architecture, source: WeightSource) -> dict[str, F32Array]:
    """Everything that stays in float32: norms, biases in the order of their matrix, routers."""
    floats = {"ln_final": source.float32("model.norm.weight")}
    ln1, ln2 = architecture.norm_names()
    for layer, kind in enumerate(architecture.layers):
        prefix, name = f"model.layers.{layer}", f"blocks.{layer}"
        floats[f"{name}.ln1"] = source.float32(f"{prefix}.{ln1}.weight")
        floats[f"{name}.ln2"] = source.float32(f"{prefix}.{ln2}.weight")
        if architecture.qk_norm != "none":
            floats[f"{name}.q_norm"] = source.float32(f"{prefix}.self_attn.q_norm.weight")
            floats[f"{name}.k_norm"] = source.float32(f"{prefix}.self_attn.k_norm.weight")
        if kind.routed:
            floats[f"{name}.router"] = source.float32(f"{prefix}.mlp.gate.weight")
            floats[f"{name}.router.norm"] = floats[f"{name}.ln2"]
        biases = architecture.bias_sizes(kind.routed)
        for linear, parts in fused_linears(architecture, layer).items():
            if parts[0] in biases:
                bias_N = np.concatenate([source.float32(f"{prefix}.{part}.bias") for part in parts])
                order = gate_up_turns(len(bias_N)) if linear == "gate_up" else slice(None)
                floats[f"{name}.{linear}.bias"] = bias_N[order]
    return floats


class _SmoothedPacker:
    """Packs a model to 8 bits piece by piece; what divides an input goes into the norm that makes it."""

    def __init__(
        self, architecture: Architecture, source: WeightSource, peaks: Mapping[str, F32Array]
    ) -> None:
        self._architecture = architecture
        self._source = source
        self._peaks = peaks
        self._parts = _linear_parts(architecture)
        self._expert_parts = _expert_parts(architecture)
        self._floats = _floats(architecture, source)
        self._smoothing: dict[str, F32Array] = {}

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        for layer, kind in enumerate(self._architecture.layers):
            yield from self._attention(layer)
            yield from (self._experts if kind.routed else self._gated_unit)(layer)
        yield "head", self._head()
        yield from ((f"float.{name}", values) for name, values in self._floats.items())
        yield from ((f"smoothing.{name}", factors) for name, factors in self._smoothing.items())

    def _attention(self, layer: int) -> Iterator[tuple[str, Piece]]:
        name = f"blocks.{layer}"
        yield f"{name}.qkv", pack_i8c(self._after_norm(f"{name}.qkv", f"{name}.ln1"))
        yield f"{name}.out", pack_i8c(self._matrix(f"{name}.out"))

    def _gated_unit(self, layer: int) -> Iterator[tuple[str, Piece]]:
        name, inner = f"blocks.{layer}", self._architecture.intermediate_size
        gate_up_NK, down_NK = self._after_norm(f"{name}.gate_up", f"{name}.ln2"), self._matrix(f"{name}.down")
        s_K = smoothing_factors(self._peaks[f"{name}.mlp.hook_post"], np.abs(down_NK).max(axis=0))
        turns = gate_up_turns(2 * inner)
        divisor_N = np.concatenate([np.ones(inner, np.float32), s_K])
        gate_up_NK /= divisor_N[:, None]
        if (bias_N := self._floats.get(f"{name}.gate_up.bias")) is not None:
            self._floats[f"{name}.gate_up.bias"] = bias_N / divisor_N[turns]
        self._smoothing[f"{name}.mlp.hook_post"] = s_K
        yield f"{name}.gate_up", pack_i8c(gate_up_NK[turns])
        yield f"{name}.down", pack_i8c(down_NK * s_K)

    def _experts(self, layer: int) -> Iterator[tuple[str, Piece]]:
        """One set of factors for all experts of a layer, which read the same rows; the inner rows stay."""
        name, source = f"blocks.{layer}", self._source
        gate_up, down = self._expert_parts[f"{name}.gate_up"], self._expert_parts[f"{name}.down"]
        turns = gate_up_turns(2 * source.shape(gate_up[0][0])[0])
        weight_peaks = [np.abs(_matrix(source, each)).max(axis=0) for each in gate_up]
        s_K = self._factors(f"{name}.ln2", np.max(weight_peaks, axis=0))
        ups = (pack_i8c((_matrix(source, each) * s_K)[turns]) for each in gate_up)
        yield f"{name}.gate_up", ExpertParts(num_experts=len(gate_up), linears=ups)
        downs = (pack_i8c(_matrix(source, each)) for each in down)
        yield f"{name}.down", ExpertParts(num_experts=len(down), linears=downs)

    def _head(self) -> PackedLinear:
        [name] = self._parts["head"]
        weight_peaks = [np.abs(part_NK).max(axis=0) for part_NK in float32_parts(self._source, name)]
        s_K = self._factors("ln_final", np.max(weight_peaks, axis=0))
        return _joined([pack_i8c(part_NK * s_K) for part_NK in float32_parts(self._source, name)])

    def _after_norm(self, linear: str, norm: str) -> F32Array:
        """The matrix, smoothed if a norm makes its input."""
        matrix_NK = self._matrix(linear)
        if not self._architecture.post_norm:
            matrix_NK *= self._factors(norm, np.abs(matrix_NK).max(axis=0))
        return matrix_NK

    def _factors(self, norm: str, weight_peak_K: F32Array) -> F32Array:
        """What the weights that read a norm are multiplied by; the norm is divided by it."""
        s_K = smoothing_factors(self._peaks[f"{norm}.hook_normalized"], weight_peak_K)
        self._floats[norm] = self._floats[norm] / s_K
        self._smoothing[f"{norm}.hook_normalized"] = s_K
        return s_K

    def _matrix(self, linear: str) -> F32Array:
        return _matrix(self._source, self._parts[linear])


def _pack_head(source: WeightSource, name: str, weights: WeightFormat) -> PackedLinear:
    """As `_pack`, for a matrix that is often larger than all of a block: some rows at a time."""
    if weights == "bf16":
        return _joined([pack_bf16(part_NK) for part_NK in bf16_parts(source, name)])
    if source.grid(name) is not None:
        return _pack(source, [name], weights)
    return _joined([pack_i8c(part_NK) for part_NK in float32_parts(source, name)])


def _joined(parts: Sequence[PackedLinear]) -> PackedLinear:
    """One matrix of parts of its rows; each but the last has whole pairs of tiles."""
    return replace(
        parts[0],
        num_out=sum(part.num_out for part in parts),
        data=np.concatenate([part.data for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
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
    if weights == "w4a8" and grid is None and source.shape(_EMBED)[1] % _GROUP == 0:
        tables = [_rounded_rows(part_VD) for part_VD in float32_parts(source, _EMBED)]
        data_VD, scales_VG = (np.concatenate(each) for each in zip(*tables, strict=True))
        return EmbedTable(data=data_VD, scales=scales_VG)
    return EmbedTable(data=source.bf16(_EMBED), scales=_NO_SCALES)


def _rounded_rows(part_VD: F32Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Rows of the table of embeddings in 8 bits, with a scale (absmax / 127) a group of 32."""
    grouped = part_VD.reshape(len(part_VD), -1, _GROUP)
    scales_VG = (np.abs(grouped).max(axis=2) / np.float32(127)).astype(np.float16)
    step = np.where(scales_VG > 0, scales_VG, np.float16(1)).astype(np.float32)[:, :, None]
    values = np.clip(np.rint(grouped / step), -127, 127).astype(np.int8)
    return values.reshape(part_VD.shape), scales_VG
