"""GGUF to Hugging Face: names, shapes, configuration, and the order of query and key rows.

GGUF files of the Llama family store the query and key rows of each head interleaved (rotation pairs side
by side); Hugging Face stores the two halves one after the other. Rows are put back here, for floats and
for quantised grids alike: moving whole rows keeps a grid exact.

A tensor that the architecture does not know, or one that is missing, is an error: nothing is ignored.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.architecture import Architecture
from tokenmill.models.bfloat16 import F32Array, U16Array
from tokenmill.models.gguf import GgufFile, Grid
from tokenmill.models.hf_config import read_architecture

__all__ = ["GgufWeights", "gguf_architecture", "hf_name", "split_head_rows"]

_TOP_NAMES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
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
_UNSUPPORTED_KEYS: Final = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "expert_count",
    "attention.sliding_window",
)


def gguf_architecture(gguf: GgufFile) -> Architecture:
    """The architecture that a GGUF file's metadata describes.

    Raises ModelFormatError naming the key that is missing, out of bounds or not supported.
    """
    source = str(gguf.path)
    family = gguf.metadata.get("general.architecture")
    if not isinstance(family, str) or family != "llama":
        raise ModelFormatError(f"{source}: general.architecture is {family!r}", hint="supported: llama")
    metadata = _scalars(gguf)
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
    for field in ("bos_token_id", "eos_token_id"):
        config[field] = metadata.get(f"tokenizer.ggml.{field}")
    architecture = read_architecture(config, source)
    for key in ("rope.dimension_count", "attention.value_length"):
        if metadata.get(f"llama.{key}", architecture.head_dim) != architecture.head_dim:
            raise ModelFormatError(
                f"{source}: llama.{key} differs from the head size {architecture.head_dim}"
            )
    return architecture


def _scalars(gguf: GgufFile) -> dict[str, int | float | str]:
    """The metadata that are single values; that is what every number of the architecture has to be."""
    found = {key: value for key, value in gguf.metadata.items() if isinstance(value, int | float | str)}
    numbers = (*_CONFIG_FIELDS.values(), "rope.dimension_count", "attention.value_length")
    ids = (f"tokenizer.ggml.{token}_token_id" for token in ("bos", "eos"))
    for key in (*(f"llama.{number}" for number in numbers), *ids):
        if key in gguf.metadata and key not in found:
            raise ModelFormatError(f"{gguf.path}: {key} is a list, expected one value")
    if (key := f"llama.{_CONFIG_FIELDS['rms_norm_eps']}") not in found:  # a config.json has a default for it
        raise ModelFormatError(f"{gguf.path}: {key} is missing")
    return found


def hf_name(name: str, source: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises ModelFormatError for a tensor that is not supported."""
    match = re.fullmatch(r"(?:blk\.(\d{1,4})\.)?(\w+)\.weight", name)
    layer, kind = match.groups() if match else (None, "")
    names = _TOP_NAMES if layer is None else _BLOCK_NAMES
    if kind not in names:
        raise ModelFormatError(f"{source}: tensor {name} is not supported")
    prefix = "" if layer is None else f"model.layers.{int(layer)}."
    return f"{prefix}{names[kind]}.weight"


def split_head_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Row order that undoes GGUF's interleaving: out[i] = stored[rows[i]], [num_heads * head_dim]."""
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


class GgufWeights:
    """The weights of an open GGUF file under their Hugging Face names; a `WeightSource`."""

    def __init__(self, gguf: GgufFile, architecture: Architecture) -> None:
        source = str(gguf.path)
        self._gguf = gguf
        self._architecture = architecture
        self._stored = {hf_name(name, source): name for name in gguf.tensors}
        self._shapes = architecture.tensor_shapes()
        for name, shape in self._shapes.items():
            if name not in self._stored:
                raise ModelFormatError(f"{source}: tensor for {name} is missing")
            found = gguf.tensor(self._stored[name]).shape
            if found != shape:
                raise ModelFormatError(f"{source}: tensor {self._stored[name]} is {found}, expected {shape}")
        extra = sorted(set(self._stored) - set(self._shapes))
        if extra or len(self._stored) != len(gguf.tensors):
            raise ModelFormatError(f"{source}: tensors beyond the architecture: {extra[:3]}")

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._gguf.tensor(self._stored_name(name)).shape

    def float32(self, name: str) -> F32Array:
        """The de-quantised weights: exactly what the file's grid says."""
        values = self._gguf.float32(self._stored_name(name))
        rows = self._rows(name)
        return values if rows is None else values[rows]

    def bf16(self, name: str) -> U16Array:
        """The de-quantised weights rounded to bfloat16 bits. Raises ModelFormatError if one is not finite."""
        values = self._gguf.bf16(self._stored_name(name))
        if np.any((values & 0x7F80) == 0x7F80):
            raise ModelFormatError(f"{self._gguf.path}: tensor {self._stored_name(name)} is not finite")
        rows = self._rows(name)
        return values if rows is None else values[rows]

    def grid(self, name: str) -> Grid | None:
        """The file's own grid; None for tensors stored as floats."""
        grid = self._gguf.grid(self._stored_name(name))
        rows = self._rows(name)
        return grid if grid is None or rows is None else grid.take_rows(rows)

    def _stored_name(self, name: str) -> str:
        try:
            return self._stored[name]
        except KeyError:
            raise ModelFormatError(f"{self._gguf.path}: no tensor for {name}") from None

    def _rows(self, name: str) -> npt.NDArray[np.intp] | None:
        architecture = self._architecture
        if name.endswith("self_attn.q_proj.weight"):
            return split_head_rows(architecture.num_heads, architecture.head_dim)
        if name.endswith("self_attn.k_proj.weight"):
            return split_head_rows(architecture.num_kv_heads, architecture.head_dim)
        return None


def _shortest(value: object) -> object:
    """A float32 of the file as the shortest decimal that rounds to it: 1e-05, not 9.99999974e-06."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
