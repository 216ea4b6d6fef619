"""What a decoder looks like and what a token of it costs: the numbers of a `config.json`, checked.

A config comes from a stranger, so every number is bounded before anything is sized by it, and a
feature that the engine does not compute is an error that names the field, never silently ignored.
Covers the Llama family (RMSNorm, rotary positions, grouped-query attention, SwiGLU). It does not cover
mixtures of experts, scaled rotary positions, biases or sliding windows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenmill.core.errors import ModelFormatError
from tokenmill.kernels import KvDtype, kv_block_bytes

__all__ = ["MAX_JSON_BYTES", "Architecture", "load_json_object"]

MAX_JSON_BYTES: Final = 1 << 20

_FAMILIES: Final = {"llama": "LlamaForCausalLM"}
_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "vocab_size": (1, 1 << 21),
    "hidden_size": (8, 1 << 16),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 1024),
    "intermediate_size": (8, 1 << 18),
    "max_position_embeddings": (1, 1 << 24),
    "rms_norm_eps": (1e-12, 1e-1),
    "rope_theta": (1.0, 1e12),
}
_UNSUPPORTED_UNLESS: Final[Mapping[str, tuple[object, ...]]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "rope_scaling": (None,),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "num_local_experts": (None, 0),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shapes and constants of a decoder, and the cost that follows from them.

    `max_positions` is the longest context in tokens; `norm_eps` and `rope_theta` are plain numbers.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "Architecture":
        """Read a Hugging Face `config.json`; `source` is what errors call it.

        Raises ModelFormatError naming the field that is missing, out of bounds or not supported.
        """
        family = config.get("model_type")
        if not isinstance(family, str) or family not in _FAMILIES:
            raise ModelFormatError(
                f"{source}: model_type is {family!r}", hint=f"supported: {', '.join(_FAMILIES)}"
            )
        _refuse_unsupported(config, source)
        hidden_size = _integer(config, "hidden_size", source)
        num_heads = _integer(config, "num_attention_heads", source)
        vocab_size = _integer(config, "vocab_size", source)
        architecture = cls(
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=_integer(config, "num_hidden_layers", source),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", source, num_heads),
            head_dim=_integer(config, "head_dim", source, hidden_size // num_heads),
            intermediate_size=_integer(config, "intermediate_size", source),
            norm_eps=_number(config, "rms_norm_eps", source),
            rope_theta=_rope_theta(config, source),
            max_positions=_integer(config, "max_position_embeddings", source),
            tied_embeddings=_flag(config, "tie_word_embeddings", source),
            bos_token_id=_token_id(config.get("bos_token_id"), vocab_size, f"{source}: bos_token_id"),
            eos_token_ids=_token_ids(config.get("eos_token_id"), vocab_size, f"{source}: eos_token_id"),
        )
        architecture._check_heads(source)
        return architecture

    def to_config(self) -> dict[str, Any]:
        """The Hugging Face `config.json` that says the same; transformers and vLLM open it."""
        eos = list(self.eos_token_ids)
        return {
            "architectures": [_FAMILIES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "torch_dtype": "bfloat16",
        }

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.num_kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices of one block as [outputs, inputs], by the end of their Hugging Face name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.query_size, hidden),
            "self_attn.k_proj": (self.kv_size, hidden),
            "self_attn.v_proj": (self.kv_size, hidden),
            "self_attn.o_proj": (hidden, self.query_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint by its Hugging Face name. A tied head has no tensor of its own."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            for name, shape in self.linear_shapes().items():
                shapes[f"{prefix}.{name}.weight"] = shape
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def num_params(self) -> int:
        """Parameters that the checkpoint stores; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return embeddings + norms + self.block_macs_per_token

    @property
    def num_active_params(self) -> int:
        """Parameters that take part in one token. In a dense model: all of them."""
        return self.num_params

    @property
    def block_macs_per_token(self) -> int:
        """Multiply-accumulates of all blocks' matrices for one token, without attention scores."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linear_shapes().values())

    @property
    def head_macs_per_token(self) -> int:
        """Multiply-accumulates of the output head for one token."""
        return self.vocab_size * self.hidden_size

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates of all matrices for one generated token: blocks and head."""
        return self.block_macs_per_token + self.head_macs_per_token

    def attention_flops(self, context: int) -> int:
        """Floating point operations of the attention scores and sums for one token that sees `context`.

        Two products (scores, values) of two operations each, over every layer and query head.
        """
        return 4 * self.num_layers * self.query_size * context

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Bytes of keys and values that one token leaves in the cache."""
        return round(2 * self.num_layers * self.kv_size * bytes_per_value)

    def kv_block_bytes(self, kv_dtype: KvDtype = "bf16") -> int:
        """Bytes of one block of the KV cache as it lies in memory, padding and scales counted."""
        return kv_block_bytes(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kv_dtype=kv_dtype,
        )

    def _check_heads(self, source: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelFormatError(
                f"{source}: num_attention_heads {self.num_heads} is no multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelFormatError(f"{source}: head_dim {self.head_dim} is odd, rotation needs pairs")


def load_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file that must hold an object.

    Raises ModelFormatError if it is missing, larger than 1 MiB, not JSON, nested too deep, or no object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_JSON_BYTES:
        raise ModelFormatError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: not a JSON object")
    return value


def _token_ids(value: object, vocab_size: int, field: str) -> tuple[int, ...]:
    """One token id, a list of them or None, as a tuple; each must lie in the vocabulary."""
    values = value if isinstance(value, list) else [value]
    if len(values) > 64:
        raise ModelFormatError(f"{field}: {len(values)} entries, at most 64")
    ids = (_token_id(each, vocab_size, field) for each in values)
    return tuple(each for each in ids if each is not None)


def _token_id(value: object, vocab_size: int, field: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ModelFormatError(f"{field}: {value!r} is no token of a vocabulary of {vocab_size}")
    return value


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    for field, allowed in _UNSUPPORTED_UNLESS.items():
        if config.get(field) not in allowed:
            raise ModelFormatError(f"{source}: {field} is {config[field]!r}, which is not supported")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ModelFormatError(f"{source}: rope_parameters is {rope!r}, only the default type is supported")


def _number(config: Mapping[str, Any], field: str, source: str, default: float | None = None) -> float:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ModelFormatError(f"{source}: {field} is missing")
    low, high = _BOUNDS[field]  # NaN and infinity are outside any interval
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ModelFormatError(f"{source}: {field} is {value!r}, expected a number from {low} to {high}")
    return float(value)


def _integer(config: Mapping[str, Any], field: str, source: str, default: int | None = None) -> int:
    value = _number(config, field, source, default)
    if value != int(value):
        raise ModelFormatError(f"{source}: {field} is {value!r}, expected a whole number")
    return int(value)


def _flag(config: Mapping[str, Any], field: str, source: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise ModelFormatError(f"{source}: {field} is {value!r}, expected true or false")
    return value


def _rope_theta(config: Mapping[str, Any], source: str) -> float:
    """`rope_theta`, at the top or (transformers 5) inside `rope_parameters`; 10,000 where neither is."""
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", rope.get("rope_theta"))
    return _number({"rope_theta": theta}, "rope_theta", source, 1e4)
