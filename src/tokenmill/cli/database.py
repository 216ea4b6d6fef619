"""What the commands over a server's database share: the flag `--db`, opening it, and how money and time are
written. They may run beside the server, which sees what they change within a second."""

import argparse
import datetime
import re
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from tokenmill.cli.arguments import Parser
from tokenmill.core import NotFoundError

if TYPE_CHECKING:
    from tokenmill.store import Store

__all__ = ["add_db_flag", "duration_s", "format_day", "format_usd", "with_store"]

_T = TypeVar("_T")

_DURATION: Final = re.compile(r"(\d{1,5})\s*([smhdwy])", flags=re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


def add_db_flag(parser: Parser) -> None:
    """`--db`."""
    parser.add_argument(
        "--db",
        metavar="PATH",
        help="the server's database: a file, or postgresql://... (default: server.db in TOKENMILL_HOME)",
    )


def with_store(
    args: argparse.Namespace, work: "Callable[[Store], Awaitable[_T]]", *, creates: bool = False
) -> _T:
    """Run `work` with the database of `--db`. Raises NotFoundError if there is none, unless `creates`."""
    from tokenmill.models.store.library import default_home
    from tokenmill.store import open_store

    url = args.db or str(default_home() / "server.db")
    if not creates and "://" not in url and not Path(url).expanduser().exists():
        hint = "`tokenmill keys create` and `tokenmill serve` make one; or give its path with --db"
        raise NotFoundError(f"there is no database at {url}", hint=hint)

    async def run() -> _T:
        store = open_store(url)
        try:
            return await work(store)
        finally:
            await store.close()

    import asyncio  # not at the top: it would be read for every command

    return asyncio.run(run())


def duration_s(text: str) -> float | None:
    """Seconds of `90m`, `12h`, `30d`, `4w`, `1y`; None for another text."""
    match = _DURATION.fullmatch(text.strip().lower())
    return None if match is None else float(int(match[1]) * _SECONDS[match[2]])


def format_usd(nano_usd: int) -> str:
    """Dollars with all their digits, and at least two after the point."""
    whole, _, part = f"{Decimal(nano_usd).scaleb(-9):f}".partition(".")
    return f"{whole}.{part.rstrip('0').ljust(2, '0')}"


def format_day(at_s: float | None) -> str:
    """`2026-11-22 19:30` of UTC; `-` for no time."""
    if at_s is None:
        return "-"
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%Y-%m-%d %H:%M")
