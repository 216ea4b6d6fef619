"""LoRA adapters in the layout of PEFT: read with the suspicion that a stranger's file deserves, and packed.

    adapter_config.json  adapter_model.safetensors

An adapter adds scale * up @ down @ x to some matrices (Hu et al. 2021). It is not merged into the weights:
the kernels add it for the rows that ask for it. What would change the answer in a way that is not computed
here (DoRA, trained biases or embeddings, ranks that differ, adapters on the head) is an error that names the
field, and so is any switch that is set and not known. Training adapters is not here.
Source: https://huggingface.co/docs/peft, `LoraConfig` and its checkpoint format.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenmill.core.errors import ModelFormatError, NotFoundError
from tokenmill.kernels import F32Array, Linear, PackedAdapter, PackedLowRank, StepPlan
from tokenmill.kernels.lowrank import LowRankPart, pack_low_rank
from tokenmill.models.architecture import Architecture
from tokenmill.models.formats.safetensors import SafetensorsFile
from tokenmill.models.hf_config import load_json_object
from tokenmill.models.packing.pack import FUSED, gate_up_turns

__all__ = ["Adapter", "LowRankPair", "pack_adapter", "read_adapter"]

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_MAX_RANK: Final = 512
_MAX_ALPHA: Final = 1e6
_TENSOR: Final = re.compile(
    r"base_model\.model\.(model\.layers\.\d{1,4}\.[a-z_]+\.[a-z_]+)\.lora_([AB])\.weight"
)
_ALLOWED: Final[Mapping[str, tuple[object, ...]]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    # Other ways to start (PiSSA, OLoRA, LoftQ, CorDA) change the base weights, too.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_IRRELEVANT: Final = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
        "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
        "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type",
        "use_rslora",
    }
)  # fmt: skip
"""Fields that are read elsewhere, or that say how an adapter was trained and not what it computes."""

_MATRICES: Final = tuple(part for parts in FUSED.values() for part in parts)
"""What can have an adapter: not the experts of a mixture, nor their router."""

_INPUTS: Final[Mapping[str, str]] = {
    "qkv": "ln1.hook_normalized",
    "out": "attn.hook_z",
    "gate_up": "ln2.hook_normalized",
    "down": "mlp.hook_post",
}
"""What each fused matrix reads, as `StepPlan.smoothing` names it."""


@dataclass(frozen=True, kw_only=True)
class LowRankPair:
    """What one matrix [n, K] gains: `up` [n, r] times `down` [r, K], before the adapter's scale."""

    down: F32Array
    up: F32Array


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as read: a pair by the name of its matrix (`model.layers.0.self_attn.q_proj`).

    `digest` is the SHA-256 of the scale and of every matrix: equal for equal content, in whatever files.
    """

    scale: float
    pairs: Mapping[str, LowRankPair]
    digest: str


def read_adapter(folder: Path, architecture: Architecture) -> Adapter:
    """Read an adapter for a model of this architecture.

    Raises NotFoundError if `folder` holds none, ModelFormatError naming the file and the field that is wrong.
    """
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise NotFoundError(
                f"{folder} is no adapter (it has no {name})",
                hint="save the adapter with PEFT's save_pretrained, as safetensors",
            )
    rank, scale = _read_config(folder / _CONFIG)
    with SafetensorsFile.open(folder / _WEIGHTS) as file:
        pairs = _read_pairs(file, architecture, rank)
    return Adapter(scale=scale, pairs=pairs, digest=_digest(scale, pairs))


def pack_adapter(adapter: Adapter, plan: StepPlan) -> PackedAdapter:
    """The adapter for the linears of a plan that was compiled from a model of its architecture.

    Where packing divided the inputs of a linear by factors, `down` is multiplied by them; where it divided
    the outputs of the up projection, so is `up`.
    """
    linears: dict[int, PackedLowRank] = {}
    for index, layer, name in _places(plan):
        op = plan.ops[index]
        assert isinstance(op, Linear)
        if parts := _parts(adapter, plan, layer, name, op.weight.num_out):
            linears[index] = pack_low_rank(parts, op.weight, adapter.scale)
    return PackedAdapter(digest=adapter.digest, linears=linears)


def _places(plan: StepPlan) -> Iterator[tuple[int, int, str]]:
    """The index, the layer and the name in FUSED of every linear but the head."""
    layer, name = -1, ""
    for index, op in enumerate(plan.ops):
        if isinstance(op, Linear) and op.dst != "logits":
            if op.dst == "qkv":
                layer, name = layer + 1, "qkv"
            elif op.dst == "h":
                name = "gate_up"
            else:
                name = "out" if name == "qkv" else "down"
            yield index, layer, name


def _parts(adapter: Adapter, plan: StepPlan, layer: int, name: str, num_out: int) -> list[LowRankPart]:
    """The adapter's matrices in one fused linear, each with the outputs that it has there."""
    input_factors_K = plan.smoothing.get(f"blocks.{layer}.{_INPUTS[name]}", np.float32(1))
    order = np.argsort(gate_up_turns(num_out)) if name == "gate_up" else np.arange(num_out)
    parts: list[LowRankPart] = []
    first = 0
    for matrix, size in zip(FUSED[name], _sizes(plan, name), strict=True):
        if pair := adapter.pairs.get(f"model.layers.{layer}.{matrix}"):
            up_NR = pair.up
            if matrix == "mlp.up_proj":
                up_NR = (
                    up_NR
                    / plan.smoothing.get(f"blocks.{layer}.mlp.hook_post", np.ones(1, np.float32))[:, None]
                )
            parts.append(
                LowRankPart(outputs=order[first : first + size], down=pair.down * input_factors_K, up=up_NR)
            )
        first += size
    assert first == num_out
    return parts


