"""`tokenmill distil`: a small model that answers one workload as a large one does."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tokenmill.cli.arguments import Subparsers, add_command, open_model, positive
from tokenmill.cli.output import Output, format_count
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.compress.mill import MillConfig, Milled
    from tokenmill.workload import Row, Splits, WorkloadConfig

__all__ = ["RECIPES", "STUDENTS", "add_parser"]

STUDENTS: Final = ("mill-2M", "mill-4M", "mill-6M")
"""Shapes of students, known here without importing them; a test compares."""

RECIPES: Final = ("logits", "answers", "on-policy")
"""What a student learns from, the default first."""

_DESCRIPTION = """\
Make a small model for one workload. The teacher's vocabulary is trimmed to what the workload needs, a system
prompt that all calls share is learnt by heart, the teacher is trained on the answers, and a student that is
cut out of it learns from the teacher's own certainty. At the end the student is loaded in the engine and
compared with what was trained; one that differs is not kept.

TEACHER is a chat model; DATA a workload.yaml or a log of calls with their answers. Calls that certify are not
looked at, and calls whose terms are denied are left out. What was made on the way, the trained teacher too,
is in DIR.work; a run that was stopped goes on from there. Whether the student is good enough is for
`tokenmill optimize` to say.

  tokenmill distil smollm2-135m examples/slots/workload.yaml --output slots-4m
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `distil`."""
    parser = add_command(
        subparsers, "distil", _distil, summary="distil a small model for a workload", description=_DESCRIPTION
    )
    parser.add_argument("teacher", metavar="TEACHER", help="a model of `tokenmill models`, or its folder")
    parser.add_argument("data", type=Path, metavar="DATA", help="a workload.yaml, or a log of calls")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", required=True, help="the model directory to make"
    )
    parser.add_argument("--student", choices=STUDENTS, default="mill-4M", help="its shape (default: mill-4M)")
    parser.add_argument(
        "--recipe", choices=RECIPES, default=RECIPES[0], help=f"what it learns from (default: {RECIPES[0]})"
    )
    parser.add_argument(
        "--answers",
        choices=("recorded", "teacher"),
        default="recorded",
        help="whose answers it learns from (default: recorded)",
    )
    parser.add_argument(
        "--vocabulary",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens that are kept (default: 4096)",
    )
    parser.add_argument(
        "--keep-teacher", action="store_true", help="take the teacher as it is: nothing trimmed or trained"
    )
    parser.add_argument("--rows", type=positive, metavar="N", help="learn from so many calls (default: all)")
    parser.add_argument(
        "--teacher-rows", type=positive, metavar="N", help="train the teacher on so many (default: as many)"
    )
    parser.add_argument(
        "--epochs", type=positive, metavar="N", default=8, help="times that the student sees all (default: 8)"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of order and draws (default: 0)")


def _distil(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.compress.corpus import conversations_of
    from tokenmill.compress.mill import mill

    teacher, config = open_model(args.teacher), _config(args)
    workload, splits = _splits(args.data, out)
    rows = _allowed(splits.train, workload, out)[: args.rows]
    used, held = conversations_of(rows), conversations_of(_allowed(splits.select, workload, out))
    if len(used) < len(rows):
        out.warn(f"{len(rows) - len(used)} calls are none that a server here would take, and are left out")
    if not used:
        raise UsageError(f"{args.data} has no call to learn from", hint="see `tokenmill workload check`")
    folder = args.output.expanduser().absolute()
    with out.progress("") as bar:
        made = mill(
            teacher,
            used,
            config,
            folder,
            work=folder.with_name(f"{folder.name}.work"),
            validation=held[:500],
            progress=bar,
        )
    _show(made, folder, out)
    return 0


def _config(args: argparse.Namespace) -> "MillConfig":
    from dataclasses import replace

    from tokenmill.compress.mill import MillConfig
    from tokenmill.compress.recipes import DistilConfig, OnPolicyConfig
    from tokenmill.compress.students import PRESETS

    plain = DistilConfig()
    distil = replace(
        plain,
        hard_share=1.0 if args.recipe == "answers" else plain.hard_share,
        on_policy=OnPolicyConfig() if args.recipe == "on-policy" else None,
        train=replace(plain.train, num_epochs=args.epochs, seed=args.seed),
    )
    config = MillConfig(
        student=PRESETS[args.student], vocabulary=args.vocabulary, answers=args.answers, distil=distil
    )
    if args.keep_teacher:
        return replace(config, vocabulary=None, teacher=None)
    assert config.teacher is not None
    return replace(config, teacher_rows=args.teacher_rows, teacher=replace(config.teacher, seed=args.seed))


def _splits(path: Path, out: Output) -> "tuple[WorkloadConfig, Splits]":
    from tokenmill.workload import infer_workload, read_rows, read_workload, split_rows

    with out.busy(f"reading {path}"):
        is_config = path.suffix in (".yaml", ".yml")
        config = read_workload(path) if is_config else infer_workload(path)
        log = read_rows(config)
        if log.faults:
            out.warn(f"{len(log.faults)} lines make no call; see `tokenmill workload check`")
        return config, split_rows(config, log)


def _allowed(rows: "tuple[Row, ...]", config: "WorkloadConfig", out: Output) -> "list[Row]":
    """The rows that may train a model; says which may not, and which nobody has settled."""
    rulings = [config.terms.ruling(row) for row in rows]
    denied = sum(each.action == "deny" for each in rulings)
    if denied:
        out.warn(f"{denied} of {len(rows)} calls are left out: their terms are denied")
    if any(each.action == "warn" for each in rulings):
        out.warn("not all terms of the answers are known to allow training; see `tokenmill workload check`")
    return [row for row, each in zip(rows, rulings, strict=True) if each.action != "deny"]


def _show(made: "Milled", folder: Path, out: Output) -> None:
    teacher, student = made.teacher.architecture, made.student.model.architecture
    share = student.macs_per_token / teacher.macs_per_token
    losses = [loss for stage in made.student.stages for _, loss in stage.validation_losses]
    out.text(
        f"{folder.name}: {format_count(student.num_params)} parameters, "
        f"{format_count(student.macs_per_token)} multiply-accumulates a token ({share:.1%} of the teacher's)"
    )
    out.text(f"teacher: {made.teacher.path}")
    if losses:
        out.text(f"loss on held-out answers: {losses[0]:.3f} at first, {losses[-1]:.3f} at the end")
    for line in made.student.export.lines():
        out.text(line)
    out.document(
        {
            "path": str(folder),
            "teacher": str(made.teacher.path),
            "digest": made.student.model.digest,
            "num_params": student.num_params,
            "macs_per_token": student.macs_per_token,
            "share_of_teacher": share,
            "validation_losses": losses,
            "export": {
                each.weights: {**each.drift._asdict(), "num_wrong_tokens": each.num_wrong_tokens}
                for each in made.student.export.formats
            },
        }
    )
