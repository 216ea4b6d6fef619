"""Rotary positions: the angle by which each pair of a head turns a position, scaled for long contexts or not.

Computed in float32, as the reference implementations of these models do. Covers no scaling, linear scaling
(Chen et al. 2023), Llama 3's three bands, and YaRN (Peng et al. 2023). It does not cover rotations of a part
of the head, LongRoPE, or scaling that depends on the length of the text ("dynamic").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np

from tokenmill.core.errors import ModelFormatError
from tokenmill.kernels import F32Array

__all__ = ["RopeScaling", "rope_frequencies", "rope_tables"]

_RopeKind = Literal["linear", "llama3", "yarn"]

_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "factor": (1e-3, 1e4),
    "original_max_position_embeddings": (1, 1 << 24),
    "low_freq_factor": (1e-3, 1e4),
    "high_freq_factor": (1e-3, 1e4),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "attention_factor": (0, 1e3),
    "mscale": (0, 1e3),
    "mscale_all_dim": (0, 1e3),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies are changed so that a model reads longer texts than it was first trained on.

    `original_positions`: the context before. `low_freq_factor` and `high_freq_factor` bound Llama 3's middle
    band, `beta_fast` and `beta_slow` YaRN's, in turns over the original context. `attention_factor`
    multiplies sines and cosines (YaRN).
    """

    kind: _RopeKind
    factor: float
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    @classmethod
    def from_config(cls, values: Mapping[str, Any], source: str) -> "RopeScaling | None":
        """Read `rope_scaling` or `rope_parameters` of a `config.json`; None for plain rotation.

        Raises ModelFormatError naming the field that is missing, out of bounds or not supported.
        """
        kind = values.get("rope_type", values.get("type", "default"))
        if kind == "default":
            return None
        if kind not in get_args(_RopeKind):
            supported = ", ".join(("default", *get_args(_RopeKind)))
            raise ModelFormatError(
                f"{source}: rope_type is {str(kind)[:40]!r}, which is not supported",
                hint=f"supported: {supported}",
            )
        read = _Reader(values, source)
        if kind == "linear":
            return cls(kind="linear", factor=read("factor"))
        original = int(read("original_max_position_embeddings"))
        if kind == "llama3":
            low, high = read("low_freq_factor"), read("high_freq_factor")
            if not low < high:
                raise ModelFormatError(
                    f"{source}: low_freq_factor {low} is not below high_freq_factor {high}"
                )
            return cls(
                kind="llama3", factor=read("factor"), original_positions=original,
                low_freq_factor=low, high_freq_factor=high,
            )  # fmt: skip
        return cls(
            kind="yarn",
            factor=read("factor"),
            original_positions=original,
            beta_fast=read("beta_fast", 32.0),
            beta_slow=read("beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(read),
            truncate=values.get("truncate") is not False,
        )

    def to_config(self) -> dict[str, Any]:
        """The fields of `rope_scaling` that say the same."""
        config: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        if self.kind != "linear":
            config["original_max_position_embeddings"] = self.original_positions
        if self.kind == "llama3":
            config |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind == "yarn":
            config |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
            config |= {"attention_factor": self.attention_factor, "truncate": self.truncate}
        return config


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> F32Array:
    """Radians a position of each pair of a head, [head_dim / 2] (Su et al. 2021)."""
    half = head_dim // 2
    exponents = np.arange(half, dtype=np.float32) / np.float32(half)
    plain = (np.float32(1) / np.float32(theta) ** exponents).astype(np.float32)
    if scaling is None:
        return plain
    slow: F32Array = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        return _llama3(plain, slow, scaling)
    return _yarn(plain, slow, head_dim, theta, scaling)


def rope_tables(
    head_dim: int, theta: float, scaling: RopeScaling | None, num_positions: int
) -> tuple[F32Array, F32Array]:
    """Cosines and sines [positions, head_dim / 2]."""
    frequencies = rope_frequencies(head_dim, theta, scaling)
    angles = (np.arange(num_positions, dtype=np.float32)[:, None] * frequencies).astype(np.float32)
    factor = np.float32(1 if scaling is None else scaling.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def _llama3(plain: F32Array, slow: F32Array, scaling: RopeScaling) -> F32Array:
    """Waves shorter than a bound stay, longer ones are slowed, those between are mixed."""
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    turns = np.float32(scaling.original_positions) * plain / np.float32(2 * math.pi)
    share = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
    mixed: F32Array = (np.float32(1) - share) * slow + share * plain
    return mixed


def _yarn(plain: F32Array, slow: F32Array, head_dim: int, theta: float, scaling: RopeScaling) -> F32Array:
    """Pairs that turn often over the original context stay, those that turn rarely are slowed."""
    half = head_dim // 2

    def pair_of(turns: float) -> float:
        return half * math.log(scaling.original_positions / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    ramp = np.clip((np.arange(half, dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    mixed: F32Array = slow * ramp + plain * (np.float32(1) - ramp)
    return mixed


class _Reader:
    """Numbers of one mapping, each within its bounds."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def __call__(self, field: str, default: float | None = None) -> float:
        value: Any = self._values.get(field)
        value = default if value is None else value
        low, high = _BOUNDS[field]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise ModelFormatError(
                f"{self._source}: {field} is {str(value)[:40]}, expected a number from {low} to {high}"
            )
        return float(value)


def _yarn_attention_factor(read: _Reader) -> float:
    """As given, or from the factor: 0.1 ln(factor) + 1, with the weights that DeepSeek added."""
    if given := read("attention_factor", 0.0):
        return given
    log_factor = math.log(max(read("factor"), 1.0))
    scale, scale_all = read("mscale", 0.0), read("mscale_all_dim", 0.0)
    if scale and scale_all:
        return (0.1 * scale * log_factor + 1.0) / (0.1 * scale_all * log_factor + 1.0)
    return 0.1 * log_factor + 1.0
