"""Distillation: a small model learns to answer as a large one does, on one workload.

Four recipes, in the order of what they cost:

    answers     cross entropy with the examples' answers (recorded, or the teacher's own: sequence-level)
    logits      (1 - s) KL(teacher || student) + s cross entropy, with logits that were computed once
    on-policy   after either of these: rounds in which the student answers, as the engine will serve it, and
                learns what the teacher thinks of its own tokens (Agarwal et al. 2024), by reverse KL or the
                generalised Jensen-Shannon divergence; recorded examples stay in the mixture

The teacher has the student's vocabulary: trim it first, and cut the student out of it. Everything is kept in
a work folder under the hash of what decides it, so a run that is killed goes on where it was. The last step
loads the new directory again and compares it with the twin; a directory that differs is not left behind.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from tokenmill.compress.export_check import ExportMismatch, ExportReport, check_export
from tokenmill.compress.generation import answer_prompts, kept_examples, longest_answer, prompt_of
from tokenmill.compress.made import check_target
from tokenmill.compress.teacher_logits import CacheConfig, TeacherLogits, cache_teacher, examples_digest
from tokenmill.core import UsageError
from tokenmill.models.files import hash_file
from tokenmill.models.packing.compile import forget_packed
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.runs import RunFolder
from tokenmill.train import Example, Loss, Targets, TrainConfig, TrainResult, save_model, train
from tokenmill.train.loop import Progress
from tokenmill.train.losses import (
    cross_entropy,
    sparse_forward_kl,
    sparse_jsd,
    sparse_reverse_kl,
    target_loss,
)

__all__ = ["DistilConfig", "Distilled", "Divergence", "OnPolicyConfig", "distil"]

Divergence = Literal["reverse_kl", "jsd"]

_CHECK_WINDOWS: Final = 16


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Rounds in which the student's own answers are learnt from. In each it answers `prompts` of the examples
    at `temperature`, and trains once on these and on `recorded` other examples for each of them, at
    `learning_rate`. `beta` is that of the Jensen-Shannon divergence.
    """

    rounds: int = 2
    prompts: int = 1024
    recorded: int = 3
    temperature: float = 1.0
    learning_rate: float = 3e-4
    divergence: Divergence = "reverse_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.prompts < 1 or self.recorded < 0:
            raise UsageError("on-policy rounds and prompts are at least 1, recorded examples at least 0")
        if self.divergence not in get_args(Divergence) or not 0 < self.beta < 1:
            raise UsageError(f"divergence {self.divergence!r} with beta {self.beta:g} is not known")


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How a student learns. `hard_share` is the weight of the examples' own tokens: 1 needs no teacher.

    The learning rate is that of small models, ten times a large one's, and the steps are small, too.
    """

    hard_share: float = 0.5
    cache: CacheConfig = field(default_factory=CacheConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(learning_rate=2e-3, num_epochs=8, tokens_per_step=1024)
    )
    on_policy: OnPolicyConfig | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.hard_share <= 1:
            raise UsageError(f"hard_share is {self.hard_share:g}", hint="use a value from 0 to 1")

    @property
    def recipe(self) -> str:
        """Its name in reports and manifests."""
        first = "answers" if self.hard_share == 1 else "logits"
        return first if self.on_policy is None else f"{first}, then on-policy"

    def decisive(self) -> dict[str, Any]:
        """What decides the weights."""
        return {**asdict(self), "train": self.train.decisive()}


class Distilled(NamedTuple):
    """The student that came out, what each stage's training came to, and the comparison with the engine."""

    model: ModelDirectory
    stages: tuple[TrainResult, ...]
    export: ExportReport


