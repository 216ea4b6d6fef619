"""Random small plans and batches, shared by the tests of the executors."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tokenmill.kernels import (
    KV_BLOCK,
    Activation,
    AddNorm,
    Attend,
    Embed,
    EmbedTable,
    F32Array,
    Linear,
    Norm,
    Op,
    PackedLinear,
    PlanShape,
    Quantize,
    RopeKv,
    Select,
    StepBatch,
    StepPlan,
)
from tokenmill.kernels.packing import pack_bf16, pack_i4g, pack_i8c, pack_i8g, quantize_groups
from tokenmill.kernels.twin import bf16_bits

FORMATS = ("i8c", "i8g", "i4g", "i4g-symmetric", "i4g-96", "bf16")


def pack(weight: F32Array, kind: str) -> PackedLinear:
    """`weight` [N, K] in one of FORMATS."""
    if kind == "i8c":
        return pack_i8c(weight)
    if kind == "bf16":
        return pack_bf16(bf16_bits(weight))
    if kind == "i8g":
        grouped = weight.reshape(weight.shape[0], -1, 32)
        scales = (np.abs(grouped).max(axis=2) / 127).astype(np.float16)
        values = np.rint(grouped / scales.astype(np.float32)[:, :, None]).clip(-127, 127).astype(np.int8)
        return pack_i8g(values.reshape(weight.shape), scales)
    group = 96 if kind == "i4g-96" else 32
    values4, scales, mins = quantize_groups(weight, group, symmetric=kind == "i4g-symmetric")
    return pack_i4g(values4, scales, mins)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a block has besides those of Llama; `window` is that of the even layers."""

    bias: bool = False
    activation: Activation = "silu"
    qk_norm: Literal["", "head", "all"] = ""
    rotary: bool = True
    window: int | None = None
    post_norm: bool = False


LLAMA = Variant()


def make_plan(
    kind: str,
    variant: Variant = LLAMA,
    /,
    *,
    seed: int = 0,
    hidden: int = 96,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    inner: int = 192,
    vocab: int = 203,
    layers: int = 2,
) -> StepPlan:
    """A random decoder with all its linears in one format."""
    rng = np.random.default_rng(seed)
    angles = np.arange(256)[:, None] / 100.0 ** (np.arange(head_dim // 2) / (head_dim // 2))
    shape = PlanShape(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocab,
        num_layers=layers,
        softmax_scale=head_dim**-0.5,
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
    )
    table = EmbedTable(
        data=bf16_bits(rng.standard_normal((vocab, hidden), np.float32)), scales=np.zeros(0, np.float16)
    )
    maker = _Maker(kind, shape, variant, rng)
    ops: list[Op] = [Embed(table=table, name="hook_embed")]
    for layer in range(layers):
        ops += [*maker.attention(layer), *maker.gated_unit(layer)]
    head = Linear(weight=maker.matrix(vocab, hidden), dst="logits", rows="L")
    norm = Norm(src="y", weight=maker.near_one(hidden), eps=1e-5, act=None, name="ln_final.hook_normalized")
    return StepPlan(shape=shape, ops=(*ops, Select(), norm, Quantize(src="y", act=maker.act), head))


class _Maker:
    """Random parts of a plan, in the order in which the plan has them."""

    def __init__(self, kind: str, shape: PlanShape, variant: Variant, rng: np.random.Generator) -> None:
        self.act = pack(np.ones((16, 96), np.float32), kind).act_format
        self._kind, self._shape, self._variant, self._rng = kind, shape, variant, rng

    def matrix(self, num_out: int, num_in: int) -> PackedLinear:
        weight = self._rng.standard_normal((num_out, num_in), np.float32) / np.float32(np.sqrt(num_in))
        return pack(weight, self._kind)

    def near_one(self, size: int) -> F32Array:
        return (1 + self._rng.standard_normal(size, np.float32) / 8).astype(np.float32)

    def attention(self, layer: int) -> list[Op]:
        shape, variant, name = self._shape, self._variant, f"blocks.{layer}"
        read = self._read(f"{name}.ln1")
        qkv = Linear(
            weight=self.matrix(shape.qkv_size, shape.hidden_size), bias=self._bias(shape.qkv_size), dst="qkv"
        )
        return [
            read,
            qkv,
            RopeKv(
                layer=layer,
                rotary=variant.rotary,
                q_norm=self._head_norm(shape.num_heads),
                k_norm=self._head_norm(shape.num_kv_heads),
                eps=1e-5,
            ),
            Attend(layer=layer, window=None if layer % 2 else variant.window, name=f"{name}.attn.hook_z"),
            Quantize(src="z", act=self.act),
            *self._write(shape.num_heads * shape.head_dim, f"{name}.hook_resid_mid"),
        ]

    def gated_unit(self, layer: int) -> list[Op]:
        shape, name = self._shape, f"blocks.{layer}"
        read = self._read(f"{name}.ln2")
        gate_up = Linear(
            weight=self.matrix(2 * shape.intermediate_size, shape.hidden_size),
            bias=self._bias(2 * shape.intermediate_size),
            dst="h",
            gated=self._variant.activation,
            name=f"{name}.mlp.hook_post",
        )
        return [
            read,
            gate_up,
            Quantize(src="h", act=self.act),
            *self._write(shape.intermediate_size, f"{name}.hook_resid_post"),
        ]

    def _read(self, name: str) -> Op:
        if self._variant.post_norm:
            return Quantize(src="x", act=self.act)
        weight = self.near_one(self._shape.hidden_size)
        return Norm(src="x", weight=weight, eps=1e-5, act=self.act, name=f"{name}.hook_normalized")

    def _write(self, num_in: int, name: str) -> list[Op]:
        hidden = self._shape.hidden_size
        linear = Linear(
            weight=self.matrix(hidden, num_in), bias=self._bias(hidden), dst="x", accumulate=True, name=name
        )
        if not self._variant.post_norm:
            return [linear]
        norm = AddNorm(weight=self.near_one(hidden), eps=1e-5, name=name)
        return [replace(linear, dst="o", accumulate=False, name=""), norm]

    def _bias(self, size: int) -> F32Array | None:
        return self._rng.standard_normal(size, np.float32) if self._variant.bias else None

    def _head_norm(self, heads: int) -> F32Array | None:
        if not self._variant.qk_norm:
            return None
        return self.near_one(self._shape.head_dim * (heads if self._variant.qk_norm == "all" else 1))


def make_batch(parts: list[tuple[list[int], int, list[int]]], out_rows: list[int] | None = None) -> StepBatch:
    """A batch of (tokens, number of tokens already computed, block ids) a sequence."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    row_starts, block_starts = [0], [0]
    blocks: list[tuple[int, int, int]] = []
    for new, done, ids in parts:
        total = done + len(new)
        tokens += new
        positions += range(done, total)
        slots += [ids[p // KV_BLOCK] * KV_BLOCK + p % KV_BLOCK for p in range(done, total)]
        used = range(-(-total // KV_BLOCK))
        blocks += [(ids[i], i * KV_BLOCK, min(KV_BLOCK, total - i * KV_BLOCK)) for i in used]
        row_starts.append(len(tokens))
        block_starts.append(len(blocks))

    def ints(values: object) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
        return np.array(values, np.int32)

    return StepBatch(
        tokens=ints(tokens),
        positions=ints(positions),
        kv_slots=ints(slots),
        row_starts=ints(row_starts),
        block_starts=ints(block_starts),
        blocks=ints(blocks).reshape(-1, 3),
        out_rows=ints(list(range(len(tokens))) if out_rows is None else out_rows),
    )
