"""`tokenmill versus A B`: two systems side by side, with the same requests, in turns."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from tokenmill.cli.arguments import Subparsers, add_command, positive
from tokenmill.cli.load_arguments import (
    DEFAULT_CONCURRENCY,
    add_bound_flags,
    add_level_flags,
    add_target_flags,
    add_workload_flags,
    drive_config,
    number,
)
from tokenmill.cli.output import Output
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.evals.load import MachinePrice, Side, TokenPrice
    from tokenmill.evals.load.versus import Figure

__all__ = ["add_parser"]

_SIGNALLED: Final = 128
_SIDES: Final = ("a", "b")

_DESCRIPTION = """\
Measure two systems, endpoints or local models, with the same requests in turns (A B A B), and compare what
they do and cost. An improvement is of B over A, with an interval; more is better. Energy is measured where
this machine has counters and the system runs on it, else estimated from --watts-a and --watts-b, else not
measured.

A price is `USD/h` for a machine, whose seconds are then shared between input and output by the time spent
waiting for the first token (an estimate), or `IN,OUT` for what a provider asks for a million tokens.
"""
_HEADER = ("figure", "unit", "A", "B", "improvement", "between", "how")


def add_parser(subparsers: Subparsers) -> None:
    """Add `versus`."""
    parser = add_command(
        subparsers, "versus", _versus, summary="two systems side by side", description=_DESCRIPTION
    )
    for side in _SIDES:
        parser.add_argument(side, metavar=side.upper(), help="URL of an endpoint, or a local model")
    parser.add_argument("--rounds", type=positive, metavar="N", default=3, help="turns of each (default: 3)")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--rate", type=number, metavar="R", help="requests a second (open loop)")
    levels.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help=f"requests at a time (closed loop; default: {DEFAULT_CONCURRENCY})",
    )
    for side in _SIDES:
        name = side.upper()
        parser.add_argument(
            f"--endpoint-model-{side}",
            default="",
            metavar="NAME",
            help=f"what {name} calls its model (default: the only one)",
        )
        parser.add_argument(
            f"--key-env-{side}", default="", metavar="VAR", help=f"variable with {name}'s key"
        )
        parser.add_argument(
            f"--price-{side}", type=_price, metavar="P", help=f"price of {name}: USD/h or IN,OUT"
        )
        parser.add_argument(f"--watts-{side}", type=number, metavar="W", help=f"assumed power of {name}")
    add_workload_flags(parser)
    add_level_flags(parser)
    add_bound_flags(parser)
    add_target_flags(parser)


def _versus(args: argparse.Namespace, out: Output) -> int:
    import asyncio

    from tokenmill.cli.versus_run import measure
    from tokenmill.evals.load import compare_sides
    from tokenmill.evals.load.results import SCHEMA, level_document

    a, b, stopped_by = asyncio.run(measure(args, out))
    if not a.ok or not b.ok:
        _warn_of_errors(out, (a, b))
        raise UsageError("a system answered nothing", hint="see the reasons above")
    table = compare_sides(a, b, args.seed)
    out.text(f"A  {a.name}\nB  {b.name}")
    out.table(_HEADER, [_cells(figure) for figure in table.figures])
    _warn_of_errors(out, (a, b))
    if stopped_by:
        out.warn("stopped early: the rounds may differ in what they hold")
    out.document(
        {
            "schema": SCHEMA,
            "a": a.name,
            "b": b.name,
            "figures": [asdict(figure) for figure in table.figures],
            "num_ok": table.num_ok,
            "num_requests": table.num_requests,
            "bounds": asdict(drive_config(args)),
            "rounds": [[level_document(result) for result in side.rounds] for side in (a, b)],
            "was_stopped": bool(stopped_by),
        }
    )
    return _SIGNALLED + stopped_by if stopped_by else 0


def _warn_of_errors(out: Output, sides: "tuple[Side, Side]") -> None:
    for letter, side in zip("AB", sides, strict=True):
        for result in side.rounds:
            for reason, count in result.summary.errors.items():
                out.warn(f"{letter}: {count} failed in a round: {reason}")
            if result.summary.client.is_saturated:
                out.warn(
                    f"{letter}: this client was the bottleneck; its latencies are partly the client's own"
                )


def _cells(figure: "Figure") -> list[str]:
    labels = sorted({figure.label_a, figure.label_b})
    improvement = "-" if figure.improvement is None else f"{figure.improvement:+.1%}"
    bounds = "-" if figure.low is None or figure.high is None else f"{figure.low:+.1%} to {figure.high:+.1%}"
    values = [_value(figure.a, figure.unit), _value(figure.b, figure.unit)]
    return [figure.name, figure.unit, *values, improvement, bounds, ", ".join(labels)]


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if unit == "tokens" else f"{value:,.4g}" if unit in ("$", "J") else f"{value:,.1f}"


def _price(text: str) -> "MachinePrice | TokenPrice":
    """`2.95/h`, or `0.15,0.60`."""
    from tokenmill.evals.load import MachinePrice, TokenPrice

    try:
        if text.endswith("/h"):
            return MachinePrice(usd_per_hour=float(text.removesuffix("/h")))
        usd_in, usd_out = text.split(",")
        return TokenPrice(usd_per_1m_in=float(usd_in), usd_per_1m_out=float(usd_out))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no price such as 2.95/h or 0.15,0.60") from None
