"""From a chat model and the rows of a workload to a small model: all steps in their order, each kept.

    trimmed     the vocabulary that the workload needs, and its common system prompt learnt by heart
    teacher     trained on the workload's answers, in which it gets as good as its size allows
    cut         a student's shape out of the teacher
    student     distilled (`recipes`)

The teacher is a candidate itself. Each step is a model directory in the work folder and is made once: a run
that was killed goes on with the step that it was in. Search over shapes and settings is not here.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

from tokenmill.compress.corpus import Conversation, examples_of, prepare_teacher
from tokenmill.compress.export_check import ExportMismatch, check_export
from tokenmill.compress.generation import answer_prompts, kept_examples, longest_answer, prompt_of
from tokenmill.compress.recipes import DistilConfig, Distilled, distil
from tokenmill.compress.students import PRESETS, StudentInit, StudentShape, make_student
from tokenmill.compress.teacher_logits import examples_digest
from tokenmill.core import UsageError
from tokenmill.models.packing.compile import forget_packed
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.runs import RunFolder, content_hash
from tokenmill.train import Example, TrainConfig, save_model, train
from tokenmill.train.loop import Progress

__all__ = ["AnswersOf", "MillConfig", "Milled", "mill", "train_teacher"]

AnswersOf = Literal["recorded", "teacher"]

_CALIBRATION: Final = 64
_CHECK_WINDOWS: Final = 16


@dataclass(frozen=True, kw_only=True)
class MillConfig:
    """What is made of a model. `vocabulary` None leaves the teacher's tokens and template as they are;
    `teacher` None leaves its weights. `teacher_rows` are as many as it is trained on (None: all). The student
    learns from the `recorded` answers or from the `teacher`'s own (sequence-level distillation).
    """

    student: StudentShape = field(default_factory=lambda: PRESETS["mill-4M"])
    start: StudentInit = "sliced"
    vocabulary: int | None = 4096
    fold: bool = True
    teacher: TrainConfig | None = field(
        default_factory=lambda: TrainConfig(learning_rate=2e-4, num_epochs=1, tokens_per_step=2048)
    )
    teacher_rows: int | None = None
    answers: AnswersOf = "recorded"
    distil: DistilConfig = field(default_factory=DistilConfig)

    def __post_init__(self) -> None:
        if self.answers not in get_args(AnswersOf):
            raise UsageError(
                f"answers is {self.answers!r}", hint=f"use one of {', '.join(get_args(AnswersOf))}"
            )

    def decisive(self) -> dict[str, Any]:
        """What decides the weights."""
        teacher = None if self.teacher is None else self.teacher.decisive()
        return {**asdict(self), "teacher": teacher, "distil": self.distil.decisive()}


class Milled(NamedTuple):
    """The teacher as it was distilled, and the student."""

    teacher: ModelDirectory
    student: Distilled


def mill(
    model: ModelDirectory,
    rows: Sequence[Conversation],
    config: MillConfig,
    folder: Path,
    *,
    work: Path,
    validation: Sequence[Conversation] = (),
    progress: Progress | None = None,
) -> Milled:
    """Make the student that `config` describes, as the new model directory `folder`.

    `rows` are learnt from; `validation` decides when training has done its best. `work` keeps the steps.
    Raises UsageError if it belongs to another run, and what the steps raise.
    """
    header = {"model": model.digest, "rows": _digest(rows), "validation": _digest(validation)}
    with RunFolder(work, {**header, **config.decisive()}, resume=True):
        trimmed = model
        if config.vocabulary is not None:
            trimmed = _kept(work / "trimmed") or prepare_teacher(
                model, rows, work / "trimmed", vocabulary=config.vocabulary, fold=config.fold
            )
        examples: Sequence[Example] = examples_of(trimmed, rows)
        held = examples_of(trimmed, validation) if validation else []
        teacher = trimmed
        if config.teacher is not None:
            teacher = _kept(work / "teacher") or train_teacher(
                trimmed,
                examples[: config.teacher_rows],
                config.teacher,
                work / "teacher",
                work=work / "teacher-run",
                validation=held,
                progress=progress,
            )
        windows = [each.tokens for each in examples[:_CALIBRATION]]
        cut = _kept(work / "cut") or make_student(
            teacher, config.student, work / "cut", windows, start=config.start, seed=config.distil.train.seed
        )
        if config.answers == "teacher":
            examples = kept_examples(work / "answers.json", partial(_own_answers, teacher, examples))
        student = distil(
            teacher,
            cut,
            examples,
            config.distil,
            folder,
            work=work / "distil",
            validation=held,
            progress=progress,
        )
    return Milled(teacher, student)


def train_teacher(
    model: ModelDirectory,
    examples: Sequence[Example],
    config: TrainConfig,
    folder: Path,
    *,
    work: Path,
    validation: Sequence[Example] = (),
    progress: Progress | None = None,
) -> ModelDirectory:
    """Train all weights of `model` on the examples: the new model directory `folder`, checked in the engine.

    Errors as in `train` and `check_export`; a directory that is not served as trained is not left behind.
    """
    header = {"model": model.digest, "data": examples_digest(examples), **config.decisive()}
    twin = TorchDecoder.load(model.architecture, model.weights())
    with RunFolder(work, {**header, "validation": examples_digest(validation)}, resume=True) as run:
        result = train(twin, examples, config, validation=validation, run_folder=run, progress=progress)
    recipe = {
        "step": "fine-tune",
        "examples": f"{len(examples)}, sha256:{examples_digest(examples)}",
        "tokens": str(result.num_tokens),
        "config": json.dumps(config.decisive(), sort_keys=True),
    }
    made = save_model(twin, model, folder, recipe=recipe)
    try:
        check_export(
            made, [each.tokens for each in (validation or examples)[:_CHECK_WINDOWS]], twin=twin.float()
        )
    except ExportMismatch:
        forget_packed(folder)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return made


def _own_answers(teacher: ModelDirectory, examples: Sequence[Example]) -> Sequence[Example]:
    """What the teacher answers to the prompts of the examples; answers without an end are left out."""
    prompts = [prompt_of(each) for each in examples]
    answers = answer_prompts(teacher, prompts, max_tokens=longest_answer(examples)).examples
    if not answers:
        raise UsageError(f"{teacher.name} ends none of its answers", hint="train it on the workload first")
    return answers


def _kept(folder: Path) -> ModelDirectory | None:
    """The step that is there already: directories appear whole."""
    return ModelDirectory.open(folder) if folder.is_dir() else None


def _digest(conversations: Sequence[Conversation]) -> str:
    if not conversations:
        return ""
    try:
        return content_hash([[repr(each.messages), each.tools] for each in conversations])
    except (TypeError, ValueError):
        raise UsageError("a conversation has tools that are no JSON") from None
