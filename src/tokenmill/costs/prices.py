"""What providers charge for tokens, each price with its date and its source.

Prices of the same model differ between hosts, tiers, days and even sources, so there is never one current
price: a row is what somebody asked on a day, as somebody wrote down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenmill.core import NotFoundError, UsageError
from tokenmill.costs.tables import (
    Row,
    TableText,
    data_home,
    optional_number,
    parse_rows,
    read_table,
    read_text,
    required,
    valid_date,
    write_atomically,
)

__all__ = [
    "MAX_USD",
    "PRICE_FILE",
    "Price",
    "find_price",
    "load_prices",
    "parse_prices",
    "select_prices",
    "update_prices",
]

PRICE_FILE: Final = "prices.csv"

MAX_USD: Final = 5000.0
"""Dollars for 10^6 tokens above which a price is taken for an error of units."""

_COLUMNS: Final = (
    "provider",
    "model",
    "tier",
    "usd_per_1m_input",
    "usd_per_1m_cached_input",
    "usd_per_1m_output",
    "price_date",
    "source",
    "note",
)
_TIERS: Final = ("standard", "fast", "batch", "flex", "priority")


@dataclass(frozen=True, kw_only=True)
class Price:
    """Dollars for 10^6 tokens, as asked by `provider` at `date` according to `source`.

    `cached_usd` is for input found in the provider's cache; None: no such discount is known.
    """

    provider: str
    model: str
    tier: str
    input_usd: float
    output_usd: float
    cached_usd: float | None
    date: str
    source: str
    note: str = ""

    def __post_init__(self) -> None:
        assert self.date and self.source, f"the price of {self.model} has no date or source"

    def __str__(self) -> str:
        tier = "" if self.tier == "standard" else f" {self.tier}"
        return (
            f"${self.input_usd:g} in, ${self.output_usd:g} out per 1M "
            f"({self.provider} {self.model}{tier}, {self.date}, {self.source})"
        )


def load_prices(home: Path | None = None) -> tuple[Price, ...]:
    """All prices: the user's table if there is one, else that of the package."""
    return parse_prices(read_table(PRICE_FILE, home))


def parse_prices(table: TableText) -> tuple[Price, ...]:
    """Prices of a table. Raises UsageError with file and line; a price given twice is one too."""
    seen: dict[tuple[str, ...], str] = {}

    def make(row: Row) -> Price:
        price = _price(row)
        key = (price.provider, price.model, price.tier, price.date, price.source)
        if key in seen:
            raise row.bad(f"the same price as {seen[key]}, with the same date and source")
        seen[key] = row.where
        return price

    prices = parse_rows(table, _COLUMNS, make)
    if not prices:
        raise UsageError(f"{table.name} has no prices", hint=f"the columns are {','.join(_COLUMNS)}")
    return prices


def select_prices(prices: Sequence[Price], *, provider: str = "", model: str = "") -> tuple[Price, ...]:
    """Those whose provider is, and whose model's name contains, what is asked; case does not count.

    Sorted by model, provider, and date, newest first.
    """
    chosen = [
        price
        for price in prices
        if (not provider or price.provider.lower() == provider.lower())
        and model.lower() in price.model.lower()
    ]
    chosen.sort(key=lambda price: price.date, reverse=True)
    return tuple(sorted(chosen, key=lambda price: (price.model.lower(), price.provider, price.tier)))


def find_price(prices: Sequence[Price], name: str) -> Price:
    """The newest standard price of `PROVIDER/MODEL`, or `PROVIDER/MODEL:TIER`. Raises NotFoundError."""
    provider, _, rest = name.partition("/")
    model, _, tier = rest.partition(":")
    found = [
        price
        for price in select_prices(prices, provider=provider, model=model)
        if price.model.lower() == model.lower() and price.tier == (tier or "standard")
    ]
    if not found:
        raise NotFoundError(f"no price is known for {name}", hint="`tokenmill prices` lists what is known")
    return found[0]


def update_prices(source: Path, home: Path | None = None) -> tuple[Path, tuple[Price, ...]]:
    """Check a table of prices and make it the user's own; a bad row changes nothing.

    Returns where it lies now. Raises UsageError with file and line, StorageError if it cannot be written.
    """
    text = read_text(source)
    prices = parse_prices(TableText(str(source), text, True))
    target = (home or data_home()) / PRICE_FILE
    write_atomically(target, text.encode())
    return target, prices


def _price(row: Row) -> Price:
    input_usd = optional_number(row, "usd_per_1m_input", 0.0, MAX_USD)
    output_usd = optional_number(row, "usd_per_1m_output", 0.0, MAX_USD)
    cached_usd = optional_number(row, "usd_per_1m_cached_input", 0.0, MAX_USD)
    if input_usd is None or output_usd is None:
        raise row.bad("the price of input or of output is empty")
    if cached_usd is not None and cached_usd > input_usd:
        raise row.bad("cached input costs more than fresh input")
    tier = required(row, "tier")
    if tier not in _TIERS:
        raise row.bad(f"tier is {tier[:40]!r}, none of {', '.join(_TIERS)}")
    return Price(
        provider=required(row, "provider"),
        model=required(row, "model"),
        tier=tier,
        input_usd=input_usd,
        output_usd=output_usd,
        cached_usd=cached_usd,
        date=valid_date(row, "price_date"),
        source=required(row, "source"),
        note=row.fields["note"],
    )
