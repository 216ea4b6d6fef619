"""`config.json` to an architecture and back.

A config comes from a stranger, so every number is bounded before anything is sized by it, and a feature that
the engine does not compute is an error that names the field, never silently ignored. What a file leaves out
is what the family's own loader assumes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenmill.core.errors import ModelFormatError
from tokenmill.kernels import Activation
from tokenmill.models.architecture import Architecture, Experts, Layer
from tokenmill.models.families import FAMILIES, Family, family_of
from tokenmill.models.rope import RopeScaling

__all__ = ["MAX_JSON_BYTES", "architecture_to_config", "load_json_object", "read_architecture"]

MAX_JSON_BYTES: Final = 1 << 20

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
    "sliding_window": (1, 1 << 24),
    "max_window_layers": (0, 1024),
    "no_rope_layer_interval": (1, 1024),
    "num_local_experts": (1, 1024),
    "num_experts": (1, 1024),
    "num_experts_per_tok": (1, 1024),
    "moe_intermediate_size": (8, 1 << 18),
    "decoder_sparse_step": (1, 1024),
}
_MAX_EXPERTS: Final = 1 << 15
"""In all layers together: each has three tensors, of which tables are made before a file is looked at."""
_DEFAULTS: Final[Mapping[str, Any]] = {"rms_norm_eps": 1e-6}
_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_UNSUPPORTED_UNLESS: Final[Mapping[str, tuple[object, ...]]] = {
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "clip_qkv": (None,),
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
}
_NULLABLE: Final = frozenset({"sliding_window", "bos_token_id", "eos_token_id"})
"""Fields whose null is a value of its own and not the family's default."""
_EXPERT_FIELDS: Final = ("num_local_experts", "num_experts", "n_routed_experts")


