"""What sets one family of decoders apart from Llama: a few flags, and what its files call things.

A new family is one entry here (docs/families.md has the recipe). Fields of `config.json` that mean the same
everywhere are not listed; `hf_config.py` reads them. There is no code a family.

Canonical tensor names are Llama's, with these beyond:

    self_attn.{q,k,v,o}_proj.bias   mlp.{gate,up,down}_proj.bias
    self_attn.{q,k}_norm.weight     the norm of queries and keys
    post_feedforward_layernorm      with `post_norm`, where `input_layernorm` is absent
    mlp.gate.weight                 the router [experts, width]
    mlp.experts.E.{gate,up,down}_proj.weight
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tokenmill.core.errors import ModelFormatError

__all__ = ["FAMILIES", "Family", "QkNorm", "Window", "family_of", "stored_name"]

QkNorm = Literal["none", "head", "all"]
"""RMSNorm of queries and keys before rotation: none, over each head, or over all heads at once."""

Window = Literal["none", "always", "switched"]
"""Whether `sliding_window` counts: never, where it is set, or where `use_sliding_window` is set, too."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: its flags, and the names in its Hugging Face and GGUF files that are not Llama's.

    `defaults` are values of `config.json` that the family's own loader assumes. `renamed` are (pattern, name)
    pairs from canonical names to the checkpoint's; tensors that get one name are stacked by outputs, in the
    order above. `gguf_turns` says that GGUF files hold the rows of queries
    and keys in turns (rotation pairs side by side). `experts_field` is where the number of experts stands.
    """

    hf_class: str
    gguf_name: str
    gguf_turns: bool = False
    qkv_bias: bool | Literal["config"] = "config"
    out_bias: bool | Literal["config"] = "config"
    mlp_bias: bool | Literal["config"] = False
    qk_norm: QkNorm = "none"
    post_norm: bool = False
    window: Window = "none"
    experts_field: str = ""
    renormalise: bool | Literal["config"] = "config"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()


FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(hf_class="LlamaForCausalLM", gguf_name="llama", gguf_turns=True, mlp_bias="config"),
    "mistral": Family(
        hf_class="MistralForCausalLM",
        gguf_name="llama",
        gguf_turns=True,
        window="always",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        hf_class="Qwen2ForCausalLM",
        gguf_name="qwen2",
        qkv_bias=True,
        out_bias=False,
        window="switched",
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        hf_class="Qwen3ForCausalLM",
        gguf_name="qwen3",
        qk_norm="head",
        window="switched",
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "smollm3": Family(
        hf_class="SmolLM3ForCausalLM",
        gguf_name="smollm3",
        gguf_turns=True,
        mlp_bias="config",
        window="switched",
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    ),
    "olmo2": Family(
        hf_class="Olmo2ForCausalLM",
        gguf_name="olmo2",
        qk_norm="all",
        post_norm=True,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "phi3": Family(
        hf_class="Phi3ForCausalLM",
        gguf_name="phi3",
        qkv_bias=False,
        out_bias=False,
        window="always",
        defaults={"rms_norm_eps": 1e-5},
        renamed=(
            (r"self_attn\.[qkv]_proj", "self_attn.qkv_proj"),
            (r"mlp\.(gate|up)_proj", "mlp.gate_up_proj"),
        ),
    ),
    "mixtral": Family(
        hf_class="MixtralForCausalLM",
        gguf_name="llama",
        gguf_turns=True,
        window="always",
        experts_field="num_local_experts",
        renormalise=True,
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        renamed=(
            (r"mlp\.gate\.", "block_sparse_moe.gate."),
            (r"mlp\.experts\.(\d+)\.gate_proj", r"block_sparse_moe.experts.\1.w1"),
            (r"mlp\.experts\.(\d+)\.up_proj", r"block_sparse_moe.experts.\1.w3"),
            (r"mlp\.experts\.(\d+)\.down_proj", r"block_sparse_moe.experts.\1.w2"),
        ),
    ),
    "qwen3_moe": Family(
        hf_class="Qwen3MoeForCausalLM",
        gguf_name="qwen3moe",
        qk_norm="head",
        window="switched",
        experts_field="num_experts",
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    "olmoe": Family(
        hf_class="OlmoeForCausalLM",
        gguf_name="olmoe",
        qk_norm="all",
        experts_field="num_experts",
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
    ),
}  # fmt: skip
"""By `model_type` of `config.json`."""


def stored_name(family: str, name: str) -> str:
    """What a checkpoint of this family calls the tensor, or stack of tensors, that holds a canonical one."""
    for pattern, replacement in FAMILIES[family].renamed:
        stored, count = re.subn(pattern, replacement, name)
        if count:
            return stored
    return name


def family_of(model_type: object, source: str) -> str:
    """The family that `model_type` names. Raises ModelFormatError for one that is not known."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelFormatError(
            f"{source}: model_type is {str(model_type)[:40]!r}", hint=f"supported: {', '.join(FAMILIES)}"
        )
    return model_type
