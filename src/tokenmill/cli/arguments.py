"""What the commands' arguments have in common: one parser class, the flags that several commands share.

Importing this must stay cheap, for `tokenmill --help` imports every command: no numpy, no engine. A
command module has `add_parser(subparsers)`, which calls `add_command`, and its handler `(args, out) -> int`
returns the exit code (0) and imports what is heavy inside. Errors are raised, never printed.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from tokenmill.cli.output import Output, format_bytes
from tokenmill.core import NotFoundError, UsageError

if TYPE_CHECKING:
    from tokenmill.engine import LLM, LLMConfig
    from tokenmill.models.store.directory import ModelDirectory

__all__ = [
    "KV_DTYPES",
    "SPECULATIONS",
    "WEIGHTS",
    "Handler",
    "Parser",
    "Subparsers",
    "adapter_name",
    "add_command",
    "add_engine_flags",
    "add_generator_flags",
    "add_model_argument",
    "add_shared_flags",
    "add_speculation_flags",
    "byte_size",
    "expert_cache_fields",
    "llm_config",
    "open_model",
    "opened_llm",
    "positive",
    "text_argument",
]

_SIZE: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]i?)?b?", flags=re.ASCII | re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

Handler: TypeAlias = Callable[[argparse.Namespace, Output], int]
"""Runs a command: parsed arguments and the output to write to; returns the exit code."""

WEIGHTS: Final = ("w8a8", "w4a8", "bf16")
"""The engine's weight formats, its default first, known here without importing it; a test compares."""

KV_DTYPES: Final = ("bf16", "int8")
"""What keys and values may be kept as; the rest as of `WEIGHTS`."""

SPECULATIONS: Final = ("off", "lookup")
"""Where guesses may come from; the rest as of `WEIGHTS`."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors, and which takes no abbreviated flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, but a command itself refuses what it does not know, and points to its own help."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, []

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with a pointer to this command's help."""
        raise UsageError(message, hint=f"see `{self.prog} --help`")


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class _HelpFormatter(argparse.HelpFormatter):
    """Folds a description to the terminal, paragraph by paragraph; indented lines stay as they are."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=28, **settings)

    def add_argument(self, action: argparse.Action) -> None:
        """As argparse, with room for the names of commands, which it indents without counting it."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip("\n").split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(part if part.startswith("  ") else fill(part, width, indent) for part in parts)


def add_command(
    subparsers: Subparsers, name: str, handler: Handler, *, summary: str, description: str = ""
) -> Parser:
    """A new command with its handler; `add_shared_flags` completes it when all of its own are there."""
    parser = subparsers.add_parser(
        name, help=summary, description=description or f"{summary[0].upper()}{summary[1:]}."
    )
    parser.set_defaults(handler=handler)
    return parser


def add_shared_flags(parser: Parser) -> None:
    """The flags that every command has: `--json` and `--debug`."""
    shared = parser.add_argument_group("for every command")
    shared.add_argument(
        "--json", action="store_true", help="print one JSON document, and nothing else, on stdout"
    )
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_model_argument(parser: Parser) -> None:
    """MODEL."""
    parser.add_argument(
        "model", metavar="MODEL", help="a name of `tokenmill models`, or the path of a model directory"
    )


def add_engine_flags(parser: Parser) -> "argparse._ArgumentGroup":
    """`--weights`, `--kv` and `--threads`; not given, the engine's own defaults hold."""
    group = parser.add_argument_group("engine")
    group.add_argument("--weights", choices=WEIGHTS, help=f"format of the weights (default: {WEIGHTS[0]})")
    group.add_argument(
        "--kv", choices=KV_DTYPES, help=f"format of the KV cache; int8 is half (default: {KV_DTYPES[0]})"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="threads (default: one a processor)")
    group.add_argument(
        "--expert-cache",
        type=byte_size,
        metavar="SIZE",
        help="memory for the experts of a mixture, for example 2GB; the others are read when they are asked",
    )
    return group


