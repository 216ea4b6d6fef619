"""GGUF and Hugging Face: names, shapes, configuration, and the order of query and key rows, both ways.

GGUF files of the Llama family store the query and key rows of each head interleaved (rotation pairs side
by side); Hugging Face stores the two halves one after the other. Rows are put back here, for floats and
for quantised grids alike: moving whole rows keeps a grid exact.

A tensor that the architecture does not know, or one that is missing, is an error: nothing is ignored.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.architecture import Architecture
from tokenmill.models.bfloat16 import F32Array, U16Array
from tokenmill.models.gguf import GgufFile, Grid

__all__ = [
    "GgufWeights",
    "StoredTensor",
    "gguf_architecture",
    "gguf_fields",
    "interleave_head_rows",
    "split_head_rows",
    "stored_tensors",
]

_RowOrder: TypeAlias = npt.NDArray[np.intp]

_GGUF_NAMES: Final[Mapping[str, str]] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CONFIG_FIELDS: Final[Mapping[str, str]] = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_END_TOKENS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
"""A GGUF file has one field for each end token: of a text, of a turn, of a message."""

_UNSUPPORTED_KEYS: Final = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "expert_count",
    "attention.sliding_window",
)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What one tensor of a GGUF file holds: a Hugging Face tensor, or several of one shape stacked.

    `num_heads` is the number of heads whose rows are interleaved; 0 where rows are as in Hugging Face.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    num_heads: int = 0


def gguf_architecture(gguf: GgufFile) -> Architecture:
    """The architecture that a GGUF file's metadata describes.

    Raises ModelFormatError naming the key that is missing, out of bounds or not supported.
    """
    source = str(gguf.path)
    metadata = {key: value for key, value in gguf.metadata.items() if isinstance(value, int | float | str)}
    family = metadata.get("general.architecture")
    if family != "llama":
        raise ModelFormatError(f"{source}: general.architecture is {family!r}", hint="supported: llama")
    for key in _UNSUPPORTED_KEYS:
        if f"llama.{key}" in gguf.metadata and metadata.get(f"llama.{key}") not in ("none", 0):
            raise ModelFormatError(f"{source}: llama.{key} is not supported")
    config: dict[str, Any] = {
        "model_type": family,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    for field, key in _CONFIG_FIELDS.items():
        config[field] = _shortest(metadata.get(f"llama.{key}"))
    config["vocab_size"] = gguf.tensor("token_embd.weight").shape[0]
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    end_tokens = (metadata.get(f"tokenizer.ggml.{key}") for key in _END_TOKENS)
    config["eos_token_id"] = list(dict.fromkeys(each for each in end_tokens if each is not None))
    architecture = Architecture.from_config(config, source)
    for key in ("rope.dimension_count", "attention.value_length"):
        if metadata.get(f"llama.{key}", architecture.head_dim) != architecture.head_dim:
            raise ModelFormatError(
                f"{source}: llama.{key} differs from the head size {architecture.head_dim}"
            )
    return architecture


def gguf_fields(architecture: Architecture) -> dict[str, int | float | str]:
    """The metadata that `gguf_architecture` reads, and what other programs want of it besides."""
    family, config = architecture.family, architecture.to_config()
    fields: dict[str, int | float | str] = {"general.architecture": family}
    fields |= {f"{family}.{key}": config[field] for field, key in _CONFIG_FIELDS.items()}
    fields[f"{family}.attention.value_length"] = architecture.head_dim
    fields[f"{family}.rope.dimension_count"] = architecture.head_dim
    fields[f"{family}.vocab_size"] = architecture.vocab_size
    if architecture.bos_token_id is not None:
        fields["tokenizer.ggml.bos_token_id"] = architecture.bos_token_id
    ends = zip(_END_TOKENS, architecture.eos_token_ids, strict=False)
    return fields | {f"tokenizer.ggml.{key}": token_id for key, token_id in ends}


def stored_tensors(architecture: Architecture) -> dict[str, StoredTensor]:
    """Every tensor of a model's GGUF file by its name there, in the order of the file."""
    stored = {}
    for name, shape in architecture.tensor_shapes().items():
        match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        assert match is not None, name
        layer, kind, suffix = match.groups()
        prefix = "" if layer is None else f"blk.{layer}."
        stored[f"{prefix}{_GGUF_NAMES[kind]}.{suffix}"] = StoredTensor(
            parts=(name,), shape=shape, num_heads=_interleaved_heads(architecture, kind)
        )
    return stored


