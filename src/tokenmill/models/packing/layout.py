"""The step plan of a decoder: its description and its packed weights as a list of operations.

Named points are those of TransformerLens: `blocks.3.attn.hook_z`, `blocks.3.mlp.hook_post`,
`blocks.3.hook_resid_mid`, `blocks.3.hook_resid_post`; a routed block has `blocks.3.mlp.hook_route`, the
weights of each token's experts, in place of `hook_post`. A `hook_normalized` (`blocks.3.ln1`, `blocks.3.ln2`,
`ln_final`) is here the norm's output with its weight: what the next linear reads.
"""

from tokenmill.kernels import (
    AddNorm,
    Attend,
    Combine,
    Embed,
    ExpertLinear,
    Gather,
    Linear,
    Norm,
    Op,
    PlanShape,
    Quantize,
    RopeKv,
    Route,
    Select,
    StepPlan,
)
from tokenmill.kernels.plan import ActFormat
from tokenmill.models.architecture import Architecture
from tokenmill.models.packing.packed import PackedModel
from tokenmill.models.rope import rope_tables

__all__ = ["compile_plan"]


def compile_plan(
    architecture: Architecture, packed: PackedModel, max_positions: int | None = None
) -> StepPlan:
    """The step plan of a decoder: norms, fused linears, attention, gated units or experts, then the head.

    Positions of a sequence stay below `max_positions`, or the architecture's limit where that is lower.
    """
    head, eps = packed.linears["head"], architecture.norm_eps
    ops: list[Op] = [Embed(table=packed.embed, name="hook_embed")]
    for layer in range(architecture.num_layers):
        ops += _attention_ops(layer, architecture, packed)
        is_routed = architecture.layers[layer].routed
        ops += (_expert_ops if is_routed else _gated_ops)(layer, architecture, packed)
    final = packed.floats["ln_final"]
    ops += [
        Select(),
        Norm(src="y", weight=final, eps=eps, act=None, name="ln_final.hook_normalized"),
        Quantize(src="y", act=head.act_format),
        Linear(weight=head, dst="logits", rows="L"),
    ]
    positions = min(architecture.max_positions, max_positions or architecture.max_positions)
    return StepPlan(shape=_plan_shape(architecture, positions), ops=tuple(ops), smoothing=packed.smoothing)


def _attention_ops(layer: int, architecture: Architecture, packed: PackedModel) -> list[Op]:
    name, floats, kind = f"blocks.{layer}", packed.floats, architecture.layers[layer]
    qkv, out = packed.linears[f"{name}.qkv"], packed.linears[f"{name}.out"]
    rope = RopeKv(
        layer=layer,
        rotary=kind.rotary,
        q_norm=floats.get(f"{name}.q_norm"),
        k_norm=floats.get(f"{name}.k_norm"),
        eps=architecture.norm_eps,
    )
    return [
        _read_residual(f"{name}.ln1", architecture, packed, qkv.act_format),
        Linear(weight=qkv, bias=floats.get(f"{name}.qkv.bias"), dst="qkv"),
        rope,
        Attend(layer=layer, window=kind.window, name=f"{name}.attn.hook_z"),
        Quantize(src="z", act=out.act_format),
        *_write_residual(layer, "out", architecture, packed),
    ]


def _gated_ops(layer: int, architecture: Architecture, packed: PackedModel) -> list[Op]:
    name = f"blocks.{layer}"
    gate_up, down = packed.linears[f"{name}.gate_up"], packed.linears[f"{name}.down"]
    gated = Linear(
        weight=gate_up,
        bias=packed.floats.get(f"{name}.gate_up.bias"),
        dst="h",
        gated=architecture.activation,
        name=f"{name}.mlp.hook_post",
    )
    return [
        _read_residual(f"{name}.ln2", architecture, packed, gate_up.act_format),
        gated,
        Quantize(src="h", act=down.act_format),
        *_write_residual(layer, "down", architecture, packed),
    ]


def _expert_ops(layer: int, architecture: Architecture, packed: PackedModel) -> list[Op]:
    name, experts = f"blocks.{layer}", architecture.experts
    assert experts is not None and not architecture.post_norm
    gate_up, down = packed.experts[f"{name}.gate_up"], packed.experts[f"{name}.down"]
    route = Route(
        weight=packed.floats[f"{name}.router"],
        norm=packed.floats[f"{name}.router.norm"],
        eps=architecture.norm_eps,
        renormalise=experts.renormalise,
        name=f"{name}.mlp.hook_route",
    )
    return [
        _read_residual(f"{name}.ln2", architecture, packed, gate_up.linear.act_format),
        route,
        Gather(),
        ExpertLinear(weight=gate_up, dst="eh", gated=architecture.activation),
        Quantize(src="eh", act=down.linear.act_format),
        ExpertLinear(weight=down, dst="eo"),
        Combine(name=f"{name}.hook_resid_post"),
    ]


def _read_residual(name: str, architecture: Architecture, packed: PackedModel, act: ActFormat) -> Op:
    """What the first linear of a block's part reads: the residual stream, normed unless the outputs are."""
    if architecture.post_norm:
        return Quantize(src="x", act=act)
    weight = packed.floats[name]
    return Norm(src="x", weight=weight, eps=architecture.norm_eps, act=act, name=f"{name}.hook_normalized")


def _write_residual(layer: int, linear: str, architecture: Architecture, packed: PackedModel) -> list[Op]:
    """The last linear of a block's part, added to the residual stream, by way of a norm if there is one."""
    name = f"blocks.{layer}"
    norm, point = {"out": ("ln1", "hook_resid_mid"), "down": ("ln2", "hook_resid_post")}[linear]
    weight, bias = packed.linears[f"{name}.{linear}"], packed.floats.get(f"{name}.{linear}.bias")
    if not architecture.post_norm:
        return [Linear(weight=weight, bias=bias, dst="x", accumulate=True, name=f"{name}.{point}")]
    norm_weight = packed.floats[f"{name}.{norm}"]
    return [
        Linear(weight=weight, bias=bias, dst="o"),
        AddNorm(weight=norm_weight, eps=architecture.norm_eps, name=f"{name}.{point}"),
    ]


def _plan_shape(architecture: Architecture, num_positions: int) -> PlanShape:
    experts = architecture.experts
    cos, sin = rope_tables(
        architecture.head_dim, architecture.rope_theta, architecture.rope_scaling, num_positions
    )
    return PlanShape(
        hidden_size=architecture.hidden_size,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        intermediate_size=architecture.intermediate_size,
        vocab_size=architecture.vocab_size,
        num_layers=architecture.num_layers,
        softmax_scale=architecture.head_dim**-0.5,
        cos=cos,
        sin=sin,
        num_experts=experts.num_experts if experts else 0,
        num_active=experts.num_active if experts else 0,
        expert_size=experts.intermediate_size if experts else 0,
    )
