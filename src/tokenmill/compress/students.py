"""Small models cut out of a large one: fewer layers, a narrower residual stream, fewer heads and neurons.

A student is a place to begin training from, not a model that answers: at a twentieth of the size nothing of
the teacher's skill is left without training. What is kept are the layers at even distances (the first and the
last among them), the dimensions that are largest after the norms, the heads and neurons whose outputs are
largest, each by its mean absolute value over calibration texts (Muralidharan et al. 2024); key-value heads
are averaged into fewer (Ainslie et al. 2023). The vocabulary is the teacher's, so logits can be compared one
to one: trim that first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenmill.compress.made import MadeModel, check_target, write_made
from tokenmill.core import UsageError
from tokenmill.kernels import F32Array
from tokenmill.models.architecture import Architecture
from tokenmill.models.formats.bfloat16 import U16Array, round_to_bf16
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.models.weights import WeightSource

__all__ = ["PRESETS", "StudentInit", "StudentShape", "make_student"]

StudentInit = Literal["sliced", "random"]

_Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class StudentShape:
    """The sizes of a student; the width of a head, the vocabulary and all else are the teacher's."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int

    def architecture(self, teacher: Architecture) -> Architecture:
        """The student's architecture. Raises UsageError for a shape that cannot be cut out of the teacher."""
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size"):
            value, most = getattr(self, name), getattr(teacher, name)
            if not 1 <= value <= most:
                raise UsageError(f"the student's {name} is {value}", hint=f"use 1 to the teacher's {most}")
        if teacher.num_kv_heads % self.num_kv_heads or self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"the student's num_kv_heads is {self.num_kv_heads}",
                hint=f"use a divisor of {self.num_heads} heads and of the teacher's {teacher.num_kv_heads}",
            )
        if self.num_heads // self.num_kv_heads > teacher.num_heads // self.num_kv_heads:
            raise UsageError(f"the student's num_heads is {self.num_heads}", hint="use fewer heads")
        if teacher.experts is not None:
            raise UsageError(
                "the teacher is a mixture of experts, and students are cut out of dense models",
                hint="distil into a student of a dense model with the same vocabulary",
            )
        return replace(
            teacher,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            layers=tuple(teacher.layers[i] for i in _spaced(teacher.num_layers, self.num_layers)),
        )


PRESETS: Final[Mapping[str, StudentShape]] = {
    "mill-2M": StudentShape(
        num_layers=3, hidden_size=192, num_heads=3, num_kv_heads=1, intermediate_size=512
    ),
    "mill-4M": StudentShape(
        num_layers=4, hidden_size=256, num_heads=4, num_kv_heads=1, intermediate_size=768
    ),
    "mill-6M": StudentShape(
        num_layers=5, hidden_size=256, num_heads=4, num_kv_heads=1, intermediate_size=768
    ),
}
"""Shapes for teachers with heads of 64; with a vocabulary of 4,096 (8,192 for the last) their names are their
multiply-accumulates a token, about."""


class _Choice(NamedTuple):
    """What of the teacher is kept: layers, and in each of them, in the student's order, heads and neurons."""

    layers: Sequence[int]
    dims: _Indices
    head_rows: Sequence[_Indices]
    neurons: Sequence[_Indices]


def make_student(
    teacher: ModelDirectory,
    shape: StudentShape,
    folder: Path,
    calibration: Sequence[Sequence[int]],
    *,
    start: StudentInit = "sliced",
    seed: int = 0,
) -> ModelDirectory:
    """Write a student of `teacher` as the new model directory `folder`.

    `calibration` are token windows of the workload, by which it is decided what is kept; a hundred do. With
    `start` "random" the student has the shape, and random weights that follow from `seed`.
    """
    check_target(folder)
    architecture = shape.architecture(teacher.architecture)
    recipe = {
        "step": "student",
        "start": start,
        "shape": f"{shape.num_layers} layers of {shape.hidden_size}, {shape.num_heads} heads "
        f"({shape.num_kv_heads} KV), inner {shape.intermediate_size}",
    }
    load: Callable[[str], U16Array]
    if start == "random":
        recipe["seed"] = str(seed)
        load = _random_weights(architecture, seed)
    else:
        if not calibration:
            raise UsageError("no calibration texts", hint="give some token windows of the workload")
        weights = teacher.weights()
        means = _mean_activations(
            TorchDecoder.load(teacher.architecture, weights, torch.bfloat16), calibration
        )
        cut = _Cut(
            teacher.architecture, architecture, weights, _choose(teacher.architecture, architecture, means)
        )
        recipe["calibration"] = f"{len(calibration)} texts, {sum(map(len, calibration))} tokens"
        load = cut.tensor
    return write_made(MadeModel(architecture=architecture, load=load, recipe=recipe), teacher, folder)


def _spaced(count: int, kept: int) -> list[int]:
    """`kept` of `count` numbers at even distances, the first and the last among them."""
    if kept == 1:
        return [0]
    return [round(i * (count - 1) / (kept - 1)) for i in range(kept)]