def _interleaved_heads(architecture: Architecture, kind: str) -> int:
    heads = {"self_attn.q_proj": architecture.num_heads, "self_attn.k_proj": architecture.num_kv_heads}
    return heads.get(kind, 0)


def split_head_rows(num_heads: int, head_dim: int) -> _RowOrder:
    """Row order that undoes GGUF's interleaving: out[i] = stored[rows[i]], [num_heads * head_dim]."""
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def interleave_head_rows(num_heads: int, head_dim: int) -> _RowOrder:
    """Row order that GGUF's Llama family stores: stored[i] = rows[order[i]]; undoes `split_head_rows`."""
    return np.argsort(split_head_rows(num_heads, head_dim))


class GgufWeights:
    """The weights of an open GGUF file under their Hugging Face names; a `WeightSource`."""

    def __init__(self, gguf: GgufFile, architecture: Architecture) -> None:
        source = str(gguf.path)
        self._gguf = gguf
        self._shapes = architecture.tensor_shapes()
        self._places: dict[str, tuple[str, slice, _RowOrder | None]] = {}
        stored = stored_tensors(architecture)
        for name, tensor in stored.items():
            if name not in gguf.tensors:
                raise ModelFormatError(f"{source}: tensor {name} is missing")
            found = gguf.tensor(name).shape
            if found != tensor.shape:
                raise ModelFormatError(f"{source}: tensor {name} is {found}, expected {tensor.shape}")
            self._place(name, tensor)
        extra = [name for name in gguf.tensors if name not in stored]
        if extra:
            raise ModelFormatError(f"{source}: tensors beyond the architecture: {', '.join(extra[:3])}")

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        self._found(name)
        return self._shapes[name]

    def float32(self, name: str) -> F32Array:
        """The de-quantised weights: exactly what the file's grid says."""
        stored, rows, order = self._found(name)
        values = self._gguf.float32(stored, rows).reshape(self._shapes[name])
        return values if order is None else values[order]

    def bf16(self, name: str) -> U16Array:
        """The de-quantised weights rounded to bfloat16 bits. Raises ModelFormatError if one is not finite."""
        stored, rows, order = self._found(name)
        values = self._gguf.bf16(stored, rows).reshape(self._shapes[name])
        if np.any((values & 0x7F80) == 0x7F80):
            raise ModelFormatError(f"{self._gguf.path}: tensor {stored} is not finite")
        return values if order is None else values[order]

    def grid(self, name: str) -> Grid | None:
        """The file's own grid; None for tensors stored as floats or in a type without one."""
        stored, rows, order = self._found(name)
        grid = self._gguf.grid(stored, rows) if len(self._shapes[name]) > 1 else None
        return grid if grid is None or order is None else grid.take_rows(order)

    def _place(self, stored: str, tensor: StoredTensor) -> None:
        """Remember for each part where its rows are and in which order they are wanted."""
        shape = self._shapes[tensor.parts[0]]
        num_rows = math.prod(shape[:-1])
        order = split_head_rows(tensor.num_heads, shape[0] // tensor.num_heads) if tensor.num_heads else None
        for index, name in enumerate(tensor.parts):
            self._places[name] = (stored, slice(index * num_rows, (index + 1) * num_rows), order)

    def _found(self, name: str) -> tuple[str, slice, _RowOrder | None]:
        try:
            return self._places[name]
        except KeyError:
            raise ModelFormatError(f"{self._gguf.path}: no tensor for {name}") from None


def _shortest(value: object) -> object:
    """A float32 of the file as the shortest decimal that rounds to it: 1e-05, not 9.99999974e-06."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
