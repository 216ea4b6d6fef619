"""Every family: the torch twin equals transformers on small random models, and files mean the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scripts.families.runners import measure, native_logits, same_experts
from scripts.families.zoo import ZOO, make_model, put_on_grid, save_model
from tokenmill.models.architecture import Architecture
from tokenmill.models.hf_config import architecture_to_config, read_architecture
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder

TOLERANCE = 1e-4
NUM_TOKENS = 100


def tokens_BT(vocab_size: int = 160) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(vocab_size, (2, NUM_TOKENS), generator=generator)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        out = model(tokens_BT())
    return out if isinstance(out, torch.Tensor) else out.logits


def worst(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize("name", ZOO)
def test_the_twin_equals_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    directory = ModelDirectory.open(save_model(model, tmp_path))
    twin = TorchDecoder.load(directory.architecture, directory.weights())
    expected = logits(model)
    assert expected.std() > 0.5
    assert worst(logits(twin), expected) < TOLERANCE


@pytest.mark.parametrize("name", ZOO)
def test_the_description_goes_back_to_a_configuration_that_transformers_opens(name: str) -> None:
    model = make_model(name)
    architecture = read_architecture(model.config.to_dict(), "config.json")
    config = architecture_to_config(architecture)
    assert read_architecture(config, "again") == architecture
    again: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float32
    )
    again.load_state_dict(model.state_dict())
    assert worst(logits(again.eval()), logits(model)) == 0


@pytest.mark.parametrize("name", ZOO)
def test_parameters_are_counted(name: str) -> None:
    model = make_model(name)
    architecture = read_architecture(model.config.to_dict(), "config.json")
    shapes = architecture.tensor_shapes()
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(each.numel() for each in model.parameters()) == total == architecture.num_params
    assert {name: tuple(x.shape) for name, x in TorchDecoder(architecture).named_parameters()} == shapes


BOUNDS: dict[WeightFormat, tuple[float, float]] = {
    "bf16": (0.05, 0.001),
    "w8a8": (0.15, 0.010),
    "w4a8": (0.12, 0.008),
}
"""Error of the logits at the middle position over their spread; KL divergence of the next token, nats."""
SAME_EXPERTS: dict[WeightFormat, float] = {"bf16": 0.9, "w8a8": 0.6, "w4a8": 0.7}


@pytest.mark.parametrize("weights", BOUNDS)
@pytest.mark.parametrize("name", ZOO)
def test_the_engine_s_runner_is_near_transformers(
    name: str, weights: WeightFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path))
    model = make_model(name)
    # Four bits lose nothing more where the weights have no more: the rest is the runner's own rounding.
    is_4_bits = weights == "w4a8"
    model = put_on_grid(model) if is_4_bits else model
    folder = save_model(model, tmp_path / "model", torch.float32 if is_4_bits else torch.bfloat16)
    tokens = tokens_BT()[0]
    directory = ModelDirectory.open(folder)
    # A token that a rounding sends to another expert is computed otherwise; those after it attend to it.
    same_T = same_experts(directory, weights, tokens.tolist())
    assert same_T.mean() > SAME_EXPERTS[weights]
    got_TV = native_logits(directory, weights, tokens.tolist())
    distance = measure(got_TV[same_T], logits(model)[0].numpy()[same_T])
    error, divergence = BOUNDS[weights]
    if not same_T.all():
        error, divergence = 2 * error, 5 * divergence
    assert distance.median < error and distance.kl < divergence, (distance, same_T.mean())
    assert distance.decided > 0.95, distance


def without_scaling(architecture: Architecture) -> Architecture:
    return replace(architecture, rope_scaling=None)


def without_windows(architecture: Architecture) -> Architecture:
    return replace(architecture, layers=tuple(replace(each, window=None) for each in architecture.layers))


def all_turned(architecture: Architecture) -> Architecture:
    return replace(architecture, layers=tuple(replace(each, rotary=True) for each in architecture.layers))


def with_silu(architecture: Architecture) -> Architecture:
    return replace(architecture, activation="silu")


def other_weighing(architecture: Architecture) -> Architecture:
    experts = architecture.experts
    assert experts is not None
    return replace(architecture, experts=replace(experts, renormalise=not experts.renormalise))


def one_expert(architecture: Architecture) -> Architecture:
    assert architecture.experts is not None
    return replace(architecture, experts=replace(architecture.experts, num_active=1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Llama 3", without_scaling),
        ("Llama, linear RoPE", without_scaling),
        ("Llama, YaRN", without_scaling),
        ("Llama, GeGLU", with_silu),
        ("Llama, ReGLU", with_silu),
        ("Mistral", without_windows),
        ("Phi-3", without_windows),
        ("Qwen2, windows", without_windows),
        ("SmolLM3", all_turned),
        ("Mixtral", other_weighing),
        ("Mixtral", one_expert),
        ("Qwen3-MoE", other_weighing),
        ("OLMoE", other_weighing),
        ("OLMoE, renormalised", other_weighing),
    ],
)
def test_every_feature_matters(
    name: str, change: Callable[[Architecture], Architecture], tmp_path: Path
) -> None:
    """The control of the first test: a twin without the feature is far from transformers."""
    model = make_model(name)
    directory = ModelDirectory.open(save_model(model, tmp_path))
    twin = TorchDecoder.load(change(directory.architecture), directory.weights())
    assert worst(logits(twin), logits(model)) > 100 * TOLERANCE
