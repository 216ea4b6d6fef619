"""What tokens cost in dollars: by the hour, against a price list, by tier, and in a cascade.

Pure arithmetic. Whoever shows a figure shows the price that it rests on, with its date and source.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "ApiRates",
    "BreakEven",
    "CascadePoint",
    "HourlyCost",
    "MonthlyTokens",
    "Tier",
    "api_month_usd",
    "break_even",
    "break_even_utilisation",
    "cascade",
    "max_payback_years",
    "owned_hour_usd",
    "tiers",
    "usd_per_million",
]

_HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, kw_only=True)
class HourlyCost:
    """An hour of one system. `power_w` is drawn from the wall while it works, at `usd_per_kwh`.

    A rent that includes power has `power_w` 0.
    """

    usd: float
    power_w: float = 0.0
    usd_per_kwh: float = 0.0

    @property
    def electricity_usd(self) -> float:
        """What an hour at work draws."""
        return self.power_w / 1000 * self.usd_per_kwh


@dataclass(frozen=True, kw_only=True)
class ApiRates:
    """Dollars for 10^6 tokens of input, of input found in the provider's cache, of output."""

    input_usd: float
    output_usd: float
    cached_usd: float | None = None


@dataclass(frozen=True, kw_only=True)
class MonthlyTokens:
    """Tokens a month; `cached` is the share of the input that is found in a cache."""

    input: float
    output: float
    cached: float = 0.0


class BreakEven(NamedTuple):
    """`output_tokens` a month from which self-hosting is cheaper, on how many systems; None: never."""

    output_tokens: float | None
    num_systems: int
    self_host_usd: float


class Tier(NamedTuple):
    """Running at `batch`: speed of one user and cost of a token, as multiples of the standard batch."""

    batch: int
    tokens_per_s: float
    user_tokens_per_s: float
    speed: float
    cost: float


class CascadePoint(NamedTuple):
    """A small model first, a large one for what it does not keep: cost of a request, and quality."""

    usd: float
    quality: float


def owned_hour_usd(
    price_usd: float, *, residual: float, years: float, opex_usd_per_hour: float = 0.0
) -> float:
    """An hour of a machine that was bought: what it loses over its life, and what running it costs."""
    return price_usd * (1 - residual) / (years * 12 * _HOURS_PER_MONTH) + opex_usd_per_hour


def usd_per_million(hour: HourlyCost, tokens_per_s: float, utilisation: float = 1.0) -> float:
    """Dollars for 10^6 tokens at `tokens_per_s`, if the machine works `utilisation` of the time.

    The rent is paid for every hour; electricity for those that work.
    """
    assert tokens_per_s > 0 and 0 < utilisation <= 1, "a machine that makes no tokens"
    return 1e6 / tokens_per_s / 3600 * (hour.usd / utilisation + hour.electricity_usd)


def api_month_usd(tokens: MonthlyTokens, rates: ApiRates) -> float:
    """A month of tokens at a provider's prices."""
    cached_usd = rates.input_usd if rates.cached_usd is None else rates.cached_usd
    per_input = (1 - tokens.cached) * rates.input_usd + tokens.cached * cached_usd
    return (tokens.input * per_input + tokens.output * rates.output_usd) / 1e6


def break_even(
    rates: ApiRates,
    hour: HourlyCost,
    tokens_per_s: float,
    *,
    utilisation: float = 1.0,
    input_per_output: float = 1.0,
    cached: float = 0.0,
    spare: int = 0,
    fixed_usd: float = 0.0,
    max_systems: int = 1000,
) -> BreakEven:
    """The smallest output volume a month at which self-hosting costs no more than the provider.

    Systems come whole; on n of them the volume lies above what n - 1 serve and within what n do. Each makes
    `tokens_per_s` output tokens, prefill counted in, for `utilisation` of the time.
    """
    unit = MonthlyTokens(input=input_per_output, output=1.0, cached=cached)
    worth = api_month_usd(unit, rates)
    electricity = hour.electricity_usd / 3600 / tokens_per_s
    capacity = tokens_per_s * utilisation * 3600 * _HOURS_PER_MONTH
    for count in range(1, max_systems + 1):
        rent = (count + spare) * hour.usd * _HOURS_PER_MONTH + fixed_usd
        if worth <= electricity:
            return BreakEven(None, count, rent)
        volume = max(rent / (worth - electricity), (count - 1) * capacity)
        if volume <= count * capacity:
            return BreakEven(volume, count, rent + volume * electricity)
    return BreakEven(None, max_systems, rent)


def break_even_utilisation(
    rates: ApiRates, hour: HourlyCost, tokens_per_s: float, *, input_per_output: float, cached: float = 0.0
) -> float | None:
    """The share of the time that a machine must work to be worth its rent, perhaps over 1; None: never."""
    output = tokens_per_s * 3600
    tokens = MonthlyTokens(input=input_per_output * output, output=output, cached=cached)
    gained = api_month_usd(tokens, rates) - hour.electricity_usd
    return hour.usd / gained if gained > 0 else None


def tiers(batches: Sequence[int], step_seconds: Callable[[int], float], standard: int) -> tuple[Tier, ...]:
    """Speed and fair price of every batch against the standard one: cost is X(standard) / X(batch)."""
    base_s = step_seconds(standard)
    rows = []
    for batch in batches:
        seconds = step_seconds(batch)
        cost = (standard / base_s) / (batch / seconds)
        rows.append(Tier(batch, batch / seconds, 1 / seconds, base_s / seconds, cost))
    return tuple(rows)


def max_payback_years(price_fall: float) -> float:
    """If prices fall by the factor `price_fall` a year, buying pays only if it pays back sooner than this."""
    return math.inf if price_fall <= 1 else 1 / math.log(price_fall)


def cascade(
    small_usd: float, large_usd: float, escalated: float, kept_quality: float, large_quality: float
) -> CascadePoint:
    """Every request goes to the small model, a share `escalated` on to the large one."""
    quality = (1 - escalated) * kept_quality + escalated * large_quality
    return CascadePoint(small_usd + escalated * large_usd, quality)
