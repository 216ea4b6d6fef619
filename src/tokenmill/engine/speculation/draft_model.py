"""A small model that guesses for a large one: it runs ahead and says what it would have drawn.

It draws with the target's own noise (same seed and position, `sampler.sample`), so where the two models
agree on the distribution they draw the same token, sampled or greedy; no scheme without communication
agrees much more often (Daliri et al. 2024). Its chance for a token is its own probability of it.

It has its own executor and KV group: blocks of its own pool, one table a sequence. What it computed is a
prefix of the sequence and, after it, draft tokens; of those that were rejected, rows are computed over.
Nothing it holds is needed: when blocks run out, the sequence used least recently loses its own, and is
computed again if it is asked for. A vocabulary other than the target's is not covered.
"""

import math
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from tokenmill.core import UsageError
from tokenmill.engine.batch import BatchRows, flat_batch, int32
from tokenmill.engine.sampler import SamplingRow, logprobs_of, sample
from tokenmill.engine.speculation.proposers import NO_DRAFT, Draft, DraftRow, SequenceKey
from tokenmill.kernels import KV_BLOCK, Executor, StepBatch
from tokenmill.kvcache import BlockPool, BlockTable

__all__ = ["DraftModel"]


class DraftModel:
    """Proposes the continuations of a model on `executor`, which has `num_blocks` KV blocks.

    `context` is the most tokens of a sequence that the model can see; a longer one gets no drafts. A call
    computes at most one full step to catch up with its rows, and for each further draft token one row a
    sequence. Rows come in order of importance: the last give their blocks to the first. If a run raises,
    the error passes through, and what that run was to compute does not count as computed.
    """

    def __init__(self, executor: Executor, *, num_blocks: int, context: int, target_vocab_size: int) -> None:
        vocab_size = executor.plan.shape.vocab_size
        if vocab_size != target_vocab_size:
            raise UsageError(
                f"the draft model has {vocab_size} tokens, the model {target_vocab_size}",
                hint="use a draft model with the same vocabulary",
            )
        self._pool = BlockPool(num_blocks)
        self._executor = executor
        self._context = context
        # Least recently used first; of the rows of one call, the last row first.
        self._sequences: OrderedDict[SequenceKey, _Sequence] = OrderedDict()

    @property
    def num_blocks_in_use(self) -> int:
        """KV blocks that sequences hold."""
        return self._pool.num_in_use

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """Draft greedily or with each row's noise. A row that is still behind, or wants none, gets none."""
        drafts = iter(self._propose([row for row in rows if row.max_tokens > 0]))
        return [next(drafts) if row.max_tokens > 0 else NO_DRAFT for row in rows]

    def _propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        for row in reversed(rows):
            self._sequences.setdefault(row.key, _Sequence()).begin(row, self._num_wanted(row))
            self._sequences.move_to_end(row.key)
        sequences = [self._sequences[row.key] for row in rows]
        drafting = self._run(self._catch_up(sequences))
        while growing := [each for each in drafting if len(each.tokens) < each.num_wanted]:
            drafting = self._run([_Chunk(each, 1, True) for each in growing])
        return [Draft(tuple(each.tokens), tuple(each.probabilities)) for each in sequences]

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        """Nothing to do: the next call sees which tokens stand, also where no draft was verified."""

    def forget(self, key: SequenceKey) -> None:
        """Drop a sequence; its blocks are free at once."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._pool.free(sequence.table.clear())

    def check_integrity(self) -> None:
        """Assert that the sequences hold exactly the blocks in use."""
        self._pool.check_integrity(b for each in self._sequences.values() for b in each.table.blocks)

    def _num_wanted(self, row: DraftRow) -> int:
        """Drafts for a row: the last of them is never computed, so it may lie behind the context."""
        return max(0, min(row.max_tokens, self._context - len(row.tokens) + 1))

    def _catch_up(self, sequences: Sequence["_Sequence"]) -> list["_Chunk"]:
        """The missing tokens of each sequence, as many as a step has room for."""
        chunks: list[_Chunk] = []
        num_rows, num_out_rows = self._executor.max_rows, self._executor.max_out_rows
        for sequence in sequences:
            row = sequence.row
            is_dropped = self._sequences.get(row.key) is not sequence
            if is_dropped or len(row.tokens) > self._context or not self._make_room(sequence):
                continue
            num_missing = len(row.tokens) - sequence.num_computed
            wants_logits = num_missing <= num_rows and num_out_rows > 0 and sequence.num_wanted > 0
            # Without logits now, the last row is left: it is the one that gives them.
            count = num_missing if wants_logits else min(num_rows, num_missing - 1)
            if count > 0:
                chunks.append(_Chunk(sequence, count, wants_logits))
                num_rows -= count
                num_out_rows -= wants_logits
        return chunks

    def _make_room(self, sequence: "_Sequence") -> bool:
        """Take blocks up to the end of the draft, so that nobody is dropped while it is drafted."""
        key, table = sequence.row.key, sequence.table
        num_missing = table.num_missing(len(sequence.row.tokens) + max(0, sequence.num_wanted - 1))
        if table.num_blocks + num_missing > self._pool.num_blocks:
            return False
        while not self._pool.can_allocate(num_missing):
            victim = next(iter(self._sequences))
            if victim == key:
                return False
            self.forget(victim)
        table.extend(self._pool.allocate(num_missing))
        return True

    def _run(self, chunks: Sequence["_Chunk"]) -> list["_Sequence"]:
        """Compute a step; returns the sequences that got a token."""
        if not chunks:
            return []
        sampled = [chunk.sequence for chunk in chunks if chunk.wants_logits]
        self._executor.run(_step_batch(chunks), last=None if sampled else self._executor.plan.head_start)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_rows
        return self._sample(sampled) if sampled else []

    def _sample(self, sequences: list["_Sequence"]) -> list["_Sequence"]:
        """Give each a token, unless its logits are broken; returns those that got one."""
        logits_LV = self._executor.buffer("logits")[: len(sequences)]
        rows = [
            SamplingRow(
                s.row.params,
                s.row.seed,
                s.num_total,
                i,
                s.row.tokens + array("i", s.tokens),
                s.row.num_prompt,
            )
            for i, s in enumerate(sequences)
        ]
        result = sample(logits_LV, rows)
        token_ids, valid = result.token_ids.tolist(), result.valid.tolist()
        logprobs = logprobs_of(logits_LV, token_ids)
        for sequence, token_id, logprob, is_valid in zip(sequences, token_ids, logprobs, valid, strict=True):
            if is_valid:
                sequence.tokens.append(token_id)
                sequence.probabilities.append(math.exp(logprob))
        return [sequence for sequence, is_valid in zip(sequences, valid, strict=True) if is_valid]


class _Sequence:
    """What is computed of one sequence, and its draft of the present call.

    The first `num_computed` tokens of the row's, followed by the draft's, are in the cache.
    """

    row: DraftRow

    def __init__(self) -> None:
        self.table = BlockTable(KV_BLOCK)
        self.num_computed = 0
        self.num_known = 0
        self.num_wanted = 0
        self.tokens: list[int] = []
        self.probabilities: list[float] = []

    @property
    def num_total(self) -> int:
        """Tokens of the sequence and its draft."""
        return self.num_known + len(self.tokens)

    def begin(self, row: DraftRow, num_wanted: int) -> None:
        """Start a new draft; what is computed of the old one stays as far as its tokens stand."""
        assert len(row.tokens) >= self.num_known, f"{row.key} lost tokens"
        drafted = self.tokens[: max(0, self.num_computed - self.num_known)]
        came = row.tokens[self.num_known : self.num_known + len(drafted)].tolist()
        pairs = enumerate(zip(drafted, came, strict=False))
        num_standing = next((i for i, (draft, token) in pairs if draft != token), len(came))
        # One row at least is computed again, for its logits.
        standing = min(self.num_computed, self.num_known) + num_standing
        self.num_computed = min(standing, len(row.tokens) - 1)
        self.row, self.num_wanted = row, num_wanted
        self.num_known = len(row.tokens)
        self.tokens, self.probabilities = [], []

    def text(self, start: int, stop: int) -> "array[int]":
        """Tokens [start, stop), all of the row or all of the draft."""
        if start < self.num_known:
            return self.row.tokens[start:stop]
        return array("i", self.tokens[start - self.num_known : stop - self.num_known])


class _Chunk(NamedTuple):
    """The next `num_rows` rows of a sequence; the last of them may give logits."""

    sequence: _Sequence
    num_rows: int
    wants_logits: bool


def _step_batch(chunks: Sequence[_Chunk]) -> StepBatch:
    """The flat inputs of a step."""
    parts, out_rows, num_rows = list[BatchRows](), list[int](), 0
    for sequence, count, wants_logits in chunks:
        start = sequence.num_computed
        parts.append(BatchRows(sequence.text(start, start + count), start, sequence.table))
        num_rows += count
        if wants_logits:
            out_rows.append(num_rows - 1)
    return flat_batch(parts, int32(out_rows))
