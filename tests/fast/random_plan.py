"""Random small plans and batches, shared by the tests of the executors."""

from dataclasses import replace

import numpy as np

from tokenmill.kernels import (
    KV_BLOCK,
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


def make_plan(
    kind: str,
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

    def matrix(num_out: int, num_in: int) -> PackedLinear:
        weight = rng.standard_normal((num_out, num_in), np.float32) / np.float32(np.sqrt(num_in))
        return pack(weight, kind)

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
    act = pack(np.ones((16, 96), np.float32), kind).act_format
    table = EmbedTable(
        data=bf16_bits(rng.standard_normal((vocab, hidden), np.float32)), scales=np.zeros(0, np.float16)
    )

    def norm(name: str) -> Norm:
        weight = (1 + rng.standard_normal(hidden, np.float32) / 8).astype(np.float32)
        made = Norm(src="x", weight=weight, eps=1e-5, act=act, name=f"{name}.hook_normalized")
        return replace(made, src="y", act=None) if name == "ln_final" else made

    ops: list[Op] = [Embed(table=table, name="hook_embed")]
    for layer in range(layers):
        at = f"blocks.{layer}"
        out, down = f"{at}.hook_resid_mid", f"{at}.hook_resid_post"
        ops += [
            norm(f"{at}.ln1"),
            Linear(weight=matrix(shape.qkv_size, hidden), dst="qkv"),
            RopeKv(layer=layer),
            Attend(layer=layer, name=f"{at}.attn.hook_z"),
            Quantize(src="z", act=act),
            Linear(weight=matrix(hidden, heads * head_dim), dst="x", accumulate=True, name=out),
            norm(f"{at}.ln2"),
            Linear(weight=matrix(2 * inner, hidden), dst="h", gated="silu", name=f"{at}.mlp.hook_post"),
            Quantize(src="h", act=act),
            Linear(weight=matrix(hidden, inner), dst="x", accumulate=True, name=down),
        ]
    head = Linear(weight=matrix(vocab, hidden), dst="logits", rows="L")
    return StepPlan(shape=shape, ops=(*ops, Select(), norm("ln_final"), Quantize(src="y", act=act), head))


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
