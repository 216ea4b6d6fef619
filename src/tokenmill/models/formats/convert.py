"""GGUF and Hugging Face: the description of a model both ways, and a GGUF file's weights by canonical names.

A GGUF file says some things only by its architecture's name, because llama.cpp has them built in: which
layers of SmolLM3 are not turned, whether a router's weights are normalised, which activation there is. What
a model has otherwise cannot be said, and is refused when writing. When reading, a tensor or a setting that
the architecture does not know, or one that is missing, is an error: nothing is ignored.

Llama 3's rotary scaling is a tensor of divisors in GGUF, without the numbers that it was made of; those that
Llama 3 uses are tried, or the ones that tokenmill wrote beside it.
Source: conversion/ and src/models/ of the llama.cpp project.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from tokenmill.core.errors import ModelFormatError, UsageError
from tokenmill.models.architecture import Architecture
from tokenmill.models.families import FAMILIES, Family
from tokenmill.models.formats.bfloat16 import F32Array, U16Array
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.gguf_names import RowOrder, StoredTensor, split_head_rows, stored_tensors
from tokenmill.models.formats.gguf_quants import Grid
from tokenmill.models.formats.gguf_writer import MetadataItem
from tokenmill.models.hf_config import read_architecture
from tokenmill.models.rope import RopeScaling, rope_frequencies

__all__ = ["ROPE_FREQS", "GgufWeights", "gguf_architecture", "gguf_fields", "rope_divisors"]

ROPE_FREQS: Final = "rope_freqs.weight"
"""The tensor of Llama 3's rotary scaling: what each pair's frequency is divided by."""

_NEEDED: Final[Mapping[str, str]] = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_END_TOKENS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
"""A GGUF file has one field for each end token: of a text, of a turn, of a message."""

_WINDOW, _WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_SCALING: Final = "rope.scaling"
_LLAMA3: Final[Mapping[str, tuple[str, float]]] = {
    "low_freq_factor": ("rope.scaling.llama3.low_freq_factor", 1.0),
    "high_freq_factor": ("rope.scaling.llama3.high_freq_factor", 4.0),
    "original_max_position_embeddings": ("rope.scaling.llama3.original_context_length", 8192),
}
"""The numbers behind the divisors: the key that tokenmill writes, and what Llama 3 has."""

_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
    "expert_gating_func": (0, 1),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
}
"""Settings that are not computed, and the values that change nothing."""

_RENORMALISES: Final = {"llama": True, "qwen3moe": True, "olmoe": False}
"""Whether llama.cpp divides the weights of a token's experts by their sum, by GGUF architecture."""


def gguf_architecture(gguf: GgufFile) -> Architecture:
    """The architecture that a GGUF file's metadata and table of tensors describe.

    Raises ModelFormatError naming the key that is missing, out of bounds or not supported.
    """
    return _Description(gguf).architecture()


