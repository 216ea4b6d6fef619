"""The block table: in which blocks the keys and values of one sequence lie.

Attention is given an explicit list of (block, position of its first token, rows), never an implied range;
this is where that list is made. The table does not allocate: the scheduler moves blocks between pool and
table, because only it may decide to preempt.
"""

from array import array
from collections.abc import Iterable

__all__ = ["BlockTable"]

_FIELDS = 3


class BlockTable:
    """The blocks of one sequence, in order of position; each holds `block_size` tokens.

    Integers lie in `array('i')` (32 bits), so that a step's flat inputs are made by copying memory.
    """

    def __init__(self, block_size: int) -> None:
        assert block_size > 0, f"a block of {block_size} tokens"
        self.block_size = block_size
        self._entries = array("i")
        self._capacity = 0

    @property
    def blocks(self) -> list[int]:
        """The block ids, in order of position."""
        return self._entries[::_FIELDS].tolist()

    @property
    def num_blocks(self) -> int:
        """Blocks in the table."""
        return len(self._entries) // _FIELDS

    @property
    def capacity(self) -> int:
        """Tokens that the table has room for."""
        return self._capacity

    def num_missing(self, num_tokens: int) -> int:
        """Blocks to add before the table has room for this many tokens."""
        return max(0, -(-(num_tokens - self._capacity) // self.block_size))

    def extend(self, blocks: Iterable[int]) -> None:
        """Append blocks, which this table now owns."""
        for block in blocks:
            self._entries.extend((block, self._capacity, self.block_size))
            self._capacity += self.block_size

    def clear(self) -> list[int]:
        """Give up all blocks and return them, for the pool."""
        blocks = self.blocks
        self._entries = array("i")
        self._capacity = 0
        return blocks

    def spans(self, num_tokens: int) -> "array[int]":
        """Flat triples (block, position of its first token, rows) that hold positions [0, num_tokens)."""
        assert num_tokens <= self._capacity, f"no room for {num_tokens} tokens"
        num_blocks = -(-num_tokens // self.block_size)
        entries = self._entries[: num_blocks * _FIELDS]
        if entries:
            entries[-1] = num_tokens - entries[-2]
        return entries

    def slots(self, start: int, stop: int) -> "array[int]":
        """Cache slots (block * block_size + offset) of positions [start, stop)."""
        assert stop <= self._capacity, f"no room for {stop} tokens"
        size, slots = self.block_size, array("i")
        while start < stop:
            index, offset = divmod(start, size)
            base = self._entries[index * _FIELDS] * size
            count = min(size - offset, stop - start)
            slots.extend(range(base + offset, base + offset + count))
            start += count
        return slots
