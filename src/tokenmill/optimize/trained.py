"""Candidates that are trained on the workload: a fine-tuned model, and students that are distilled from it.

    model ─► vocabulary trimmed, system prompt folded ─► fine-tuned (the teacher) ─► student cut out,
    distilled

The teacher is a candidate itself, and is made once for all students. Every directory is loaded again and
compared with what was trained before anybody asks it anything; one that differs is a candidate that lost.
Importing this needs torch (the `train` extra).
"""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from tokenmill.compress import (
    PRESETS,
    DistilConfig,
    OnPolicyConfig,
    check_export,
    common_system_prompt,
    distil,
    examples_digest,
    folded_template,
    make_student,
    trim_vocabulary,
)
from tokenmill.core import Message, ToolCall, UsageError
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.optimize.candidate import Candidate, CannotBeMadeError, Expected, Opened, Workshop
from tokenmill.optimize.cases import Case
from tokenmill.optimize.local import directory_bytes, lineage_of
from tokenmill.optimize.problem import Problem
from tokenmill.optimize.records import Artefact, Kind, Lineage
from tokenmill.optimize.served import ServedModel, answer_limit, opened_model
from tokenmill.runs import RunFolder, content_hash
from tokenmill.train import ConversationEncoder, Example, TrainConfig, fitting, save_model, train

__all__ = ["StudentRecipe", "TeacherRecipe", "TrainedCandidate", "trained_candidates"]

_FLOPS: Final = 6e11
"""Operations a second that training gets out of two cores with AMX, for the plan; others take as long as they
take."""
_STUDENT_TOKENS_PER_S: Final = 10_000.0
_GUESSED_TOKENS: Final = 60
_START_S: Final = 6.0
_NUM_CALIBRATION: Final = 128
_NUM_VALIDATION: Final = 200
_MAX_VOCABULARY: Final = 4096
_SHARED: Final = "teachers"


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """How the model itself is tuned: `vocabulary` tokens are kept, None leaves it as it is. Without `train`
    it is not tuned, and only something to cut a student out of.
    """

    vocabulary: int | None = _MAX_VOCABULARY
    train: TrainConfig | None = field(
        default_factory=lambda: TrainConfig(learning_rate=2e-4, num_epochs=2, tokens_per_step=4096)
    )

    def to_json(self) -> dict[str, Any]:
        """What decides it."""
        tuning = None if self.train is None else self.train.decisive()
        return {"vocabulary": self.vocabulary, "train": tuning}


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """A student: one of `compress.PRESETS`, and how it learns."""

    preset: str = "mill-4M"
    distil: DistilConfig = field(default_factory=DistilConfig)

    def to_json(self) -> dict[str, Any]:
        """What decides it."""
        return {"shape": asdict(PRESETS[self.preset]), "distil": self.distil.decisive()}


