"""Random small mixtures of experts, shared by the tests of routing, of experts and of their cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tests.fast.random_plan import make_plan, pack
from tokenmill.kernels import (
    Activation,
    Combine,
    ExpertLinear,
    Gather,
    Linear,
    Norm,
    Op,
    PackedExperts,
    PackedLinear,
    Quantize,
    Route,
    StepPlan,
)

__all__ = ["make_moe_plan", "stack", "work_ops"]

_PARTS = ("data", "scales")


def stack(each: Sequence[PackedLinear]) -> PackedExperts:
    """Matrices of one kind and shape as those of experts."""
    stacked: dict[str, Any] = {part: np.stack([getattr(linear, part) for linear in each]) for part in _PARTS}
    return PackedExperts(num_experts=len(each), linear=replace(each[0], **stacked))


def make_moe_plan(
    kind: str,
    *,
    seed: int = 0,
    num_experts: int = 5,
    num_active: int = 2,
    expert_size: int = 96,
    renormalise: bool = True,
    layers: int = 2,
    hidden: int = 96,
    activation: Activation = "silu",
) -> StepPlan:
    """A random decoder whose gated units are all replaced by experts in one format."""
    plan = make_plan(kind, seed=seed, layers=layers, hidden=hidden)
    rng = np.random.default_rng(seed + 1)

    def matrices(num_out: int, num_in: int) -> PackedExperts:
        weight_XNK = rng.standard_normal((num_experts, num_out, num_in), np.float32)
        return stack([pack(weight_NK / np.float32(np.sqrt(num_in)), kind) for weight_NK in weight_XNK])

    ops: list[Op] = []
    for before, op in zip((None, *plan.ops), plan.ops, strict=False):
        if isinstance(op, Linear) and op.dst == "h":
            assert isinstance(before, Norm) and before.act is not None
            router_XD = rng.standard_normal((num_experts, hidden), np.float32) / np.float32(np.sqrt(hidden))
            name = op.name.removesuffix("hook_post") + "hook_route"
            norm_D = (1 + rng.standard_normal(hidden, np.float32) / 8).astype(np.float32)
            route = Route(weight=router_XD, norm=norm_D, eps=1e-5, renormalise=renormalise, name=name)
            up, down = matrices(2 * expert_size, hidden), matrices(hidden, expert_size)
            ops += [
                route,
                Gather(),
                ExpertLinear(weight=up, dst="eh", gated=activation),
                Quantize(src="eh", act=before.act),
                ExpertLinear(weight=down, dst="eo"),
                Combine(name=op.name.removesuffix("mlp.hook_post") + "hook_resid_post"),
            ]
        elif not _is_gone(op, before):
            ops.append(op)
    shape = replace(plan.shape, num_experts=num_experts, num_active=num_active, expert_size=expert_size)
    return replace(plan, shape=shape, ops=tuple(ops))


def work_ops(plan: StepPlan, kind: type[Op]) -> list[int]:
    """The indices of the operations of one kind."""
    return [index for index, op in enumerate(plan.ops) if isinstance(op, kind)]


def _is_gone(op: Op, before: Op | None) -> bool:
    """What a gated unit has after its first linear."""
    of_h = isinstance(op, Quantize) and op.src == "h"
    return of_h or (isinstance(before, Quantize) and before.src == "h")