def distil(
    teacher: ModelDirectory,
    student: ModelDirectory,
    examples: Sequence[Example],
    config: DistilConfig,
    folder: Path,
    *,
    work: Path,
    validation: Sequence[Example] = (),
    progress: Progress | None = None,
) -> Distilled:
    """Train `student` on the examples and write it as the new model directory `folder`.

    `work` keeps what a killed run goes on from; it may be removed afterwards. Raises UsageError if teacher
    and student have other vocabularies or `work` belongs to another run, ExportMismatch if the engine does
    not compute what was trained (then `folder` is not there).
    """
    check_target(folder)
    _check_vocabulary(teacher, student)
    return _Distillation(teacher, student, examples, config, work, validation, progress).run(folder)


class _Distillation:
    """One call of `distil`."""

    def __init__(
        self,
        teacher: ModelDirectory,
        student: ModelDirectory,
        examples: Sequence[Example],
        config: DistilConfig,
        work: Path,
        validation: Sequence[Example],
        progress: Progress | None,
    ) -> None:
        self._teacher, self._student = teacher, student
        self._examples, self._config = examples, config
        self._work, self._validation = work, validation
        self._progress = progress
        self._model = TorchDecoder.load(student.architecture, student.weights())

    def run(self, folder: Path) -> Distilled:
        """All stages, then the export and its check."""
        self._work.mkdir(parents=True, exist_ok=True)
        recorded: Loss = target_loss
        if self._config.hard_share < 1:
            cached = cache_teacher(
                self._teacher,
                self._examples,
                self._work / "teacher",
                self._config.cache,
                progress=self._progress,
            )
            recorded = _RecordedLoss(cached, self._config)
        stages = [self._train("train", self._examples, recorded, self._config.train)]
        if self._config.on_policy is not None:
            for number in range(self._config.on_policy.rounds):
                stages.append(self._round(number, recorded, self._config.on_policy))
        return self._export(folder, tuple(stages))

    def _train(self, name: str, examples: Sequence[Example], loss: Loss, config: TrainConfig) -> TrainResult:
        header = {
            "stage": name,
            "teacher": self._teacher.digest,
            "student": self._student.digest,
            "data": examples_digest(examples),
            "validation": examples_digest(self._validation),
            **self._config.decisive(),
        }
        with RunFolder(self._work / name, header, resume=True) as run:
            return train(
                self._model,
                examples,
                config,
                loss=loss,
                validation=self._validation,
                run_folder=run,
                progress=self._progress,
            )

    def _round(self, number: int, recorded: Loss, config: OnPolicyConfig) -> TrainResult:
        """The student answers, the teacher reads that, the student learns from it and from old examples."""
        rng = np.random.default_rng((self._config.train.seed, number))
        order = rng.permutation(len(self._examples))
        asked, kept = order[: config.prompts], order[: config.prompts * config.recorded]
        prompts = [prompt_of(self._examples[i]) for i in asked]
        # Kept, so that a round that is killed goes on with them.
        own = kept_examples(
            self._work / f"round-{number}-answers.json", lambda: self._own_answers(number, prompts, config)
        )
        cached = cache_teacher(
            self._teacher,
            own,
            self._work / f"round-{number}-teacher",
            replace(self._config.cache, temperature=1.0),
            progress=self._progress,
        )
        loss = _MixedLoss(recorded, kept, _OwnLoss(cached, config))
        settings = replace(
            self._config.train, learning_rate=config.learning_rate, num_epochs=1, patience=None
        )
        return self._train(f"round-{number}", [*(self._examples[i] for i in kept), *own], loss, settings)

    def _own_answers(
        self, number: int, prompts: Sequence[Sequence[int]], config: OnPolicyConfig
    ) -> Sequence[Example]:
        """What the student answers now, as the engine serves it."""
        exported = self._work / f"round-{number}-student"
        shutil.rmtree(exported, ignore_errors=True)
        current = save_model(self._model, self._student, exported, recipe={"step": "on-policy round"})
        try:
            answers = answer_prompts(
                current,
                prompts,
                max_tokens=longest_answer(self._examples),
                temperature=config.temperature,
                seed=1 + number * len(prompts),
                keep_cut=True,
                weights="bf16",
            )
        finally:
            forget_packed(exported)
            shutil.rmtree(exported, ignore_errors=True)
        return answers.examples

    def _export(self, folder: Path, stages: tuple[TrainResult, ...]) -> Distilled:
        recipe = {
            "step": "distil",
            "recipe": self._config.recipe,
            "teacher": f"sha256:{self._teacher.digest}",
            "examples": f"{len(self._examples)}, sha256:{examples_digest(self._examples)}",
            "config": json.dumps(self._config.decisive(), sort_keys=True),
        }
        made = save_model(self._model, self._student, folder, recipe=recipe)
        windows = [each.tokens for each in (self._validation or self._examples)[:_CHECK_WINDOWS]]
        try:
            report = check_export(made, windows, twin=self._model.float())
        except ExportMismatch:
            forget_packed(folder)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Distilled(made, stages, report)


