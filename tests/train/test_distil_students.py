"""Students cut out of a teacher: what is kept is the teacher's own, what is averaged is averaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.tiny_teacher import examples_of, make_teacher, teacher_architecture
from tokenmill.compress import PRESETS, StudentShape, make_student
from tokenmill.core import UsageError
from tokenmill.models.architecture import Architecture, Experts, Layer
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder

WHOLE = StudentShape(num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, intermediate_size=96)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


def windows(model: ModelDirectory) -> list[list[int]]:
    return [list(each.tokens) for each in examples_of(model, 6)]


def logits(model: ModelDirectory, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = TorchDecoder.load(model.architecture, model.weights())(torch.tensor([tokens]))
    return result


def test_a_student_of_the_whole_shape_is_the_teacher(teacher: ModelDirectory, tmp_path: Path) -> None:
    student = make_student(teacher, WHOLE, tmp_path / "student", windows(teacher))
    assert torch.equal(logits(student, windows(teacher)[0]), logits(teacher, windows(teacher)[0]))


def test_a_smaller_student_has_its_shape_and_lineage(teacher: ModelDirectory, tmp_path: Path) -> None:
    shape = StudentShape(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=40)
    student = make_student(teacher, shape, tmp_path / "student", windows(teacher))
    architecture = student.architecture
    assert (architecture.num_layers, architecture.hidden_size, architecture.kv_size) == (2, 32, 16)
    assert torch.isfinite(logits(student, windows(teacher)[0])).all()
    assert student.manifest is not None and student.manifest.parent == f"sha256:{teacher.digest}"
    assert student.manifest.recipe["step"] == "student"
    # The first and the last layer are the teacher's: their norms are cut by the same dimensions.
    final = teacher.weights().float32("model.norm.weight")
    for here, there in ((0, 0), (1, 2)):
        name = "model.layers.{}.input_layernorm.weight"
        both = set(zip(final, teacher.weights().float32(name.format(there)), strict=True))
        mine = student.weights()
        assert (
            set(zip(mine.float32("model.norm.weight"), mine.float32(name.format(here)), strict=True)) <= both
        )


def test_key_value_heads_are_averaged(teacher: ModelDirectory, tmp_path: Path) -> None:
    student = make_student(teacher, replace(WHOLE, num_kv_heads=1), tmp_path / "mqa", windows(teacher))
    name = "model.layers.1.self_attn.v_proj.weight"
    heads = teacher.weights().float32(name).reshape(2, 16, 64)
    np.testing.assert_allclose(student.weights().float32(name), heads.mean(0), rtol=1e-2, atol=1e-3)


def test_what_is_kept_is_what_is_largest(tmp_path: Path) -> None:
    """Twelve loud dimensions, heads and neurons are found again; the others are gone."""
    teacher = make_teacher(tmp_path / "teacher")
    source, loud = teacher.weights(), [3, 9, 10, 17, 22, 31, 33, 40, 47, 52, 58, 63]
    norm = np.zeros(64, np.float32)
    norm[loud] = 1.0
    changed = {name: source.float32(name) for name in source.names()}
    for name in changed:
        if name.endswith("norm.weight"):
            changed[name] = norm * changed[name] + 1e-3
    with_loud = make_teacher(tmp_path / "loud")
    _overwrite(with_loud, changed)
    shape = replace(WHOLE, hidden_size=12)
    student = make_student(ModelDirectory.open(with_loud.path), shape, tmp_path / "student", windows(teacher))
    got, want = student.weights().float32("model.embed_tokens.weight"), changed["model.embed_tokens.weight"]
    np.testing.assert_array_equal(got, want[:, loud])


def _overwrite(model: ModelDirectory, tensors: dict[str, np.ndarray]) -> None:
    from tokenmill.models.formats.bfloat16 import round_to_bf16
    from tokenmill.models.formats.safetensors import write_safetensors

    shapes = {name: values.shape for name, values in tensors.items()}
    write_safetensors(
        model.path / "model.safetensors", shapes, "BF16", lambda name: round_to_bf16(tensors[name])
    )


def test_a_random_student_follows_from_its_seed(teacher: ModelDirectory, tmp_path: Path) -> None:
    shape = replace(WHOLE, num_layers=1)
    made = [
        make_student(teacher, shape, tmp_path / str(i), (), start="random", seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (each.weights().bf16("model.layers.0.mlp.up_proj.weight") for each in made)
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 4}, "num_layers is 4"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_kv_heads is 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    teacher: ModelDirectory, change: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        replace(WHOLE, **change).architecture(teacher.architecture)


def test_a_mixture_has_no_students() -> None:
    experts = Experts(num_experts=4, num_active=2, intermediate_size=32, renormalise=True)
    mixture = replace(teacher_architecture(), experts=experts, layers=(Layer(routed=True),) * 3)
    with pytest.raises(UsageError, match="dense"):
        WHOLE.architecture(mixture)


def test_presets_cost_what_their_names_say() -> None:
    teacher = replace(teacher_architecture(), num_layers=30, hidden_size=576, num_heads=9, num_kv_heads=3)
    teacher = replace(teacher, head_dim=64, intermediate_size=1536, layers=(Layer(),) * 30)
    for name, vocab_size in (("mill-2M", 4096), ("mill-4M", 4096), ("mill-6M", 8192)):
        student: Architecture = PRESETS[name].architecture(replace(teacher, vocab_size=vocab_size))
        assert round(student.macs_per_token / 1e6) == int(name[5])