@dataclass(frozen=True, kw_only=True)
class TrainedCandidate:
    """A teacher, or with `student` a student of it."""

    name: str
    path: str
    digest: str
    num_params: int
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: StudentRecipe | None = None
    weights: Literal["w8a8", "w4a8", "bf16"] = "w8a8"
    is_control: bool = False

    @property
    def kind(self) -> Kind:
        """What it is."""
        return "fine-tuned" if self.student is None else "student"

    @property
    def is_trained(self) -> bool:
        """It is."""
        return True

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What decides it, beside the rows."""
        return {
            "kind": self.kind,
            "parent": self.digest,
            "teacher": self.teacher.to_json(),
            "student": None if self.student is None else self.student.to_json(),
            "weights": self.weights,
        }

    def expected(self, workshop: Workshop, num_items: int) -> Expected:
        """By operations; a teacher that another candidate makes as well is counted with both."""
        num_tokens = _GUESSED_TOKENS * len(workshop.train)
        make_s = 0.0
        if self.teacher.train is not None:
            make_s += 6.0 * self.num_params * num_tokens * self.teacher.train.num_epochs / _FLOPS
        if self.student is not None:
            if self.student.distil.hard_share < 1:
                make_s += 2.0 * self.num_params * num_tokens / _FLOPS
            make_s += num_tokens * self.student.distil.train.num_epochs / _STUDENT_TOKENS_PER_S
        return Expected(make_s, 2 * _START_S + 0.01 * num_items)

    def make(self, workshop: Workshop, share: float) -> Artefact:
        """Make the teacher, and the student from it; both are gone on with after a kill."""
        began_s = time.monotonic()
        rows = _usable(workshop.train, share)
        base = ModelDirectory.open(Path(self.path))
        teacher = _made_teacher(base, self.teacher, rows, workshop)
        made = teacher if self.student is None else _made_student(teacher, self.student, rows, workshop)
        rows_of_log = Lineage(what="trained on", name=f"{len(rows)} rows of the log", terms=_terms(rows))
        lineage = [lineage_of(base), rows_of_log]
        if self.student is not None and self.teacher.train is not None:
            lineage.append(Lineage(what="teacher", name=teacher.name, digest=teacher.digest))
        return Artefact(
            path=str(made.path),
            digest=made.digest,
            num_bytes=directory_bytes(made),
            seconds=time.monotonic() - began_s,
            lineage=tuple(lineage),
            trained_on=tuple(case.id for case in rows),
            settings={
                **ServedModel(weights=self.weights, max_tokens=answer_limit(rows)).to_json(),
                "num_params": made.architecture.num_params,
            },
        )

    @asynccontextmanager
    async def opened(self, artefact: Artefact, workshop: Workshop) -> AsyncIterator[Opened]:
        """Its engine."""
        served = ServedModel.from_json(artefact.settings)
        async with opened_model(
            artefact.path, served, "candidate", usd_per_hour=workshop.usd_per_hour
        ) as opened:
            yield opened

    def deployment(self, artefact: Artefact, name: str) -> Mapping[str, Any]:
        """A model of the run's folder."""
        return ServedModel.from_json(artefact.settings).deployment(artefact.path, name)


def trained_candidates(directory: ModelDirectory, problem: Problem) -> list[Candidate]:
    """The fine-tuned model, and students of it: from the log's answers, from logits, and on-policy."""
    first = TrainedCandidate(
        name=f"{directory.name} fine-tuned",
        path=str(directory.path),
        digest=directory.digest,
        num_params=directory.architecture.num_params,
    )
    logits = StudentRecipe()
    answers = replace(logits, distil=replace(logits.distil, hard_share=1.0))
    on_policy = replace(logits, distil=replace(logits.distil, on_policy=OnPolicyConfig()))
    student = f"student {logits.preset} of {directory.name}"
    return [
        first,
        replace(first, name=f"{student}, answers", student=answers, teacher=TeacherRecipe(train=None)),
        replace(first, name=f"{student}, logits", student=logits),
        replace(first, name=f"{student}, on-policy", student=on_policy),
    ]


def _usable(train: Sequence[Case], share: float) -> list[Case]:
    """The first share of the rows that are calls."""
    rows = [case for case in train if case.call is not None]
    rows = rows[: max(1, round(share * len(rows)))]
    if not rows:
        raise CannotBeMadeError("there are no rows that may train a model", hint="see the terms")
    return rows


def _terms(rows: Sequence[Case]) -> tuple[str, ...]:
    return tuple(sorted({term for case in rows for term in case.terms}))


def _made_teacher(
    base: ModelDirectory, recipe: TeacherRecipe, rows: Sequence[Case], workshop: Workshop
) -> ModelDirectory:
    """The tuned model in a folder that all candidates of the run share."""
    ids = content_hash([case.id for case in rows])
    key = content_hash({"base": base.digest, "recipe": recipe.to_json(), "rows": ids, "seed": workshop.seed})
    folder = workshop.folder.parent / f"{_SHARED}-{key[:12]}"
    target = folder / "model"
    if target.is_dir():
        return ModelDirectory.open(target)
    folder.mkdir(parents=True, exist_ok=True)
    start = _trimmed(base, recipe, rows, folder / "trimmed")
    if recipe.train is None:
        return start
    examples, validation = _examples(start, rows), _examples(start, workshop.select[:_NUM_VALIDATION])
    config = replace(recipe.train, seed=workshop.seed)
    model = TorchDecoder.load(start.architecture, start.weights())
    header = {"start": start.digest, "examples": examples_digest(examples), "train": config.decisive()}
    with RunFolder(folder / "training", header, resume=True) as run:
        train(model, examples, config, validation=validation, run_folder=run, progress=workshop.progress)
    staging = folder / "exported"
    if not staging.is_dir():
        save_model(model, start, staging, recipe={"step": "fine-tune", "rows": str(len(rows))})
    made = ModelDirectory.open(staging)
    check_export(made, [example.tokens for example in examples[:16]], twin=model)
    staging.rename(target)
    return ModelDirectory.open(target)