class _RecordedLoss:
    """(1 - s) KL(teacher || student) + s cross entropy, on examples that the cache knows by index."""

    def __init__(self, cached: TeacherLogits, config: DistilConfig) -> None:
        self._cached = cached
        self._share, self._temperature = config.hard_share, config.cache.temperature

    def __call__(self, logits_RV: Tensor, targets: Targets) -> Tensor:
        tokens_RK, logprobs_RK = self._cached.rows(targets)
        soft_R = sparse_forward_kl(logits_RV, tokens_RK, logprobs_RK, self._temperature)
        if self._share == 0:
            return soft_R
        return self._share * cross_entropy(logits_RV, targets.tokens_R) + (1 - self._share) * soft_R


class _OwnLoss:
    """The divergence from the teacher on the student's own answers."""

    def __init__(self, cached: TeacherLogits, config: OnPolicyConfig) -> None:
        self._cached, self._config = cached, config

    def __call__(self, logits_RV: Tensor, targets: Targets) -> Tensor:
        tokens_RK, logprobs_RK = self._cached.rows(targets)
        if self._config.divergence == "jsd":
            return sparse_jsd(logits_RV, tokens_RK, logprobs_RK, self._config.beta)
        return sparse_reverse_kl(logits_RV, tokens_RK, logprobs_RK)


class _MixedLoss:
    """One loss for the first examples, which are `kept` of the recorded ones, and another for those after."""

    def __init__(self, recorded: Loss, kept: "np.ndarray[tuple[int], Any]", own: Loss) -> None:
        self._recorded, self._own = recorded, own
        self._kept = torch.from_numpy(np.ascontiguousarray(kept, np.int64))

    def __call__(self, logits_RV: Tensor, targets: Targets) -> Tensor:
        losses_R = logits_RV.new_zeros(len(logits_RV))
        is_own_R = targets.examples_R >= len(self._kept)
        for is_own, rows in ((False, (~is_own_R).nonzero()[:, 0]), (True, is_own_R.nonzero()[:, 0])):
            if not len(rows):
                continue
            part = Targets(*(each[rows] for each in tuple(targets)))
            loss = self._own if is_own else self._recorded
            examples = part.examples_R - len(self._kept) if is_own else self._kept[part.examples_R]
            losses_R = losses_R.index_put((rows,), loss(logits_RV[rows], part._replace(examples_R=examples)))
        return losses_R


def _check_vocabulary(teacher: ModelDirectory, student: ModelDirectory) -> None:
    """Raise an error unless both have the same tokenizer, file by file."""
    hashes = {hash_file(model.path / "tokenizer.json") for model in (teacher, student)}
    sizes = {model.architecture.vocab_size for model in (teacher, student)}
    if len(hashes) > 1 or len(sizes) > 1:
        raise UsageError(
            f"{teacher.name} and {student.name} have other vocabularies",
            hint="trim the teacher's vocabulary first, and cut the student out of the trimmed model",
        )
