"""`tokenmill train`: conversations in, a model that answers like them out."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import Subparsers, add_command, add_model_argument, open_model, positive
from tokenmill.cli.output import Output, format_count
from tokenmill.core import NotFoundError, TokenmillError, UsageError

if TYPE_CHECKING:
    from tokenmill.models.store.directory import ModelDirectory
    from tokenmill.runs import RunFolder
    from tokenmill.train import ConversationEncoder, Example, LoraConfig, TrainConfig, TrainResult

__all__ = ["add_parser"]

_DESCRIPTION = """\
Train MODEL on conversations and write the result as a new model directory. Each line of DATA is a JSON object
with `messages` in the OpenAI chat shape (and `tools`, if there are some); the last message, the assistant's,
is what is learnt. The prompt before it is made as `tokenmill serve` makes it.

  tokenmill train smollm2-135m train.jsonl --validation valid.jsonl --output ./mine

With --lora only small matrices beside the weights are trained; they are merged into the result, or with
--adapter written as an adapter alone, as PEFT lays it out. A run that was killed goes on with --resume and
comes to the same weights.
"""
_ANSWER_KEYS: Final = ("messages", "tools")
_SKIPPED_SHOWN: Final = 3


def add_parser(subparsers: Subparsers) -> None:
    """Add `train`."""
    parser = add_command(
        subparsers, "train", _train, summary="train a model on conversations", description=_DESCRIPTION
    )
    add_model_argument(parser)
    parser.add_argument("data", type=Path, metavar="DATA", help="conversations to learn, as JSON lines")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the model directory to make"
    )
    parser.add_argument(
        "--validation", type=Path, metavar="FILE", help="conversations that decide which weights are kept"
    )
    parser.add_argument(
        "--run", type=Path, metavar="FOLDER", help="log and checkpoints (default: DIR with .run behind it)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    _add_settings(parser.add_argument_group("how to train"))
    adapter = parser.add_argument_group("low-rank adapter")
    adapter.add_argument("--lora", type=positive, metavar="RANK", help="train an adapter of this rank only")
    adapter.add_argument("--alpha", type=float, metavar="X", help="its strength (default: twice the rank)")
    adapter.add_argument("--targets", nargs="+", metavar="NAME", help="its matrices (default: all)")
    adapter.add_argument(
        "--adapter", action="store_true", help="write the adapter alone, not merged into the model"
    )


def _add_settings(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--epochs", type=positive, metavar="N", help="times through the data (default: 3)")
    group.add_argument(
        "--learning-rate", type=float, metavar="X", help="its peak (default: 1e-4; 1e-3 with --lora)"
    )
    group.add_argument(
        "--tokens-per-step", type=positive, metavar="N", help="tokens between two updates (default: 4096)"
    )
    group.add_argument(
        "--patience", type=positive, metavar="N", help="end after N validations without a better loss"
    )
    group.add_argument("--seed", type=int, metavar="N", help="order of the data (default: 0)")
    group.add_argument("--threads", type=positive, metavar="N", help="threads (default: one a core)")
    group.add_argument(
        "--licence", nargs="+", default=[], metavar="NAME", help="licences of the data, for the manifest"
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is trained, how, and where it goes."""

    model: "ModelDirectory"
    config: "TrainConfig"
    lora: "LoraConfig | None"
    examples: "list[Example]"
    validation: "list[Example]"
    output: Path


def _train(args: argparse.Namespace, out: Output) -> int:
    import torch

    from tokenmill.runs import RunFolder

    output = args.output.expanduser().absolute()
    if output.exists():
        raise UsageError(f"{output} exists already", hint="remove it first, or choose another --output")
    if not output.parent.is_dir():
        raise NotFoundError(f"{output.parent} is no folder", hint="make it first")
    if args.adapter and args.lora is None:
        raise UsageError("--adapter is for --lora", hint="give --lora RANK")
    if args.lora is None and (args.alpha is not None or args.targets):
        raise UsageError("--alpha and --targets are for --lora", hint="give --lora RANK")
    if args.patience is not None and args.validation is None:
        raise UsageError("--patience is for --validation", hint="give --validation FILE")
    if args.threads:
        torch.set_num_threads(args.threads)
    job = _job(args, output, out)
    run = (args.run or output.with_name(f"{output.name}.run")).expanduser()
    with RunFolder(run, _header(job, args), resume=args.resume) as folder:
        result = _run(job, args, folder, out)
    _show(job, result, run, out)
    return 0


def _job(args: argparse.Namespace, output: Path, out: Output) -> _Job:
    from tokenmill.train import ConversationEncoder

    config, lora = _config(args), _lora(args)
    model = open_model(args.model)
    encoder = ConversationEncoder(model)
    with out.busy("reading the conversations"):
        examples = _examples(args.data, encoder, model, out)
        validation = [] if args.validation is None else _examples(args.validation, encoder, model, out)
    return _Job(
        model=model, config=config, lora=lora, examples=examples, validation=validation, output=output
    )


