"""`tokenmill export`: a model as one GGUF file, or as a Hugging Face folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tokenmill.cli.arguments import Subparsers, add_command, add_model_argument, open_model
from tokenmill.cli.output import Output, format_bytes
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.models.store.directory import ModelDirectory
    from tokenmill.models.store.export import Exported, GgufType
    from tokenmill.models.store.fetch import Progress

__all__ = ["TYPES", "add_parser"]

TYPES: "Final[tuple[GgufType, ...]]" = ("q8_0", "q4_0", "f16", "bf16")
"""The types of a GGUF file, the default first, known here without importing them; a test compares."""

_DESCRIPTION = """\
Write a model for other programs. `gguf` is one file, for llama.cpp and what is built on it; `hf` is a folder
for transformers, vLLM and others, with the weights as they are stored. Nothing that exists is replaced, and
an export that fails or is interrupted leaves nothing behind.

With q4_0 the embeddings and the head are q8_0. A matrix whose exact 4- or 8-bit grid is kept is written as
that grid where the type can hold it; bf16 is the stored weights without a change.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `export`."""
    parser = add_command(
        subparsers, "export", _export, summary="write a model for other programs", description=_DESCRIPTION
    )
    add_model_argument(parser)
    parser.add_argument("--to", choices=("gguf", "hf"), required=True, help="what to write")
    parser.add_argument("--type", choices=TYPES, help=f"type of the matrices in a GGUF (default: {TYPES[0]})")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="what to make, or the folder to put it in (default: MODEL-TYPE.gguf or MODEL-hf, here)",
    )


def _export(args: argparse.Namespace, out: Output) -> int:
    if args.type is not None and args.to != "gguf":
        raise UsageError("--type is for --to gguf", hint="an hf folder has the weights as they are stored")
    model = open_model(args.model)
    with out.progress() as bar:
        exported = _write(model, args, bar)
    for note in exported.notes:
        out.warn(note)
    out.text(f"{model.name} is written: {format_bytes(exported.num_bytes)} in {exported.path}")
    out.document(
        {
            "name": model.name,
            "to": args.to,
            "type": (args.type or TYPES[0]) if args.to == "gguf" else None,
            "path": str(exported.path),
            "num_bytes": exported.num_bytes,
            "notes": list(exported.notes),
        }
    )
    return 0


def _write(model: "ModelDirectory", args: argparse.Namespace, progress: "Progress") -> "Exported":
    from tokenmill.models.store.export import export_gguf, export_hf

    name = model.path.resolve().name
    if args.to == "hf":
        return export_hf(model, _target(args.output, f"{name}-hf"), progress)
    gguf_type: GgufType = args.type or TYPES[0]
    return export_gguf(model, _target(args.output, f"{name}-{gguf_type}.gguf"), gguf_type, progress)


def _target(output: Path | None, name: str) -> Path:
    """Where to write: as asked; inside, if that is a folder which is there; else here."""
    path = Path(name) if output is None else output.expanduser()
    return (path / name if path.is_dir() else path).absolute()
