"""What a key pays: USD for 10^6 tokens by model and tier, as whole nanodollars, rounded up once a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tokenmill.core import Tier, Usage, UsageError

__all__ = ["PriceList", "TokenPrice"]

_NANO: Final = 1_000_000_000
_MILLION: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TokenPrice:
    """USD for 10^6 tokens of input, of input found in the cache (default: as input), and of output."""

    input: float = 0.0
    cached_input: float | None = None
    output: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (
            ("input", self.input),
            ("cached_input", self.cached_input),
            ("output", self.output),
        ):
            if value is not None and not 0.0 <= value <= 1e6:
                raise UsageError(f"the price of {name} is {value}", hint="use USD for 10^6 tokens, from 0")

    def nano_usd(self, usage: Usage) -> int:
        """The price of these tokens."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = usage.num_prompt_tokens - usage.num_cached_tokens
        amount = fresh * _rate(self.input) + usage.num_cached_tokens * _rate(cached)
        return -(-(amount + usage.num_output_tokens * _rate(self.output)) // _MILLION)

    def worst_nano_usd(self, num_prompt_tokens: int, num_output_tokens: int) -> int:
        """The most that so many tokens can come to."""
        dearest = max(self.input, self.cached_input or 0.0)
        amount = num_prompt_tokens * _rate(dearest) + num_output_tokens * _rate(self.output)
        return -(-amount // _MILLION)


@dataclass(frozen=True, kw_only=True)
class PriceList:
    """Prices by model, and within it by tier. What has none is free."""

    prices: Mapping[str, Mapping[Tier, TokenPrice]] = field(default_factory=dict)

    def of(self, model: str, tier: Tier) -> TokenPrice:
        """The price of a tier of a model; a tier without one has that of `standard`."""
        tiers = self.prices.get(model, {})
        return tiers.get(tier) or tiers.get("standard") or TokenPrice()


def _rate(usd_per_million: float) -> int:
    """Nanodollars for 10^6 tokens."""
    return round(usd_per_million * _NANO)
