"""The time of one step: what it reads and computes, against the limits of a machine and its constants.

The estimate adds the terms, because the kernels of a step run one after the other:

    t = W / (n BW e_w) + KV / (n BW e_k) + FLOPs / (n F e_c) + L (τ_L + τ_comm) + B τ_B

The other form, for comparison, takes the longer of memory and arithmetic in place of their sum. The bound
is that form at the full rates of the data sheet and without any overhead: no step is shorter. For a
mixture of experts the estimate lets tokens choose evenly and apart, the bound lets all choose the same.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from tokenmill.costs.interconnect import Link, all_reduce_seconds
from tokenmill.costs.shape import (
    ModelShape,
    decode_attention_flops,
    kv_bytes,
    prefill_attention_flops,
    streamed_params,
    weight_bytes,
)

__all__ = [
    "Constants",
    "Form",
    "MachinePeak",
    "StepLoad",
    "StepTerms",
    "bound_seconds",
    "critical_batch",
    "decode_load",
    "prefill_load",
    "step_seconds",
    "step_terms",
]

Form: TypeAlias = Literal["sum", "max"]


@dataclass(frozen=True, kw_only=True)
class MachinePeak:
    """What one device can do at most, by its data sheet or measured: operations and bytes a second."""

    flops: float
    bytes_per_s: float
    link_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        assert self.flops > 0 and self.bytes_per_s > 0, "a machine without a rate"


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a machine and its software make of the peak.

    `weights`, `kv`, `compute`: shares of the peak that are reached. `layer_s`: seconds a layer that nothing
    hides. `comm_s`: more of them a layer on several devices. `row_s`: seconds for each sequence of a step.
    """

    weights: float
    kv: float
    compute: float
    layer_s: float
    comm_s: float
    row_s: float

    def __post_init__(self) -> None:
        assert min(self.weights, self.kv, self.compute) > 0, "an efficiency is not positive"
        assert min(self.layer_s, self.comm_s, self.row_s) >= 0, "an overhead is negative"


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What one step reads and computes, over all devices together.

    `least_weight_bytes`: the weights that are read even if all tokens choose the same experts.
    `exchange_s`: seconds of activations on the links between devices.
    """

    weight_bytes: float
    least_weight_bytes: float
    kv_bytes: float
    flops: float
    num_layers: int
    num_rows: float
    num_devices: int = 1
    exchange_s: float = 0.0


class StepTerms(NamedTuple):
    """Seconds of a step at the full rates, and how often each overhead occurs, in `Constants`' order."""

    weights: float
    kv: float
    compute: float
    layers: float
    exchanges: float
    rows: float


def decode_load(
    shape: ModelShape,
    *,
    bits: float,
    batch: float,
    context: float,
    kv_value_bytes: float = 2.0,
    num_devices: int = 1,
    guesses: int = 0,
    link_bytes_per_s: float = math.inf,
) -> StepLoad:
    """A step that adds one token to `batch` sequences of `context` tokens each.

    `guesses` of a speculation a sequence are computed beside it; keys and values are read once for both.
    """
    num_tokens = batch * (guesses + 1)
    flops = num_tokens * (2 * shape.active_params + decode_attention_flops(shape, context))
    return StepLoad(
        weight_bytes=weight_bytes(streamed_params(shape, num_tokens), bits),
        least_weight_bytes=weight_bytes(shape.active_params, bits),
        kv_bytes=batch * kv_bytes(shape, context, kv_value_bytes),
        flops=flops,
        num_layers=shape.num_layers,
        num_rows=num_tokens,
        num_devices=num_devices,
        exchange_s=_exchange_seconds(shape, num_tokens, num_devices, link_bytes_per_s),
    )


def prefill_load(
    shape: ModelShape,
    *,
    bits: float,
    num_tokens: float,
    cached: float = 0.0,
    kv_value_bytes: float = 2.0,
    num_devices: int = 1,
    batch: int = 1,
    link_bytes_per_s: float = math.inf,
) -> StepLoad:
    """Computing `batch` prompts of `num_tokens`, of each of which the first `cached` are in the cache."""
    new = batch * (num_tokens - cached)
    # Of a prompt only the last token has logits.
    products = (shape.active_params - shape.head_params) * new + shape.head_params * batch
    return StepLoad(
        weight_bytes=weight_bytes(streamed_params(shape, new), bits),
        least_weight_bytes=weight_bytes(shape.active_params, bits),
        kv_bytes=batch * kv_bytes(shape, num_tokens, kv_value_bytes),
        flops=2 * products + batch * prefill_attention_flops(shape, num_tokens, cached),
        num_layers=shape.num_layers,
        num_rows=batch,
        num_devices=num_devices,
        exchange_s=_exchange_seconds(shape, new, num_devices, link_bytes_per_s),
    )


def step_terms(load: StepLoad, peak: MachinePeak) -> StepTerms:
    """The six terms that the constants weigh."""
    many = load.num_devices > 1
    return StepTerms(
        weights=load.weight_bytes / (load.num_devices * peak.bytes_per_s),
        kv=load.kv_bytes / (load.num_devices * peak.bytes_per_s),
        compute=load.flops / (load.num_devices * peak.flops),
        layers=float(load.num_layers),
        exchanges=float(load.num_layers) if many else 0.0,
        rows=load.num_rows,
    )


def bound_seconds(load: StepLoad, peak: MachinePeak) -> float:
    """The least time of a step: memory or arithmetic at the full rate, whichever is longer."""
    terms = step_terms(load, peak)
    fewest = load.least_weight_bytes / (load.num_devices * peak.bytes_per_s)
    return max(fewest + terms.kv, terms.compute)


def step_seconds(load: StepLoad, peak: MachinePeak, constants: Constants, form: Form = "sum") -> float:
    """The estimated time of a step."""
    assert form in get_args(Form), form
    terms = step_terms(load, peak)
    memory = terms.weights / constants.weights + terms.kv / constants.kv
    compute = terms.compute / constants.compute
    busy = memory + compute if form == "sum" else max(memory, compute)
    overhead = terms.layers * constants.layer_s + terms.exchanges * constants.comm_s
    return busy + overhead + terms.rows * constants.row_s + load.exchange_s


def critical_batch(shape: ModelShape, bits: float, peak: MachinePeak) -> float:
    """Tokens in a step from which arithmetic binds and not memory: F b / (2 BW), and E / k times it."""
    sparsity = shape.num_experts / shape.num_active if shape.num_experts else 1.0
    return peak.flops * bits / 8 / (2 * peak.bytes_per_s) * sparsity


def _exchange_seconds(
    shape: ModelShape, num_tokens: float, num_devices: int, link_bytes_per_s: float
) -> float:
    """Two all-reduces a layer of activations of 2 bytes; their latency is a constant of the machine."""
    link = Link(bytes_per_s=link_bytes_per_s, latency_s=0.0)
    return 2 * shape.num_layers * all_reduce_seconds(link, num_devices, num_tokens * shape.hidden_size * 2)
