"""`tokenmill plan`: what a model would do and cost on a machine, before anybody buys or rents it."""

import argparse
from pathlib import Path

from tokenmill.cli.arguments import Handler, Parser, Subparsers, add_command, add_shared_flags, positive
from tokenmill.cli.output import Output
from tokenmill.core import UsageError

__all__ = ["add_parser"]

_DESCRIPTION = """\
Plan: what a model would do and cost on a machine. Every speed comes as a bound (no machine of this kind is
faster), an estimate, and an interval that is to hold 80 % of measurements. Prices come with date and source.

MODEL is a name of `tokenmill models`, the path of a model directory or config.json, or a well-known name such
as Llama-3.1-8B; with --params any name. HARDWARE is a name of `tokenmill prices --hardware`; `this` is this
machine as `tokenmill plan calibrate` measured it.
"""

_ESTIMATE = "Speed, time to the first token, memory, energy and cost of one model on one machine."
_CALIBRATE = """\
Measure this machine and some real steps of MODEL in under three minutes, fit the constants of the plan to
them and keep these. The error that is shown is of points that the fit had not seen, left out one by one.
"""
_COMPARE = """\
Cost of hosting MODEL on HARDWARE against a provider's price: by the million tokens, the volume a month from
which hosting is cheaper, the utilisation that it needs, and how that moves if speed or prices do.
"""
_TIERS = "What smaller or larger batches do to the speed of one user and to the cost of a token."
_READINESS = """\
What a workload needs of a machine: what fits, what binds, and what is missing for a decision. WORKLOAD is a
log of chats in the OpenAI shape (JSON lines), or a trace with lengths (CSV as of Azure, JSON lines as of
Mooncake; .gz too). Without --model the well-known models are tried.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `plan` and its actions."""
    plan = add_command(
        subparsers, "plan", _no_action, summary="what a model would do and cost", description=_DESCRIPTION
    )
    actions = plan.add_subparsers(
        title="actions", metavar="ACTION", dest="action", parser_class=Parser, help="what to plan"
    )
    _add_estimate(actions)
    _add_calibrate(actions)
    _add_compare(actions)
    _add_tiers(actions)
    _add_readiness(actions)
    for action in actions.choices.values():
        add_shared_flags(action)


def _add_action(actions: Subparsers, name: str, handler: Handler, summary: str, description: str) -> Parser:
    return add_command(actions, name, handler, summary=summary, description=description)


def _add_estimate(actions: Subparsers) -> None:
    parser = _add_action(actions, "estimate", _estimate, "speed, memory, energy and cost", _ESTIMATE)
    _add_model(parser)
    _add_target(parser)
    _add_load(parser)
    parser.add_argument(
        "--form", choices=("sum", "max"), default="sum", help="of the estimate (default: sum)"
    )


def _add_calibrate(actions: Subparsers) -> None:
    parser = _add_action(actions, "calibrate", _calibrate, "measure this machine for later plans", _CALIBRATE)
    parser.add_argument("model", metavar="MODEL", help="a name of `tokenmill models`, or a model directory")
    parser.add_argument("--weights", choices=("w8a8", "w4a8", "bf16"), default="w8a8", help="default: w8a8")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (default: one a processor)")
    parser.add_argument(
        "--seconds",
        type=positive,
        default=150,
        metavar="N",
        help="stop measuring after so long (default: 150)",
    )


def _add_compare(actions: Subparsers) -> None:
    parser = _add_action(actions, "compare", _compare, "hosting against a provider's price", _COMPARE)
    _add_model(parser)
    _add_target(parser)
    _add_load(parser)
    parser.add_argument(
        "--api", required=True, metavar="PROVIDER/MODEL", help="the price to compare with, also MODEL:batch"
    )
    parser.add_argument(
        "--ratio", type=_number, default=1.0, metavar="X", help="input tokens for one of output (default: 1)"
    )
    parser.add_argument(
        "--cached",
        type=_share,
        default=0.0,
        metavar="X",
        help="share of input that a cache holds (default: 0)",
    )
    parser.add_argument(
        "--fixed",
        type=_number,
        default=0.0,
        metavar="USD",
        help="more dollars a month, as staff (default: 0)",
    )
    parser.add_argument(
        "--spare", type=_count, default=0, metavar="N", help="systems held in reserve (default: 0)"
    )


