"""The step plan of a decoder: its description and its packed weights as a list of operations.

Named points are those of TransformerLens: `blocks.3.attn.hook_z`, `blocks.3.mlp.hook_post`,
`blocks.3.hook_resid_mid`, `blocks.3.hook_resid_post`. A `hook_normalized` (`blocks.3.ln1`, `blocks.3.ln2`,
`ln_final`) is here the norm's output with its weight: what the next linear reads.
"""

import numpy as np

from tokenmill.kernels import (
    Attend,
    Embed,
    Linear,
    Norm,
    Op,
    PackedLinear,
    PlanShape,
    Quantize,
    RopeKv,
    Select,
    StepPlan,
)
from tokenmill.models.architecture import Architecture
from tokenmill.models.packed import PackedModel

__all__ = ["compile_plan"]


def compile_plan(architecture: Architecture, packed: PackedModel) -> StepPlan:
    """The step plan of a decoder: norms, fused linears, attention and gated units, then the head."""
    head = packed.linears["head"]
    ops: list[Op] = [Embed(table=packed.embed, name="hook_embed")]
    for layer in range(architecture.num_layers):
        ops += _block_ops(layer, architecture, packed)
    ops += [
        Select(),
        Norm(
            src="y",
            weight=packed.norms["ln_final"],
            eps=architecture.norm_eps,
            act=None,
            name="ln_final.hook_normalized",
        ),
        Quantize(src="y", act=head.act_format),
        Linear(weight=head, dst="logits", rows="L"),
    ]
    return StepPlan(shape=_plan_shape(architecture), ops=tuple(ops), smoothing=packed.smoothing)


def _block_ops(layer: int, architecture: Architecture, packed: PackedModel) -> list[Op]:
    name, eps = f"blocks.{layer}", architecture.norm_eps
    qkv, out, gate_up, down = (packed.linears[f"{name}.{part}"] for part in ("qkv", "out", "gate_up", "down"))
    return [
        _norm(f"{name}.ln1", packed, eps, qkv),
        Linear(weight=qkv, dst="qkv"),
        RopeKv(layer=layer),
        Attend(layer=layer, name=f"{name}.attn.hook_z"),
        Quantize(src="z", act=out.act_format),
        Linear(weight=out, dst="x", accumulate=True, name=f"{name}.hook_resid_mid"),
        _norm(f"{name}.ln2", packed, eps, gate_up),
        Linear(weight=gate_up, dst="h", gated=True, name=f"{name}.mlp.hook_post"),
        Quantize(src="h", act=down.act_format),
        Linear(weight=down, dst="x", accumulate=True, name=f"{name}.hook_resid_post"),
    ]


def _norm(name: str, packed: PackedModel, eps: float, reader: PackedLinear) -> Norm:
    weight = packed.norms[name]
    return Norm(src="x", weight=weight, eps=eps, act=reader.act_format, name=f"{name}.hook_normalized")


def _plan_shape(architecture: Architecture) -> PlanShape:
    # Angles in float32, as the reference implementations of these models compute them.
    half = architecture.head_dim // 2
    exponents = np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = (np.float32(1) / np.float32(architecture.rope_theta) ** exponents).astype(np.float32)
    positions = np.arange(architecture.max_positions, dtype=np.float32)
    angles = (positions[:, None] * frequencies).astype(np.float32)
    return PlanShape(
        hidden_size=architecture.hidden_size,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        intermediate_size=architecture.intermediate_size,
        vocab_size=architecture.vocab_size,
        num_layers=architecture.num_layers,
        softmax_scale=architecture.head_dim**-0.5,
        cos=np.cos(angles),
        sin=np.sin(angles),
    )