def add_generator_flags(parser: Parser) -> None:
    """The engine flags, and those for what only a generation has: speculation and an adapter."""
    group = add_speculation_flags(parser)
    group.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="use this LoRA adapter, as PEFT saves it"
    )


def add_speculation_flags(parser: Parser) -> "argparse._ArgumentGroup":
    """The engine flags, and `--speculation` and `--draft`."""
    group = add_engine_flags(parser)
    group.add_argument(
        "--speculation",
        choices=SPECULATIONS,
        help=f"guess tokens from the text so far; same answer, fewer steps (default: {SPECULATIONS[0]})",
    )
    group.add_argument(
        "--draft", metavar="MODEL", help="a small model with the same vocabulary that guesses for MODEL"
    )
    return group


def adapter_name(args: argparse.Namespace) -> str:
    """What the adapter of `--adapter` is called: its folder's name; empty if there is none."""
    folder: Path | None = getattr(args, "adapter", None)
    return "" if folder is None else folder.expanduser().resolve().name or "adapter"


def llm_config(args: argparse.Namespace) -> "LLMConfig":
    """What the engine flags say; imports the engine."""
    from tokenmill.engine import LLMConfig

    given = {
        "weights": args.weights,
        "kv_dtype": args.kv,
        "num_threads": args.threads,
        "speculation": getattr(args, "speculation", None),
        "max_adapters": 1 if adapter_name(args) else None,
        "expert_cache_bytes": args.expert_cache,
    }
    return LLMConfig(**{name: value for name, value in given.items() if value is not None})


def open_model(name: str) -> "ModelDirectory":
    """The model of this name or path. Raises NotFoundError with the way to get it."""
    from tokenmill.models.store.library import Library

    try:
        return Library().find(name)
    except NotFoundError as error:
        path = Path(name).expanduser()
        if path.is_file():
            hint = f"take it into the store first: tokenmill pull {name}"
            raise UsageError(f"{path} is a file, not a model directory", hint=hint) from error
        raise NotFoundError(
            error.message, hint=error.hint or "`tokenmill models` lists what is here"
        ) from error


@contextmanager
def opened_llm(model: "ModelDirectory", args: argparse.Namespace, out: Output) -> "Iterator[LLM]":
    """The model, ready to run as the engine flags say, and closed at the end; imports the engine.

    The adapter of `--adapter` is loaded under `adapter_name`.
    """
    from tokenmill.engine import LLM

    config = llm_config(args)
    draft_name: str | None = getattr(args, "draft", None)
    draft = None if draft_name is None else open_model(draft_name)
    name = adapter_name(args)
    if name and not args.adapter.expanduser().is_dir():
        raise NotFoundError(f"{args.adapter} is no folder", hint="give the folder of a LoRA adapter")
    with out.busy(f"loading {model.name}, {config.weights}"):
        llm = LLM(model, config, draft=draft)
    with closing(llm):
        if name:
            llm.load_adapter(name, args.adapter.expanduser())
        yield llm


def expert_cache_fields(llm: "LLM", out: Output) -> dict[str, Any]:
    """What the cache of experts did, for the document and as a note; nothing without one."""
    stats = llm.expert_cache
    if stats is None:
        return {}
    asked = stats.num_hits + stats.num_misses
    hit_rate = stats.num_hits / asked if asked else 1.0
    out.note(
        f"experts: {hit_rate:.0%} of {asked} were in memory, {format_bytes(stats.bytes_read)} read in "
        f"{stats.read_seconds:.1f} s, {format_bytes(stats.bytes_held)} held"
    )
    return {"expert_cache": {"hit_rate": hit_rate, **stats._asdict()}}


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return value


def byte_size(text: str) -> int:
    """An argument that is a size: `3GB`, `2.5GiB`, `800 MB`, `1000`; units count in thousands or 1024s."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 3GB or 3GiB")
    unit = (match[2] or "").lower()
    scale: int = (1024 if unit.endswith("i") else 1000) ** _POWERS[unit[:1]]
    return round(float(match[1]) * scale)


def text_argument(text: str) -> str:
    """An argument that is text; the system hands bytes over, which may be none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8") from None
    return text