def _config(args: argparse.Namespace) -> "TrainConfig":
    from tokenmill.train import TrainConfig

    rate = args.learning_rate
    if rate is None and args.lora is not None:
        rate = 1e-3
    given = {
        "learning_rate": rate,
        "num_epochs": args.epochs,
        "tokens_per_step": args.tokens_per_step,
        "patience": args.patience,
        "seed": args.seed,
    }
    return TrainConfig(**{name: value for name, value in given.items() if value is not None})


def _lora(args: argparse.Namespace) -> "LoraConfig | None":
    from tokenmill.train import LoraConfig

    if args.lora is None:
        return None
    given: dict[str, Any] = {"alpha": 2.0 * args.lora if args.alpha is None else args.alpha}
    if args.targets:
        given["targets"] = tuple(args.targets)
    return LoraConfig(rank=args.lora, seed=args.seed or 0, **given)


def _header(job: _Job, args: argparse.Namespace) -> dict[str, Any]:
    """What decides the weights that come out."""
    import torch

    return {
        "model": job.model.digest,
        "data": _sha256(args.data),
        "validation": None if args.validation is None else _sha256(args.validation),
        "config": job.config.decisive(),
        "lora": None if job.lora is None else vars(job.lora),
        "threads": torch.get_num_threads(),
    }


def _run(job: _Job, args: argparse.Namespace, folder: "RunFolder", out: Output) -> "TrainResult":
    import torch

    from tokenmill.train import (
        TorchDecoder,
        add_lora,
        discard_checkpoint,
        merge_lora,
        peak_flops,
        save_adapter,
        save_model,
        train,
    )

    with out.busy(f"loading {job.model.name}"):
        decoder = TorchDecoder.load(job.model.architecture, job.model.weights())
    if job.lora is not None:
        add_lora(decoder, job.lora)
    peak = peak_flops(torch.get_num_threads())
    with out.progress(unit="step") as bar:
        result = train(
            decoder,
            job.examples,
            job.config,
            validation=job.validation,
            run_folder=folder,
            progress=bar,
            peak_flops=peak,
        )
    if args.adapter:
        save_adapter(decoder, job.output, base=job.model.name)
    else:
        if job.lora is not None:
            merge_lora(decoder)
        settings = {key: _text(value) for key, value in folder.header.items() if value is not None}
        recipe = {"step": "train", **settings}
        save_model(decoder, job.model, job.output, recipe=recipe, licences=args.licence)
    discard_checkpoint(folder)
    return result


def _examples(
    path: Path, encoder: "ConversationEncoder", model: "ModelDirectory", out: Output
) -> "list[Example]":
    """The conversations of a file. Those longer than the model's context are left out, and named."""
    longest = model.architecture.max_positions
    examples, too_long = [], []
    for place, example in _read(path, encoder):
        if example.num_inputs <= longest:
            examples.append(example)
        else:
            too_long.append(place)
    if too_long:
        shown = ", ".join(too_long[:_SKIPPED_SHOWN])
        out.warn(f"{len(too_long)} conversations have more than {longest} tokens and are left out: {shown}")
    if not examples:
        raise UsageError(f"{path} has no conversation to learn", hint="give a file with some")
    return examples


def _read(path: Path, encoder: "ConversationEncoder") -> "Iterator[tuple[str, Example]]":
    from tokenmill.core import SamplingParams
    from tokenmill.evals.data import read_rows
    from tokenmill.wire import parse_openai_chat

    for row in read_rows(path):
        if "messages" not in row.fields:
            row.place.refuse("there is no messages", f"its fields are {', '.join(row.fields)}")
        body = {"model": "model"} | {
            name: row.fields[name] for name in _ANSWER_KEYS if row.fields.get(name) is not None
        }
        try:
            call = parse_openai_chat(json.dumps(body).encode(), SamplingParams())
            yield str(row.place), encoder.example(call.messages, call.tools)
        except TokenmillError as error:
            row.place.refuse(error.message, error.hint or "mend the line, or remove it")


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _show(job: _Job, result: "TrainResult", run: Path, out: Output) -> None:
    out.text(
        f"{job.output} is written: {result.num_steps} steps, {format_count(result.num_tokens)} tokens, "
        f"loss {result.loss:.4f}"
    )
    if result.validation_losses:
        best = min(loss for _, loss in result.validation_losses)
        early = ", ended early" if result.stopped_early else ""
        out.text(f"validation loss {best:.4f}, at step {result.best_step}{early}")
    if result.tokens_per_second is not None and result.utilisation is not None:
        out.text(
            f"{result.tokens_per_second:,.0f} tokens/s, {result.utilisation:.0%} of what this machine "
            f"multiplies in bf16; the log is in {run}"
        )
    out.document(
        {
            "output": str(job.output),
            "run": str(run),
            "num_examples": len(job.examples),
            "num_validation_examples": len(job.validation),
            "num_steps": result.num_steps,
            "num_tokens": result.num_tokens,
            "loss": result.loss,
            "validation_losses": [{"step": step, "loss": loss} for step, loss in result.validation_losses],
            "best_step": result.best_step,
            "stopped_early": result.stopped_early,
            "tokens_per_second": result.tokens_per_second,
            "utilisation": result.utilisation,
        }
    )