def _sizes(plan: StepPlan, name: str) -> tuple[int, ...]:
    """Outputs of the matrices that are fused in one linear."""
    shape = plan.shape
    kv_size = shape.num_kv_heads * shape.head_dim
    return {
        "qkv": (shape.num_heads * shape.head_dim, kv_size, kv_size),
        "gate_up": (shape.intermediate_size, shape.intermediate_size),
    }.get(name, (shape.hidden_size,))


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and scale. Every other field must be known, or off."""
    config = load_json_object(path)
    for field, allowed in _ALLOWED.items():
        if config.get(field) not in allowed:
            _refuse(path, field, config.get(field))
    for field in sorted(config.keys() - _ALLOWED.keys() - _IRRELEVANT):
        if config[field]:
            _refuse(path, field, config[field])
    rank = _number(config, "r", path, _MAX_RANK)
    if rank != int(rank) or rank < 1:
        raise ModelFormatError(f"{path}: r is {rank!r}, expected a whole number from 1 to {_MAX_RANK}")
    alpha = _number(config, "lora_alpha", path, _MAX_ALPHA)
    if config.get("use_rslora") not in (None, False, True):
        _refuse(path, "use_rslora", config["use_rslora"])
    # Rank-stabilised scaling (Kalajdzievski 2023).
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(config: Mapping[str, Any], field: str, path: Path, limit: float) -> float:
    value: Any = config.get(field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= limit:
        raise ModelFormatError(f"{path}: {field} is {_short(value)}, expected a number from 0 to {limit:g}")
    return float(value)


def _read_pairs(file: SafetensorsFile, architecture: Architecture, rank: int) -> dict[str, LowRankPair]:
    matrices = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(architecture.num_layers)
        for name, shape in architecture.linear_shapes(layer).items()
        if name in _MATRICES
    }
    found: dict[str, dict[str, F32Array]] = {}
    for tensor in file.names():
        match = _TENSOR.fullmatch(tensor)
        if match is None or match[1] not in matrices:
            raise ModelFormatError(
                f"{file.path}: tensor {tensor} belongs to no matrix that can have an adapter",
                hint=f"supported: lora_A and lora_B of {', '.join(_MATRICES)}",
            )
        num_out, num_in = matrices[match[1]]
        wanted = (rank, num_in) if match[2] == "A" else (num_out, rank)
        if file.shape(tensor) != wanted:
            raise ModelFormatError(
                f"{file.path}: tensor {tensor} has the shape {file.shape(tensor)}, expected {wanted}",
                hint="the adapter is for another model, or its r differs between matrices",
            )
        values = file.float32(tensor)
        if not np.isfinite(values).all():
            raise ModelFormatError(f"{file.path}: tensor {tensor} has a value that is not finite")
        found.setdefault(match[1], {})[match[2]] = values
    for name, pair in found.items():
        if len(pair) != 2:
            raise ModelFormatError(f"{file.path}: {name} has lora_A or lora_B, but not both")
    if not found:
        raise ModelFormatError(f"{file.path}: holds no tensors")
    return {name: LowRankPair(down=found[name]["A"], up=found[name]["B"]) for name in sorted(found)}


def _digest(scale: float, pairs: Mapping[str, LowRankPair]) -> str:
    names = {name: [pair.down.shape, pair.up.shape] for name, pair in pairs.items()}
    digest = hashlib.sha256(json.dumps([scale, names]).encode())
    for pair in pairs.values():
        digest.update(pair.down.astype("<f4").tobytes())
        digest.update(pair.up.astype("<f4").tobytes())
    return digest.hexdigest()


def _refuse(path: Path, field: str, value: object) -> None:
    raise ModelFormatError(
        f"{path}: {field} is {_short(value)}, which is not supported",
        hint="train the adapter as plain LoRA, or merge it into the model",
    )


def _short(value: object) -> str:
    return repr(value)[:80]
