"""What the trainer writes, the engine serves: whole models, and adapters as PEFT lays them out."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fast.cli_tools import make_home
from tests.fast.random_plan import make_batch
from tests.train import tools
from tokenmill.core import UsageError
from tokenmill.kernels import F32Array, create_executor
from tokenmill.models.adapter import pack_adapter, read_adapter
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import pack_model
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library
from tokenmill.train import (
    LoraConfig,
    TorchDecoder,
    TrainConfig,
    add_lora,
    merge_lora,
    save_adapter,
    save_model,
    train,
)

CONFIG = TrainConfig(learning_rate=1e-2, num_epochs=4, tokens_per_step=100, tokens_per_row=100)
TOKENS = [5, 17, 3, 88, 41, 2, 9, 60, 31, 7, 12]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path: Path) -> ModelDirectory:
    return Library(make_home(tmp_path)).find("tiny")


def decoder(source: ModelDirectory) -> TorchDecoder:
    return TorchDecoder.load(source.architecture, source.weights())


def twin_logits(model: TorchDecoder) -> F32Array:
    with torch.inference_mode():
        logits: F32Array = model.float()(torch.tensor([TOKENS]))[0].numpy()
    return logits


def engine_logits(directory: ModelDirectory, adapter: Path | None = None) -> F32Array:
    packed = pack_model(directory.architecture, directory.weights(), "bf16")
    plan = compile_plan(directory.architecture, packed)
    executor = create_executor(plan, max_rows=20, max_out_rows=20, num_blocks=2, max_adapters=1)
    batch = make_batch([(TOKENS, 0, [0])])
    if adapter is not None:
        executor.set_adapter(0, pack_adapter(read_adapter(adapter, directory.architecture), plan))
        batch = replace(batch, adapters=np.zeros(1, np.int32))
    executor.run(batch)
    return np.array(executor.buffer("logits")[: len(TOKENS)])


def far(left: F32Array, right: F32Array) -> float:
    return float(np.abs(left - right).max() / np.abs(right).max())


def test_a_trained_model_is_a_model_directory_that_the_engine_serves(
    source: ModelDirectory, tmp_path: Path
) -> None:
    model = decoder(source)
    train(model, tools.examples(20), CONFIG)
    saved = save_model(
        model, source, tmp_path / "new", recipe={"step": "train"}, licences=("CC0-1.0", "apache-2.0")
    )
    saved.verify()
    assert saved.manifest is not None and source.manifest is not None
    assert saved.manifest.parent == f"sha256:{source.digest}" and saved.manifest.recipe == {"step": "train"}
    assert saved.manifest.licences == ("apache-2.0", "CC0-1.0")
    assert saved.architecture == source.architecture and not (saved.path / "model.gguf").exists()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (saved.path / name).read_bytes() == (source.path / name).read_bytes()
    for name, weight in model.named_parameters():
        assert np.array_equal(saved.weights().float32(name), weight.detach().float().numpy()), name
    assert far(engine_logits(saved), twin_logits(model)) < 0.03
    assert far(engine_logits(source), twin_logits(model)) > 0.1


def test_a_model_is_there_whole_or_not_at_all(
    source: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, place = decoder(source), tmp_path / "new"
    with pytest.raises(UsageError, match="exists already"):
        save_model(model, source, source.path, recipe={})
    with monkeypatch.context() as patch:
        patch.setattr("tokenmill.train.save.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_model(model, source, place, recipe={})
    assert not [each for each in tmp_path.iterdir() if "new" in each.name]
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(UsageError, match=r"model\.norm\.weight is not finite"):
        save_model(model, source, place, recipe={})


def test_another_architecture_and_other_files_are_written(source: ModelDirectory, tmp_path: Path) -> None:
    smaller = replace(source.architecture, num_layers=1, layers=source.architecture.layers[:1])
    files = {"chat_template.jinja": b"{{ messages[0]['content'] }}"}
    saved = save_model(TorchDecoder(smaller), source, tmp_path / "small", recipe={}, files=files)
    assert saved.architecture == smaller
    assert (saved.path / "chat_template.jinja").read_bytes() == files["chat_template.jinja"]
    saved.verify()


def trained_adapter(source: ModelDirectory, **settings: object) -> TorchDecoder:
    model = decoder(source)
    add_lora(model, LoraConfig(**settings))  # type: ignore[arg-type]
    train(model, tools.examples(20), CONFIG)
    return model


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LoraConfig().targets])
def test_an_adapter_is_served_as_the_twin_computes_it(
    source: ModelDirectory, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    model = trained_adapter(source, rank=4, alpha=8.0, targets=targets)
    save_adapter(model, tmp_path / "adapter", base="tiny")
    wanted = twin_logits(model)
    assert far(engine_logits(source, tmp_path / "adapter"), wanted) < 0.03
    assert far(engine_logits(source), wanted) > 0.05  # a control: without it, another answer


def test_a_merged_adapter_computes_the_same_and_is_a_plain_model(
    source: ModelDirectory, tmp_path: Path
) -> None:
    model = trained_adapter(source, rank=4, alpha=8.0)
    model.float()
    wanted = twin_logits(model)
    merge_lora(model)
    assert far(twin_logits(model), wanted) < 1e-4
    assert dict(model.named_parameters()).keys() == source.architecture.tensor_shapes().keys()
    assert all(each.requires_grad for each in model.parameters())
    saved = save_model(model, source, tmp_path / "merged", recipe={"step": "lora"})
    assert far(engine_logits(saved), wanted) < 0.03


def test_only_the_adapter_is_trained_and_at_first_it_adds_nothing(source: ModelDirectory) -> None:
    model, plain = decoder(source), decoder(source)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    add_lora(model, LoraConfig(rank=2, alpha=4.0))
    assert far(twin_logits(model), twin_logits(plain)) == 0
    train(model, tools.examples(20), replace(CONFIG, dtype="float32"))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in before.items())
    assert now.keys() - before.keys() and now["model.layers.0.self_attn.q_proj.up"].any()
    with pytest.raises(UsageError, match="has an adapter already"):
        add_lora(model, LoraConfig())


def test_wrong_adapters_are_refused(source: ModelDirectory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank is 0"):
        LoraConfig(rank=0)
    with pytest.raises(UsageError, match="no matrix is named 'lm_head'"):
        LoraConfig(targets=("lm_head",))
    with pytest.raises(UsageError, match="has no adapter"):
        save_adapter(decoder(source), tmp_path / "adapter")


def test_peft_s_own_fields_are_there(source: ModelDirectory, tmp_path: Path) -> None:
    save_adapter(trained_adapter(source, rank=4, targets=("o_proj",)), tmp_path / "adapter", base="tiny")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 32 and config["target_modules"] == ["o_proj"]
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "tiny"