def _mean_activations(
    model: TorchDecoder, calibration: Sequence[Sequence[int]]
) -> Mapping[str, npt.NDArray[np.float64]]:
    """The mean absolute value of every dimension of the points that decide, over all tokens."""
    wanted = ("hook_normalized", "hook_resid_post", "attn.hook_z", "mlp.hook_post")
    points = [name for name in model.hook_names if name.endswith(wanted)]
    sums: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        total = value[0].flatten(1).double().abs().sum(0)
        sums[name] = sums[name] + total if name in sums else total

    def hook(name: str) -> Callable[[Tensor], None]:
        return lambda value: add(name, value)

    hooks = {name: hook(name) for name in points}
    limit = model.architecture.max_positions
    with torch.inference_mode():
        for tokens in calibration:
            model.hidden(torch.tensor([list(tokens[:limit])]), hooks)
    num_tokens = sum(min(len(tokens), limit) for tokens in calibration)
    return {name: (total / num_tokens).numpy() for name, total in sums.items()}


def _choose(
    teacher: Architecture, student: Architecture, means: Mapping[str, npt.NDArray[np.float64]]
) -> _Choice:
    layers = _spaced(teacher.num_layers, student.num_layers)
    norms = [mean for name, mean in means.items() if name.endswith("hook_normalized")]
    if teacher.post_norm:  # blocks read the residual stream itself
        norms += [mean for name, mean in means.items() if name.endswith("hook_resid_post")]
    # Each norm counts the same, however large its weights are.
    total = np.sum([mean / mean.mean() for mean in norms], axis=0)
    return _Choice(
        layers=layers,
        dims=_largest(total, student.hidden_size),
        head_rows=[_head_rows(teacher, student, means[f"blocks.{i}.attn.hook_z"]) for i in layers],
        neurons=[_largest(means[f"blocks.{i}.mlp.hook_post"], student.intermediate_size) for i in layers],
    )


def _largest(scores: npt.NDArray[np.float64], count: int) -> _Indices:
    """The indices of the `count` largest, rising; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _head_rows(teacher: Architecture, student: Architecture, z: npt.NDArray[np.float64]) -> _Indices:
    """Rows of the query heads that stay: of those of every new key-value head, which averages several old
    ones, the ones with the largest outputs.
    """
    scores = z.reshape(student.num_kv_heads, -1, teacher.head_dim).mean(2)
    per_group = student.num_heads // student.num_kv_heads
    width = teacher.num_heads // student.num_kv_heads
    heads = [group * width + head for group, row in enumerate(scores) for head in _largest(row, per_group)]
    return (np.array(heads)[:, None] * teacher.head_dim + np.arange(teacher.head_dim)).ravel()


class _Cut:
    """The teacher's tensors as the student has them."""

    def __init__(
        self, teacher: Architecture, student: Architecture, weights: WeightSource, choice: _Choice
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._weights = weights
        self._choice = choice

    def tensor(self, name: str) -> U16Array:
        """A tensor of the student as bf16 bits."""
        dims = self._choice.dims
        parts = name.split(".")
        if "layers" not in parts:
            return round_to_bf16(np.ascontiguousarray(self._weights.float32(name)[..., dims]))
        number = int(parts[2])
        parts[2] = str(self._choice.layers[number])
        values = self._weights.float32(".".join(parts))
        end = ".".join(parts[3:])
        cut = self._in_layer(end, values, number)
        assert cut.shape == self._student.tensor_shapes()[name], name
        return round_to_bf16(np.ascontiguousarray(cut))

    def _in_layer(self, name: str, values: F32Array, number: int) -> F32Array:
        dims, rows = self._choice.dims, self._choice.head_rows[number]
        neurons = self._choice.neurons[number]
        part = name.rpartition(".")[0]
        outputs = {
            "self_attn.q_proj": rows,
            "self_attn.o_proj": dims,
            "mlp.gate_proj": neurons,
            "mlp.up_proj": neurons,
            "mlp.down_proj": dims,
        }
        inputs = {"self_attn.o_proj": rows, "mlp.down_proj": neurons}
        if part in ("self_attn.k_proj", "self_attn.v_proj"):
            values = self._pooled(values)
        elif part in ("self_attn.q_norm", "self_attn.k_norm"):
            return self._head_norm(part, values, rows)
        else:
            values = values[outputs.get(part, dims)]
        return values if values.ndim == 1 else values[:, inputs.get(part, dims)]

    def _pooled(self, values: F32Array) -> F32Array:
        """Rows of key-value heads, neighbours averaged into as many heads as the student has."""
        groups, width = self._student.num_kv_heads, self._teacher.head_dim
        heads = values.reshape(groups, -1, width, *values.shape[1:])
        pooled: F32Array = heads.mean(1).reshape(groups * width, *values.shape[1:])
        return pooled

    def _head_norm(self, part: str, values: F32Array, rows: _Indices) -> F32Array:
        """The norm of one head is the teacher's; one over all heads is cut as they are."""
        if self._teacher.qk_norm == "head":
            return values
        return values[rows] if part.endswith("q_norm") else self._pooled(values)


def _random_weights(architecture: Architecture, seed: int) -> Callable[[str], U16Array]:
    """Norms of one, other tensors normal with 1 / sqrt(inputs); embeddings with 0.02, biases zero."""
    shapes = architecture.tensor_shapes()
    numbers = {name: number for number, name in enumerate(shapes)}

    def load(name: str) -> U16Array:
        shape = shapes[name]
        if len(shape) == 1:
            return round_to_bf16(np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32))
        scale = 0.02 if "embed" in name or "lm_head" in name else shape[1] ** -0.5
        values = np.random.default_rng((seed, numbers[name])).standard_normal(shape, np.float32)
        return round_to_bf16(values * np.float32(scale))

    return load