class _Description:
    """The settings of one open file, by their key without the architecture's name in front."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        self._source = str(gguf.path)
        name = gguf.metadata.get("general.architecture")
        names = sorted({family.gguf_name for family in FAMILIES.values()})
        if not isinstance(name, str) or name not in names:
            shown = str(name)[:40]
            raise ModelFormatError(
                f"{self._source}: general.architecture is {shown!r}", hint=f"supported: {', '.join(names)}"
            )
        self._name = name

    def architecture(self) -> Architecture:
        for key, neutral in _NEUTRAL.items():
            if (value := self._value(key)) is not None and value not in neutral:
                raise ModelFormatError(
                    f"{self._source}: {self._name}.{key} is {value}, which is not supported"
                )
        model_type = self._family()
        config = {"model_type": model_type, **self._config(FAMILIES[model_type])}
        architecture = read_architecture(config, self._source)
        for key in ("rope.dimension_count", "attention.value_length"):
            if (self._value(key) or architecture.head_dim) != architecture.head_dim:
                raise ModelFormatError(
                    f"{self._source}: {self._name}.{key} differs from the head size {architecture.head_dim}"
                )
        self._check_divisors(architecture)
        return architecture

    def _value(self, key: str) -> Any:
        """One number, text or flag; None if it is absent."""
        return self._scalar(f"{self._name}.{key}")

    def _scalar(self, key: str) -> Any:
        value = self._gguf.metadata.get(key)
        if value is not None and not isinstance(value, int | float | str):
            raise ModelFormatError(f"{self._source}: {key} is a list, expected one value")
        return _shortest(value)

    def _needed(self, key: str) -> Any:
        if (value := self._value(key)) is None:
            raise ModelFormatError(f"{self._source}: {self._name}.{key} is missing")
        return value

    def _family(self) -> str:
        """Families share a name in GGUF; a mixture of experts and a window tell them apart."""
        has_experts, has_window = bool(self._value("expert_count")), bool(self._value(_WINDOW))
        for model_type, family in FAMILIES.items():
            takes_window = not has_window or family.window != "none" or family.gguf_name != "llama"
            if family.gguf_name == self._name and bool(family.experts_field) == has_experts and takes_window:
                return model_type
        problem = "is not supported" if has_experts else "is missing"
        raise ModelFormatError(f"{self._source}: {self._name}.expert_count {problem}")

    def _config(self, family: Family) -> dict[str, Any]:
        """The `config.json` that says the same."""
        config: dict[str, Any] = {field: self._needed(key) for field, key in _NEEDED.items()}
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        num_kv_heads, head_dim = self._value("attention.head_count_kv"), self._value("attention.key_length")
        are_sizes = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
        tensors, tokens = self._gguf.tensors, "tokenizer.ggml"
        ends = (self._scalar(f"{tokens}.{key}") for key in _END_TOKENS)
        return config | {
            "vocab_size": self._gguf.tensor("token_embd.weight").shape[0],
            "num_key_value_heads": heads if num_kv_heads is None else num_kv_heads,
            "head_dim": hidden // heads if head_dim is None and are_sizes else head_dim,
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            "rope_theta": self._value("rope.freq_base"),
            "rope_scaling": self._rope_scaling(),
            "bos_token_id": self._scalar(f"{tokens}.bos_token_id"),
            "eos_token_id": list(dict.fromkeys(each for each in ends if each is not None)),
            **self._windows(family),
            **self._experts(family),
        }

    def _windows(self, family: Family) -> dict[str, Any]:
        window = self._value(_WINDOW) or None
        if window is None or family.window != "switched":
            return {"sliding_window": window}
        pattern = self._gguf.metadata.get(f"{self._name}.{_WINDOW_PATTERN}")
        if not isinstance(pattern, list):
            raise ModelFormatError(f"{self._source}: {self._name}.{_WINDOW_PATTERN} is no list of flags")
        types = ["sliding_attention" if each else "full_attention" for each in pattern]
        return {"sliding_window": window, "use_sliding_window": True, "layer_types": types}

    def _experts(self, family: Family) -> dict[str, Any]:
        if not family.experts_field:
            return {}
        fields = {family.experts_field: self._needed("expert_count")}
        fields["num_experts_per_tok"] = self._needed("expert_used_count")
        if "moe_intermediate_size" in family.defaults:
            fields["moe_intermediate_size"] = self._needed("expert_feed_forward_length")
        if family.renormalise == "config":
            fields["norm_topk_prob"] = _RENORMALISES[self._name]
        return fields

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind, factor = self._value(f"{_SCALING}.type"), self._value(f"{_SCALING}.factor")
        if ROPE_FREQS in self._gguf.tensors:
            divisors = self._gguf.float32(ROPE_FREQS)
            config = {field: self._value(key) or usual for field, (key, usual) in _LLAMA3.items()}
            return {"rope_type": "llama3", "factor": _shortest(float(divisors.max())), **config}
        if kind == "none" or (kind is None and not factor):
            return None
        config = {"rope_type": kind or "linear", "factor": factor}
        if kind != "yarn":
            return config
        original = self._value(f"{_SCALING}.original_context_length") or self._needed("context_length")
        config["original_max_position_embeddings"] = original
        for field in ("beta_fast", "beta_slow"):
            config[field] = self._value(f"{_SCALING}.yarn_{field}")
        config["attention_factor"] = self._value(f"{_SCALING}.yarn_attn_factor")
        if (scale := self._value(f"{_SCALING}.attn_factor")) and not config["attention_factor"]:
            config["attention_factor"] = scale * _usual_attention_factor(factor)
        return config

    def _check_divisors(self, architecture: Architecture) -> None:
        """The numbers that were tried must give the divisors of the file."""
        scaling = architecture.rope_scaling
        if scaling is None or scaling.kind != "llama3":
            return
        found, expected = self._gguf.float32(ROPE_FREQS), rope_divisors(architecture)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4, atol=0):
            raise ModelFormatError(
                f"{self._source}: tensor {ROPE_FREQS} is not Llama 3's rotary scaling by {scaling.factor:g}"
            )


def gguf_fields(architecture: Architecture) -> dict[str, MetadataItem]:
    """The metadata that `gguf_architecture` reads, and what other programs want of it besides.

    Raises UsageError for a model that a GGUF file cannot describe.
    """
    name = FAMILIES[architecture.family].gguf_name
    for problem in _unsayable(architecture, name):
        raise UsageError(f"GGUF has no way to say {problem}", hint="use --to hf")
    settings: dict[str, MetadataItem] = {
        "context_length": architecture.max_positions,
        "embedding_length": architecture.hidden_size,
        "block_count": architecture.num_layers,
        "feed_forward_length": architecture.intermediate_size,
        "attention.head_count": architecture.num_heads,
        "attention.head_count_kv": architecture.num_kv_heads,
        "attention.key_length": architecture.head_dim,
        "attention.value_length": architecture.head_dim,
        "attention.layer_norm_rms_epsilon": architecture.norm_eps,
        "rope.dimension_count": architecture.head_dim,
        "rope.freq_base": architecture.rope_theta,
        "vocab_size": architecture.vocab_size,
        **_window_settings(architecture),
        **_expert_settings(architecture),
        **_scaling_settings(architecture.rope_scaling),
    }
    fields: dict[str, MetadataItem] = {"general.architecture": name}
    fields |= {f"{name}.{key}": value for key, value in settings.items()}
    if architecture.bos_token_id is not None:
        fields["tokenizer.ggml.bos_token_id"] = architecture.bos_token_id
    ends = zip(_END_TOKENS, architecture.eos_token_ids, strict=False)
    return fields | {f"tokenizer.ggml.{key}": token_id for key, token_id in ends}


def rope_divisors(architecture: Architecture) -> F32Array:
    """What Llama 3's scaling divides each pair's frequency by, [head_dim / 2]."""
    plain = rope_frequencies(architecture.head_dim, architecture.rope_theta, None)
    scaled = rope_frequencies(architecture.head_dim, architecture.rope_theta, architecture.rope_scaling)
    return plain / scaled


def _unsayable(architecture: Architecture, name: str) -> Iterator[str]:
    """What programs that read GGUF would compute otherwise."""
    layers, experts, scaling = architecture.layers, architecture.experts, architecture.rope_scaling
    interval = FAMILIES[architecture.family].defaults.get("no_rope_layer_interval", 1 << 30)
    if architecture.activation != "silu":
        yield f"the activation {architecture.activation}"
    if name != "llama" and (architecture.out_bias or architecture.mlp_bias):
        yield "biases beyond queries, keys and values in this family"
    if any(layer.rotary != ((index + 1) % interval != 0) for index, layer in enumerate(layers)):
        yield f"which layers are not turned, if it is not every {interval}th"
    if experts is not None and not all(layer.routed for layer in layers):
        yield "that some layers have no experts"
    if experts is not None and experts.renormalise != _RENORMALISES[name]:
        yield f"that expert weights are {'' if experts.renormalise else 'not '}normalised in this family"
    if scaling is not None and scaling.kind == "llama3" and name != "llama":
        yield "Llama 3's rotary scaling in this family"
    if scaling is not None and not scaling.truncate:
        yield "YaRN without truncation"
    if name in ("olmo2", "olmoe", "phi3") and architecture.query_size != architecture.hidden_size:
        yield "heads that are together not as wide as the model in this family"
    if name == "olmoe" and architecture.num_kv_heads != architecture.num_heads:
        yield "fewer heads of keys than of queries in this family"
    if architecture.tied_embeddings and name in ("olmo2", "olmoe"):
        yield "a head that is tied to the embeddings in this family"


def _window_settings(architecture: Architecture) -> dict[str, MetadataItem]:
    windows = [layer.window for layer in architecture.layers]
    width = next((each for each in windows if each is not None), None)
    if width is None:
        return {_WINDOW: 0} if FAMILIES[architecture.family].window == "always" else {}
    return {_WINDOW: width, _WINDOW_PATTERN: np.array([each is not None for each in windows])}


def _expert_settings(architecture: Architecture) -> dict[str, MetadataItem]:
    experts = architecture.experts
    if experts is None:
        return {}
    settings: dict[str, MetadataItem] = {
        "expert_count": experts.num_experts,
        "expert_used_count": experts.num_active,
    }
    if "moe_intermediate_size" in FAMILIES[architecture.family].defaults:
        settings["expert_feed_forward_length"] = experts.intermediate_size
    return settings


def _scaling_settings(scaling: RopeScaling | None) -> dict[str, MetadataItem]:
    if scaling is None:
        return {}
    if scaling.kind == "llama3":
        config = scaling.to_config()
        return {key: config[field] for field, (key, _) in _LLAMA3.items()}
    settings: dict[str, MetadataItem] = {
        f"{_SCALING}.type": scaling.kind,
        f"{_SCALING}.factor": scaling.factor,
    }
    if scaling.kind == "linear":
        return settings
    settings[f"{_SCALING}.original_context_length"] = scaling.original_positions
    settings[f"{_SCALING}.yarn_beta_fast"] = scaling.beta_fast
    settings[f"{_SCALING}.yarn_beta_slow"] = scaling.beta_slow
    usual = _usual_attention_factor(scaling.factor)
    if not math.isclose(scaling.attention_factor, usual):
        # llama.cpp multiplies its own factor by the first; the second is what its converter writes.
        settings[f"{_SCALING}.attn_factor"] = scaling.attention_factor / usual
        settings[f"{_SCALING}.yarn_attn_factor"] = scaling.attention_factor
    return settings


def _usual_attention_factor(factor: float) -> float:
    return 0.1 * math.log(max(factor, 1.0)) + 1.0


class GgufWeights:
    """The weights of an open GGUF file under their canonical names; a `WeightSource`."""

    def __init__(self, gguf: GgufFile, architecture: Architecture) -> None:
        source = str(gguf.path)
        self._gguf = gguf
        self._shapes = architecture.tensor_shapes()
        self._places: dict[str, tuple[str, slice, RowOrder | None]] = {}
        stored = stored_tensors(architecture)
        for name, tensor in stored.items():
            if name not in gguf.tensors:
                raise ModelFormatError(f"{source}: tensor {name} is missing")
            found = gguf.tensor(name).shape
            if found != tensor.shape:
                raise ModelFormatError(f"{source}: tensor {name} is {found}, expected {tensor.shape}")
            self._place(name, tensor)
        extra = [name for name in gguf.tensors if name not in stored and name != ROPE_FREQS]
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
        first = 0
        for name in tensor.parts:
            shape = self._shapes[name]
            num_rows = math.prod(shape[:-1])
            heads = tensor.num_heads
            order = split_head_rows(heads, shape[0] // heads) if heads else None
            self._places[name] = (stored, slice(first, first + num_rows), order)
            first += num_rows

    def _found(self, name: str) -> tuple[str, slice, RowOrder | None]:
        try:
            return self._places[name]
        except KeyError:
            raise ModelFormatError(f"{self._gguf.path}: no tensor for {name}") from None


def _shortest(value: Any) -> Any:
    """A float32 of the file as the shortest decimal that rounds to it: 1e-05, not 9.99999974e-06."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
