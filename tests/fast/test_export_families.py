"""Every family: exported to GGUF and pulled back it is the same model; what GGUF cannot say is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from tests.fast.export_tools import random_folder
from tests.fast.model_files import Tensor, gguf_bytes, tiny_llama
from tokenmill.core import ModelFormatError, UsageError
from tokenmill.models.architecture import Architecture
from tokenmill.models.families import FAMILIES
from tokenmill.models.formats.convert import gguf_architecture, gguf_fields
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.gguf_names import stored_tensors
from tokenmill.models.hf_config import read_architecture
from tokenmill.models.rope import RopeScaling
from tokenmill.models.store.export import export_gguf
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model

COMMON = {
    "vocab_size": 266,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 24,
    "layer_types": ["full_attention", "sliding_attention"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, three bands": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama, linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2": {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen2, windows": {"model_type": "qwen2", **SLIDING},
    "qwen2, attention factor": {"model_type": "qwen2", "rope_scaling": {**YARN, "attention_factor": 1.5}},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "olmo2": {"model_type": "olmo2"},
    "olmoe": {"model_type": "olmoe", "num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi3, window": {"model_type": "phi3", "sliding_window": 24},
}


def described(name: str) -> Architecture:
    return read_architecture({**COMMON, **CONFIGS[name]}, name)


def test_every_family_is_here() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model = random_folder(tmp_path / "model", described(name))
    exported = export_gguf(model, tmp_path / "out.gguf", "bf16")
    back = import_model(exported.path, Library(tmp_path / "home"))
    assert back.architecture == model.architecture
    expected, found = model.weights(), back.weights()
    assert found.names() == expected.names()
    for tensor in expected.names():
        np.testing.assert_array_equal(found.bf16(tensor), expected.bf16(tensor), tensor)
    has_window = any(layer.window for layer in model.architecture.layers)
    assert any("window of 24 tokens" in note for note in exported.notes) == has_window


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_have_the_names_that_llama_cpp_gives_them(name: str) -> None:
    """Against the name table of the reference package, by the names that transformers' files have."""
    architecture = described(name)
    kind = next(
        each
        for each, text in reference.MODEL_ARCH_NAMES.items()
        if text == FAMILIES[architecture.family].gguf_name
    )
    table = reference.get_tensor_name_map(kind, architecture.num_layers)
    checkpoint = {part: stored for stored, parts in architecture.stored_parts().items() for part in parts}
    for stored, tensor in stored_tensors(architecture).items():
        part = checkpoint[tensor.parts[0]]
        if "experts" in part:  # the converter stacks experts under this name
            part = part.replace("experts.0.", "experts.")
        base, suffix = part.rsplit(".", 1)
        assert table.get_name(base) == stored.removesuffix(f".{suffix}"), part


def test_a_quantised_mixture_keeps_its_grid(tmp_path: Path) -> None:
    """Experts are read out of one stacked tensor, and their exact grid is kept."""
    model = random_folder(tmp_path / "model", described("mixtral"))
    exported = export_gguf(model, tmp_path / "out.gguf", "q8_0")
    back = import_model(exported.path, Library(tmp_path / "home"))
    with GgufFile.open(exported.path) as file:
        assert file.tensor("blk.1.ffn_down_exps.weight").shape == (6, 64, 96)
        assert file.tensor("blk.1.ffn_gate_inp.weight").dtype == "F32"
        stacked = file.float32("blk.1.ffn_down_exps.weight")
    for expert in range(6):
        grid = back.weights().grid(f"model.layers.1.mlp.experts.{expert}.down_proj.weight")
        assert grid is not None
        np.testing.assert_array_equal(grid.float32(), stacked[expert])
    again = export_gguf(back, tmp_path / "again.gguf", "q8_0")
    with GgufFile.open(again.path) as file:
        np.testing.assert_array_equal(file.float32("blk.1.ffn_down_exps.weight"), stacked)


def changed(name: str, **changes: Any) -> Architecture:
    return replace(described(name), **changes)


def turned(*rotary: bool) -> Architecture:
    architecture = described("smollm3")
    layers = tuple(
        replace(layer, rotary=each) for layer, each in zip(architecture.layers, rotary, strict=True)
    )
    return replace(architecture, layers=layers)


def partly_routed() -> Architecture:
    first, second = described("olmoe").layers
    return changed("olmoe", layers=(replace(first, routed=False), second))


def renormalised(name: str, value: bool) -> Architecture:
    experts = described(name).experts
    assert experts is not None
    return changed(name, experts=replace(experts, renormalise=value))


