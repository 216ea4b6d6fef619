"""Where weights come from: one small protocol by Hugging Face tensor names, and its safetensors form.

The weights of a model are what its safetensors checkpoint holds in bfloat16: that is what every other program
sees. Where a directory also keeps the quantised file it was made from, `grid` gives that file's exact
integers and scales, of which the bfloat16 weights are a rounding.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.architecture import Architecture
from tokenmill.models.formats.bfloat16 import F32Array, U16Array
from tokenmill.models.formats.checkpoint import Checkpoint
from tokenmill.models.formats.gguf_quants import Grid

__all__ = ["CheckpointWeights", "RowSource", "WeightSource", "bf16_parts", "float32_parts"]

_PART_WEIGHTS = 1 << 24
_ROW_MULTIPLE = 32


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


@runtime_checkable
class RowSource(Protocol):
    """A `WeightSource` that reads some rows of a tensor without the others."""

    def float32_rows(self, name: str, rows: slice) -> F32Array:
        """Those rows in float32."""
        ...

    def bf16_rows(self, name: str, rows: slice) -> U16Array:
        """Those rows as bfloat16 bits."""
        ...


def float32_parts(source: WeightSource, name: str) -> Iterator[F32Array]:
    """A matrix in float32, some rows at a time (a multiple of 32, but for the last), all of them in order."""
    if isinstance(source, RowSource):
        return (source.float32_rows(name, rows) for rows in _spans(source.shape(name)))
    whole = source.float32(name)
    return (whole[rows] for rows in _spans(whole.shape))


def bf16_parts(source: WeightSource, name: str) -> Iterator[U16Array]:
    """As `float32_parts`, in bfloat16 bits."""
    if isinstance(source, RowSource):
        return (source.bf16_rows(name, rows) for rows in _spans(source.shape(name)))
    whole = source.bf16(name)
    return (whole[rows] for rows in _spans(whole.shape))


def _spans(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _PART_WEIGHTS // shape[-1] // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


class _Place(NamedTuple):
    """A stored tensor, and where in it the meant rows begin."""

    stored: str
    first: int


class CheckpointWeights:
    """A safetensors checkpoint by canonical names, with the grid of the quantised file it is from, if any.

    It must hold the tensors of the architecture and no others.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
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
                self._places[part] = _Place(stored, first)
                first += self._shapes[part][0]

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        self._place(name)
        return self._shapes[name]

    def float32(self, name: str) -> F32Array:
        """The checkpoint's weights widened to float32: not the grid, of which they are a rounding."""
        return self.float32_rows(name, slice(0, self.shape(name)[0]))

    def bf16(self, name: str) -> U16Array:
        """The checkpoint's weights as bfloat16 bits."""
        return self.bf16_rows(name, slice(0, self.shape(name)[0]))

    def float32_rows(self, name: str, rows: slice) -> F32Array:
        """Rows `rows.start` to `rows.stop`, without reading the others."""
        place = self._place(name)
        return self._checkpoint.float32(place.stored, _shifted(rows, place.first))

    def bf16_rows(self, name: str, rows: slice) -> U16Array:
        """The same as bfloat16 bits."""
        place = self._place(name)
        return self._checkpoint.bf16(place.stored, _shifted(rows, place.first))

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


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
