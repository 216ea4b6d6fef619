"""Adapters as PEFT saves them, written by hand, and the weights that they would be merged into."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.kernels import F32Array
from tokenmill.models.adapter import Adapter
from tokenmill.models.architecture import Architecture
from tokenmill.models.formats.bfloat16 import U16Array, round_to_bf16
from tokenmill.models.formats.gguf_quants import Grid
from tokenmill.models.formats.safetensors import write_safetensors
from tokenmill.models.weights import WeightSource

__all__ = ["MATRICES", "MergedWeights", "adapter_tensors", "only", "plain_config", "write_adapter"]

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plain_config(rank: int = 8, **changes: Any) -> dict[str, Any]:
    """What PEFT 0.21 writes for plain LoRA, with `changes`."""
    config: dict[str, Any] = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "some/model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "target_modules": list(MATRICES),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    return config | changes


def adapter_tensors(
    architecture: Architecture,
    rank: int = 8,
    *,
    seed: int = 0,
    strength: float = 1.0,
    matrices: Collection[str] = MATRICES,
) -> dict[str, F32Array]:
    """Random factors under PEFT's names; `strength` is the size of up @ down against a random matrix's."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, F32Array] = {}
    for layer in range(architecture.num_layers):
        for name, (num_out, num_in) in architecture.linear_shapes(layer).items():
            if name.partition(".")[2] in matrices:
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                down = rng.standard_normal((rank, num_in)) / np.sqrt(num_in)
                up = rng.standard_normal((num_out, rank)) * strength / np.sqrt(rank)
                tensors[f"{prefix}.lora_A.weight"] = down.astype(np.float32)
                tensors[f"{prefix}.lora_B.weight"] = up.astype(np.float32)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, F32Array], config: dict[str, Any]) -> Path:
    """Write the two files; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {name: values.shape for name, values in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", shapes, "F32", tensors.__getitem__)
    return folder


def only(adapter: Adapter, *names: str) -> Adapter:
    """The adapter with these matrices alone."""
    return replace(adapter, pairs={name: adapter.pairs[name] for name in names})


class MergedWeights:
    """A model's weights with an adapter merged into them in float32."""

    def __init__(self, source: WeightSource, adapter: Adapter) -> None:
        self._source = source
        self._adapter = adapter

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def float32(self, name: str) -> F32Array:
        weight = self._source.float32(name)
        pair = self._adapter.pairs.get(name.removesuffix(".weight"))
        if pair is None:
            return weight
        return weight + np.float32(self._adapter.scale) * (pair.up @ pair.down)

    def bf16(self, name: str) -> U16Array:
        return round_to_bf16(self.float32(name))

    def grid(self, name: str) -> Grid | None:
        return None
