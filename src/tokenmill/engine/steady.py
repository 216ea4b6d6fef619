"""Steps in which every running sequence decodes one token and nothing else happens: most of all steps.

The general path plans each step anew: who runs, rows, blocks, choices. From one plain step to the next all
of that stays as it is, one position further. A `SteadyRun` holds it in flat arrays and moves them on. What
the sequences, their tables and the pool say is brought up to date in every step, so the general path can go
on at any moment; it is the twin, and gives the same answers.

A run ends where anything else happens: a sequence comes, ends, is preempted or branches, or a block is
missing.
What makes a sequence fit for it is `GenerationState.is_plain`.

Shape legend: R sequences, which are the rows of the step; B blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tokenmill.engine.batch import BatchRows, flat_batch
from tokenmill.engine.outputs import append_token, replace_refused
from tokenmill.engine.runner import OutRows
from tokenmill.engine.sampler import SamplingRow, choice_of
from tokenmill.engine.schedule import Chunk
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.step_time import ROW_TILE
from tokenmill.kernels import KV_BLOCK, Choice, ChoiceTable, Executor, F32Array, I32Array, StepBatch
from tokenmill.kvcache import BlockPool

__all__ = ["SteadyRun"]


class SteadyRun:
    """The running sequences of a scheduler, as long as they only decode. Made by `begin`.

    `states` are in the order of the rows; `num_steps` is how many it has made. A run whose step broke off
    must not be used again.
    """

    def __init__(self, states: Sequence[GenerationState], scheduler: Scheduler, executor: Executor) -> None:
        self.states = states
        self._scheduler = scheduler
        self._executor = executor
        self._num_changes = scheduler.num_changes
        # Whose token has to be looked at: any (None), or these, of which -1 says that there is none.
        self._rows = [
            (state, state.tokens, None if state.ends_by_text else state.end_token_ids | {-1})
            for state in states
        ]
        self._grammars = {row: state for row, state in enumerate(states) if state.grammar is not None}
        self._max_steps = min(state.max_total - state.num_total for state in states)
        self._table = ChoiceTable([_choice(state, row) for row, state in enumerate(states)])
        parts = [BatchRows(state.tokens[-1:], state.num_computed, state.table) for state in states]
        rows_R = np.arange(len(states), dtype=np.int32)
        batch = flat_batch(parts, rows_R, [state.adapter.number for state in states])
        self._set_batch(batch)
        self.num_steps = 0
        self._full_rows: list[int] = []
        self._num_calm = self._next_full()

    @classmethod
    def begin(cls, scheduler: Scheduler, executor: Executor) -> "SteadyRun | None":
        """The run of what runs now; None if the next step has to do anything else."""
        if not scheduler.only_decodes:
            return None
        states = [s for s in scheduler.running if isinstance(s, GenerationState) and s.is_plain]
        if len(states) < len(scheduler.running):
            return None
        # With rows to spare the general path also takes the tokens that a grammar leaves no choice of.
        if len(states) < ROW_TILE and any(state.grammar is not None for state in states):
            return None
        if not _extend(states, scheduler.pool):
            return None
        return cls(states, scheduler, executor)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose keys and values the next step reads."""
        return int(self._batch.positions.sum()) + len(self.states)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The step as the general path plans it."""
        return tuple(Chunk(each, each.num_computed, each.num_computed + 1, 1) for each in self.states)

    def goes_on(self) -> bool:
        """Make room for one more step; false if the run has ended."""
        if self._scheduler.num_changes != self._num_changes:
            return False
        if not self._full_rows:
            return True
        if not _extend([self.states[row] for row in self._full_rows], self._scheduler.pool):
            return False
        self._add_blocks(self._full_rows)
        self._full_rows = []
        return True

    def step(self, clock: Callable[[], float]) -> list[GenerationState]:
        """Compute a token for each sequence, and return those that it ends."""
        self._executor.run(self._batch)
        logits_LV = self._executor.buffer("logits")
        ids_R = self._table.choose(logits_LV, self._executor)
        if self._grammars:
            out = OutRows(rows=(), logits_LV=logits_LV, executor=self._executor)
            replace_refused(self._grammars, ids_R, out, clock)
        ended = self._append(ids_R.tolist(), logits_LV, clock())
        for state in self.states:
            state.num_computed += 1
        self._advance(ids_R)
        return ended

    def _append(self, token_ids: Sequence[int], logits_LV: F32Array, now_s: float) -> list[GenerationState]:
        """Give each sequence its token. Where that is all that can happen, its text can wait."""
        self.num_steps += 1
        ended: list[GenerationState] = []
        last = self.num_steps == self._max_steps
        for row, (token_id, (state, tokens, ends)) in enumerate(zip(token_ids, self._rows, strict=True)):
            if ends is not None and token_id not in ends and not last:
                tokens.append(token_id)
                continue
            if not state.finished:  # a grammar may have failed
                append_token(state, token_id, None, logits_LV[row], now_s)
            if state.finished:
                ended.append(state)
        return ended

    def _advance(self, ids_R: I32Array) -> None:
        """Move on by one position, and name the blocks that are full now."""
        batch = self._batch
        batch.tokens[:] = ids_R
        self._cells[self._moving] += 1
        self._table.advance()
        self._num_calm -= 1
        if not self._num_calm:
            self._full_rows = np.flatnonzero(batch.positions % KV_BLOCK == 0).tolist()
            self._num_calm = self._next_full()
            for row in self._full_rows:
                self._scheduler.publish(self.states[row])

    def _add_blocks(self, rows: Sequence[int]) -> None:
        """Let these rows, at the beginning of a block, go on in their new ones."""
        batch = self._batch
        batch.blocks[batch.block_starts[1:][rows] - 1, 2] = KV_BLOCK
        entries: list[tuple[int, int, int]] = []
        for row in rows:
            table, position = self.states[row].table, self.states[row].num_computed
            (slot,) = table.slots(position, position + 1)
            batch.kv_slots[row] = slot
            entries.append((slot // KV_BLOCK, position, 1))
        blocks = np.insert(batch.blocks, batch.block_starts[1:][rows], entries, axis=0)
        is_longer_R = np.zeros(len(self.states), np.int32)
        is_longer_R[rows] = 1
        batch.block_starts[1:] += np.cumsum(is_longer_R)
        self._set_batch(replace(batch, blocks=blocks))

    def _set_batch(self, batch: StepBatch) -> None:
        """Lay what moves on with each step in one array: positions, slots, and how full last blocks are."""
        num_rows = len(self.states)
        self._cells = np.concatenate([batch.positions, batch.kv_slots, batch.blocks.reshape(-1)])
        self._moving = np.arange(3 * num_rows)
        self._moving[2 * num_rows :] += batch.block_starts[1:] * 3 - 1 - np.arange(num_rows)
        positions_R, slots_R, cells = np.split(self._cells, [num_rows, 2 * num_rows])
        self._batch = replace(batch, positions=positions_R, kv_slots=slots_R, blocks=cells.reshape(-1, 3))

    def _next_full(self) -> int:
        """Steps after which the next block is full."""
        return KV_BLOCK - int((self._batch.positions % KV_BLOCK).max())


def _extend(states: Sequence[GenerationState], pool: BlockPool) -> bool:
    """Give sequences the blocks that their tokens need; false, and none, if there are too few."""
    missing = [state.table.num_missing(state.num_total) for state in states]
    if not pool.can_allocate(sum(missing)):
        return False
    for state, num_blocks in zip(states, missing, strict=True):
        state.table.extend(pool.allocate(num_blocks))
    return True


def _choice(state: GenerationState, row: int) -> Choice:
    """How the next token of a plain sequence is chosen, from this row of the logits."""
    return choice_of(
        SamplingRow(
            params=state.params,
            seed=state.seed,
            position=state.num_total,
            logits_row=row,
            tokens=state.tokens,
            num_prompt=state.num_prompt,
        )
    )
