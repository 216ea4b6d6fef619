"""Where weights come from: one small protocol by Hugging Face tensor names, and its safetensors form.

The weights of a model are what `model.safetensors` holds in bfloat16: that is what every other program
sees. Where a directory also keeps the quantised file it was made from, `grid` gives that file's exact
integers and scales, of which the bfloat16 weights are a rounding.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.architecture import Architecture
from tokenmill.models.bfloat16 import F32Array, U16Array
from tokenmill.models.gguf_quants import Grid
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


class _Place(NamedTuple):
    """A stored tensor, and the rows of it that are meant; None for all of them."""

    stored: str
    rows: slice | None


class CheckpointWeights:
    """A safetensors file by canonical names, with the grid of the quantised file it was made from, if any.

    The file must hold the tensors of the architecture and no others.
    """

    def __init__(
        self,
        checkpoint: SafetensorsFile,
        architecture: Architecture,
        open_grids: "Callable[[], WeightSource] | None" = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._open_grids = open_grids
        self._shapes = architecture.tensor_shapes()
        self._places: dict[str, _Place] = {}
        for stored, parts in architecture.stored_parts().items():
            first = 0
            for part in parts:
                rows = self._shapes[part][0]
                self._places[part] = _Place(stored, slice(first, first + rows) if len(parts) > 1 else None)
                first += rows

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        self._place(name)
        return self._shapes[name]

    def float32(self, name: str) -> F32Array:
        """The checkpoint's weights widened to float32: not the grid, of which they are a rounding."""
        place = self._place(name)
        values = self._checkpoint.float32(place.stored)
        return values if place.rows is None else values[place.rows].copy()

    def bf16(self, name: str) -> U16Array:
        """The checkpoint's weights as bfloat16 bits."""
        place = self._place(name)
        values = self._checkpoint.bf16(place.stored)
        return values if place.rows is None else values[place.rows].copy()

    def grid(self, name: str) -> Grid | None:
        """The grid of the quantised file, opened at first use; None where there is none."""
        return None if self._grids is None else self._grids.grid(name)

    def _place(self, name: str) -> "_Place":
        try:
            return self._places[name]
        except KeyError:
            raise ModelFormatError(f"{self._checkpoint.path}: no tensor for {name}") from None

    @cached_property
    def _grids(self) -> WeightSource | None:
        return None if self._open_grids is None else self._open_grids()