def read_architecture(config: Mapping[str, Any], source: str) -> Architecture:
    """Read a Hugging Face `config.json`; `source` is what errors call it.

    Raises ModelFormatError naming the field that is missing, out of bounds or not supported.
    """
    name = family_of(config.get("model_type"), source)
    family = FAMILIES[name]
    _refuse_unsupported(config, family, source)
    given = {key: value for key, value in config.items() if value is not None or key in _NULLABLE}
    # transformers 5 writes the same number of experts under another name than the published files have.
    for spelling in _EXPERT_FIELDS:
        if family.experts_field and spelling in given:
            given.setdefault(family.experts_field, given[spelling])
    config = {**_DEFAULTS, **family.defaults, **given}
    read = _Fields(config, source)
    hidden_size, num_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    vocab_size, num_layers = read.integer("vocab_size"), read.integer("num_hidden_layers")
    rope_field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = read.mapping(rope_field)
    experts = _experts(read, family)
    if experts is not None and num_layers * experts.num_experts > _MAX_EXPERTS:
        raise ModelFormatError(
            f"{source}: {family.experts_field} {experts.num_experts} in each of {num_layers} layers: "
            f"over {_MAX_EXPERTS} together"
        )
    architecture = Architecture(
        family=name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=read.integer("num_key_value_heads", num_heads),
        head_dim=read.integer("head_dim", hidden_size // num_heads),
        intermediate_size=read.integer("intermediate_size"),
        norm_eps=read.number("rms_norm_eps"),
        rope_theta=_rope_theta(config, rope, source),
        rope_scaling=RopeScaling.from_config(rope, f"{source}: {rope_field}"),
        max_positions=read.integer("max_position_embeddings"),
        tied_embeddings=read.flag("tie_word_embeddings"),
        bos_token_id=_token_id(config.get("bos_token_id"), vocab_size, f"{source}: bos_token_id"),
        eos_token_ids=_token_ids(config.get("eos_token_id"), vocab_size, f"{source}: eos_token_id"),
        layers=_layers(read, family, num_layers, experts),
        activation=_activation(config, source),
        qkv_bias=read.flag("attention_bias") if family.qkv_bias == "config" else family.qkv_bias,
        out_bias=read.flag("attention_bias") if family.out_bias == "config" else family.out_bias,
        mlp_bias=read.flag("mlp_bias") if family.mlp_bias == "config" else family.mlp_bias,
        qk_norm=family.qk_norm,
        post_norm=family.post_norm,
        experts=experts,
    )
    _check_heads(architecture, source)
    return architecture


def architecture_to_config(architecture: Architecture) -> dict[str, Any]:
    """The Hugging Face `config.json` that says the same; transformers and vLLM open it."""
    eos = list(architecture.eos_token_ids)
    family = FAMILIES[architecture.family]
    scaling = architecture.rope_scaling
    config = {
        "architectures": [family.hf_class],
        "model_type": architecture.family,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "intermediate_size": architecture.intermediate_size,
        "hidden_act": next(name for name, each in _ACTIVATIONS.items() if each == architecture.activation),
        "rms_norm_eps": architecture.norm_eps,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": None if scaling is None else scaling.to_config(),
        "max_position_embeddings": architecture.max_positions,
        "tie_word_embeddings": architecture.tied_embeddings,
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
    }
    if "config" in (family.qkv_bias, family.out_bias):
        config["attention_bias"] = architecture.qkv_bias
    if family.mlp_bias == "config":
        config["mlp_bias"] = architecture.mlp_bias
    return config | _layer_fields(architecture, family) | _expert_fields(architecture, family)


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


class _Fields:
    """Values of one config, each of its type and within its bounds."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def number(self, field: str, default: float | None = None) -> float:
        return _number(self.config, field, self.source, default)

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.number(field, default)
        if value != int(value):
            raise ModelFormatError(f"{self.source}: {field} is {value!r}, expected a whole number")
        return int(value)

    def flag(self, field: str) -> bool:
        value = self.config.get(field, False)
        if not isinstance(value, bool):
            raise ModelFormatError(f"{self.source}: {field} is {_short(value)}, expected true or false")
        return value

    def mapping(self, field: str) -> Mapping[str, Any]:
        value = self.config.get(field) or {}
        if not isinstance(value, dict):
            raise ModelFormatError(f"{self.source}: {field} is {_short(value)}, expected an object")
        return value

    def layer_list(self, field: str, num_layers: int) -> list[Any] | None:
        """A list with an entry a layer; None where the field is absent."""
        value = self.config.get(field)
        if value is not None and (not isinstance(value, list) or len(value) != num_layers):
            raise ModelFormatError(f"{self.source}: {field} is no list of {num_layers} entries, one a layer")
        return value


def _layers(read: _Fields, family: Family, num_layers: int, experts: Experts | None) -> tuple[Layer, ...]:
    rotary = _rotary_layers(read, family, num_layers)
    windows = _windows(read, family, num_layers, rotary)
    routed = [experts is not None] * num_layers
    if "decoder_sparse_step" in family.defaults:  # the others ignore it
        routed = _routed_layers(read, num_layers)
    return tuple(
        Layer(rotary=turned, window=window, routed=is_routed)
        for turned, window, is_routed in zip(rotary, windows, routed, strict=True)
    )


def _rotary_layers(read: _Fields, family: Family, num_layers: int) -> list[bool]:
    """SmolLM3: every fourth layer is not turned, or what `no_rope_layers` says (1 is turned)."""
    if "no_rope_layer_interval" not in family.defaults:
        return [True] * num_layers
    listed = read.layer_list("no_rope_layers", num_layers)
    if listed is None:
        interval = read.integer("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if any(each not in (0, 1) for each in listed):
        raise ModelFormatError(f"{read.source}: no_rope_layers has an entry that is not 0 or 1")
    return [bool(each) for each in listed]


def _windows(read: _Fields, family: Family, num_layers: int, rotary: list[bool]) -> list[int | None]:
    """The window of each layer. `layer_types` decides where it is given."""
    is_on = family.window == "always" or (family.window == "switched" and read.flag("use_sliding_window"))
    if not is_on or read.config.get("sliding_window") is None:
        return [None] * num_layers
    window = read.integer("sliding_window")
    types = read.layer_list("layer_types", num_layers)
    if types is not None and family.window == "switched":
        for each in types:
            if each not in ("full_attention", "sliding_attention"):
                raise ModelFormatError(
                    f"{read.source}: layer_types has {_short(each)}, which is not supported"
                )
        return [window if each == "sliding_attention" else None for each in types]
    if "no_rope_layer_interval" in family.defaults:
        return [None if turned else window for turned in rotary]
    first = read.integer("max_window_layers") if "max_window_layers" in family.defaults else 0
    return [window if layer >= first else None for layer in range(num_layers)]


def _routed_layers(read: _Fields, num_layers: int) -> list[bool]:
    step = read.integer("decoder_sparse_step", 1)
    dense = read.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(each, int) for each in dense):
        raise ModelFormatError(f"{read.source}: mlp_only_layers is no list of layers")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]


def _experts(read: _Fields, family: Family) -> Experts | None:
    if not family.experts_field:
        return None
    num_experts, num_active = read.integer(family.experts_field), read.integer("num_experts_per_tok")
    if num_active > num_experts:
        raise ModelFormatError(
            f"{read.source}: num_experts_per_tok {num_active} is above {family.experts_field} {num_experts}"
        )
    width = "moe_intermediate_size" if "moe_intermediate_size" in family.defaults else "intermediate_size"
    renormalise = read.flag("norm_topk_prob") if family.renormalise == "config" else family.renormalise
    return Experts(
        num_experts=num_experts,
        num_active=num_active,
        intermediate_size=read.integer(width),
        renormalise=renormalise,
    )


def _layer_fields(architecture: Architecture, family: Family) -> dict[str, Any]:
    """The fields that say what differs between layers, as far as the family knows them."""
    fields: dict[str, Any] = {}
    windows = [layer.window for layer in architecture.layers]
    width = next((each for each in windows if each is not None), None)
    if family.window != "none":
        fields["sliding_window"] = width
    if family.window == "switched":
        fields["use_sliding_window"] = width is not None
        if width is not None:
            fields["layer_types"] = [
                "full_attention" if each is None else "sliding_attention" for each in windows
            ]
    if "no_rope_layer_interval" in family.defaults:
        fields["no_rope_layers"] = [int(layer.rotary) for layer in architecture.layers]
    return fields


def _expert_fields(architecture: Architecture, family: Family) -> dict[str, Any]:
    experts = architecture.experts
    if experts is None:
        return {}
    fields: dict[str, Any] = {
        family.experts_field: experts.num_experts,
        "num_experts_per_tok": experts.num_active,
    }
    if family.renormalise == "config":
        fields["norm_topk_prob"] = experts.renormalise
    if "moe_intermediate_size" in family.defaults:
        dense = [index for index, layer in enumerate(architecture.layers) if not layer.routed]
        fields |= {"moe_intermediate_size": experts.intermediate_size}
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return fields


def _check_heads(architecture: Architecture, source: str) -> None:
    if architecture.num_heads % architecture.num_kv_heads:
        raise ModelFormatError(
            f"{source}: num_attention_heads {architecture.num_heads} is no multiple of "
            f"num_key_value_heads {architecture.num_kv_heads}"
        )
    if architecture.head_dim % 2:
        raise ModelFormatError(f"{source}: head_dim {architecture.head_dim} is odd, rotation needs pairs")


def _refuse_unsupported(config: Mapping[str, Any], family: Family, source: str) -> None:
    fixed: dict[str, tuple[object, ...]] = {}
    if family.mlp_bias is False:
        fixed["mlp_bias"] = (False, None)
    if not family.experts_field:
        fixed |= dict.fromkeys(_EXPERT_FIELDS, (None, 0))
    if family.window == "none":
        fixed["sliding_window"] = (None,)
    for field, allowed in {**_UNSUPPORTED_UNLESS, **fixed}.items():
        if config.get(field) not in allowed:
            raise ModelFormatError(f"{source}: {field} is {_short(config[field])}, which is not supported")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("partial_rotary_factor") not in (1, 1.0, None):
        raise ModelFormatError(f"{source}: partial_rotary_factor is not supported")


def _activation(config: Mapping[str, Any], source: str) -> Activation:
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelFormatError(
            f"{source}: hidden_act is {_short(name)}, which is not supported",
            hint=f"supported: {', '.join(_ACTIVATIONS)}",
        )
    return _ACTIVATIONS[name]


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
        raise ModelFormatError(f"{field}: {_short(value)} is no token of a vocabulary of {vocab_size}")
    return value


def _number(config: Mapping[str, Any], field: str, source: str, default: float | None = None) -> float:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ModelFormatError(f"{source}: {field} is missing")
    low, high = _BOUNDS[field]  # NaN and infinity are outside any interval
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ModelFormatError(
            f"{source}: {field} is {_short(value)}, expected a number from {low} to {high}"
        )
    return float(value)


def _rope_theta(config: Mapping[str, Any], rope: Mapping[str, Any], source: str) -> float:
    """`rope_theta`, at the top or (transformers 5) inside `rope_parameters`; 10,000 where neither is."""
    theta = config.get("rope_theta", rope.get("rope_theta"))
    return _number({"rope_theta": theta}, "rope_theta", source, 1e4)


def _short(value: object) -> str:
    return repr(value)[:80]
