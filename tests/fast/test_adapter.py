"""PEFT's files become what the merged model computes, and files that lie are refused by name.

Run: pytest tests/fast/test_adapter.py
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fast.adapter_files import (
    MATRICES,
    MergedWeights,
    adapter_tensors,
    only,
    plain_config,
    write_adapter,
)
from tests.fast.random_plan import make_batch
from tests.fast.random_weights import RandomWeights, tiny_architecture
from tokenmill.core.errors import ModelFormatError, NotFoundError
from tokenmill.kernels import F32Array, StepPlan, create_executor
from tokenmill.models.adapter import Adapter, pack_adapter, read_adapter
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WeightFormat, pack_model
from tokenmill.models.packing.packed import read_packed, write_packed

ARCHITECTURE = tiny_architecture()
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 100, 40)]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def logits(plan: StepPlan, adapter: Adapter | None = None) -> F32Array:
    executor = create_executor(
        plan, max_rows=40, max_out_rows=40, num_blocks=2, max_adapters=1, num_threads=1
    )
    batch = make_batch([(TOKENS, 0, [0, 1])])
    if adapter is not None:
        executor.set_adapter(0, pack_adapter(adapter, plan))
        batch = replace(batch, adapters=np.zeros(1, np.int32))
    executor.run(batch)
    return executor.buffer("logits")[:40].copy()


def read(folder: Path, tensors: dict[str, F32Array] | None = None, **config: Any) -> Adapter:
    tensors = adapter_tensors(ARCHITECTURE, strength=0.5) if tensors is None else tensors
    return read_adapter(write_adapter(folder, tensors, plain_config(**config)), ARCHITECTURE)


@pytest.mark.parametrize(("weights", "bound"), [("bf16", 0.03), ("w8a8", 0.15)])
def test_every_matrix_shifts_the_logits_as_merging_does(
    tmp_path: Path, weights: WeightFormat, bound: float
) -> None:
    """Each alone, and all: dropped or at half its scale, a matrix would miss the merged shift by 0.5 to 1."""
    source = RandomWeights(ARCHITECTURE, outlier=8.0)
    adapter = read(tmp_path)
    plan = compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, source, weights))
    exact = compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, source, "bf16"))
    plain, exact_plain = logits(plan), logits(exact)
    assert bool(plan.smoothing) == (weights == "w8a8")
    assert len(adapter.pairs) == 14
    for names in [*([name] for name in adapter.pairs), list(adapter.pairs)]:
        part = only(adapter, *names)
        merged = compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, MergedWeights(source, part), "bf16"))
        wanted = logits(merged) - exact_plain
        miss = np.linalg.norm(logits(plan, part) - plain - wanted) / np.linalg.norm(wanted)
        assert miss < bound, (names, miss)


@pytest.mark.parametrize("matrices", [("q_proj", "v_proj"), ("up_proj",), ("o_proj", "down_proj")])
def test_some_matrices_only(tmp_path: Path, matrices: tuple[str, ...]) -> None:
    adapter = read(tmp_path, adapter_tensors(ARCHITECTURE, matrices=matrices))
    source = RandomWeights(ARCHITECTURE)
    plan = compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, source, "bf16"))
    packed = pack_adapter(adapter, plan)
    fused = {"q_proj": 0, "v_proj": 0, "o_proj": 1, "up_proj": 2, "down_proj": 3}
    assert len(packed.linears) == 2 * len({fused[name] for name in matrices})
    merged = pack_model(ARCHITECTURE, MergedWeights(source, adapter), "bf16")
    got, wanted = logits(plan, adapter), logits(compile_plan(ARCHITECTURE, merged))
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.03


def test_scale_is_alpha_by_rank_or_by_its_root(tmp_path: Path) -> None:
    assert read(tmp_path, lora_alpha=24).scale == 3
    assert read(tmp_path, lora_alpha=24, use_rslora=True).scale == pytest.approx(24 / 8**0.5)


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    tensors = adapter_tensors(ARCHITECTURE)
    digest = read(tmp_path, tensors).digest
    assert len(digest) == len(hashlib.sha256().hexdigest())
    shuffled = dict(sorted(tensors.items(), reverse=True))
    assert read(tmp_path, shuffled, lora_dropout=0.5, base_model_name_or_path="b").digest == digest
    changed = {name: values.copy() for name, values in tensors.items()}
    changed[f"{Q0}.lora_B.weight"][3, 3] += 1e-3
    swapped = tensors | {
        f"{Q0.replace('q_proj', to)}.lora_{each}.weight": tensors[
            f"{Q0.replace('q_proj', of)}.lora_{each}.weight"
        ]
        for of, to in (("k_proj", "v_proj"), ("v_proj", "k_proj"))
        for each in "AB"
    }
    others = [read(tmp_path, changed), read(tmp_path, tensors, lora_alpha=8), read(tmp_path, swapped)]
    assert len({digest, *(other.digest for other in others)}) == 4
    plan = compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, RandomWeights(ARCHITECTURE), "bf16"))
    assert pack_adapter(others[0], plan).digest == others[0].digest


def test_smoothing_is_named_by_the_input_and_survives_the_cache(tmp_path: Path) -> None:
    packed = pack_model(ARCHITECTURE, RandomWeights(ARCHITECTURE), "w8a8")
    names = ["ln_final.hook_normalized"]
    for layer in range(2):
        points = ("ln1.hook_normalized", "ln2.hook_normalized", "mlp.hook_post")
        names += [f"blocks.{layer}.{point}" for point in points]
    write_packed(tmp_path / "cache", packed.pieces())
    kept = read_packed(tmp_path / "cache")
    assert kept is not None
    assert sorted(kept.floats) == sorted(packed.floats)
    for model in (packed, kept):
        plan = compile_plan(ARCHITECTURE, model)
        assert sorted(plan.smoothing) == sorted(names)
        for name, factors in plan.smoothing.items():
            np.testing.assert_array_equal(factors, packed.smoothing[name])
            assert factors.shape == ((160,) if "mlp" in name else (96,))
    norm = RandomWeights(ARCHITECTURE).float32("model.layers.1.input_layernorm.weight")
    true_norm = packed.floats["blocks.1.ln1"] * packed.smoothing["blocks.1.ln1.hook_normalized"]
    np.testing.assert_allclose(true_norm, norm, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", ["LORA"]),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("a_switch_of_tomorrow", True),
        ("r", 0),
        ("r", 513),
        ("r", 2.5),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", -1),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("lora_alpha", 1e7),
        ("use_rslora", "yes"),
    ],
)
def test_a_config_that_is_not_plain_lora_is_refused_by_field(
    tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(ModelFormatError, match=rf"adapter_config.json: {field} "):
        read(tmp_path, None, **{field: value})


def renamed(old: str, new: str) -> dict[str, F32Array]:
    tensors = adapter_tensors(ARCHITECTURE, matrices=("q_proj",))
    return {name.replace(old, new): values for name, values in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (renamed("q_proj", "lm_head"), "belongs to no matrix"),
        (renamed("self_attn.q_proj", "mlp.q_proj"), "belongs to no matrix"),
        (renamed("layers.1", "layers.2"), "belongs to no matrix"),
        (renamed("layers.1", "layers.01"), "belongs to no matrix"),
        (renamed("base_model.model.model", "base_model.model"), "belongs to no matrix"),
        (renamed("lora_B.weight", "lora_B.bias"), "belongs to no matrix"),
        (renamed("lora_B.weight", "lora_magnitude_vector"), "belongs to no matrix"),
        (renamed("q_proj", "k_proj"), r"has the shape \(96, 8\), expected \(32, 8\)"),
        ({f"{Q0}.lora_A.weight": np.zeros((8, 96), np.float32)}, "but not both"),
        ({f"{Q0}.lora_A.weight": np.zeros((4, 96), np.float32)}, r"expected \(8, 96\)"),
        ({f"{Q0}.lora_A.weight": np.full((8, 96), np.inf, np.float32)}, "not finite"),
        ({}, "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, F32Array], message: str
) -> None:
    with pytest.raises(ModelFormatError, match=rf"adapter_model.safetensors: .*{message}"):
        read(tmp_path, tensors)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_and_missing_files(tmp_path: Path, name: str) -> None:
    read(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for damaged in (b"", whole[:-1], b"[1]", b"[" * 5000, b"\xff" + whole[1:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ModelFormatError, match=name):
            read_adapter(tmp_path, ARCHITECTURE)
    (tmp_path / name).unlink()
    with pytest.raises(NotFoundError, match=f"no {name}"):
        read_adapter(tmp_path, ARCHITECTURE)


def test_the_fields_that_peft_writes_are_all_known(tmp_path: Path) -> None:
    read(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == list(MATRICES)
    del config["bias"], config["init_lora_weights"], config["use_rslora"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter(tmp_path, ARCHITECTURE).scale == 2
