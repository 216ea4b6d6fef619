"""`tokenmill prices`: what providers charge and machines cost, each with its date and source."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.output import Output
from tokenmill.core import NotFoundError, UsageError

if TYPE_CHECKING:
    from tokenmill.costs import Hardware, Price

__all__ = ["add_parser"]

_DESCRIPTION = """\
Prices for 10^6 tokens as providers asked them, and machines with what an hour of them costs. Every price has
the day and the source; there is no price of today, for sources differ.

  tokenmill prices --model llama
  tokenmill prices --hardware
  tokenmill prices update --from FILE

update checks a table of your own (CSV with the columns of the table that comes along) and puts it in the
place of that; a bad row changes nothing.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `prices`."""
    parser = add_command(
        subparsers, "prices", _prices, summary="what tokens and machines cost", description=_DESCRIPTION
    )
    parser.add_argument("action", nargs="?", choices=("update",), help="take over a table of your own")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="the table for update")
    parser.add_argument("--model", default="", metavar="NAME", help="models whose name contains this")
    parser.add_argument("--provider", default="", metavar="NAME", help="this provider only")
    parser.add_argument("--hardware", action="store_true", help="list machines in place of tokens")


def _prices(args: argparse.Namespace, out: Output) -> int:
    if args.action == "update":
        return _update(args, out)
    if args.source is not None:
        raise UsageError("--from belongs to update", hint="tokenmill prices update --from FILE")
    return _machines(args, out) if args.hardware else _tokens(args, out)


def _update(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.costs import update_prices

    if args.source is None:
        raise UsageError("update from what?", hint="tokenmill prices update --from FILE")
    target, prices = update_prices(args.source)
    out.text(f"{len(prices)} prices from {args.source} are now used; they lie in {target}")
    out.document({"path": str(target), "num_prices": len(prices)})
    return 0


def _tokens(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.costs import load_prices, select_prices

    chosen = select_prices(load_prices(), provider=args.provider, model=args.model)
    if not chosen:
        raise NotFoundError("no price is known for that", hint="`tokenmill prices` lists what is known")
    header = ("model", "provider", "tier", "$/1M in", "cached", "out", "date", "source")
    out.table(header, [_price_cells(price) for price in chosen])
    out.document({"prices": [asdict(price) for price in chosen]})
    return 0


def _price_cells(price: "Price") -> list[str]:
    cached = "-" if price.cached_usd is None else f"{price.cached_usd:g}"
    figures = [f"{price.input_usd:g}", cached, f"{price.output_usd:g}"]
    return [price.model, price.provider, price.tier, *figures, price.date, price.source]


def _machines(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.costs import load_hardware

    machines = load_hardware()
    header = ("hardware", "kind", "bf16 TFLOPS", "GB", "GB/s", "W", "$/h", "date", "source of the price")
    out.table(header, [_machine_cells(machine) for machine in machines])
    out.document({"hardware": [asdict(machine) for machine in machines]})
    return 0


def _machine_cells(machine: "Hardware") -> list[str]:
    sizes = (machine.bf16_tflops, machine.mem_gb, machine.mem_gb_s, machine.tdp_w)
    price = machine.price
    money = ["-", "-", "-"] if price is None else [f"{price.usd:g}", price.date, price.source]
    return [machine.name, machine.kind, *("-" if size is None else f"{size:g}" for size in sizes), *money]
