"""Least recently used results within a number of bytes, of which one tenant gets only a share."""

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["TenantCache"]

_T = TypeVar("_T")


class TenantCache(Generic[_T]):
    """Results by key. Safe between threads.

    Tenants share no entry: how fast an answer comes would tell one what another has asked. An entry larger
    than a tenant's share is not kept.
    """

    def __init__(self, max_bytes: int, tenant_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.tenant_bytes = tenant_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[_T, int, str]] = OrderedDict()
        self._used: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        with self._lock:
            return sum(self._used.values())

    def get(self, key: bytes) -> _T | None:
        """The entry, which is now the most recently used one; None if there is none."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: bytes, value: _T, num_bytes: int, tenant: str) -> None:
        """Keep `value`; the tenant's least recently used entries make room first, then everybody's."""
        with self._lock:
            if num_bytes > self.tenant_bytes or key in self._entries:
                return
            while self._used.get(tenant, 0) + num_bytes > self.tenant_bytes:
                self._drop(next(k for k, (_, _, owner) in self._entries.items() if owner == tenant))
            while sum(self._used.values()) + num_bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
            self._entries[key] = (value, num_bytes, tenant)
            self._used[tenant] = self._used.get(tenant, 0) + num_bytes

    def _drop(self, key: bytes) -> None:
        _, num_bytes, tenant = self._entries.pop(key)
        self._used[tenant] -= num_bytes
        if not self._used[tenant]:
            del self._used[tenant]
