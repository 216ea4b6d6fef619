"""The pool of KV blocks: which are free, which are kept for later, and how many owners the others have.

A block is an integer in [0, num_blocks), and always in one of three states:

    free ──allocate──► in use (one or more owners) ──free──► cached, if its content has a key; else free
      ▲                    ▲                                    │
      └──── forgotten ─────┼──────────── share (a hit) ◄────────┤
                           └──────────── allocate (evicted) ◄───┘

Several sequences own the same block where they share a prefix. A cached block has no owner but its content
is still good. When no block is free, one is taken from the tenant that has most of the named contents, of
those with cached ones, and there the one unused longest: who floods the cache evicts itself, and what another
tenant has stays as long as it is no more than the flood. Contents are named by keys that the caller makes
(`prefix.py`); what a block contains is not known here.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["BlockPool"]


class _Content(NamedTuple):
    key: bytes
    tokens: bytes
    tenant: str


class BlockPool:
    """Hands out blocks, counts their owners, and remembers contents.

    The block freed last is handed out first, so memory that was never needed is never touched.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[str, OrderedDict[int, None]] = {}
        self._num_cached = 0
        self._num_named: Counter[str] = Counter()
        self._num_owners = [0] * num_blocks
        self._content: dict[int, _Content] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody owns and whose content is kept."""
        return self._num_cached

    @property
    def num_in_use(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - len(self._free) - self._num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + self._num_cached

    def num_owners(self, block: int) -> int:
        """Owners of a block; 0 if it is free or cached."""
        return self._num_owners[block]

    def can_allocate(self, num_blocks: int) -> bool:
        """True if `allocate` with this number would succeed now."""
        return num_blocks <= self.num_available

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one owner, cached ones last. Ask `can_allocate` first."""
        assert 0 <= num_blocks <= self.num_available, f"{num_blocks} asked, {self.num_available} available"
        while len(self._free) < num_blocks:
            self.forget(self._next_evicted())
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one owner to each of these blocks, which are in use or cached."""
        for block in blocks:
            if self._num_owners[block] == 0:
                assert block in self._content, f"block {block} is free and cannot be shared"
                self._uncache(block)
            self._num_owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Remove one owner from each of these blocks. Of the cached ones the first is evicted first."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} is freed twice"
            self._num_owners[block] -= 1
            if self._num_owners[block]:
                continue
            content = self._content.get(block)
            if content is None:
                self._free.append(block)
            else:
                self._cached.setdefault(content.tenant, OrderedDict())[block] = None
                self._num_cached += 1

    def publish(self, block: int, key: bytes, tokens: bytes, tenant: str = "") -> None:
        """Name the content of a full block in use, of a tenant. No-op if another block has it already."""
        assert self._num_owners[block] > 0, f"block {block} is not in use and cannot be published"
        if key not in self._block_of and block not in self._content:
            self._block_of[key] = block
            self._content[block] = _Content(key, tokens, tenant)
            self._num_named[tenant] += 1

    def find(self, key: bytes, tokens: bytes) -> int | None:
        """The block with this content, in use or cached. `tokens` are compared, so a key cannot lie."""
        block = self._block_of.get(key)
        return block if block is not None and self._content[block].tokens == tokens else None

    def forget(self, block: int) -> None:
        """Drop the name of a block's content; a cached block becomes free. No-op if it has none."""
        if block not in self._content:
            return
        if self._num_owners[block] == 0:
            self._uncache(block)
            self._free.append(block)
        content = self._content.pop(block)
        del self._block_of[content.key]
        self._num_named[content.tenant] -= 1
        if not self._num_named[content.tenant]:
            del self._num_named[content.tenant]

    def _next_evicted(self) -> int:
        """The cached block unused longest, of the tenant with cached ones that has most named contents."""
        tenants = self._cached
        tenant = next(iter(tenants)) if len(tenants) == 1 else max(tenants, key=self._num_named.__getitem__)
        return next(iter(tenants[tenant]))

    def _uncache(self, block: int) -> None:
        tenant = self._content[block].tenant
        del self._cached[tenant][block]
        self._num_cached -= 1
        if not self._cached[tenant]:
            del self._cached[tenant]

    def check_integrity(self, held: Iterable[int] | None = None) -> None:
        """Assert that free + cached + in use = total, each block once.

        With `held` (the blocks of every owner, one after the other) also assert that the owners are
        exactly those: nothing leaked, nothing used after it was freed.
        """
        free, cached = set(self._free), {block for blocks in self._cached.values() for block in blocks}
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert free <= set(range(self.num_blocks)), "a block outside the pool is on the free list"
        owned = {block for block, count in enumerate(self._num_owners) if count}
        assert all(count >= 0 for count in self._num_owners), "a block has a negative number of owners"
        assert not (free & owned or free & cached or cached & owned), "a block is in two states"
        assert len(free) + len(cached) + len(owned) == self.num_blocks, "blocks are in no state"
        assert cached <= self._content.keys() and not free & self._content.keys(), "contents are out of step"
        assert len(cached) == self._num_cached and all(self._cached.values()), "the cached are miscounted"
        assert self._num_named == Counter(c.tenant for c in self._content.values()), "tenants are miscounted"
        assert self._block_of == {c.key: block for block, c in self._content.items()}, "a key names no block"
        if held is not None:
            counts = Counter(held)
            wrong = {b for b in range(self.num_blocks) if counts[b] != self._num_owners[b]}
            assert not wrong and counts.keys() <= owned, f"blocks {sorted(wrong)} are leaked or lost"
