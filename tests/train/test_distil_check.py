"""The check after an export: sound directories pass, broken ones are named and blocked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.tiny_teacher import examples_of, make_teacher
from tokenmill.compress import ExportMismatch, check_export, drift, row_drift
from tokenmill.models.formats.bfloat16 import round_to_bf16
from tokenmill.models.formats.safetensors import write_safetensors
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("TOKENMILL_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def model(tmp_path: Path) -> ModelDirectory:
    return make_teacher(tmp_path / "model")


def windows(model: ModelDirectory) -> list[list[int]]:
    return [list(each.tokens) for each in examples_of(model, 6)]


def test_what_was_exported_is_served(model: ModelDirectory) -> None:
    report = check_export(model, windows(model))
    assert [each.weights for each in report.formats] == ["bf16", "w8a8"]
    assert all(each.num_wrong_tokens == 0 and each.num_answer_tokens == 64 for each in report.formats)
    assert report.formats[0].drift.relative_error < 0.03
    assert report.formats[0].drift.same_top_p > 0.9


Damage = Callable[[dict[str, np.ndarray]], None]


def swap_heads(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = np.roll(tensors[name], 16, axis=0)


def swap_layers(tensors: dict[str, np.ndarray]) -> None:
    for end in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        one, other = (f"model.layers.{i}.{end}" for i in (0, 2))
        tensors[one], tensors[other] = tensors[other], tensors[one]


def shift_vocabulary(tensors: dict[str, np.ndarray]) -> None:
    name = "model.embed_tokens.weight"
    tensors[name] = np.roll(tensors[name], 1, axis=0)


def lose_norm(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] *= np.linspace(0.5, 1.5, 64, dtype=np.float32)


@pytest.mark.parametrize("damage", [swap_heads, swap_layers, shift_vocabulary, lose_norm])
def test_a_broken_export_is_blocked(model: ModelDirectory, damage: Damage) -> None:
    trained = TorchDecoder.load(model.architecture, model.weights())
    source = model.weights()
    tensors = {name: source.float32(name) for name in source.names()}
    shapes = {name: values.shape for name, values in tensors.items()}
    damage(tensors)
    write_safetensors(
        model.path / "model.safetensors", shapes, "BF16", lambda name: round_to_bf16(tensors[name])
    )
    broken = ModelDirectory.open(model.path)
    with pytest.raises(
        ExportMismatch, match=r"the engine differs from the torch twin \(bf16: relative error"
    ):
        check_export(broken, windows(model), twin=trained)


def test_a_model_that_is_not_a_number_is_blocked(model: ModelDirectory) -> None:
    trained = TorchDecoder.load(model.architecture, model.weights())
    with torch.no_grad():
        trained.model.norm.weight[0] = float("nan")
    with pytest.raises(ExportMismatch):
        check_export(model, windows(model), twin=trained)


def test_drift_of_known_distributions() -> None:
    """Two tokens: p = (3/4, 1/4), q = (1/2, 1/2); and the same once more with a constant added."""
    p, q = np.log(np.array([[3.0, 1.0]], np.float32)), np.zeros((1, 2), np.float32)
    same = row_drift(p, p + 5, np.array([0]))
    other = row_drift(p, q, np.array([0]))
    found = drift([same, other])
    kld = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert found.num_positions == 2
    assert found.max_kld == pytest.approx(kld) and found.mean_kld == pytest.approx(kld / 2)
    assert found.rms_delta_p == pytest.approx(0.25 / np.sqrt(2))
    assert found.same_top_p == 1.0  # of equal logits the first is taken
    assert found.relative_error == pytest.approx(np.sqrt(0.5))
    assert [line.partition(":")[0] for line in found.lines()] == [
        "Mean    KLD", "99.9%   KLD", "Maximum KLD", "RMS delta p", "Same top p",
    ]  # fmt: skip
