"""The pool of KV blocks: which are free, and how many owners each of the others has.

A block is an integer in [0, num_blocks). It is either on the free list or has one or more owners, so
that several sequences can hold the same block (a shared prefix, a fork before its first write). What a
block contains, and which positions of which sequence, is not known here (see `table.py`).
"""

from collections import Counter
from collections.abc import Iterable

__all__ = ["BlockPool"]


class BlockPool:
    """Hands out blocks and counts their owners.

    The block freed last is handed out first, so memory that was never needed is never touched.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - len(self._free)

    def num_owners(self, block: int) -> int:
        """Owners of a block; 0 if it is free. A block with more than one must be copied before a write."""
        return self._num_owners[block]

    def can_allocate(self, num_blocks: int) -> bool:
        """True if `allocate` with this number would succeed now."""
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one owner. Ask `can_allocate` first."""
        assert 0 <= num_blocks <= len(self._free), f"{num_blocks} blocks asked, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one owner to each of these blocks, which are in use."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} is free and cannot be shared"
            self._num_owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Remove one owner from each of these blocks; a block without owners becomes free."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} is freed twice"
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                self._free.append(block)

    def check_integrity(self, held: Iterable[int] | None = None) -> None:
        """Assert that free + in use = total, each block once.

        With `held` (the blocks of every owner, one after the other) also assert that the owners are
        exactly those: nothing leaked, nothing used after it was freed.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert free <= set(range(self.num_blocks)), "a block outside the pool is on the free list"
        owned = {block for block, count in enumerate(self._num_owners) if count}
        assert all(count >= 0 for count in self._num_owners), "a block has a negative number of owners"
        assert not free & owned, f"blocks {sorted(free & owned)} are free and owned"
        assert len(free) + len(owned) == self.num_blocks, "blocks are neither free nor owned"
        if held is not None:
            counts = Counter(held)
            wrong = {b for b in range(self.num_blocks) if counts[b] != self._num_owners[b]}
            assert not wrong and counts.keys() <= owned, f"blocks {sorted(wrong)} are leaked or lost"
