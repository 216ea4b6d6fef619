"""Which form each matrix of a model takes in a weight format, and what is done to it on the way.

`w8a8`: 8-bit weights, one scale an output, after smoothing (see `smoothing.py`). `w4a8`: the file's own
4-bit grid where the directory keeps one, exactly, its 8-bit head included; else rounding to nearest on
asymmetric groups of 32. `bf16`: as stored. Compression that looks at data, and makes a new model
directory, is not here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from tokenmill.core import UsageError
from tokenmill.kernels import EmbedTable, F32Array, PackedExperts, PackedLinear
from tokenmill.kernels.packing import pack_bf16, pack_i4g, pack_i8c, pack_i8g, quantize_groups
from tokenmill.models.architecture import Architecture
from tokenmill.models.gguf_quants import Grid
from tokenmill.models.layout import compile_plan
from tokenmill.models.packed import PackedModel
from tokenmill.models.smoothing import SMOOTHING_TOKENS, activation_peaks, smoothing_factors
from tokenmill.models.weights import WeightSource

__all__ = ["FUSED", "WEIGHT_FORMATS", "WeightFormat", "fused_linears", "gate_up_turns", "pack_model"]

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
    """Pack every matrix of a model. Peak memory: the packed model (for w8a8 in bf16, too) and one matrix."""
    if weights == "w8a8":
        return _pack_smoothed(architecture, source)
    linears = {name: _pack(source, parts, weights) for name, parts in _linear_parts(architecture).items()}
    experts = {
        name: _stack([_pack(source, parts, weights) for parts in each])
        for name, each in _expert_parts(architecture).items()
    }
    return PackedModel(
        embed=_embed_table(source, weights),
        linears=linears,
        experts=experts,
        floats=_floats(architecture, source),
    )


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


def _stack(each: Sequence[PackedLinear]) -> PackedExperts:
    """One matrix of every expert; all of one kind and shape."""
    first = each[0]
    stacked: dict[str, Any] = {
        part: np.stack([getattr(linear, part) for linear in each]) for part in ("data", "scales", "mins")
    }
    return PackedExperts(num_experts=len(each), linear=replace(first, **stacked))


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


def _pack_smoothed(architecture: Architecture, source: WeightSource) -> PackedModel:
    """8 bits a weight, the outliers of the activations moved into the weights first."""
    plain = pack_model(architecture, source, "bf16")
    packer = _SmoothedPacker(architecture, source, plain)
    for layer, kind in enumerate(architecture.layers):
        packer.attention(layer)
        (packer.experts if kind.routed else packer.gated_unit)(layer)
    packer.head()
    return PackedModel(
        embed=plain.embed,
        linears=packer.linears,
        experts=packer.packed_experts,
        floats=packer.floats,
        smoothing=packer.smoothing,
    )


class _SmoothedPacker:
    """Packs a model to 8 bits part by part; what it divides an input by goes into the norm that makes it."""

    def __init__(self, architecture: Architecture, source: WeightSource, plain: PackedModel) -> None:
        self._architecture = architecture
        self._source = source
        self._peaks = activation_peaks(compile_plan(architecture, plain, SMOOTHING_TOKENS))
        self._parts = _linear_parts(architecture)
        self.floats = dict(plain.floats)
        self.linears: dict[str, PackedLinear] = {}
        self.packed_experts: dict[str, PackedExperts] = {}
        self.smoothing: dict[str, F32Array] = {}

    def attention(self, layer: int) -> None:
        name = f"blocks.{layer}"
        self.linears[f"{name}.qkv"] = pack_i8c(self._after_norm(f"{name}.qkv", f"{name}.ln1"))
        self.linears[f"{name}.out"] = pack_i8c(self._matrix(f"{name}.out"))

    def gated_unit(self, layer: int) -> None:
        name, inner = f"blocks.{layer}", self._architecture.intermediate_size
        gate_up_NK, down_NK = self._after_norm(f"{name}.gate_up", f"{name}.ln2"), self._matrix(f"{name}.down")
        s_K = smoothing_factors(self._peaks[f"{name}.mlp.hook_post"], np.abs(down_NK).max(axis=0))
        turns = gate_up_turns(2 * inner)
        divisor_N = np.concatenate([np.ones(inner, np.float32), s_K])
        gate_up_NK /= divisor_N[:, None]
        if (bias_N := self.floats.get(f"{name}.gate_up.bias")) is not None:
            self.floats[f"{name}.gate_up.bias"] = bias_N / divisor_N[turns]
        self.smoothing[f"{name}.mlp.hook_post"] = s_K
        self.linears[f"{name}.gate_up"] = pack_i8c(gate_up_NK[turns])
        self.linears[f"{name}.down"] = pack_i8c(down_NK * s_K)

    def experts(self, layer: int) -> None:
        """One set of factors for all experts of a layer, which read the same rows; the inner rows stay."""
        name, parts = f"blocks.{layer}", _expert_parts(self._architecture)
        gate_up, norm = parts[f"{name}.gate_up"], f"{name}.ln2"
        turns = gate_up_turns(2 * self._source.shape(gate_up[0][0])[0])
        peaks = [np.abs(_matrix(self._source, each)).max(axis=0) for each in gate_up]
        s_K = smoothing_factors(self._peaks[f"{norm}.hook_normalized"], np.max(peaks, axis=0))
        self._divide_norm(norm, s_K)
        self.packed_experts[f"{name}.gate_up"] = _stack(
            [pack_i8c((_matrix(self._source, each) * s_K)[turns]) for each in gate_up]
        )
        self.packed_experts[f"{name}.down"] = _stack(
            [pack_i8c(_matrix(self._source, each)) for each in parts[f"{name}.down"]]
        )

    def head(self) -> None:
        head_NK = self._matrix("head")
        s_K = smoothing_factors(self._peaks["ln_final.hook_normalized"], np.abs(head_NK).max(axis=0))
        self._divide_norm("ln_final", s_K)
        self.linears["head"] = pack_i8c(head_NK * s_K)

    def _after_norm(self, linear: str, norm: str) -> F32Array:
        """The matrix, smoothed if a norm makes its input."""
        matrix_NK = self._matrix(linear)
        if self._architecture.post_norm:
            return matrix_NK
        s_K = smoothing_factors(self._peaks[f"{norm}.hook_normalized"], np.abs(matrix_NK).max(axis=0))
        self._divide_norm(norm, s_K)
        return matrix_NK * s_K

    def _divide_norm(self, norm: str, s_K: F32Array) -> None:
        self.floats[norm] = self.floats[norm] / s_K
        self.smoothing[f"{norm}.hook_normalized"] = s_K

    def _matrix(self, linear: str) -> F32Array:
        return _matrix(self._source, self._parts[linear])


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
    if names[0] in ("lm_head.weight", _EMBED) or matrix_NK.shape[1] % _GROUP:
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
