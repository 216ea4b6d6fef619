"""A teacher's logits on disk: what was computed comes back, what belongs to something else does not."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.train.tiny_teacher import examples_of, make_teacher
from tokenmill.compress import CacheConfig, TeacherLogits, cache_teacher, teacher_logits
from tokenmill.core import UsageError
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.train import Example, Targets, make_row


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


def targets_of(examples: Sequence[Example], indices: Sequence[int]) -> Targets:
    return make_row(examples, indices).targets


def dense(teacher: ModelDirectory, examples: Sequence[Example], targets: Targets) -> torch.Tensor:
    """Log-probabilities [R, V] of the twin in bf16, one example at a time."""
    twin = TorchDecoder.load(teacher.architecture, teacher.weights(), torch.bfloat16)
    rows = []
    with torch.inference_mode():
        for example, position in zip(targets.examples_R.tolist(), targets.positions_R.tolist(), strict=True):
            logits = twin(torch.tensor([list(examples[example].tokens)]))[0, position - 1]
            rows.append(logits.float().log_softmax(-1))
    return torch.stack(rows)


def test_rows_are_the_teachers_likeliest_tokens(teacher: ModelDirectory, tmp_path: Path) -> None:
    examples = examples_of(teacher, 9)
    cached = cache_teacher(teacher, examples, tmp_path / "cache", CacheConfig(top_k=8))
    targets = targets_of(examples, [7, 0, 3])  # in any order
    tokens_RK, logprobs_RK = cached.rows(targets)
    want = dense(teacher, examples, targets)
    assert (want.gather(1, tokens_RK) - logprobs_RK).abs().max() < 0.1  # bf16
    assert (want.topk(8).values.exp().sum(1) - logprobs_RK.exp().sum(1)).abs().max() < 0.01
    assert (logprobs_RK.exp().sum(1) < 1).all()  # the tail has its share


def test_a_whole_vocabulary_has_no_tail(teacher: ModelDirectory, tmp_path: Path) -> None:
    examples = examples_of(teacher, 2)
    cached = cache_teacher(teacher, examples, tmp_path / "cache", CacheConfig(top_k=4096))
    logprobs_RK = cached.rows(targets_of(examples, [0, 1])).logprobs_RK
    assert torch.allclose(logprobs_RK.exp().sum(1), torch.ones(len(logprobs_RK)), atol=1e-5)


def test_temperature_flattens(teacher: ModelDirectory, tmp_path: Path) -> None:
    examples = examples_of(teacher, 2)
    targets = targets_of(examples, [0, 1])
    heights = [
        cache_teacher(teacher, examples, tmp_path / str(t), CacheConfig(top_k=4, temperature=t))
        .rows(targets)
        .logprobs_RK[:, 0]
        .mean()
        for t in (1.0, 3.0)
    ]
    assert heights[1] < heights[0]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_killed_cache_is_gone_on_with(
    teacher: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    examples = examples_of(teacher, 9)
    monkeypatch.setattr(teacher_logits, "_TOKENS_PER_ROW", 150)
    whole = cache_teacher(teacher, examples, tmp_path / "whole")
    calls: list[int] = []

    def kill(_: str, done: int, __: int) -> None:
        calls.append(done)
        if len(calls) == kill_at:
            raise Killed

    with pytest.raises(Killed):
        cache_teacher(teacher, examples, tmp_path / "cut", progress=kill)
    with (tmp_path / "cut" / "tokens.bin").open("ab") as file:
        file.write(b"half a row")
    cut = cache_teacher(teacher, examples, tmp_path / "cut", progress=lambda _, done, __: calls.append(done))
    assert calls[kill_at] > calls[kill_at - 1]  # not from the start
    for name in ("tokens.bin", "logprobs.bin"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert cut.num_bytes == whole.num_bytes


def test_a_finished_cache_needs_no_teacher(
    teacher: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = examples_of(teacher, 3)
    cache_teacher(teacher, examples, tmp_path / "cache")
    monkeypatch.setattr(TorchDecoder, "load", None)
    assert isinstance(cache_teacher(teacher, examples, tmp_path / "cache"), TeacherLogits)


@pytest.mark.parametrize("what", ["data", "teacher", "template", "tokenizer", "top_k"])
def test_what_belongs_to_something_else_is_refused(
    teacher: ModelDirectory, tmp_path: Path, what: str
) -> None:
    examples = examples_of(teacher, 3)
    cache_teacher(teacher, examples, tmp_path / "cache")
    config, other = CacheConfig(), teacher
    if what == "data":
        examples = [
            *examples[:2],
            Example(examples[2].tokens, [False, *[True] * (len(examples[2].tokens) - 1)]),
        ]
    elif what == "top_k":
        config = CacheConfig(top_k=7)
    else:
        shutil.copytree(teacher.path, tmp_path / "other")
        other = ModelDirectory.open(tmp_path / "other")
        if what == "teacher":
            other = make_teacher(tmp_path / "new", seed=1)
        elif what == "template":
            (other.path / "chat_template.jinja").write_text("{{ messages[0].content }}")
        else:
            vocabulary = json.loads((other.path / "tokenizer.json").read_text())
            (other.path / "tokenizer.json").write_text(json.dumps(vocabulary, indent=1))
    with pytest.raises(UsageError, match=f"something else: .*{what} was"):
        cache_teacher(other, examples, tmp_path / "cache", config)
