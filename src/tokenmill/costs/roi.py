"""What calls of one's own would have cost at a provider's price of some day, to the nanodollar.

Tokens are counted as they were here: another model's tokenizer makes more or fewer of the same text.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from tokenmill.core import UsageError
from tokenmill.costs.prices import Price, find_price

__all__ = ["price_at", "would_cost_nano_usd"]

_DATED: Final = re.compile(r"(.+)@(\d{4}-\d{2}-\d{2})", flags=re.ASCII)
_NANO_USD_A_TOKEN: Final = 1000
"""One dollar for 10^6 tokens, in nanodollars for one."""


def price_at(prices: Sequence[Price], name: str) -> Price:
    """The newest price of `PROVIDER/MODEL[:TIER]`, or with `@YYYY-MM-DD` the newest of that day or before.

    Raises UsageError for what is no such name, NotFoundError if no price is known.
    """
    dated = _DATED.fullmatch(name)
    plain = dated[1] if dated else name
    if "/" not in plain or "@" in plain:
        raise UsageError(
            f"{name!r} is no price such as openai/gpt-4o-mini or openai/gpt-4o-mini@2026-08-01",
            hint="`tokenmill prices` lists what is known",
        )
    return find_price([price for price in prices if not dated or price.date <= dated[2]], plain)


def would_cost_nano_usd(
    price: Price, *, num_prompt_tokens: int, num_cached_tokens: int, num_output_tokens: int
) -> int:
    """Whole nanodollars; cached tokens are part of the prompt's, at the price of cached input if known.

    Exact: the decimal figures of the table are taken as fractions, and only the sum is rounded.
    """
    rate_in, rate_out = Fraction(repr(price.input_usd)), Fraction(repr(price.output_usd))
    rate_cached = rate_in if price.cached_usd is None else Fraction(repr(price.cached_usd))
    total = (num_prompt_tokens - num_cached_tokens) * rate_in
    total += num_cached_tokens * rate_cached + num_output_tokens * rate_out
    return round(total * _NANO_USD_A_TOKEN)
