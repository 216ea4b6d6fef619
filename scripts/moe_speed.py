"""A mixture of experts against transformers' loop over experts in torch, on one layer.

    python -m scripts.moe_speed --batch 1,16,64,512 --rounds 5

Both compute the routed part of a block on the same rows and weights: ours in bf16 and with 8-bit weights and
activations, norm and router included; transformers' eager block in bf16 and float32, without the norm. Every
round times each of them once (A B C D A B C D), so that a machine that changes changes for all. Medians and
ranges; the speed-up is over the faster of torch's two. Shapes are one layer of Mixtral at half the width, and
of Qwen3-30B-A3B. Needs the extra `train` (torch) and transformers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from tokenmill.kernels import (
    Combine,
    Embed,
    EmbedTable,
    ExpertLinear,
    F32Array,
    Gather,
    Linear,
    Norm,
    PackedExperts,
    PackedLinear,
    PlanShape,
    Quantize,
    Route,
    Select,
    StepBatch,
    StepPlan,
    create_executor,
    default_threads,
)
from tokenmill.kernels.packing import pack_bf16, pack_i8c
from tokenmill.kernels.twin import bf16_bits, bf16_values, rms_norm
from tokenmill.models.packing.pack import gate_up_turns

__all__ = ["Shape", "main"]

_EPS = 1e-6
_NUM_DISTINCT = 3  # matrices among the experts


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer."""

    name: str
    hidden: int
    inner: int
    num_experts: int
    num_active: int


_SHAPES = (
    Shape(name="mixtral/2", hidden=2048, inner=7168, num_experts=8, num_active=2),
    Shape(name="qwen3-30b-a3b", hidden=2048, inner=768, num_experts=128, num_active=8),
)


class _Layer:
    """Random weights of a layer, all of them numbers of bf16. Expert e has the matrices number e % 3."""

    def __init__(self, shape: Shape) -> None:
        rng = np.random.default_rng(1)

        def matrix(num_out: int, num_in: int) -> F32Array:
            weight = rng.standard_normal((num_out, num_in), np.float32) / np.float32(num_in**0.5)
            return bf16_values(bf16_bits(weight))

        self.shape = shape
        self.gate_up = [matrix(2 * shape.inner, shape.hidden) for _ in range(_NUM_DISTINCT)]
        self.down = [matrix(shape.hidden, shape.inner) for _ in range(_NUM_DISTINCT)]
        self.router = matrix(shape.num_experts, shape.hidden)


def _packed(each: Sequence[PackedLinear], num_experts: int) -> PackedExperts:
    arrays: dict[str, Any] = {
        part: np.stack([getattr(each[e % len(each)], part) for e in range(num_experts)])
        for part in ("data", "scales")
    }
    return PackedExperts(num_experts=num_experts, linear=PackedLinear(**{**vars(each[0]), **arrays}))


def _plan(layer: _Layer, kind: str) -> StepPlan:
    """A plan whose operations from the second to the one before Select are the routed part of a block."""
    shape, ones = layer.shape, np.ones(layer.shape.hidden, np.float32)

    def pack(weight: F32Array) -> PackedLinear:
        return pack_i8c(weight) if kind == "w8a8" else pack_bf16(bf16_bits(weight))

    turns = gate_up_turns(2 * shape.inner)
    up = _packed([pack(weight[turns]) for weight in layer.gate_up], shape.num_experts)
    down = _packed([pack(weight) for weight in layer.down], shape.num_experts)
    act, head = up.linear.act_format, pack(np.zeros((16, shape.hidden), np.float32))
    table = EmbedTable(data=np.zeros((16, shape.hidden), np.uint16), scales=np.zeros(0, np.float16))
    sizes = PlanShape(
        hidden_size=shape.hidden,
        num_heads=1,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=32,
        vocab_size=16,
        num_layers=1,
        softmax_scale=1.0,
        cos=np.ones((1, 16), np.float32),
        sin=np.zeros((1, 16), np.float32),
        num_experts=shape.num_experts,
        num_active=shape.num_active,
        expert_size=shape.inner,
    )
    ops = (
        Embed(table=table),
        Norm(src="x", weight=ones, eps=_EPS, act=act),
        Route(weight=layer.router, norm=ones, eps=_EPS, renormalise=True),
        Gather(),
        ExpertLinear(weight=up, dst="eh", gated="silu"),
        Quantize(src="eh", act=act),
        ExpertLinear(weight=down, dst="eo"),
        Combine(),
        Select(),
        Norm(src="y", weight=ones, eps=_EPS, act=None),
        Quantize(src="y", act=act),
        Linear(weight=head, dst="logits", rows="L"),
    )
    return StepPlan(shape=sizes, ops=ops)


