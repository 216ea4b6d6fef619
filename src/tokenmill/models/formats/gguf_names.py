"""What a GGUF file calls each tensor of a model, what it stacks into one, and in which order it has rows.

GGUF files of the Llama family store the query and key rows of each head interleaved (rotation pairs side
by side); Hugging Face stores the two halves one after the other. Experts of a layer are one tensor of three
dimensions. Names are those of llama.cpp (gguf-py, tensor_mapping.py and constants.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.models.architecture import Architecture
from tokenmill.models.families import FAMILIES, stored_name

__all__ = ["RowOrder", "StoredTensor", "interleave_head_rows", "split_head_rows", "stored_tensors"]

RowOrder: TypeAlias = npt.NDArray[np.intp]
"""Rows to take, in this order: out[i] = rows[order[i]]."""

_NAMES: Final[Mapping[str, str]] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_POST_NORMS: Final[Mapping[str, str]] = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_CANONICAL: Final = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")
_EXPERT: Final = re.compile(r"mlp\.experts\.\d+\.(gate|up|down)_proj")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What one tensor of a GGUF file holds: a canonical tensor, or several whose rows follow each other.

    `shape` is row-major; experts are [experts, outputs, inputs]. `num_heads` is the number of heads whose
    rows are interleaved; 0 where rows are as in Hugging Face.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    num_heads: int = 0


def stored_tensors(architecture: Architecture) -> dict[str, StoredTensor]:
    """Every tensor of a model's GGUF file by its name there, in the order of the file."""
    shapes = architecture.tensor_shapes()
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(_gguf_name(architecture, name), []).append(name)
    return {stored: _stored(architecture, names, shapes) for stored, names in parts.items()}


def split_head_rows(num_heads: int, head_dim: int) -> RowOrder:
    """Row order that undoes GGUF's interleaving: out[i] = stored[rows[i]], [num_heads * head_dim]."""
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def interleave_head_rows(num_heads: int, head_dim: int) -> RowOrder:
    """Row order of GGUF's Llama family: stored[i] = rows[order[i]]; undone by `split_head_rows`."""
    return np.argsort(split_head_rows(num_heads, head_dim))


def _gguf_name(architecture: Architecture, name: str) -> str:
    layer, kind, suffix = _parse(name)
    prefix = "" if layer is None else f"blk.{layer}."
    if expert := _EXPERT.fullmatch(kind):
        return f"{prefix}ffn_{expert[1]}_exps.{suffix}"
    if architecture.post_norm and kind in _POST_NORMS:
        return f"{prefix}{_POST_NORMS[kind]}.{suffix}"
    fused = stored_name(architecture.family, kind)  # what a checkpoint stacks by outputs, GGUF does, too
    return f"{prefix}{_NAMES.get(fused) or _NAMES[kind]}.{suffix}"


def _stored(
    architecture: Architecture, names: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> StoredTensor:
    first = shapes[names[0]]
    _, kind, _ = _parse(names[0])
    if _EXPERT.fullmatch(kind):
        return StoredTensor(parts=tuple(names), shape=(len(names), *first))
    heads = {"self_attn.q_proj": architecture.num_heads, "self_attn.k_proj": architecture.num_kv_heads}
    is_turned = FAMILIES[architecture.family].gguf_turns
    return StoredTensor(
        parts=tuple(names),
        shape=(sum(shapes[name][0] for name in names), *first[1:]),
        num_heads=heads.get(kind, 0) if is_turned else 0,
    )


def _parse(name: str) -> tuple[str | None, str, str]:
    """Layer, kind and suffix of a canonical name."""
    match = _CANONICAL.fullmatch(name)
    assert match is not None, name
    return match[1], match[2], match[3]
