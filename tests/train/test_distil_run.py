"""Distillation from end to end on a tiny teacher: recipes learn, a killed run comes to the same bits."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.tiny_teacher import ANSWERS, examples_of, make_teacher
from tokenmill.compress import (
    CacheConfig,
    DistilConfig,
    ExportMismatch,
    OnPolicyConfig,
    StudentShape,
    answer_prompts,
    distil,
    make_student,
    prompt_of,
    recipes,
)
from tokenmill.core import UsageError
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.train import TrainConfig, save_model, train

SHAPE = StudentShape(num_layers=2, hidden_size=48, num_heads=2, num_kv_heads=1, intermediate_size=64)
SETTINGS = TrainConfig(learning_rate=4e-3, num_epochs=6, tokens_per_step=800, tokens_per_row=800)
ON_POLICY = OnPolicyConfig(rounds=1, prompts=12, recorded=2)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("TOKENMILL_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    """A tiny model that learnt the task."""
    folder = tmp_path_factory.mktemp("models")
    base = make_teacher(folder / "base")
    model = TorchDecoder.load(base.architecture, base.weights())
    train(model, examples_of(base), replace(SETTINGS, num_epochs=16))
    return save_model(model, base, folder / "teacher", recipe={"step": "fine-tune"})


@pytest.fixture(scope="module")
def student(teacher: ModelDirectory, tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    windows = [each.tokens for each in examples_of(teacher, 20)]
    return make_student(teacher, SHAPE, tmp_path_factory.mktemp("models") / "student", windows)


def test_the_teacher_knows_its_task(teacher: ModelDirectory) -> None:
    examples = examples_of(teacher)
    answers = answer_prompts(teacher, [prompt_of(each) for each in examples], max_tokens=40)
    tokenizer = teacher.tokenizer()
    texts = [tokenizer.decode(each.tokens[len(prompt_of(each)) :]) for each in answers.examples]
    assert sum(text == want for text, want in zip(texts, ANSWERS, strict=True)) > 0.9 * len(ANSWERS)


@pytest.mark.parametrize(
    "config",
    [
        DistilConfig(hard_share=1.0, train=SETTINGS),
        DistilConfig(train=SETTINGS, cache=CacheConfig(top_k=8, temperature=2.0)),
        DistilConfig(train=SETTINGS, cache=CacheConfig(top_k=8), on_policy=ON_POLICY),
        DistilConfig(hard_share=0.0, train=SETTINGS, on_policy=replace(ON_POLICY, divergence="jsd")),
    ],
    ids=["answers", "logits", "on-policy", "jsd"],
)
def test_each_recipe_learns(
    teacher: ModelDirectory, student: ModelDirectory, tmp_path: Path, config: DistilConfig
) -> None:
    examples = examples_of(teacher)
    work = tmp_path / "work"
    made = distil(
        teacher, student, examples[8:], config, tmp_path / "out", work=work, validation=examples[:8]
    )
    losses = [loss for _, loss in made.stages[0].validation_losses]
    assert losses[-1] < 0.7 * losses[0]
    assert made.model.manifest is not None
    assert made.model.manifest.recipe["recipe"] == config.recipe
    assert made.model.manifest.recipe["teacher"] == f"sha256:{teacher.digest}"
    assert made.model.manifest.parent == f"sha256:{student.digest}"
    assert [each.weights for each in made.export.formats] == ["bf16", "w8a8"]
    assert len(made.stages) == (1 if config.on_policy is None else 2)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", ["teacher", "train", "second teacher", "second train"])
def test_a_killed_run_comes_to_the_same_weights(
    teacher: ModelDirectory, student: ModelDirectory, tmp_path: Path, at: str
) -> None:
    examples = examples_of(teacher, 24)
    settings = replace(SETTINGS, num_epochs=2, checkpoint_seconds=0.0)
    config = DistilConfig(train=settings, cache=CacheConfig(top_k=8), on_policy=ON_POLICY)
    whole = distil(teacher, student, examples, config, tmp_path / "whole", work=tmp_path / "work")
    stages: list[str] = []

    def kill(stage: str, done: int, total: int) -> None:
        kind = stage.partition(",")[0]
        if not stages or stages[-1].removeprefix("second ") != kind:
            stages.append(f"second {kind}" if kind in stages else kind)
        if stages[-1] == at and (done > total // 2 or done == total):
            raise Killed

    with pytest.raises(Killed):
        distil(teacher, student, examples, config, tmp_path / "cut", work=tmp_path / "again", progress=kill)
    assert not (tmp_path / "cut").exists()
    cut = distil(teacher, student, examples, config, tmp_path / "cut", work=tmp_path / "again")
    name = "model.safetensors"
    assert (cut.model.path / name).read_bytes() == (whole.model.path / name).read_bytes()


def test_a_work_folder_of_another_run_is_refused(
    teacher: ModelDirectory, student: ModelDirectory, tmp_path: Path
) -> None:
    examples = examples_of(teacher, 12)
    config = DistilConfig(hard_share=1.0, train=replace(SETTINGS, num_epochs=1))
    distil(teacher, student, examples, config, tmp_path / "one", work=tmp_path / "work")
    with pytest.raises(UsageError, match="something else: data was"):
        distil(teacher, student, examples[1:], config, tmp_path / "two", work=tmp_path / "work")


def test_other_vocabularies_are_refused(
    teacher: ModelDirectory, student: ModelDirectory, tmp_path: Path
) -> None:
    shutil.copytree(student.path, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    other = ModelDirectory.open(tmp_path / "other")
    with pytest.raises(UsageError, match="other vocabularies"):
        distil(
            teacher, other, examples_of(teacher, 4), DistilConfig(), tmp_path / "out", work=tmp_path / "work"
        )


def test_a_student_that_is_not_served_as_trained_is_not_left_behind(
    teacher: ModelDirectory, student: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = save_model

    def broken(model: TorchDecoder, *args: object, **names: object) -> ModelDirectory:
        saved = real(model, *args, **names)  # type: ignore[arg-type]
        with torch.no_grad():
            model.model.norm.weight[:24] *= 2
        return saved

    monkeypatch.setattr(recipes, "save_model", broken)
    config = DistilConfig(hard_share=1.0, train=replace(SETTINGS, num_epochs=1))
    with pytest.raises(ExportMismatch):
        distil(teacher, student, examples_of(teacher, 12), config, tmp_path / "out", work=tmp_path / "work")
    assert not (tmp_path / "out").exists()
