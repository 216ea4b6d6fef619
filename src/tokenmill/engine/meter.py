"""What each request is charged of the engine's time and energy, so that the parts sum to the whole.

    submit ─► wake        the clock runs: the engine has work
    step   ─► begin       who has part in it, and in what (`costs.metering`)
           ─► tick        its time, also that between it and the step before
           ─► settle      the time so far is shared out in whole nanoseconds
    no work ─► rest       time from here on is nobody's

Steps that only decode have the same parts but for what they read, which grows by a token each. So such a step
costs two sums, and is shared out with those after it: when somebody comes, ends, or is preempted.
A part lies within a nanosecond of its exact share for each time that it was settled, and nothing is lost: the
charges of all requests sum to `busy_ns`.

Blocks that several sequences hold, in the spans that attention reads for all of them together, are read
once, and each pays its part of that. Prices are the engine's own estimate of a step's time.
"""

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np

from tokenmill.costs.metering import F64Array, RowShare, StepPrices, split, step_weights
from tokenmill.costs.power import EnergyMeter, PowerCounters
from tokenmill.engine.schedule import Chunk
from tokenmill.engine.sequence import SequenceState
from tokenmill.engine.step_time import ROW_TILE, StepTimeModel
from tokenmill.kernels import KV_BLOCK
from tokenmill.kvcache import BlockPool

__all__ = ["Meter", "row_share"]

_SPAN_TOKENS = 512
"""Attention to what sequences share is done for all of them in whole spans of this."""
_SPAN_BLOCKS = _SPAN_TOKENS // KV_BLOCK


class Meter:
    """Charges sequences for the steps of one engine. Points in time are seconds of the engine's clock.

    `counters` are the energy counters of the machine, None where nobody may read them.
    """

    def __init__(
        self,
        step_time: StepTimeModel,
        pool: BlockPool,
        *,
        now_s: float,
        counters: PowerCounters | None = None,
    ) -> None:
        self.busy_ns = 0
        self.busy_nj = 0
        self._step_time = step_time
        self._pool = pool
        self._began_ns = _nanoseconds(now_s)
        self._energy: EnergyMeter | None = None
        with contextlib.suppress(OSError, ValueError):
            self._energy = None if counters is None else EnergyMeter(counters)
        self._since_ns: int | None = None
        self._since_nj = 0
        self._states: Sequence[SequenceState] = ()
        self._weights: F64Array = np.zeros(0)
        # Of the next step: the sum of all weights, and by how much they grow with each step.
        self._weight = 0.0
        self._growth = 0.0
        self._kv_price = 0.0
        self._num_steps = 0
        self._reset()

    def idle_ns(self, now_s: float) -> int:
        """Time up to now that was nobody's."""
        return max(0, _nanoseconds(now_s) - self._began_ns - self.busy_ns)

    def wake(self, now_s: float) -> None:
        """There is work from now on, if there was none."""
        if self._since_ns is None:
            self._since_ns = _nanoseconds(now_s)
            self._since_nj = self._read_energy()

    def begin(self, chunks: Sequence[Chunk], own_s: Mapping[SequenceState, float] | None = None) -> None:
        """The next steps are made of these chunks, each with one more token to read than the last.

        `own_s` are seconds that were spent for a sequence alone.
        """
        self.settle()
        own_s = own_s or {}
        prices = self.prices
        shares = [row_share(chunk, self._pool, own_s.get(chunk.sequence, 0.0)) for chunk in chunks]
        self._states = [chunk.sequence for chunk in chunks]
        self._weights = step_weights(prices, shares)
        self._weight = float(self._weights.sum())
        self._kv_price = prices.kv_token
        self._growth = prices.kv_token * len(chunks)
        self._num_steps = 0

    def tick(self, now_s: float) -> None:
        """A step is over. If nobody had part in it its time is nobody's."""
        now_ns = _nanoseconds(now_s)
        since_ns, self._since_ns = self._since_ns, now_ns
        if since_ns is None or not self._states:
            return
        self._amount_ns += now_ns - since_ns
        part = (now_ns - since_ns) / (self._weight or 1.0)
        self._parts += part
        self._grown += part * self._num_steps
        self._num_steps += 1
        self._weight += self._growth

    def settle(self) -> None:
        """Share out the time since the last call. What a sequence is charged is then up to date."""
        if not self._amount_ns:
            return
        weights = self._parts * self._weights
        weights[2::3] += self._grown * self._kv_price
        self.busy_ns += self._amount_ns
        _add([state.nanoseconds for state in self._states], self._amount_ns, weights)
        if self._energy is not None:
            now_nj = self._read_energy()
            spent_nj, self._since_nj = now_nj - self._since_nj, now_nj
            self.busy_nj += spent_nj
            _add([state.nanojoules for state in self._states], spent_nj, weights)
        self._reset()

    def rest(self) -> None:
        """There is no work."""
        self.settle()
        self._since_ns, self._states = None, ()

    @property
    def prices(self) -> StepPrices:
        """What the parts of a step take, in seconds, as they are estimated now."""
        costs = self._step_time.costs
        return StepPrices(
            base=costs.base_s,
            row=costs.row_s + costs.tile_s / ROW_TILE,
            out_row=costs.out_row_s,
            kv_token=costs.kv_token_s,
        )

    def _reset(self) -> None:
        """Nothing waits to be shared out."""
        self._amount_ns = 0
        self._parts = 0.0
        self._grown = 0.0

    def _read_energy(self) -> int:
        """Nanojoules that the machine took since the meter was made; those so far if it cannot be read."""
        if self._energy is None:
            return self._since_nj
        try:
            return round(self._energy.poll() * 1e9)
        except (OSError, ValueError):
            self._energy = None
            return self._since_nj


def row_share(chunk: Chunk, pool: BlockPool, own_s: float = 0.0) -> RowShare:
    """What the sequence of a chunk has part in by it."""
    sequence, start, stop, num_out_rows, _ = chunk
    prefill_rows = max(0, min(stop, sequence.num_prompt) - start)
    cached, fresh = _tokens_read(sequence, stop, pool)
    return RowShare(
        sequence.request_id,
        prefill_rows,
        stop - start - prefill_rows,
        num_out_rows if sequence.wants_logits else 0,
        fresh,
        cached,
        own_s,
        sequence.tier == "batch",
    )


def _tokens_read(sequence: SequenceState, stop: int, pool: BlockPool) -> tuple[float, float]:
    """Tokens that attention reads up to `stop`, found in the cache and computed, each of its parts by how
    many read it.
    """
    num_cached = min(sequence.num_cached, stop)
    if stop < _SPAN_TOKENS:
        return num_cached, stop - num_cached
    blocks = sequence.table.blocks
    cached, fresh, start = 0.0, 0.0, 0
    for last in range(_SPAN_BLOCKS - 1, stop // KV_BLOCK, _SPAN_BLOCKS):
        # Sequences share a beginning, so the last block of a span has the fewest owners.
        num_owners = pool.num_owners(blocks[last])
        if num_owners <= 1:
            break
        end = start + _SPAN_TOKENS
        found = max(0, min(end, num_cached) - start)
        cached += found / num_owners
        fresh += (_SPAN_TOKENS - found) / num_owners
        start = end
    found = max(0, num_cached - start)
    return cached + found, fresh + (stop - start) - found


def _add(sums: Sequence[list[int]], amount: int, weights: F64Array) -> None:
    """Add each sequence's parts of an amount to its three sums."""
    parts = iter(split(amount, weights))
    for each in sums:
        each[0] += next(parts)
        each[1] += next(parts)
        each[2] += next(parts)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
