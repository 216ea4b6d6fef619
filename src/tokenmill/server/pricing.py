"""What a key pays for tokens, by model and tier; in whole nanodollars, rounded up once a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenmill.core import Tier, Usage
from tokenmill.router.config import Price

__all__ = ["PriceList"]


@dataclass(frozen=True, kw_only=True)
class PriceList:
    """Prices by model, and within it by tier. What has none is free."""

    prices: Mapping[str, Mapping[Tier, Price]] = field(default_factory=dict)

    def nano_usd(self, model: str, tier: Tier, usage: Usage) -> int:
        """The price of these tokens."""
        return self._of(model, tier).cost_nano_usd(usage)

    def worst_nano_usd(self, model: str, tier: Tier, num_prompt_tokens: int, num_output_tokens: int) -> int:
        """The most that so many tokens can come to, whatever the cache has of them."""
        price = self._of(model, tier)
        return max(
            price.cost_nano_usd(
                Usage(
                    num_prompt_tokens=num_prompt_tokens,
                    num_cached_tokens=num_cached,
                    num_output_tokens=num_output_tokens,
                )
            )
            for num_cached in (0, num_prompt_tokens)
        )

    def _of(self, model: str, tier: Tier) -> Price:
        """The price of a tier of a model; a tier without one has that of `standard`."""
        tiers = self.prices.get(model, {})
        return tiers.get(tier) or tiers.get("standard") or Price()