class _Ours:
    """The routed part of a block in one executor."""

    def __init__(self, layer: _Layer, kind: str, max_rows: int) -> None:
        self._plan = _plan(layer, kind)
        self._executor = create_executor(self._plan, max_rows=max_rows, max_out_rows=1, num_blocks=1)

    def run(self, x_TD: F32Array) -> F32Array:
        """What is added to x. The copy of x is part of the time."""
        zeros = np.zeros(len(x_TD), np.int32)
        ends = np.array([0, len(x_TD)], np.int32)
        batch = StepBatch(
            tokens=zeros,
            positions=zeros,
            kv_slots=zeros,
            row_starts=ends,
            block_starts=np.zeros(2, np.int32),
            blocks=np.zeros((0, 3), np.int32),
            out_rows=zeros[:0],
        )
        x = self._executor.buffer("x")[: len(x_TD)]
        x[:] = x_TD
        self._executor.run(batch, 1, self._plan.head_start)
        added_TD: F32Array = x - x_TD
        return added_TD


def _torch_block(layer: _Layer, dtype: torch.dtype) -> Callable[[F32Array], F32Array]:
    """transformers' block in eager mode: a loop over the experts that rows are sent to."""
    shape = layer.shape
    sizes = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.num_active}
    block: torch.nn.Module
    with torch.device("meta"):
        if "mixtral" in shape.name:
            mixtral = MixtralConfig(
                **sizes, intermediate_size=shape.inner, num_local_experts=shape.num_experts
            )
            mixtral._experts_implementation = "eager"
            block = MixtralSparseMoeBlock(mixtral)
        else:
            qwen = Qwen3MoeConfig(
                **sizes,
                moe_intermediate_size=shape.inner,
                num_experts=shape.num_experts,
                norm_topk_prob=True,
            )
            qwen._experts_implementation = "eager"
            block = Qwen3MoeSparseMoeBlock(qwen)

    def stacked(each: Sequence[F32Array]) -> torch.Tensor:
        few = [torch.from_numpy(weight).to(dtype) for weight in each]
        return torch.stack([few[e % len(few)] for e in range(shape.num_experts)])

    weights = {
        "gate.weight": torch.from_numpy(layer.router).to(dtype),
        "experts.gate_up_proj": stacked(layer.gate_up),
        "experts.down_proj": stacked(layer.down),
    }
    block.load_state_dict(weights, assign=True)
    block.requires_grad_(False).eval()

    def run(normed_TD: F32Array) -> F32Array:
        with torch.inference_mode():
            out: torch.Tensor = block(torch.from_numpy(normed_TD).to(dtype)[None])[0]
        result: F32Array = out.float().numpy()
        return result

    return run


def _measure(layer: _Layer, batches: Sequence[int], rounds: int) -> list[Mapping[str, Any]]:
    ours = {f"tokenmill {kind}": _Ours(layer, kind, max(batches)).run for kind in ("bf16", "w8a8")}
    theirs = {
        f"torch {name}": _torch_block(layer, dtype)
        for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32))
    }
    rows: list[Mapping[str, Any]] = []
    for batch in batches:
        x_TD = np.random.default_rng(batch).standard_normal((batch, layer.shape.hidden), np.float32)
        inputs = dict.fromkeys(ours, x_TD) | dict.fromkeys(
            theirs, rms_norm(x_TD, np.ones(layer.shape.hidden, np.float32), _EPS)
        )
        both = ours | theirs
        results = {name: run(inputs[name]) for name, run in both.items()}
        seconds: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(rounds):
            for name, run in both.items():
                began = time.perf_counter()
                run(inputs[name])
                seconds[name].append(time.perf_counter() - began)
        want_TD = results["torch float32"]
        rows.append(
            {
                "shape": layer.shape.name,
                "batch": batch,
                "ms": {name: _spread(values) for name, values in seconds.items()},
                "error": {
                    name: float(np.linalg.norm(got - want_TD) / np.linalg.norm(want_TD))
                    for name, got in results.items()
                },
            }
        )
    return rows


def _spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most, in milliseconds."""
    median = statistics.median(seconds)
    return (median * 1e3, min(seconds) * 1e3, max(seconds) * 1e3)


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(rows[0]["ms"])
    print("| shape | rows | " + " | ".join(f"{name} ms" for name in names), end="")
    print(" | bf16 speed-up | w8a8 speed-up |\n|---|" + "---:|" * (len(names) + 3))
    for row in rows:
        cells = [f"{median:.1f} ({low:.1f} to {high:.1f})" for median, low, high in row["ms"].values()]
        best = min(row["ms"][name][0] for name in names if name.startswith("torch"))
        gains = [f"{best / row['ms'][f'tokenmill {kind}'][0]:.1f}" for kind in ("bf16", "w8a8")]
        print(f"| {row['shape']} | {row['batch']} | " + " | ".join([*cells, *gains]) + " |")
    errors = {name: max(row["error"][name] for row in rows) for name in names}
    print("largest relative error against torch in float32: ", end="")
    print(", ".join(f"{name} {error:.1e}" for name, error in errors.items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", default="1,16,64,512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=[shape.name for shape in _SHAPES], default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(default_threads())
    rows: list[Mapping[str, Any]] = []
    for shape in _SHAPES:
        if arguments.shape in (None, shape.name):
            rows += _measure(_Layer(shape), [int(b) for b in arguments.batch.split(",")], arguments.rounds)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


if __name__ == "__main__":
    main()
