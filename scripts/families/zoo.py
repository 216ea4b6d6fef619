"""Small random models of every family and option, as transformers makes and saves them.

The weights are random, of sensible sizes and exact in bfloat16, so that what is compared is arithmetic: norms
are not ones, biases and routers matter, logits spread widely.
"""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tokenmill.kernels.packing import quantize_groups

__all__ = ["ZOO", "Specimen", "make_model", "put_on_grid", "save_model"]

_SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
_ROUTED = {"num_experts": 6, "num_experts_per_tok": 2}
_QWEN3_MOE = {**_ROUTED, "moe_intermediate_size": 64, "norm_topk_prob": True, "head_dim": 32}


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One model: its family and what its configuration has beside the common sizes."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)


ZOO: dict[str, Specimen] = {
    "Llama 2": Specimen(model_type="llama", options={"num_key_value_heads": 4}),
    "Llama 3": Specimen(
        model_type="llama", options={"rope_parameters": _LLAMA3, "tie_word_embeddings": True}
    ),
    "Llama, MQA": Specimen(model_type="llama", options={"num_key_value_heads": 1}),
    "Llama, GeGLU": Specimen(model_type="llama", options={"hidden_act": "gelu_pytorch_tanh"}),
    "Llama, ReGLU": Specimen(model_type="llama", options={"hidden_act": "relu"}),
    "Llama, biases": Specimen(model_type="llama", options={"attention_bias": True, "mlp_bias": True}),
    "Llama, linear RoPE": Specimen(
        model_type="llama",
        options={"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "Llama, YaRN": Specimen(model_type="llama", options={"rope_parameters": _YARN}),
    "Mistral": Specimen(model_type="mistral", options={"sliding_window": 24}),
    "Mistral, no window": Specimen(model_type="mistral", options={"sliding_window": None}),
    "Qwen2": Specimen(model_type="qwen2", options={"tie_word_embeddings": True}),
    "Qwen2, windows": Specimen(
        model_type="qwen2",
        options={"use_sliding_window": True, "sliding_window": 24, "layer_types": _SLIDING},
    ),
    "Qwen2, YaRN": Specimen(model_type="qwen2", options={"rope_parameters": _YARN}),
    "Qwen3": Specimen(model_type="qwen3", options={"head_dim": 32, "tie_word_embeddings": True}),
    "SmolLM3": Specimen(model_type="smollm3", options={"num_hidden_layers": 4}),
    "OLMo2": Specimen(model_type="olmo2"),
    "Phi-3": Specimen(model_type="phi3", options={"sliding_window": 24}),
    "Mixtral": Specimen(model_type="mixtral", options={"num_local_experts": 6, "num_experts_per_tok": 2}),
    "Qwen3-MoE": Specimen(model_type="qwen3_moe", options=_QWEN3_MOE),
    "Qwen3-MoE, one layer dense": Specimen(
        model_type="qwen3_moe", options={**_QWEN3_MOE, "mlp_only_layers": [1]}
    ),
    "OLMoE": Specimen(model_type="olmoe", options={**_ROUTED, "num_key_value_heads": 4}),
    "OLMoE, renormalised": Specimen(model_type="olmoe", options={**_ROUTED, "norm_topk_prob": True}),
}
"""By a name for people."""


def make_model(name: str) -> PreTrainedModel:
    """The random model in float32, its weights exact in bfloat16."""
    specimen = ZOO[name]
    config = AutoConfig.for_model(specimen.model_type, **(_SIZES | specimen.options))
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(_random(key, weight).bfloat16())
    return model


def put_on_grid(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its matrices rounded to 4 bits, so that packing them to 4 bits loses nothing more."""
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim >= 2 and "embed" not in key and not key.endswith("mlp.gate.weight"):
                weight.copy_(_rounded(weight))
    return model


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write `config.json` and `model.safetensors`, in bfloat16 as most published checkpoints are."""
    # A copy: the change of type would round the model's own angles, too.
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    return folder


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    values, scales, mins = quantize_groups(weight.reshape(-1, weight.shape[-1]).numpy(), 32, symmetric=False)
    assert mins is not None
    grouped = (
        values.reshape(*scales.shape, 32) * scales.astype("f4")[..., None] + mins.astype("f4")[..., None]
    )
    return torch.from_numpy(grouped.astype("f4")).reshape(weight.shape)


def _random(key: str, weight: torch.Tensor) -> torch.Tensor:
    if "norm" in key:
        return 1 + 0.3 * torch.randn_like(weight)
    if weight.ndim == 1:
        return 0.5 * torch.randn_like(weight)
    scale = 3.0 if "q_proj" in key or key.endswith("gate.weight") else 1.0
    random: torch.Tensor = torch.randn_like(weight) * (scale / math.sqrt(weight.shape[-1]))
    return random