SCALING = RopeScaling.from_config(LLAMA3, "llama3")
UNSAYABLE: dict[str, Callable[[], Architecture]] = {
    "the activation relu": lambda: changed("llama", activation="relu"),
    "biases beyond queries": lambda: changed("qwen3", qkv_bias=True, out_bias=True),
    "which layers are not turned": lambda: turned(True, False, True, True, True),
    "some layers have no experts": partly_routed,
    "expert weights are normalised": lambda: renormalised("olmoe", True),
    "expert weights are not normalised": lambda: renormalised("qwen3_moe", False),
    "Llama 3's rotary scaling": lambda: changed("qwen2", rope_scaling=SCALING),
    "YaRN without truncation": lambda: changed(
        "qwen2", rope_scaling=RopeScaling.from_config({**YARN, "truncate": False}, "yarn")
    ),
    "a head that is tied": lambda: changed("olmo2", tied_embeddings=True),
    "not as wide as the model": lambda: changed("phi3", head_dim=32),
    "fewer heads of keys": lambda: changed("olmoe", num_kv_heads=2),
}


@pytest.mark.parametrize(("says", "make"), UNSAYABLE.items(), ids=UNSAYABLE)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    says: str, make: Callable[[], Architecture]
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        gguf_fields(make())
    assert "--to hf" in caught.value.hint


def opened(folder: Path, metadata: dict[str, Any], *more: Any) -> GgufFile:
    (folder / "x.gguf").write_bytes(gguf_bytes(metadata, [*tiny_llama()[1], *more]))
    return GgufFile.open(folder / "x.gguf")


BAD: dict[str, dict[str, Any]] = {
    r"general\.architecture is 'gemma'": {"general__architecture": "gemma"},
    r"llama\.block_count is missing": {"llama__block_count": None},
    r"llama\.attention\.layer_norm_rms_epsilon is missing": {
        "llama__attention__layer_norm_rms_epsilon": None
    },
    r"llama\.logit_scale is 0\.5": {"llama__logit_scale": 0.5},
    r"llama\.expert_gating_func is 2": {"llama__expert_gating_func": 2},
    r"llama\.expert_used_count is missing": {"llama__expert_count": 4},
    r"llama\.attention\.head_count is a list": {"llama__attention__head_count": [4, 4]},
    r"rope_type is 'longrope'": {"llama__rope__scaling__type": "longrope"},
    r"factor is None": {"llama__rope__scaling__type": "yarn"},
    r"num_key_value_heads is 0": {"llama__attention__head_count_kv": 0},
    r"head_dim is 0": {"llama__attention__key_length": 0},
    r"llama\.rope\.dimension_count differs": {"llama__rope__dimension_count": 8},
}


@pytest.mark.parametrize(("says", "changes"), BAD.items(), ids=BAD)
def test_descriptions_that_are_not_usable_name_the_key(
    says: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    metadata = {key: value for key, value in tiny_llama(**changes)[0].items() if value is not None}
    with opened(tmp_path, metadata) as file, pytest.raises(ModelFormatError, match=says):
        gguf_architecture(file)


def test_a_mixture_of_a_family_that_needs_experts(tmp_path: Path) -> None:
    metadata = {key.replace("llama.", "qwen3moe."): value for key, value in tiny_llama()[0].items()}
    metadata["general.architecture"] = "qwen3moe"
    with (
        opened(tmp_path, metadata) as file,
        pytest.raises(ModelFormatError, match=r"qwen3moe\.expert_count is missing"),
    ):
        gguf_architecture(file)


def divisors(factor: float, low: float, theta: float) -> bytes:
    """As the converter of the format makes them, for heads of 16."""
    turns = 8192 / theta ** (np.arange(0, 16, 2, dtype=np.float32) / 16) / (2 * np.pi)
    smooth = np.clip((turns - low) / (4.0 - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype("<f4").tobytes()


def test_llama_3_files_of_others(tmp_path: Path) -> None:
    """Their divisors give back Llama 3's numbers; any others are refused, not approximated."""
    metadata = {**tiny_llama()[0], "llama.rope.freq_base": 5e5}

    def with_divisors(low: float) -> GgufFile:
        data = divisors(32.0, low, 5e5)
        return opened(
            tmp_path, metadata, Tensor(name="rope_freqs.weight", shape=(8,), dtype="F32", data=data)
        )

    with with_divisors(1.0) as file:
        scaling = gguf_architecture(file).rope_scaling
    assert scaling is not None and (scaling.kind, scaling.factor) == ("llama3", 32.0)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
    assert scaling.original_positions == 8192
    with with_divisors(2.5) as file, pytest.raises(ModelFormatError, match="not Llama 3's rotary scaling"):
        gguf_architecture(file)
