"""Architecture: costs of a known model, and a config that is not trusted."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tokenmill.core import ModelFormatError
from tokenmill.models.hf_config import architecture_to_config, load_json_object, read_architecture

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def test_costs_of_smollm2() -> None:
    model = read_architecture(SMOLLM2, "config.json")
    assert model.block_macs_per_token == 106_168_320
    assert model.head_macs_per_token == 28_311_552
    assert model.macs_per_token == 134_479_872
    assert model.num_params == model.num_active_params == 134_515_008
    assert model.kv_bytes_per_token() == 23_040
    assert model.kv_bytes_per_token(1) == 11_520
    assert model.attention_flops(1000) == 4 * 30 * 576 * 1000
    assert model.head_dim == 64 and model.query_size == 576 and model.kv_size == 192


def test_parameters_are_the_tensors() -> None:
    for tied in (True, False):
        model = read_architecture({**SMOLLM2, "tie_word_embeddings": tied}, "config.json")
        sizes = [rows * (rest[0] if rest else 1) for rows, *rest in model.tensor_shapes().values()]
        assert sum(sizes) == model.num_params


def test_config_round_trip() -> None:
    model = read_architecture(SMOLLM2, "config.json")
    assert read_architecture(architecture_to_config(model), "again") == model
    several = dataclasses.replace(model, eos_token_ids=(0, 2), bos_token_id=None)
    assert read_architecture(architecture_to_config(several), "again") == several


def test_newer_and_shorter_spellings() -> None:
    config = {**SMOLLM2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del config["rope_theta"], config["num_key_value_heads"]
    model = read_architecture(config, "config.json")
    assert model.rope_theta == 5e5 and model.num_kv_heads == 9


BAD = [
    ("model_type", "gpt2"),
    ("model_type", None),
    ("model_type", ["llama"]),
    ("attention_bias", "yes"),
    ("mlp_bias", 1),
    ("hidden_act", "gelu"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_parameters", {"rope_type": "yarn"}),
    ("rope_scaling", {"type": "longrope"}),
    ("rope_scaling", {"type": "linear", "factor": float("nan")}),
    ("rope_parameters", [1]),
    ("sliding_window", 4096),
    ("quantization_config", {"bits": 4}),
    ("num_local_experts", 8),
    ("vocab_size", 0),
    ("vocab_size", 10**400),
    ("vocab_size", "49152"),
    ("vocab_size", None),
    ("vocab_size", True),
    ("hidden_size", -576),
    ("hidden_size", 576.5),
    ("num_hidden_layers", 10**6),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 2),
    ("head_dim", 63),
    ("intermediate_size", float("inf")),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", float("nan")),
    ("rope_theta", -1),
    ("max_position_embeddings", 2**40),
    ("tie_word_embeddings", "yes"),
    ("bos_token_id", 49152),
    ("eos_token_id", -1),
    ("eos_token_id", [2, 99999]),
    ("eos_token_id", [0] * 1000),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_config_names_the_field(field: str, value: object) -> None:
    named = "num_attention_heads" if (field, value) == ("num_attention_heads", 0) else field
    with pytest.raises(ModelFormatError, match=named) as caught:
        read_architecture({**SMOLLM2, field: value}, "config.json")
    assert caught.value.message.startswith("config.json: ")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b"9" * 10_000, b'{"a": "' + b"x" * (1 << 20) + b'"}']
)
def test_bad_json_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        load_json_object(path)
    with pytest.raises(ModelFormatError, match="cannot be read"):
        load_json_object(tmp_path / "absent.json")


MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_window_layers": 48,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def test_parameters_of_known_mixtures() -> None:
    """Totals are the published ones; active: all but the experts that a token is not sent to."""
    mixtral = read_architecture(MIXTRAL_8X7B, "config.json")
    assert mixtral.num_params == 46_702_792_704
    assert mixtral.num_active_params == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336 == 12_879_925_248
    qwen = read_architecture(QWEN3_30B_A3B, "config.json")
    assert qwen.num_params == 30_532_122_624
    assert qwen.num_active_params == 30_532_122_624 - 48 * 120 * 3 * 2048 * 768 == 3_353_032_704
    # A token's multiply-accumulates: its active weights, less the table it looks itself up in and the norms.
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    assert qwen.macs_per_token == qwen.num_active_params - 151936 * 2048 - norms
