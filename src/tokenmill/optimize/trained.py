"""Candidates that are trained on the workload: a fine-tuned model, and students that are distilled from it.

    model ─► vocabulary trimmed, system prompt folded ─► fine-tuned (the teacher) ─► student cut out,
    distilled

The teacher is a candidate itself, and is made once for all students. Every directory is loaded again and
compared with what was trained before anybody asks it anything; one that differs is a candidate that lost.
Importing this needs torch (the `train` extra).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from tokenmill.compress import (
    PRESETS,
    Conversation,
    DistilConfig,
    OnPolicyConfig,
    conversations_of,
    distil,
    examples_of,
    make_student,
    prepare_teacher,
    train_teacher,
)
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.optimize.candidate import Candidate, CannotBeMadeError, Expected, Workshop
from tokenmill.optimize.cases import Case
from tokenmill.optimize.local import directory_bytes, lineage_of
from tokenmill.optimize.problem import Problem
from tokenmill.optimize.records import Artefact, Kind, Lineage
from tokenmill.optimize.served import ServedCandidate, ServedModel, answer_limit
from tokenmill.runs import content_hash
from tokenmill.train import TrainConfig

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


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """How the model itself is tuned: `vocabulary` tokens are kept, None leaves it as it is. Without `train`
    it is not tuned, and only something to cut a student out of.
    """

    vocabulary: int | None = _MAX_VOCABULARY
    train: TrainConfig | None = field(
        default_factory=lambda: TrainConfig(learning_rate=2e-4, num_epochs=1, tokens_per_step=2048)
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
class TrainedCandidate(ServedCandidate):
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
    """The tuned model in a folder that all candidates of the run share; each step is made once."""
    ids = content_hash([case.id for case in rows])
    validation = _conversations(workshop.select[:_NUM_VALIDATION])
    prepared = _shared(
        workshop, "trimmed", {"base": base.digest, "vocabulary": recipe.vocabulary, "rows": ids}
    )
    start = base
    if recipe.vocabulary is not None and recipe.vocabulary < base.architecture.vocab_size:
        start = _kept(prepared) or prepare_teacher(
            base, _conversations(rows), prepared, vocabulary=recipe.vocabulary
        )
    if recipe.train is None:
        return start
    config = replace(recipe.train, seed=workshop.seed)
    decisive = {"start": start.digest, "train": config.decisive(), "rows": ids}
    folder = _shared(workshop, "teacher", decisive)
    return _kept(folder) or train_teacher(
        start,
        examples_of(start, _conversations(rows)),
        config,
        folder,
        work=_shared(workshop, "teacher-run", decisive),
        validation=examples_of(start, validation),
        progress=workshop.progress,
    )


def _shared(workshop: Workshop, what: str, decisive: Mapping[str, Any]) -> Path:
    """A folder beside those of the candidates, named by what decides it."""
    workshop.folder.parent.mkdir(parents=True, exist_ok=True)
    return workshop.folder.parent / f"{what}-{content_hash(dict(decisive))[:12]}"


def _made_student(
    teacher: ModelDirectory, recipe: StudentRecipe, rows: Sequence[Case], workshop: Workshop
) -> ModelDirectory:
    """A student in the candidate's own folder."""
    target = workshop.folder / "model"
    made = _kept(target)
    if made is not None:
        return made
    workshop.folder.mkdir(parents=True, exist_ok=True)
    examples = examples_of(teacher, _conversations(rows))
    windows = [example.tokens for example in examples[:_NUM_CALIBRATION]]
    cut = workshop.folder / "cut"
    start = _kept(cut) or make_student(teacher, PRESETS[recipe.preset], cut, windows, seed=workshop.seed)
    found = distil(
        teacher,
        start,
        examples,
        replace(recipe.distil, train=replace(recipe.distil.train, seed=workshop.seed)),
        target,
        work=workshop.folder / "work",
        validation=examples_of(teacher, _conversations(workshop.select[:_NUM_VALIDATION])),
        progress=workshop.progress,
    )
    return found.model


def _conversations(cases: Sequence[Case]) -> list[Conversation]:
    return conversations_of(case.row for case in cases)


def _kept(folder: Path) -> ModelDirectory | None:
    """What is there already: directories appear whole."""
    return ModelDirectory.open(folder) if folder.is_dir() else None
