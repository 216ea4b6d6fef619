"""`tokenmill ledger`: what was asked, by whom, what it cost here, and what it would have cost elsewhere."""

import argparse
import csv
import datetime
import io
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, cast

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.database import add_db_flag, duration_s, format_usd, with_store
from tokenmill.cli.output import Output
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.costs import Price
    from tokenmill.store import LedgerQuery, LedgerSum, Store, SumBy

__all__ = ["SUM_BY", "add_parser"]

SUM_BY: Final = (
    "key_id",
    "project",
    "feature",
    "end_user",
    "model",
    "deployment",
    "tier",
    "kind",
    "finish",
    "day",
    "month",
)
"""What lines can be summed by, known here without importing the store; a test compares."""

_DESCRIPTION = """\
What was asked of a server, and what it came to: tokens, seconds, joules, what it cost here (measured, or
billed by an upstream), and the price that the key paid. One line of the ledger is one attempt at a call. Days
are of UTC. The server may run meanwhile.

  tokenmill ledger --by key_id,model --since 2026-11-01
  tokenmill ledger --by feature --roi openai/gpt-4o-mini
  tokenmill ledger --lines --where project=mail > mail.csv

With --roi two columns follow: what the same tokens would have cost at a provider's price of some day, and
what is saved against the cost here. Prices and their dates are those of `tokenmill prices`; tokens are
counted as they were here, and another model's tokenizer makes more or fewer of the same text.
"""
_DATE: Final = re.compile(r"\d{4}-\d{2}(-\d{2})?", flags=re.ASCII)


