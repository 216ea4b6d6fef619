"""A random tiny model as a `WeightSource`, with or without a 4-bit grid behind it."""

import numpy as np

from tokenmill.kernels import F32Array
from tokenmill.models.architecture import Architecture, Layer
from tokenmill.models.formats.bfloat16 import U16Array, round_to_bf16, widen_bf16
from tokenmill.models.formats.gguf_quants import Grid


def tiny_architecture(*, tied: bool = True) -> Architecture:
    return Architecture(
        family="llama",
        vocab_size=100,
        hidden_size=96,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=160,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_positions=128,
        tied_embeddings=tied,
        bos_token_id=None,
        eos_token_ids=(),
        layers=(Layer(),) * 2,
    )


class RandomWeights:
    """Weights of an architecture; `bits` 4 or 8 puts the matrices on a grid with groups of 32."""

    def __init__(self, architecture: Architecture, *, bits: int | None = None, outlier: float = 1.0) -> None:
        self.architecture = architecture
        rng = np.random.default_rng(5)
        self._tensors: dict[str, F32Array] = {}
        self._grids: dict[str, Grid] = {}
        for name, shape in architecture.tensor_shapes().items():
            if len(shape) == 1:
                weight = (1 + rng.standard_normal(shape) / 8).astype(np.float32)
                weight[7] *= outlier
            else:
                weight = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
                if bits is not None:
                    self._grids[name] = _grid(rng, shape, bits)
                    weight = self._grids[name].float32()
            self._tensors[name] = widen_bf16(round_to_bf16(weight))

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def float32(self, name: str) -> F32Array:
        return self._tensors[name].copy()

    def bf16(self, name: str) -> U16Array:
        return round_to_bf16(self._tensors[name])

    def grid(self, name: str) -> Grid | None:
        return self._grids.get(name)


def _grid(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> Grid:
    groups = (shape[0], shape[1] // 32)
    scales = (rng.uniform(0.005, 0.02, groups)).astype(np.float16)
    if bits == 8:
        values = rng.integers(-127, 128, shape).astype(np.int8)
        return Grid(values=values, scales=(scales / 16).astype(np.float16), mins=None, bits=8)
    mins = (-8 * scales.astype(np.float32)).astype(np.float16)
    return Grid(values=rng.integers(0, 16, shape).astype(np.uint8), scales=scales, mins=mins, bits=4)
