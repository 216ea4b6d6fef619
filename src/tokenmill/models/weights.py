"""Where weights come from: one small protocol by Hugging Face tensor names, and its safetensors form.

The weights of a model are what `model.safetensors` holds in bfloat16: that is what every other program
sees. Where a directory also keeps the quantised file it was made from, `grid` gives that file's exact
integers and scales, of which the bfloat16 weights are a rounding.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

from tokenmill.models.bfloat16 import F32Array, U16Array
from tokenmill.models.gguf import Grid
from tokenmill.models.safetensors import SafetensorsFile

__all__ = ["CheckpointWeights", "WeightSource"]


class WeightSource(Protocol):
    """Tensors by Hugging Face name, for example `model.layers.0.self_attn.q_proj.weight`, [outputs, inputs].

    Each call reads the file again and returns a new array that the caller owns. An unknown name raises
    ModelFormatError.
    """

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def float32(self, name: str) -> F32Array:
        """The weights in float32."""
        ...

    def bf16(self, name: str) -> U16Array:
        """The weights as bfloat16 bit patterns."""
        ...

    def grid(self, name: str) -> Grid | None:
        """The exact quantised form, or None where the weights have none."""
        ...


class CheckpointWeights:
    """A safetensors file, with the grid of the quantised file it was made from, if there is one."""

    def __init__(
        self, checkpoint: SafetensorsFile, open_grids: "Callable[[], WeightSource] | None" = None
    ) -> None:
        self._checkpoint = checkpoint
        self._open_grids = open_grids

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._checkpoint.shape(name)

    def float32(self, name: str) -> F32Array:
        """The checkpoint's weights widened to float32: not the grid, of which they are a rounding."""
        return self._checkpoint.float32(name)

    def bf16(self, name: str) -> U16Array:
        """The checkpoint's weights as bfloat16 bits."""
        return self._checkpoint.bf16(name)

    def grid(self, name: str) -> Grid | None:
        """The grid of the quantised file, opened at first use; None where there is none."""
        return None if self._grids is None else self._grids.grid(name)

    @cached_property
    def _grids(self) -> WeightSource | None:
        return None if self._open_grids is None else self._open_grids()