def add_parser(subparsers: Subparsers) -> None:
    """Add `ledger`."""
    parser = add_command(
        subparsers, "ledger", _ledger, summary="what was asked, and what it cost", description=_DESCRIPTION
    )
    parser.add_argument(
        "--by",
        type=_names,
        default=("model",),
        metavar="NAME,..",
        help=f"sum by any of {', '.join(SUM_BY)}, or total (default: model)",
    )
    since = "from this day of UTC on, or this long ago: 2026-11-01, 2026-11, 7d, 12h"
    parser.add_argument("--since", type=_time, metavar="TIME", help=since)
    parser.add_argument("--until", type=_time, metavar="TIME", help="before this day, or this long ago")
    parser.add_argument(
        "--where",
        type=_condition,
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="only lines with this value, for example key_id=key_12; may be repeated",
    )
    parser.add_argument(
        "--roi", metavar="PROVIDER/MODEL[@DATE]", help="compare with this price, the newest up to DATE"
    )
    parser.add_argument("--lines", action="store_true", help="the lines themselves, as CSV")
    parser.add_argument("--csv", action="store_true", help="sums as CSV, money in nanodollars")
    add_db_flag(parser)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Sums of some lines, and what their tokens would have cost at the other price, if one is given."""

    sums: "LedgerSum"
    there_nano_usd: int | None = None

    @property
    def saved_nano_usd(self) -> int | None:
        """Against the cost here."""
        return None if self.there_nano_usd is None else self.there_nano_usd - self.sums.cost_nano_usd


def _ledger(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.costs import load_prices, price_at
    from tokenmill.store import LedgerQuery

    if args.lines and (args.roi or args.csv):
        raise UsageError("--lines are no sums", hint="leave out --roi and --csv")
    price = price_at(load_prices(), args.roi) if args.roi else None
    conditions: dict[SumBy, str] = dict(args.where)
    if len(conditions) < len(args.where):
        raise UsageError("--where has two values for one name", hint="a line has one: ask twice")
    query = LedgerQuery(since_s=args.since or 0.0, until_s=args.until, where=conditions)
    if args.lines:
        return _lines(args, query, out)

    async def work(store: "Store") -> "tuple[list[LedgerSum], list[LedgerSum]]":
        return await store.sums(query, args.by), await store.sums(query, ())

    groups, total = (
        [_Compared(sums=each, there_nano_usd=_there(each, price)) for each in sums]
        for sums in with_store(args, work)
    )
    if args.csv and not out.as_json:
        _write_csv(out, [*args.by, *_figures(price)], (_csv_row(each) for each in groups))
    else:
        _show(out, args.by, groups, total, price)
    out.document(_document(args, groups, total, price))
    return 0


def _there(sums: "LedgerSum", price: "Price | None") -> int | None:
    from tokenmill.costs import would_cost_nano_usd

    if price is None:
        return None
    return would_cost_nano_usd(
        price,
        num_prompt_tokens=sums.num_prompt_tokens,
        num_cached_tokens=sums.num_cached_tokens,
        num_output_tokens=sums.num_output_tokens,
    )


def _show(
    out: Output,
    by: Sequence[str],
    groups: Sequence[_Compared],
    total: Sequence[_Compared],
    price: "Price | None",
) -> None:
    if not total:
        out.text("no lines")
        return
    header = ["calls", "tokens in", "cached", "out", "seconds", "joules", "cost, USD", "price, USD"]
    header += [] if price is None else ["there, USD", "saved, USD"]
    rows = [[*(word or "-" for word in each.sums.group), *_cells(each)] for each in groups]
    if by:
        rows.append(["total", *[""] * (len(by) - 1), *_cells(total[0])])
    out.table([*by, *header], rows)
    if price is not None:
        out.text(f"there: {price}")


def _cells(each: _Compared) -> list[str]:
    sums = each.sums
    counts = (sums.num_entries, sums.num_prompt_tokens, sums.num_cached_tokens, sums.num_output_tokens)
    cells = [*map(str, counts), f"{sums.nanoseconds / 1e9:.3f}", f"{sums.nanojoules / 1e9:.3f}"]
    cells += [format_usd(sums.cost_nano_usd), format_usd(sums.price_nano_usd)]
    if each.there_nano_usd is not None and each.saved_nano_usd is not None:
        cells += [format_usd(each.there_nano_usd), format_usd(each.saved_nano_usd)]
    return cells


def _figures(price: "Price | None") -> list[str]:
    from tokenmill.store import LedgerSum

    names = [field.name for field in fields(LedgerSum) if field.name != "group"]
    return names if price is None else [*names, "there_nano_usd", "saved_nano_usd"]


def _csv_row(each: _Compared) -> list[object]:
    values = [value for name, value in asdict(each.sums).items() if name != "group"]
    more = [] if each.there_nano_usd is None else [each.there_nano_usd, each.saved_nano_usd]
    return [*each.sums.group, *values, *more]


def _document(
    args: argparse.Namespace,
    groups: Sequence[_Compared],
    total: Sequence[_Compared],
    price: "Price | None",
) -> dict[str, Any]:
    def fields_of(each: _Compared) -> dict[str, Any]:
        figures = dict(zip(_figures(price), _csv_row(each)[len(each.sums.group) :], strict=True))
        return {"group": dict(zip(args.by, each.sums.group, strict=False)), **figures}

    return {
        "by": list(args.by),
        "since_s": args.since,
        "until_s": args.until,
        "where": dict(args.where),
        "sums": [fields_of(each) for each in groups],
        "total": fields_of(total[0]) if total else None,
        "price": None if price is None else asdict(price),
    }


def _lines(args: argparse.Namespace, query: "LedgerQuery", out: Output) -> int:
    from tokenmill.store import Entry

    names = [field.name for field in fields(Entry)]
    kept: list[dict[str, Any]] = []

    async def work(store: "Store") -> None:
        batch: list[list[object]] = []
        async for entry in store.entries(query):
            if out.as_json:
                kept.append(asdict(entry))
                continue
            batch.append([getattr(entry, name) for name in names])
            if len(batch) >= 1000:
                _write_csv(out, [], batch)
                batch.clear()
        _write_csv(out, [], batch)

    if not out.as_json:
        _write_csv(out, names, [])
    with_store(args, work)
    out.document({"entries": kept})
    return 0


def _write_csv(out: Output, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(header)
    # A client's own words must not become a formula of whoever opens the file in a spreadsheet.
    writer.writerows([_harmless(value) for value in row] for row in rows)
    if text.tell():
        out.text(text.getvalue(), end="")


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and value else value


def _names(text: str) -> "tuple[SumBy, ...]":
    names = tuple(name.strip() for name in text.split(","))
    if names == ("total",):
        return ()
    for name in names:
        if name not in SUM_BY:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SUM_BY)}, total")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names something twice")
    return cast("tuple[SumBy, ...]", names)


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in SUM_BY:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=TEXT with one of {', '.join(SUM_BY)}")
    return name, value


def _time(text: str) -> float:
    """Unix time of the begin of a day or month of UTC, or of so long ago."""
    ago = duration_s(text)
    if ago is not None:
        return time.time() - ago
    try:
        if not _DATE.fullmatch(text):
            raise ValueError
        whole = text if len(text) == len("2026-11-01") else f"{text}-01"
        return datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC).timestamp()
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no day, month or time such as 2026-11-01, 7d"
        ) from None
