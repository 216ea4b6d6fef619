"""Keys by their secrets, without a question to the store for each request.

What is kept is found by the whole SHA-256 of a secret, never by a part of it. It is good while the store's
count of changes stands still. Whichever request comes asks for that, if nobody has for a quarter of a second,
so a key that is revoked anywhere is refused everywhere within that time. If the store cannot be asked, nobody
gets in.
"""

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from tokenmill.store import Key, hash_secret

__all__ = ["KeyCache", "KeySource"]

_FRESH_S: Final = 0.25
_MAX_KEYS: Final = 10_000


class KeySource(Protocol):
    """What is asked of a store here."""

    async def find_key(self, secret_hash: bytes) -> Key | None:
        """The key with this SHA-256 of its secret, revoked or not."""
        ...

    async def key_version(self) -> int:
        """Grows with every change of a key."""
        ...


class KeyCache:
    """Gives the key of a secret; whether it is still valid, its reader decides. For one event loop.

    Secrets that belong to no key are not kept, so that nobody can fill it. `clock` gives monotonic seconds.
    """

    def __init__(self, store: KeySource, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._keys: OrderedDict[bytes, tuple[bytes, Key]] = OrderedDict()
        self._version = -1
        self._checked_s = float("-inf")
        self._checking: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    async def __call__(self, secret: str) -> Key | None:
        """The key with this secret; None if there is none."""
        await self._check()
        secret_hash = hash_secret(secret)
        found = self._keys.get(secret_hash)
        if found is not None and hmac.compare_digest(found[0], secret_hash):
            self._keys.move_to_end(secret_hash)
            return found[1]
        version = self._version
        key = await self._store.find_key(secret_hash)
        if key is not None and version == self._version:
            self._keys[secret_hash] = secret_hash, key
            if len(self._keys) > _MAX_KEYS:
                self._keys.popitem(last=False)
        return key

    async def _check(self) -> None:
        """Forget everything if the store's keys have changed. All that come meanwhile wait for one answer."""
        if self._clock() - self._checked_s < _FRESH_S:
            return
        if self._checking is None:
            self._checking = asyncio.create_task(self._ask())
            self._checking.add_done_callback(self._checked)
        await asyncio.shield(self._checking)

    async def _ask(self) -> None:
        asked_s = self._clock()
        version = await self._store.key_version()
        if version != self._version:
            self._keys.clear()
            self._version = version
        self._checked_s = asked_s

    def _checked(self, task: "asyncio.Task[None]") -> None:
        self._checking = None
        if not task.cancelled():
            task.exception()  # it is raised in those who wait
