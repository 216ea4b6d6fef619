"""The flags of the commands that generate: the fields of SamplingParams, and what the text must match.

Names, meanings, defaults and bounds are those of `core.SamplingParams`; this is cheap to import.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from tokenmill.cli.arguments import Parser, text_argument
from tokenmill.cli.inputs import STDIN, read_text_file
from tokenmill.core import Grammar, SamplingParams, UsageError

__all__ = ["add_grammar_flags", "add_sampling_flags", "grammar", "reads_stdin", "sampling_params"]

_DEFAULTS: Final = {each.name: each.default for each in fields(SamplingParams)}

_FLAGS: Final = (
    ("max_tokens", int, "N", "longest answer, in tokens"),
    ("min_tokens", int, "N", "no end before so many tokens"),
    ("temperature", float, "T", "0 takes the likeliest token"),
    ("top_p", float, "P", "sample from the likeliest tokens that hold this probability"),
    ("top_k", int, "K", "sample from the K likeliest tokens, 0: all"),
    ("min_p", float, "P", "leave out tokens below this share of the likeliest one's probability"),
    ("repetition_penalty", float, "X", "above 1: what prompt or answer had becomes less likely"),
    ("presence_penalty", float, "X", "above 0: what the answer had becomes less likely"),
    ("frequency_penalty", float, "X", "as --presence-penalty, for each time that it was there"),
)


def add_sampling_flags(parser: Parser) -> "argparse._ArgumentGroup":
    """Fields of SamplingParams, with their defaults."""
    group = parser.add_argument_group("sampling")
    for name, kind, metavar, text in _FLAGS:
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=_DEFAULTS[name],
            metavar=metavar,
            help=f"{text} (default: %(default)s)",
        )
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible (default: drawn)")
    group.add_argument(
        "--stop",
        type=text_argument,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    return group


def sampling_params(args: argparse.Namespace, *, grammar: Grammar | None = None) -> SamplingParams:
    """What the flags say, those that the command has. Raises UsageError for a value out of bounds."""
    given: dict[str, Any] = {name: getattr(args, name) for name in _DEFAULTS if hasattr(args, name)}
    return SamplingParams(**(given | {"stop": tuple(args.stop), "grammar": grammar}))


def add_grammar_flags(parser: Parser) -> None:
    """`--json-schema`, `--regex` and `--grammar`, of which one may be given."""
    group = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    group.add_argument(
        "--json-schema", type=Path, metavar="F", help="answer in JSON of this schema; `-`: standard input"
    )
    group.add_argument("--regex", type=text_argument, metavar="R", help="answer with a match of this")
    group.add_argument(
        "--grammar", type=Path, metavar="F", help="answer in this context-free grammar, in Lark's notation"
    )


def reads_stdin(args: argparse.Namespace) -> bool:
    """True if a grammar takes standard input, so that the prompt cannot."""
    return STDIN in map(str, (args.json_schema, args.grammar))


def grammar(args: argparse.Namespace) -> Grammar | None:
    """What the grammar flags say; reads the file.

    Raises as `read_text_file` does, and UsageError for a schema that is no JSON. Whether it makes sense is
    known when the model's tokenizer is.
    """
    if args.regex is not None:
        return Grammar(kind="regex", source=args.regex)
    if args.grammar is not None:
        return Grammar(kind="lark", source=read_text_file(args.grammar))
    if args.json_schema is None:
        return None
    schema = Grammar(kind="json_schema", source=read_text_file(args.json_schema))
    try:
        json.loads(schema.source)
    except (ValueError, RecursionError) as error:
        name = "standard input" if str(args.json_schema) == STDIN else args.json_schema
        raise UsageError(f"{name} is not JSON ({error})", hint="give a JSON schema") from error
    return schema
