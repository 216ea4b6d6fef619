"""`tokenmill eval`: how good a model is at tasks, with intervals; `tokenmill tasks`: which there are."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import (
    Subparsers,
    add_command,
    add_engine_flags,
    open_model,
    opened_llm,
    positive,
)
from tokenmill.cli.machine import version_fields
from tokenmill.cli.output import Output, format_count
from tokenmill.cli.remote import add_endpoint_flags, open_remote_model
from tokenmill.core import NotFoundError, UsageError

if TYPE_CHECKING:
    from tokenmill.evals.ask import EvaluatedModel
    from tokenmill.evals.runner import EvalOptions
    from tokenmill.evals.task import Task

__all__ = ["add_parser"]

_DEFAULT_WINDOW: Final = 2048
_NOTHING_ANSWERED: Final = 1

_DESCRIPTION = """\
Ask a model the questions of one task or more, and say what share is right, with a 95 % interval, beside what
guessing would reach.

--out keeps every answer, in a folder for each task: run.json, items.jsonl, result.json. A run that was
interrupted goes on with --resume and ends with the same figures. --limit takes that many items, spread over
the data, always the same ones; those of a smaller limit are among those of a larger one.

  tokenmill eval --model smollm2-135m --task mmlu --data DATA --limit 500 --out results
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `eval` and `tasks`."""
    parser = add_command(
        subparsers, "eval", _eval, summary="how good a model is at tasks", description=_DESCRIPTION
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a name of `tokenmill models`, the path of a model directory, or the URL of an endpoint",
    )
    parser.add_argument(
        "--task", required=True, nargs="+", metavar="TASK", help="one name of `tokenmill tasks` or more"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="a folder with the tasks' folders, the folder of one task, or one file (default: data)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="ask N items of each task (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep answers and results in DIR/TASK")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, or begin it")
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help=f"tokens in a window of perplexity (default: {_DEFAULT_WINDOW}, or the model's context)",
    )
    add_engine_flags(parser)
    add_endpoint_flags(parser)
    add_command(subparsers, "tasks", _tasks, summary="list the tasks that models can be asked")


def _eval(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.evals.catalog import find_task
    from tokenmill.evals.runner import EvalOptions

    if args.resume and args.out is None:
        raise UsageError("--resume has no folder to go on with", hint="name it with --out")
    tasks = [find_task(name) for name in dict.fromkeys(args.task)]
    places = [_data(args.data, task) for task in tasks]
    options = EvalOptions(limit=args.limit, resume=args.resume, machine=_machine())
    results = []
    with ExitStack() as stack:
        folder = args.out
        if folder is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="tokenmill-eval-")))
        model = stack.enter_context(_opened(args, out))
        for task, place in zip(tasks, places, strict=True):
            results.append(_run(task, place, model, folder / task.name, options, out))
    if args.out is None:
        out.note("answers are not kept; --out DIR keeps them, for --resume and for comparisons")
    out.document({"results": results})
    return 0 if all(result["num_answered"] for result in results) else _NOTHING_ANSWERED


def _run(
    task: "Task", data: Path, model: "EvaluatedModel", folder: Path, options: "EvalOptions", out: Output
) -> dict[str, Any]:
    """Evaluate one task and show its result."""
    from tokenmill.evals.runner import evaluate

    with out.progress("item") as bar:
        try:
            result = evaluate(
                task, data, model, folder, options, lambda done, total: bar(task.name, done, total)
            )
        except KeyboardInterrupt:
            out.note(f"answers so far are in {folder}: --out with --resume goes on")
            raise
    _show(result, out)
    return result


@contextmanager
def _opened(args: argparse.Namespace, out: Output) -> "Iterator[EvaluatedModel]":
    """The model that is asked, as what it can do."""
    from tokenmill.evals.ask import EvaluatedModel
    from tokenmill.remote import is_url

    if is_url(args.model):
        remote = open_remote_model(args.model, args)
        about = {"url": remote.endpoint.url, "api": remote.endpoint.api}
        yield EvaluatedModel(name=remote.endpoint.model, about=about, generator=remote, scorer=remote)
        return
    directory = open_model(args.model)
    with opened_llm(directory, args, out) as llm:
        config = llm.config
        yield EvaluatedModel(
            name=directory.name,
            about={"digest": directory.digest, "weights": config.weights, "kv_dtype": config.kv_dtype},
            generator=llm,
            scorer=llm,
            reader=llm,
            window=args.window or min(_DEFAULT_WINDOW, llm.context_length),
        )


def _data(data: Path, task: "Task") -> Path:
    """Where a task's data are: its folder in `data`, or that itself."""
    inner = data / task.folder
    if data.is_file() or not inner.is_dir():
        inner = data
    if not inner.exists():
        hint = f"--data DIR names the folder that has {task.folder or 'the texts'}, see docs/evaluation.md"
        raise NotFoundError(f"{data} does not exist, and {task.name} needs data", hint=hint)
    return inner


def _machine() -> dict[str, Any]:
    from tokenmill.kernels.probe import read_hardware

    return {**asdict(read_hardware()), **version_fields()}


def _show(result: Mapping[str, Any], out: Output) -> None:
    """A result for people: the figures, what was not answered, what it took."""
    from tokenmill.evals.catalog import find_task

    task = find_task(result["task"])
    out.text(f"{task.name} {task.version}: {task.summary}; {result['num_answered']} of {_of(result)}")
    rows = [
        [name, _figure(value["estimate"]), f"{_figure(value['low'])} to {_figure(value['high'])}"]
        for name, value in result["metrics"].items()
    ]
    if result["chance_corrected"]:
        value = result["chance_corrected"]
        name = f"{task.metric} above chance ({task.chance:g})"
        rows.append(
            [name, _figure(value["estimate"]), f"{_figure(value['low'])} to {_figure(value['high'])}"]
        )
    if result["num_answered"]:
        out.table(["metric", "value", "95 % interval"], rows)
    tokens, seconds = result["tokens"], result["seconds"]
    cached = "" if tokens["cached_share"] is None else f" ({tokens['cached_share']:.0%} of them cached)"
    out.text(
        f"{seconds:.1f} s, {format_count(tokens['input'])} tokens in{cached}, "
        f"{format_count(tokens['output'])} out ({_asked(result['model'])})"
    )
    if result["num_errors"]:
        out.warn(
            f"{result['num_errors']} items were not answered and are in no figure, the first one: "
            f"{result['errors'][0]['id']}: {result['errors'][0]['error']}"
        )


def _asked(model: Mapping[str, Any]) -> str:
    """The model in a few words."""
    return f"{model['name']}, {model['weights']}" if model.get("weights") else str(model["name"])


def _of(result: Mapping[str, Any]) -> str:
    data = result["data"]
    if data["num_chosen"] == data["num_items"]:
        return f"{data['num_items']} items"
    return f"{data['num_chosen']} chosen of {data['num_items']} items"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _tasks(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.evals.catalog import TASKS

    cells = [
        [
            task.name,
            str(task.version),
            task.metric,
            "-" if task.chance is None else f"{task.chance:g}",
            task.folder or "a text",
            task.summary,
        ]
        for task in TASKS.values()
    ]
    out.table(["task", "version", "metric", "chance", "data", "about"], cells)
    names = ("name", "version", "metric", "chance", "folder", "summary")
    out.document({"tasks": [{name: getattr(task, name) for name in names} for task in TASKS.values()]})
    return 0
