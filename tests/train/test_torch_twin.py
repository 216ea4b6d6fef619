"""The torch twin against transformers, on tiny random models with copied weights."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tokenmill.core import ModelFormatError, UsageError
from tokenmill.models.formats.bfloat16 import F32Array, U16Array
from tokenmill.models.formats.gguf_quants import Grid
from tokenmill.models.hf_config import read_architecture
from tokenmill.models.torch_twin import HEAD_ROWS, TorchDecoder

TOLERANCE = 1e-4
SHAPES: dict[str, dict[str, Any]] = {
    "grouped, tied": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    "multi-head, untied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "multi-query, odd sizes": {
        "hidden_size": 33,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "intermediate_size": 57,
        "vocab_size": 101,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    },
    "one layer, one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1},
}


class StateDictSource:
    """A weight source over the state dict of a model in memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.state = model.state_dict()

    def names(self) -> tuple[str, ...]:
        return tuple(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def float32(self, name: str) -> F32Array:
        return np.array(self.state[name].numpy())

    def bf16(self, name: str) -> U16Array:
        return np.array(self.state[name].bfloat16().view(torch.uint16).numpy())

    def grid(self, name: str) -> Grid | None:
        return None


def reference(shape: str) -> LlamaForCausalLM:
    """A random model whose logits spread widely, so that a tolerance of 1e-4 says something."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "vocab_size": 160, "num_hidden_layers": 3}
    options = sizes | {"tie_word_embeddings": True, "max_position_embeddings": 512} | SHAPES[shape]
    torch.manual_seed(len(shape))
    model = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = weight.ndim == 1
            scale = 0.3 if is_norm else weight.shape[1] ** -0.5
            weight.copy_(torch.randn_like(weight) * scale * (4 if "q_proj" in name else 1) + is_norm)
    return model


def twin_of(model: LlamaForCausalLM) -> TorchDecoder:
    architecture = read_architecture(model.config.to_dict(), "the reference's config")
    return TorchDecoder.load(architecture, StateDictSource(model))


def random_tokens(model: LlamaForCausalLM, num_sequences: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(model.config.vocab_size, (num_sequences, num_tokens), generator=generator)


def worst(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return float((left - right).abs().max().detach())


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str) -> None:
    model = reference(shape)
    twin = twin_of(model)
    for num_sequences, num_tokens in ((1, 1), (2, 2), (3, 17), (1, 130)):
        tokens_BT = random_tokens(model, num_sequences, num_tokens)
        with torch.inference_mode():
            expected_BTV = model(tokens_BT).logits
            assert expected_BTV.std() > 0.5
            assert worst(twin(tokens_BT), expected_BTV) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_names_are_those_of_a_checkpoint(shape: str) -> None:
    model = reference(shape)
    architecture = read_architecture(model.config.to_dict(), "the reference's config")
    twin = TorchDecoder(architecture)
    assert set(twin.state_dict()) == set(model.state_dict())
    assert {name: tuple(x.shape) for name, x in twin.named_parameters()} == architecture.tensor_shapes()
    twin.load_state_dict(model.state_dict())
    tokens_BT = random_tokens(model, 1, 9)
    assert worst(twin(tokens_BT), twin_of(model)(tokens_BT)) == 0.0
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_transformers(shape: str) -> None:
    model = reference(shape)
    twin = twin_of(model)
    tokens_BT = random_tokens(model, 2, 12)
    model(tokens_BT, labels=tokens_BT).loss.backward()
    torch.autograd.backward(-twin.logprobs(tokens_BT).mean())
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    for name, weight in twin.named_parameters():
        expected = gradients.pop(name)
        assert weight.grad is not None and expected is not None, name
        # One token leaves keys and queries without a gradient; twelve do not.
        assert float(weight.grad.abs().max()) > 1e-6, name
        assert worst(weight.grad, expected) < TOLERANCE, name
    assert not gradients


def test_a_step_along_the_gradient_keeps_a_tied_head_tied_and_lowers_the_loss() -> None:
    model = reference("grouped, tied")
    twin = twin_of(model)
    tokens_BT = random_tokens(model, 2, 30)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    before = -twin.logprobs(tokens_BT).mean()
    torch.autograd.backward(before)
    optimizer.step()
    assert (-twin.logprobs(tokens_BT).mean()).item() < before.item()
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_logprobs_equal_transformers_and_bound_the_head() -> None:
    model = reference("grouped, tied")
    twin = twin_of(model)
    tokens_BT = random_tokens(model, 2, 200)
    rows: list[int] = []
    twin.lm_head.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
    with torch.inference_mode():
        logprobs_BTV = model(tokens_BT).logits[:, :-1].double().log_softmax(-1)
        expected_BT = logprobs_BTV.gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)
        assert worst(twin.logprobs(tokens_BT), expected_BT) < TOLERANCE
        assert sum(rows) == 2 * 199 and max(rows) == HEAD_ROWS
        assert twin.logprobs(tokens_BT[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_points_mean_what_their_names_say(shape: str) -> None:
    model = reference(shape)
    twin = twin_of(model)
    tokens_BT = random_tokens(model, 2, 11)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.update({name: arguments[0]}) if arguments else None
        )
    seen: dict[str, Tensor] = {}
    with torch.inference_mode():
        states = model(tokens_BT, output_hidden_states=True).hidden_states
        hooks = {name: _reader(seen, name) for name in twin.hook_names}
        assert worst(twin(tokens_BT, hooks), twin(tokens_BT)) == 0.0
    assert tuple(seen) == twin.hook_names
    assert worst(seen["hook_embed"], states[0]) < TOLERANCE
    for layer in range(model.config.num_hidden_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        same = {
            f"{ours}.hook_resid_pre": states[layer],
            f"{ours}.hook_resid_mid": inputs[f"{theirs}.post_attention_layernorm"],
            f"{ours}.mlp.hook_post": inputs[f"{theirs}.mlp.down_proj"],
        }
        for name, expected in same.items():
            assert worst(seen[name], expected) < TOLERANCE, name
        z_BTHE = seen[f"{ours}.attn.hook_z"]
        assert z_BTHE.shape[2] == model.config.num_attention_heads
        assert worst(z_BTHE.flatten(2), inputs[f"{theirs}.self_attn.o_proj"]) < TOLERANCE
        assert worst(seen[f"{ours}.ln1.hook_normalized"], inputs[f"{theirs}.self_attn.q_proj"]) < TOLERANCE
        assert worst(seen[f"{ours}.ln2.hook_normalized"], inputs[f"{theirs}.mlp.gate_proj"]) < TOLERANCE
    last = f"blocks.{model.config.num_hidden_layers - 1}.hook_resid_post"
    assert worst(seen[last], inputs["model.norm"]) < TOLERANCE
    assert worst(seen["ln_final.hook_normalized"], inputs["lm_head"]) < TOLERANCE


def test_replacing_a_value_by_itself_changes_nothing_at_any_point() -> None:
    model = reference("grouped, tied")
    twin = twin_of(model)
    tokens_BT = random_tokens(model, 2, 9)
    with torch.inference_mode():
        plain_BTV = twin(tokens_BT)
        for name in twin.hook_names:
            assert worst(twin(tokens_BT, {name: torch.clone}), plain_BTV) == 0.0, name


def test_replacing_a_value_changes_only_later_positions_and_points() -> None:
    model = reference("grouped, tied")
    twin = twin_of(model)
    tokens_BT = random_tokens(model, 1, 9)
    names = twin.hook_names
    plain: dict[str, Tensor] = {}
    with torch.inference_mode():
        plain_BTV = twin(tokens_BT, {name: _reader(plain, name) for name in names})
        for number, name in enumerate(names):
            seen: dict[str, Tensor] = {}
            hooks: dict[str, Callable[[Tensor], Tensor | None]] = {
                other: _reader(seen, other) for other in names if other != name
            }
            changed_BTV = twin(tokens_BT, hooks | {name: _moved_from_position_4})
            assert worst(changed_BTV[:, :4], plain_BTV[:, :4]) == 0.0, name
            assert all(worst(changed_BTV[:, t], plain_BTV[:, t]) > 1e-3 for t in range(4, 9)), name
            for other in names[:number]:
                assert worst(seen[other], plain[other]) == 0.0, (name, other)
            for other in names[number + 1 :]:
                assert worst(seen[other][:, :4], plain[other][:, :4]) == 0.0, (name, other)
                assert worst(seen[other][:, 4:], plain[other][:, 4:]) > 1e-3, (name, other)


def test_a_patched_residual_stream_gives_the_donor_s_logits() -> None:
    model = reference("grouped, tied")
    twin = twin_of(model)
    tokens_BT, donor_BT = random_tokens(model, 1, 9), random_tokens(model, 1, 9).flip(1)
    seen: dict[str, Tensor] = {}
    with torch.inference_mode():
        donor_BTV = twin(donor_BT, {name: _reader(seen, name) for name in twin.hook_names})
        assert worst(twin(tokens_BT), donor_BTV) > 0.5
        for name in twin.hook_names:
            if "resid" in name or name in ("hook_embed", "ln_final.hook_normalized"):
                patched_BTV = twin(tokens_BT, {name: lambda _, name=name: seen[name]})
                assert worst(patched_BTV, donor_BTV) == 0.0, name


def test_gradients_flow_through_a_replaced_value() -> None:
    model = reference("grouped, tied")
    twin = twin_of(model)
    tokens_BT = random_tokens(model, 1, 5)
    steering_D = torch.zeros(twin.architecture.hidden_size, requires_grad=True)
    logits_BTV = twin(tokens_BT, {"blocks.1.hook_resid_post": lambda x_BTD: x_BTD + steering_D})
    torch.autograd.backward(logits_BTV.square().mean())
    assert steering_D.grad is not None and float(steering_D.grad.abs().max()) > 1e-3


def test_misuse_is_a_usage_error() -> None:
    model = reference("one layer, one head")
    twin = twin_of(model)
    tokens_BT = random_tokens(model, 1, 4)
    with pytest.raises(UsageError, match=r"no point is named blocks\.1\.hook_resid_post"):
        twin(tokens_BT, {"blocks.1.hook_resid_post": lambda x: x})
    with pytest.raises(UsageError, match=r"hook_embed returned shape \(1, 3, 48\)"):
        twin(tokens_BT, {"hook_embed": lambda x_BTD: x_BTD[:, 1:]})
    with pytest.raises(UsageError, match="513 tokens in a sequence; this model takes at most 512"):
        twin(random_tokens(model, 1, 513))


def test_weights_of_another_shape_are_refused_by_name() -> None:
    model = reference("grouped, tied")
    config = model.config.to_dict() | {"intermediate_size": 64}
    architecture = read_architecture(config, "config.json")
    with pytest.raises(ModelFormatError, match=r"gate_proj\.weight has shape \(80, 48\), not \(64, 48\)"):
        TorchDecoder.load(architecture, StateDictSource(model))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.5)])
def test_other_dtypes_come_near(dtype: torch.dtype, tolerance: float) -> None:
    model = reference("grouped, tied")
    twin = TorchDecoder.load(twin_of(model).architecture, StateDictSource(model), dtype)
    tokens_BT = random_tokens(model, 1, 20)
    with torch.inference_mode():
        logits_BTV = twin(tokens_BT)
        assert logits_BTV.dtype == dtype
        assert 0.0 < worst(logits_BTV.float(), model(tokens_BT).logits) < tolerance
        assert twin.logprobs(tokens_BT).dtype == torch.float32


def test_norms_of_a_bfloat16_model_are_computed_in_float32() -> None:
    model = reference("grouped, tied")
    twin = twin_of(model).bfloat16()
    seen: dict[str, Tensor] = {}
    norm = "blocks.1.ln1.hook_normalized"
    with torch.inference_mode():
        stream = "blocks.1.hook_resid_pre"
        twin(random_tokens(model, 1, 20), {name: _reader(seen, name) for name in (stream, norm)})
        x_BTD = seen[stream].float()
        expected_BTD = x_BTD * (x_BTD.square().mean(-1, keepdim=True) + twin.architecture.norm_eps).rsqrt()
        weight_D = twin.get_parameter("model.layers.1.input_layernorm.weight")
        assert worst(seen[norm], weight_D * expected_BTD.bfloat16()) == 0.0


def test_without_torch_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tokenmill.models.torch_twin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"torch is not installed; run: pip install 'tokenmill\[train\]'"):
        importlib.import_module("tokenmill.models.torch_twin")


def test_models_can_be_imported_without_torch() -> None:
    code = "import sys, tokenmill.models, tokenmill.models.architecture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _reader(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """A hook that keeps what it saw and replaces nothing."""

    def read(value: Tensor) -> None:
        seen[name] = value.clone()

    return read


def _moved_from_position_4(value: Tensor) -> Tensor:
    changed = value.clone()
    changed[:, 4:] += torch.linspace(-1.0, 1.0, changed.shape[-1])
    return changed
