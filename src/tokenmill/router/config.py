"""What a deployment file says of upstreams and routes, as frozen values that know their own bounds.

Reading the file is the server's affair; whether the names in a route exist is known to `Router`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from tokenmill.core import Usage, UsageError
from tokenmill.costs.prices import MAX_USD
from tokenmill.wire import Api

__all__ = [
    "BreakerConfig",
    "BudgetConfig",
    "Price",
    "RouteConfig",
    "ShadowConfig",
    "TargetConfig",
    "UpstreamConfig",
]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_NANO: Final = 10**9
_MILLION: Final = 10**6
_DAY_S: Final = 86400.0


@dataclass(frozen=True, kw_only=True)
class Price:
    """Dollars for 10^6 tokens of input, of input that was found in a cache, of output.

    Without `cached_usd` cached input costs as much as other input. At most nine decimals, so that a price is
    a whole number of nanodollars. Writing to a provider's cache has no price of its own: nothing here asks
    for it.
    """

    input_usd: float = 0.0
    output_usd: float = 0.0
    cached_usd: float | None = None

    def __post_init__(self) -> None:
        for name in ("input_usd", "output_usd", "cached_usd"):
            value = getattr(self, name)
            if value is not None or name != "cached_usd":
                _check_number(name, value, 0.0, MAX_USD, "dollars for 10^6 tokens")
                if _nano(value) is None:
                    raise UsageError(f"{name} is {value}", hint="use at most nine decimals")

    def cost_nano_usd(self, usage: Usage) -> int:
        """What these tokens cost, in whole nanodollars, rounded up once."""
        cached_usd = self.input_usd if self.cached_usd is None else self.cached_usd
        parts = (
            (usage.num_prompt_tokens - usage.num_cached_tokens, self.input_usd),
            (usage.num_cached_tokens, cached_usd),
            (usage.num_output_tokens, self.output_usd),
        )
        return -(-sum(number * (_nano(usd) or 0) for number, usd in parts) // _MILLION)


@dataclass(frozen=True, kw_only=True)
class BreakerConfig:
    """When a deployment gets no more calls: after `failures` in a row, or `share` of the last `window`.

    After `open_s` one call is let through to try it. An endpoint that says how long to wait is left alone
    for that time, at most `max_open_s`.
    """

    failures: int = 5
    window: int = 20
    share: float = 0.5
    open_s: float = 10.0
    max_open_s: float = 3600.0

    def __post_init__(self) -> None:
        _check_number("failures", self.failures, 1, 1 << 20, "a count")
        _check_number("window", self.window, 2, 1 << 20, "a count")
        _check_number("share", self.share, 0.01, 1.0, "a share")
        _check_number("open_s", self.open_s, 0.001, _DAY_S, "seconds")
        _check_number("max_open_s", self.max_open_s, self.open_s, _DAY_S, "seconds")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How much may be tried again at a deployment: `share` of the requests, and `spare` beside it.

    Waits before that are random up to `base_s`, doubled each time, at most `cap_s`. A request does not wait
    for a deployment that asks for more than `max_wait_s`.
    """

    share: float = 0.2
    spare: int = 3
    base_s: float = 0.1
    cap_s: float = 2.0
    max_wait_s: float = 10.0

    def __post_init__(self) -> None:
        _check_number("share", self.share, 0.0, 1.0, "a share")
        _check_number("spare", self.spare, 0, 1000, "a count")
        for name in ("base_s", "cap_s", "max_wait_s"):
            _check_number(name, getattr(self, name), 0.0, _DAY_S, "seconds")


@dataclass(frozen=True, kw_only=True)
class UpstreamConfig:
    """An endpoint elsewhere that answers calls: `name` here, and at `url` the model that it calls `model`.

    `key_env` names the environment variable with the key, which is in no file. Time limits in seconds: to
    connect, to the first token, between two tokens, for the whole answer. Without `with_sampling` no
    temperature is sent. At most `max_open` calls are open there at a time. `terms` say what may be done with
    its answers, for captured calls.
    """

    name: str
    url: str
    model: str
    api: Api | None = None
    key_env: str = ""
    price: Price = field(default_factory=Price)
    connect_s: float = 5.0
    first_token_s: float = 60.0
    between_s: float = 30.0
    total_s: float = 600.0
    with_sampling: bool = True
    max_open: int = 256
    terms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name("the name of an upstream", self.name)
        if not self.model or len(self.model) > 256 or not self.model.isprintable():
            raise UsageError(f"the upstream {self.name} has no model", hint="give the model's name there")
        if self.api not in (None, "openai", "anthropic"):
            raise UsageError(f"api is {self.api!r}", hint="use openai or anthropic")
        for name in ("connect_s", "first_token_s", "between_s", "total_s"):
            _check_number(name, getattr(self, name), 0.001, _DAY_S, "seconds")
        _check_number("max_open", self.max_open, 1, 1 << 16, "a count")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """A deployment of a route. One of weight 0 is asked only where those before it fail."""

    backend: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_name("the backend of a target", self.backend)
        _check_number("weight", self.weight, 0.0, 1e6, "a weight")


@dataclass(frozen=True, kw_only=True)
class ShadowConfig:
    """A deployment that answers a share of a route's calls a second time, for comparison only."""

    backend: str
    share: float
    max_open: int = 4

    def __post_init__(self) -> None:
        _check_name("the backend of a shadow", self.backend)
        _check_number("share", self.share, 0.0, 1.0, "a share")
        _check_number("max_open", self.max_open, 1, 1024, "a count")


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """A name that clients ask for, and who answers.

    The first is drawn by weight; if it fails before its first token, the others follow in the order of
    `targets`. `max_attempts` counts all of them.
    """

    name: str
    targets: tuple[TargetConfig, ...]
    max_attempts: int = 3
    shadow: ShadowConfig | None = None

    def __post_init__(self) -> None:
        _check_name("the name of a route", self.name)
        names = [target.backend for target in self.targets]
        if not any(target.weight for target in self.targets):
            raise UsageError(f"the route {self.name} has no target with a weight", hint="give one above 0")
        _check_once(f"the targets of the route {self.name}", names)
        _check_number("max_attempts", self.max_attempts, 1, 20, "a count")


def _nano(usd: float) -> int | None:
    """Nanodollars for what a person wrote as dollars; None if they are not whole."""
    nano = Decimal(str(usd)) * _NANO
    return int(nano) if nano == nano.to_integral_value() else None


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{what} is {str(name)[:40]!r}", hint="use letters, digits and '._:/-', up to 128, a letter first"
        )


def _check_once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UsageError(f"{what} have {name} twice", hint="name each once")
        seen.add(name)


def _check_number(name: str, value: object, low: float, high: float, what: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and what == "a count":
        is_number = isinstance(value, int)
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        raise UsageError(f"{name} is {value!r}", hint=f"use {what} from {low:g} to {high:g}")
