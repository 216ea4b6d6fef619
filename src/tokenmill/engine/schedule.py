"""What one step computes: its rows and blocks, the limits that they keep to, and a step being planned.

Who gets rows is decided by the scheduler (`scheduler.py`); here it is written down.
"""

from dataclasses import dataclass
from typing import NamedTuple

from tokenmill.engine.sequence import SequenceState

__all__ = ["BlockMoves", "Chunk", "Schedule", "StepDraft", "StepLimits"]


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The budget of one step: rows, rows that are sampled, sequences that hold blocks; and of the queue.

    While fast requests run, of the others that decode one in `fast_ratio` takes part in a step.
    """

    max_rows: int
    max_out_rows: int
    max_sequences: int
    max_waiting: int = 1 << 20
    fast_ratio: float = 1.0

    def __post_init__(self) -> None:
        assert min(self.max_rows, self.max_out_rows, self.max_sequences, self.max_waiting) > 0, self
        assert self.max_sequences <= self.max_out_rows, "each running sequence needs a place to be sampled"


class Chunk(NamedTuple):
    """Rows [start, stop) of one sequence; the last `num_out_rows` of them need logits, and the last
    `num_drafts` are guesses."""

    sequence: SequenceState
    start: int
    stop: int
    num_out_rows: int
    num_drafts: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the chunk."""
        return self.stop - self.start


class BlockMoves(NamedTuple):
    """Blocks to move before a step runs, in this order: copies (source, target), blocks to swap out
    (block, slot), blocks to swap in (slot, block)."""

    copies: tuple[tuple[int, int], ...]
    outs: tuple[tuple[int, int], ...]
    ins: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What one step computes, which blocks move for it, and which sequences lost their blocks."""

    chunks: tuple[Chunk, ...]
    moves: BlockMoves
    preempted: tuple[SequenceState, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @property
    def num_out_rows(self) -> int:
        """Rows whose logits are wanted."""
        return sum(chunk.num_out_rows for chunk in self.chunks)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose keys and values attention reads."""
        return sum(chunk.stop for chunk in self.chunks)


class StepDraft:
    """A step while it is planned: chunks so far, what is left of the limits, and blocks to be moved."""

    def __init__(self, limits: StepLimits, max_rows: int | None, max_batch_rows: int | None = None) -> None:
        self.chunks: list[Chunk] = []
        self.preempted: list[SequenceState] = []
        self.started: list[SequenceState] = []
        self.outs: list[tuple[int, int]] = []
        self.ins: list[tuple[int, int]] = []
        self.num_places = limits.max_out_rows
        self.num_batch_rows = limits.max_rows if max_batch_rows is None else max_batch_rows
        self._num_rows = limits.max_rows
        self._num_wanted = limits.max_rows if max_rows is None else min(max_rows, limits.max_rows)

    @property
    def num_rows(self) -> int:
        """Rows that may still be handed out."""
        return max(0, self._num_wanted)

    def take(self, sequence: SequenceState, most: int) -> None:
        """Spend up to `most` rows on the sequence's next tokens."""
        start = sequence.num_computed
        if sequence.tier == "batch":
            most = min(most, self.num_batch_rows)
        # After a step that broke off more tokens may be known than there is room for.
        stop = min(sequence.num_total, sequence.table.capacity, start + min(most, self._num_rows))
        first_sampled = sequence.first_sampled
        if stop > first_sampled and self.num_places == 0:
            stop = first_sampled
        if stop > start:
            num_out_rows = max(0, min(stop - sequence.first_logits, stop - start))
            self.chunks.append(Chunk(sequence, start, stop, num_out_rows))
            self._spend(stop - start, max(0, stop - max(start, first_sampled)))
            self.num_batch_rows -= (stop - start) * (sequence.tier == "batch")

    def extend(self, index: int, num_drafts: int) -> None:
        """Add rows for drafts to a chunk; each is sampled."""
        chunk = self.chunks[index]
        self.chunks[index] = chunk._replace(
            stop=chunk.stop + num_drafts,
            num_out_rows=chunk.num_out_rows + num_drafts,
            num_drafts=num_drafts,
        )
        self._spend(num_drafts, num_drafts)

    def _spend(self, num_rows: int, num_places: int) -> None:
        self._num_rows -= num_rows
        self._num_wanted -= num_rows
        self.num_places -= num_places
