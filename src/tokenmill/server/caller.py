"""Who calls: the key that was shown, and what the client says of itself in headers."""

from dataclasses import dataclass

from tokenmill.core import Tier
from tokenmill.store import Key, Scope
from tokenmill.wire import Api

__all__ = ["ANONYMOUS", "NOBODY", "Caller"]

ANONYMOUS = Key(
    id="anonymous",
    name="no key, on this machine",
    project="default",
    scopes=("inference", "metrics"),
    tiers=("standard", "fast", "batch"),
    created_s=0.0,
)
"""Stands for everybody on this machine where a server asks for no key. It opens no more than these."""

NOBODY = Key(id="nobody", name="no key", project="default", scopes=(), created_s=0.0)
"""Stands for who shows no key where one is asked for. It opens what is open to everybody."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """One request's caller. `feature` is the client's name for what part of its product asks."""

    key: Key
    request_id: str
    api: Api
    feature: str = ""

    def may(self, scope: Scope) -> bool:
        """Whether the key has the scope."""
        return scope in self.key.scopes

    def tier(self, asked: Tier | None) -> Tier:
        """The tier that the key gets if it asks for this one: its own first for none, or if it may not."""
        return asked if asked in self.key.tiers else self.key.tiers[0]
