"""Low-rank adapters in training: added to a model, merged into it, or saved as PEFT lays them out.

An adapter adds scale * up @ down @ x to some matrices, with scale = alpha / rank (Hu et al. 2021); only `up`
and `down` are trained. What `save_adapter` writes, `models.adapter` reads and the engine serves.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenmill.core import UsageError
from tokenmill.models.files import atomic_file
from tokenmill.models.formats.safetensors import write_safetensors
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.train.save import new_folder

__all__ = ["LORA_TARGETS", "LoraConfig", "LoraLinear", "add_lora", "merge_lora", "save_adapter"]

LORA_TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices that can have an adapter."""

_MAX_RANK: Final = 512


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices get an adapter, of what rank, and how strong it is (alpha / rank)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= _MAX_RANK:
            raise UsageError(f"rank is {self.rank}", hint=f"give a whole number from 1 to {_MAX_RANK}")
        if not 0 < self.alpha <= 1e6:
            raise UsageError(f"alpha is {self.alpha}", hint="give a number above 0, such as twice the rank")
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise UsageError(
                f"no matrix is named {unknown[0]!r}" if unknown else "no matrices are named",
                hint=f"give some of {', '.join(LORA_TARGETS)}",
            )


class LoraLinear(nn.Linear):
    """A linear layer with frozen weights and an adapter. It adds nothing until it is trained."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.alpha / config.rank
        bound = 1 / math.sqrt(base.in_features)
        down = torch.rand((config.rank, base.in_features), generator=generator) * (2 * bound) - bound
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(base.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to [..., outputs]."""
        added = functional.linear(functional.linear(x, self.down), self.up)
        return torch.add(functional.linear(x, self.weight, self.bias), added, alpha=self.scale)


def add_lora(model: TorchDecoder, config: LoraConfig) -> None:
    """Freeze the model and put an adapter on its matrices, in place.

    Raises UsageError if it has one already, or none of the matrices.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UsageError("the model has an adapter already", hint="merge it first (merge_lora)")
    generator = torch.Generator().manual_seed(config.seed)
    model.requires_grad_(False)
    places = list(_places(model, nn.Linear, config.targets))
    if not places:
        raise UsageError(f"the model has none of {', '.join(config.targets)}")
    for parent, name, linear in places:
        setattr(parent, name, LoraLinear(linear, config, generator))


def merge_lora(model: TorchDecoder) -> None:
    """Add the adapter to the weights, in float32, and remove it; all parameters are trainable again."""
    with torch.no_grad():
        for parent, name, lora in list(_places(model, LoraLinear, LORA_TARGETS)):
            assert isinstance(lora, LoraLinear)
            merged = lora.weight.float() + lora.scale * (lora.up.float() @ lora.down.float())
            lora.weight.copy_(merged)
            plain = nn.Linear(lora.in_features, lora.out_features, bias=lora.bias is not None, device="meta")
            plain.weight, plain.bias = lora.weight, lora.bias
            setattr(parent, name, plain)
    model.requires_grad_(True)


def save_adapter(model: TorchDecoder, folder: Path, *, base: str = "") -> None:
    """Write the adapter of `model` as the folder `folder`, in float32; `base` names the model it is for.

    Raises UsageError if there is no adapter or `folder` exists, StorageError if the disk refuses.
    """
    tensors, found = {}, None
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            found = module
            tensors[f"base_model.model.{name}.lora_A.weight"] = module.down.detach().float()
            tensors[f"base_model.model.{name}.lora_B.weight"] = module.up.detach().float()
    if found is None:
        raise UsageError("the model has no adapter", hint="add one first (add_lora)")
    rank = found.down.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": found.scale * rank,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with new_folder(folder, 4 * sum(each.numel() for each in tensors.values())) as staging:
        with atomic_file(staging / "adapter_config.json") as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
        write_safetensors(
            staging / "adapter_model.safetensors", shapes, "F32", lambda name: tensors[name].numpy()
        )


def _places(
    model: TorchDecoder, kind: type[nn.Linear], targets: tuple[str, ...]
) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The matrices of the blocks that can have an adapter, each with its module; not those of experts."""
    for layer in model.model.layers:
        for parent in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
            for name, child in parent.named_children():
                if name in targets and isinstance(child, kind):
                    yield parent, name, child