def _add_tiers(actions: Subparsers) -> None:
    parser = _add_action(actions, "tiers", _tiers, "speed of one user against cost of a token", _TIERS)
    _add_model(parser)
    _add_target(parser)
    _add_context(parser)
    parser.add_argument(
        "--batches",
        type=_batches,
        default=(1, 4, 8, 16, 32, 64, 128, 256),
        metavar="LIST",
        help="with commas",
    )
    parser.add_argument(
        "--standard", type=positive, metavar="N", help="the batch to compare with (default: the largest)"
    )


def _add_readiness(actions: Subparsers) -> None:
    parser = _add_action(actions, "readiness", _readiness, "what a workload needs of a machine", _READINESS)
    parser.add_argument(
        "workload", type=Path, metavar="WORKLOAD", help="a log of chats, or a trace with lengths"
    )
    parser.add_argument("--model", metavar="MODEL", help="the model (default: all well-known ones)")
    _add_target(parser, is_required=True)


def _add_model(parser: Parser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="",
        metavar="MODEL",
        help="a model here, a config.json, or a well-known name; with --params what to call it",
    )
    group = parser.add_argument_group("a model that is not there yet")
    for flag, kind, what in (
        ("--params", "X", "parameters, as 7e9"),
        ("--layers", "N", "layers"),
        ("--width", "N", "width of the layers"),
        ("--heads", "N", "query heads (default: width / 128)"),
        ("--kv-heads", "N", "heads of keys and values (default: as of queries)"),
    ):
        group.add_argument(flag, type=_number, metavar=kind, help=what)


def _add_target(parser: Parser, *, is_required: bool = False) -> None:
    group = parser.add_argument_group("machine")
    default = "" if is_required else " (default: this)"
    group.add_argument(
        "--hardware",
        required=is_required,
        default=None if is_required else "this",
        metavar="NAME",
        help=f"a name of `tokenmill prices --hardware`, or this{default}",
    )
    group.add_argument("--devices", type=positive, default=1, metavar="N", help="of them (default: 1)")
    group.add_argument(
        "--weights",
        metavar="FORMAT",
        help="bf16, fp8, int8, int4, q4_k_m, w8a8 ..., or bits (default: bf16, or as calibrated)",
    )
    group.add_argument("--kv-bits", type=_bits, default=16.0, metavar="X", help="of a value (default: 16)")
    group.add_argument(
        "--runtime",
        choices=("graph", "launch"),
        help="kernels replayed as a graph, or started one by one (default: graph; launch on unified memory)",
    )
    group.add_argument("--hour-usd", type=_number, metavar="USD", help="your price of a device and hour")
    group.add_argument("--watts", type=_number, metavar="W", help="power of a device as you measured it")
    group.add_argument(
        "--kwh-usd", type=_number, default=0.0, metavar="USD", help="price of electricity, if not in the rent"
    )
    group.add_argument(
        "--utilisation",
        type=_working_share,
        default=1.0,
        metavar="X",
        help="share of the time at work (default: 1)",
    )


def _add_load(parser: Parser) -> None:
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="sequences at once (default: 1)"
    )
    _add_context(parser)


def _add_context(parser: Parser) -> None:
    parser.add_argument(
        "--context", type=positive, default=1024, metavar="N", help="tokens of each sequence (default: 1024)"
    )


def _no_action(args: argparse.Namespace, out: Output) -> int:
    raise UsageError("plan what?", hint="use estimate, calibrate, compare, tiers or readiness")


def _estimate(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.cli.plan_estimate import estimate

    return estimate(args, out)


def _calibrate(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.cli.plan_calibrate import calibrate

    return calibrate(args, out)


def _compare(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.cli.plan_compare import compare

    return compare(args, out)


def _tiers(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.cli.plan_compare import tiers

    return tiers(args, out)


def _readiness(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.cli.plan_readiness import readiness

    return readiness(args, out)


def _number(text: str) -> float:
    """An argument that is a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return value


def _share(text: str) -> float:
    """An argument from 0 to 1, or as a percentage."""
    value = _number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1, such as 0.4 or 40%")
    return value


def _working_share(text: str) -> float:
    """The same, above 0."""
    value = _share(text)
    if not value:
        raise argparse.ArgumentTypeError("a machine that never works has no cost of a token")
    return value


def _bits(text: str) -> float:
    """An argument that is bits of a value."""
    value = _number(text)
    if not 1 <= value <= 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bits from 1 to 32")
    return value


def _count(text: str) -> int:
    """An argument that is a whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def _batches(text: str) -> tuple[int, ...]:
    """An argument such as `1,8,64`."""
    return tuple(positive(part) for part in text.split(","))