def _trimmed(
    base: ModelDirectory, recipe: TeacherRecipe, rows: Sequence[Case], folder: Path
) -> ModelDirectory:
    """The model with as much vocabulary as the workload needs, and its system prompt folded."""
    if folder.is_dir():
        return ModelDirectory.open(folder)
    size = recipe.vocabulary
    if size is None or base.architecture.vocab_size <= size:
        return base
    conversations = [case.call.messages for case in rows if case.call is not None]
    system = common_system_prompt(conversations)
    try:
        template = folded_template(base, system) if system else ""
    except UsageError:
        template = ""
    texts = (text for case in rows for text in _texts(case, "" if not template else system))
    return trim_vocabulary(base, texts, size, folder, chat_template=template)


def _texts(case: Case, folded: str) -> list[str]:
    """What the model will read and write of a row."""
    assert case.call is not None
    read = [each.content for each in case.call.messages if each.content and each.content != folded]
    return [*read, case.wanted]


def _made_student(
    teacher: ModelDirectory, recipe: StudentRecipe, rows: Sequence[Case], workshop: Workshop
) -> ModelDirectory:
    """A student in the candidate's own folder."""
    target = workshop.folder / "model"
    if target.is_dir():
        return ModelDirectory.open(target)
    workshop.folder.mkdir(parents=True, exist_ok=True)
    examples = _examples(teacher, rows)
    start = workshop.folder / "start"
    windows = [example.tokens for example in examples[:_NUM_CALIBRATION]]
    if not start.is_dir():
        make_student(teacher, PRESETS[recipe.preset], start, windows, seed=workshop.seed)
    config = replace(recipe.distil, train=replace(recipe.distil.train, seed=workshop.seed))
    found = distil(
        teacher,
        ModelDirectory.open(start),
        examples,
        config,
        target,
        work=workshop.folder / "work",
        validation=_examples(teacher, workshop.select[:_NUM_VALIDATION]),
        progress=workshop.progress,
    )
    return found.model


def _examples(model: ModelDirectory, rows: Sequence[Case]) -> list[Example]:
    """The rows as this model reads them; what it cannot read is left out."""
    encoder = ConversationEncoder(model)
    examples = []
    for case in rows:
        if case.call is None:
            continue
        try:
            prompt = (*case.call.messages, _answer(case))
            examples.append(encoder.example(prompt, case.call.tools))
        except UsageError:
            continue
    kept = fitting(examples, model.architecture.max_positions)
    if not kept:
        raise CannotBeMadeError(f"{model.name} can read none of the rows", hint="try another model")
    return [examples[at] for at in kept]


def _answer(case: Case) -> Message:
    """What was wanted, as the assistant's message; tool calls where the row has tools and they are calls."""
    assert case.call is not None
    if case.call.tools:
        calls = _calls(case.wanted)
        if calls:
            return Message(role="assistant", content=None, tool_calls=calls)
    return Message(role="assistant", content=case.wanted)


def _calls(text: str) -> tuple[ToolCall, ...]:
    """Tool calls out of their canonical JSON; none if it is not that."""
    try:
        value = json.loads(text)
        return tuple(
            ToolCall(name=each["name"], arguments=json.dumps(each["arguments"], ensure_ascii=False))
            for each in value
        )
    except (ValueError, TypeError, KeyError, UsageError):
        return ()
