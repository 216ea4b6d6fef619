"""Shapes of well-known models, so that a plan needs no download."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tokenmill.core import NotFoundError
from tokenmill.costs.shape import ModelShape
from tokenmill.costs.tables import Row, optional_number, parse_rows, read_table, required

__all__ = ["SHAPE_FILE", "find_shape", "load_shapes"]

SHAPE_FILE: Final = "shapes.csv"

_INTEGERS: Final = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "num_active",
    "latent_size",
    "rope_size",
    "window_layers",
    "window",
)
_BILLIONS: Final = ("params", "nonexpert_params", "lookup_params")
_COLUMNS: Final = ("name", *_INTEGERS, *(f"{name}_b" for name in _BILLIONS), "source")


def load_shapes(home: Path | None = None) -> tuple[ModelShape, ...]:
    """All shapes: the user's table if there is one, else that of the package."""
    return parse_rows(read_table(SHAPE_FILE, home), _COLUMNS, _shape)


def find_shape(shapes: Sequence[ModelShape], name: str) -> ModelShape:
    """The shape of this name; case does not count. Raises NotFoundError with the names there are."""
    for shape in shapes:
        if shape.name.lower() == name.strip().lower():
            return shape
    raise NotFoundError(
        f"no model shape is called {name!r}", hint=f"known are {', '.join(shape.name for shape in shapes)}"
    )


def _shape(row: Row) -> ModelShape:
    integers: dict[str, Any] = {name: int(optional_number(row, name, 0, 1e6) or 0) for name in _INTEGERS}
    params: dict[str, Any] = {
        name: 1e9 * (optional_number(row, f"{name}_b", 0, 1e5) or 0.0) for name in _BILLIONS
    }
    params["head_params"] = params["lookup_params"]  # a table of its own is as large as the head
    required(row, "source")
    if not params["params"] or not integers["num_layers"] or not integers["hidden_size"]:
        raise row.bad("parameters, layers and width are needed")
    try:
        return ModelShape(name=required(row, "name"), **integers, **params)
    except AssertionError as error:
        raise row.bad(str(error)) from error
