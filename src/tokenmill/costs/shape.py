"""What a decoder looks like to a cost formula: its weights, its cache, its arithmetic, its experts.

A shape has only the numbers that decide bytes and operations, so that a model can be planned for before
it exists here; a model directory gives a better one (`cli.plan`). Not counted: norms, activations,
sampling, the writes of the cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "EFFECTIVE_BITS",
    "ModelShape",
    "decode_attention_flops",
    "distinct_experts",
    "kv_bytes",
    "prefill_attention_flops",
    "skewed_experts",
    "streamed_params",
    "weight_bytes",
]

EFFECTIVE_BITS: Final = {
    "bf16": 16.0,
    "fp8": 8.0,
    "int8": 8.0,
    "q8_0": 8.5,
    "q4_k_m": 4.85,
    "q4_0": 4.5,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
    "int4": 4.25,
    "w8a8": 8.05,
    "w4a8": 5.0,
}
"""Bits of a weight with its scales: int4 in groups of 128, w4a8 in groups of 32 with a minimum."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a decoder that decide its cost.

    `params`: all parameters. `lookup_params`: of them the table of embeddings if nothing streams it (not
    tied to the head), of which a token reads one row. `head_params`: of them the head, which a prompt needs
    for its last token only; 0 where that is not known. `num_experts` 0: dense; else `nonexpert_params` are
    those that every token reads, and a token reads `num_active` experts in each routed layer.
    `latent_size` above 0: keys and values are one latent vector of so many values (MLA), and heads do not
    count. `window_layers` of the layers see the last `window` positions only.
    """

    name: str
    params: float
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int = 0
    num_active: int = 0
    nonexpert_params: float = 0.0
    latent_size: int = 0
    rope_size: int = 0
    window_layers: int = 0
    window: int = 0
    lookup_params: float = 0.0
    head_params: float = 0.0

    def __post_init__(self) -> None:
        assert self.params > 0 and self.num_layers > 0, f"{self.name}: no parameters or layers"
        assert 0 <= self.window_layers <= self.num_layers, f"{self.name}: window layers"
        assert 0 <= self.num_active <= self.num_experts, f"{self.name}: experts"
        assert 0 <= self.nonexpert_params <= self.params, f"{self.name}: parameters outside the experts"
        assert 0 <= self.head_params <= self.params - self.lookup_params, (
            f"{self.name}: parameters of the head"
        )

    @property
    def active_params(self) -> float:
        """Parameters that are multiplied for one token; the table of embeddings is not."""
        return streamed_params(self, 1)

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    def kv_values_per_token(self) -> int:
        """Values that one token leaves in the cache, over all layers."""
        if self.latent_size:
            return self.num_layers * (self.latent_size + self.rope_size)
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def distinct_experts(num_experts: int, num_active: int, num_tokens: float) -> float:
    """Experts of one layer that `num_tokens` tokens touch, each choosing evenly: E (1 - (1 - k/E)^S)."""
    if not num_experts:
        return 0.0
    return num_experts * float(1 - (1 - num_active / num_experts) ** num_tokens)


def skewed_experts(popularity: Sequence[float], num_tokens: float) -> float:
    """The same for measured shares: `popularity[e]` is the share of tokens that choose expert e.

    They sum to the experts a token takes. Never more than the even choice touches.
    """
    return math.fsum(1 - (1 - share) ** num_tokens for share in popularity)


def streamed_params(shape: ModelShape, num_tokens: float) -> float:
    """Parameters read in one step of `num_tokens` new tokens: each once, of experts those touched."""
    if not shape.num_experts:
        return shape.params - shape.lookup_params
    share = distinct_experts(shape.num_experts, shape.num_active, num_tokens) / shape.num_experts
    return shape.nonexpert_params - shape.lookup_params + (shape.params - shape.nonexpert_params) * share


def weight_bytes(params: float, bits: float) -> float:
    """Bytes of parameters at `bits` each, the scales counted in: 4.5 for Q4_0, 8.5 for Q8_0, 16 for bf16."""
    return params * bits / 8


def kv_bytes(shape: ModelShape, context: float, bytes_per_value: float = 2.0) -> float:
    """Bytes of keys and values of one sequence of `context` tokens; windowed layers keep their window."""
    windowed = shape.window_layers / shape.num_layers
    seen = (1 - windowed) * context + windowed * min(context, shape.window or context)
    return shape.kv_values_per_token() * bytes_per_value * seen


def decode_attention_flops(shape: ModelShape, context: float) -> float:
    """Operations of scores and sums of a token that sees `context`: 4 L n_q h T, or MLA's absorbed form."""
    full = shape.num_layers - shape.window_layers
    seen = full * context + shape.window_layers * min(context, shape.window or context)
    if shape.latent_size:
        return 2.0 * shape.num_heads * seen * (2 * shape.latent_size + shape.rope_size)
    return 4.0 * shape.query_size * seen


def prefill_attention_flops(shape: ModelShape, num_tokens: float, cached: float = 0.0) -> float:
    """Operations of causal scores and sums of a prompt of which the first `cached` tokens are there.

    Half of the square for each layer: 2 L n_q h (N² - C²). Windowed layers see at most their window.
    """
    full, windowed = shape.num_layers - shape.window_layers, shape.window_layers
    pairs = full * _causal_pairs(num_tokens, cached, None)
    pairs += windowed * _causal_pairs(num_tokens, cached, shape.window or None)
    return 4.0 * shape.query_size * pairs


def _causal_pairs(num_tokens: float, cached: float, window: int | None) -> float:
    """Pairs of a query and a position that it sees, in the limit of many tokens."""

    def pairs(count: float) -> float:
        if window is None or count <= window:
            return count * count / 2
        return window * window / 2 + (count - window) * window

    return pairs(num_tokens) - pairs(cached)
