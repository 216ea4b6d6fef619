"""A machine that does to the engine's core whatever requests, clocks and full caches can do, in any order.

It runs the real scheduler, cache, runner and sampler over an executor in integers that checks what it
finds: each slot of the cache holds a digest of the whole history up to it, and each row verifies that the
blocks it was given follow one upon the other. So a block that is freed too early, shared with another
history, swapped back wrongly or overwritten by a refused guess is seen in the row that reads it. What every
request must answer is known from its own tokens alone.

Hypothesis drives it in the tests (`tests/fast/test_machine.py`), plain random numbers for the long forms.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from tokenmill.core import Request, ResourceError, SamplingParams, Tier
from tokenmill.engine.adapters import NO_ADAPTER, AdapterSlot
from tokenmill.engine.core import CoreConfig, EngineCore
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.mock import mock_plan
from tokenmill.engine.sampler import SamplingRow, sample
from tokenmill.engine.scheduler import MAX_PREEMPTIONS
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.swap import SwapFile
from tokenmill.engine.taps import Tap, TapRows
from tokenmill.kernels import (
    KV_BLOCK,
    Attend,
    BufferName,
    Embed,
    EmbedTable,
    F32Array,
    KvDtype,
    PackedAdapter,
    Select,
    StepBatch,
    StepPlan,
)

__all__ = ["Machine", "MachineFault", "Sizes"]

VOCAB = 16
END = 0
_TABLE_SIZE = 61
_NUM_ADAPTERS = 2
_MASK = (1 << 63) - 1
_EDIT = 100
_PATIENCE = 4000
"""Engine steps after which a request without progress counts as starved."""


class MachineFault(AssertionError):
    """Something that must never happen."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How narrow the engine is."""

    num_blocks: int = 12
    max_rows: int = 40
    max_sequences: int = 5
    num_swap_slots: int = 6
    max_waiting: int = 12

    @classmethod
    def drawn(cls, random: Random) -> "Sizes":
        """Some sizes, most of them too small for comfort."""
        return cls(
            num_blocks=random.choice((6, 7, 9, 12, 16, 40)),
            max_rows=random.choice((1, 8, 24, 40, 64)),
            max_sequences=random.choice((1, 2, 3, 5, 8)),
            num_swap_slots=random.choice((0, 2, 6, 20)),
            max_waiting=random.choice((2, 12)),
        )


class Machine:
    """One engine and the requests it was given. Every public method is one thing that can happen."""

    def __init__(self, sizes: Sizes | None = None, *, seed: int = 0) -> None:
        self.sizes = sizes or Sizes()
        self.random = Random(seed)
        self.now_s = 0.0
        self.counts: Counter[str] = Counter()
        self.executor = LedgerExecutor(self.sizes)
        self.adapters = [NO_ADAPTER]
        for slot in range(_NUM_ADAPTERS):
            self.adapters.append(AdapterSlot(slot, f"{slot + 1:064x}"))
            self.executor.set_adapter(slot, PackedAdapter(digest=self.adapters[-1].digest, linears={}))
        num_slots = self.sizes.num_swap_slots
        self.swap = SwapFile(None, num_slots, 8 * KV_BLOCK) if num_slots else None
        self.core = EngineCore(
            self.executor,
            CoreConfig(
                num_blocks=self.sizes.num_blocks,
                max_sequences=self.sizes.max_sequences,
                max_waiting=self.sizes.max_waiting,
            ),
            swap=self.swap,
            clock=lambda: self.now_s,
        )
        # Both ways of preemption, whatever they would cost here.
        self.core.scheduler._prefer_swap = lambda num_tokens, num_blocks: self.random.random() < 0.7
        self.live: list[GenerationState] = []
        self.num_events = 0
        self._num_requests = 0
        self._num_steps = 0
        self._oracles: dict[int, _Oracle] = {}
        self._progress: dict[int, tuple[tuple[int, int], int]] = {}

    def submit(self, num_prompt: int, num_new: int, *, n: int, tier: Tier, timeout_s: float | None) -> None:
        """A request; prompts have prefixes in common."""
        self.num_events += 1
        prompt = _prompt(self.random.randrange(3), num_prompt)
        params = SamplingParams(
            max_tokens=num_new,
            n=n,
            temperature=self.random.choice((0.0, 1.0)),
            seed=self.random.randrange(1 << 40),
            ignore_eos=self.random.random() < 0.5,
        )
        self._num_requests += 1
        name = f"r{self._num_requests}"
        tenant = self.random.choice(("", "other"))
        adapter = self.random.choice(self.adapters)
        taps = self._taps(n)
        request = Request(
            request_id=name, prompt=prompt, params=params, tier=tier, tenant=tenant, timeout_s=timeout_s
        )
        states = [self._state(request, index) for index in range(n)]
        states[0].branch(states[1:])
        for state in states:
            state.adapter, state.taps = adapter, taps
        try:
            self.core.submit(states[0])
        except ResourceError:
            self.counts["refused"] += 1
            return
        self.counts["submitted"] += n
        self.counts["adapted"] += adapter is not NO_ADAPTER
        self.counts["tapped"] += bool(taps)
        self.live += states
        self._watch(states)

    def exhaust(self, num_requests: int) -> None:
        """More long requests at once than there is room for."""
        for _ in range(num_requests):
            num_prompt = self.random.choice((8, 30, 100))
            tier: Tier = self.random.choice(("standard", "batch", "batch"))
            self.submit(num_prompt, 90, n=1, tier=tier, timeout_s=self.random.choice((None, None, 60.0)))

    def abort(self, which: int) -> None:
        """Cancel one of the live requests."""
        self.num_events += 1
        if not self.live:
            return
        state = self.live[which % len(self.live)]
        family = (state, *state.siblings)
        if state in self.core.scheduler.running or state in self.core.scheduler.waiting:
            self.core.abort(state)
            for each in family:
                self._end(each)
        self.check()

    def wait(self, seconds: float) -> None:
        """Time passes without a step."""
        self.num_events += 1
        self.now_s += seconds

    def step(self) -> None:
        """One step of the engine, with guesses of every kind."""
        self.num_events += 1
        self._guess()
        self.now_s += 0.25
        self._num_steps += 1
        result = self.core.step()
        self.counts["steps"] += 1
        self.counts["preemptions"] += result.stats.num_preempted
        swapped = sum(bool(state.swap_slots) for state in self.core.scheduler.waiting)
        self.counts["steps with swapped requests"] += swapped > 0
        for state in result.finished:
            assert isinstance(state, GenerationState)
            self._end(state)
        self.check()

    def drain(self) -> None:
        """Run to the end of everything; nothing may be left."""
        while self.core.has_work:
            self.step()
        _require(not self.live, f"never ended ({len(self.live)})")
        _require(self.core.scheduler.pool.num_in_use == 0, "blocks are in use after the end")
        if self.core.scheduler.swap is not None:
            _require(self.core.scheduler.swap.num_in_use == 0, "swap slots are in use after the end")
        if self.swap is not None:
            self.swap.close()

    def check(self) -> None:
        """Assert what must hold at any moment."""
        self.core.check_integrity()
        for state in self.live:
            progress = state.num_computed, state.num_total
            before, since = self._progress[id(state)]
            if progress != before:
                self._progress[id(state)] = progress, self._num_steps
            elif self._num_steps - since > _PATIENCE:
                raise MachineFault(f"starved ({state.request_id})")

    def random_event(self) -> None:
        """One thing that can happen, drawn from the machine's own random numbers."""
        draw = self.random.random()
        if draw < 0.70:
            self.step()
        elif draw < 0.72:
            self.exhaust(self.random.choice((4, 20)))
        elif draw < 0.86:
            self.submit(
                self.random.choice((1, 5, 20, 31, 32, 33, 64, 100)),
                self.random.choice((1, 2, 40, 90, 90)),
                n=self.random.choice((1, 1, 1, 2, 4)),
                tier=self.random.choice(("fast", "fast", "standard", "batch")),
                timeout_s=self.random.choice((None, None, None, 3.0, 40.0)),
            )
        elif draw < 0.88:
            self.abort(self.random.randrange(1 << 16))
        else:
            self.wait(self.random.choice((0.0, 1.0, 3.0)))

    def _state(self, request: Request, index: int) -> GenerationState:
        seed = request.params.seed
        assert seed is not None
        return GenerationState(
            request,
            index=index,
            seed=seed + index,
            max_total=len(request.prompt) + request.params.max_tokens,
            detokenizer=Detokenizer(lambda token: bytes([97 + token])),
            end_token_ids=frozenset(() if request.params.ignore_eos else (END,)),
            submitted_s=self.now_s,
        )

    def _taps(self, n: int) -> tuple[Tap, ...]:
        """Mostly none; else a read, an edit, or an edit that fails."""
        kind = self.random.choice(("", "", "", "", "", "read", "edit", "edit", "failing"))
        if kind == "read" and n == 1:
            return (Tap(point="hook_embed", handler=_Reader()),)
        if kind == "edit":
            return (Tap(point="hook_embed", handler=_edit, intervention="edit"),)
        if kind == "failing":
            return (Tap(point="hook_embed", handler=_fail, intervention="fail", positions=range(20, 21)),)
        return ()

    def _watch(self, states: Sequence[GenerationState]) -> None:
        for state in states:
            self._progress[id(state)] = (0, state.num_total), self._num_steps
            self._oracles[id(state)] = _Oracle(state)

    def _guess(self) -> None:
        """Give running sequences guesses: right, wrong, or right and then wrong."""
        for state in self.core.scheduler.running:
            room = self.random.choice((0, 0, 1, 3, 6))
            assert isinstance(state, GenerationState)
            room = min(room, state.max_total - state.num_total - 1)
            if state.num_pending != 1 or room <= 0 or not state.can_draft:
                continue
            oracle, drafts = self._oracles[id(state)], array("i")
            num_right = self.random.randrange(room + 1)
            for guess in range(room):
                right = oracle.token(state.num_total + guess)
                drafts.append(right if guess < num_right else (right + 1) % VOCAB)
            state.drafts = drafts
            self.counts["guesses"] += room

    def _end(self, state: GenerationState) -> None:
        """A request has ended: once, in one state, with what it had to answer."""
        _require(state in self.live, f"ended twice, or was never there ({state.request_id})")
        self.live.remove(state)
        del self._progress[id(state)]
        reason = state.finish_reason
        _require(reason is not None, f"gone without a reason ({state.request_id})")
        self.counts[str(reason)] += 1
        _require(state.num_preemptions <= MAX_PREEMPTIONS, f"preempted too often ({state.num_preemptions})")
        if state.num_preemptions:
            self.counts[f"preempted {state.num_preemptions} times"] += 1
        oracle = self._oracles.pop(id(state))
        for position in range(state.num_prompt, state.num_total):
            expected = oracle.token(position)
            _require(
                state.tokens[position] == expected,
                f"another answer than its tokens demand ({state.request_id})",
            )
        for tap in state.taps:
            if isinstance(tap.handler, _Reader):
                expected_reads = list(range(len(tap.handler.positions)))
                _require(tap.handler.positions == expected_reads, "a read missed a position or saw it twice")
        if reason == "length":
            _require(state.num_total == state.max_total, f"ended early ({state.request_id})")


class LedgerExecutor:
    """An executor in integers. A slot holds its position and the digest of the history up to it."""

    def __init__(self, sizes: Sizes) -> None:
        self.plan = _plan()
        self.kv_dtype: KvDtype = "bf16"
        self.max_rows = sizes.max_rows
        self.max_out_rows = sizes.max_sequences + 6
        self._digests = array("Q", bytes(8 * sizes.num_blocks * KV_BLOCK))
        self._roots = [_ROOT] * _NUM_ADAPTERS
        self._x = np.zeros((sizes.max_rows, 1), np.float32)
        self._ends: list[int] = [0] * sizes.max_rows
        self._logits = np.zeros((self.max_out_rows, VOCAB), np.float32)

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        """Operations: tokens to x; verify what each sequence finds and store its rows; logits."""
        if first == 0:
            self._x[: batch.num_rows, 0] = batch.tokens
        if first <= 1 and (last is None or last > 1):
            self._store(batch)
        if last is None:
            digests = [self._ends[row] for row in batch.out_rows.tolist()]
            self._logits[: len(digests)] = _TABLE[[digest % _TABLE_SIZE for digest in digests]]

    def buffer(self, name: BufferName) -> F32Array:
        """x or the logits."""
        return self._x if name == "x" else self._logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, in order."""
        for source, target in pairs:
            rows = self._digests[source * KV_BLOCK : (source + 1) * KV_BLOCK]
            self._digests[target * KV_BLOCK : (target + 1) * KV_BLOCK] = rows

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of a block."""
        bytes_of_all: npt.NDArray[np.uint8] = np.frombuffer(self._digests, np.uint8)
        block: npt.NDArray[np.uint8] = bytes_of_all.reshape(-1, KV_BLOCK * 8)[index]
        return block

    def set_adapter(self, slot: int, adapter: PackedAdapter | None) -> None:
        """The history of a sequence with an adapter begins at another root."""
        assert adapter is not None
        self._roots[slot] = _root_of(adapter.digest)

    def _store(self, batch: StepBatch) -> None:
        starts, block_starts = batch.row_starts.tolist(), batch.block_starts.tolist()
        values = self._x[: batch.num_rows, 0].astype(int).tolist()
        positions, slots = batch.positions.tolist(), batch.kv_slots.tolist()
        blocks = batch.blocks.tolist()
        _require(len(set(slots)) == len(slots), "two rows write one slot")
        for s in range(len(starts) - 1):
            mine = blocks[block_starts[s] : block_starts[s + 1]]
            start = positions[starts[s]]
            slot = int(batch.adapters[s]) if len(batch.adapters) else -1
            digest = self._history(mine, start, _ROOT if slot < 0 else self._roots[slot])
            for row in range(starts[s], starts[s + 1]):
                position = positions[row]
                block, place, rows = mine[position // KV_BLOCK]
                _require(slots[row] == block * KV_BLOCK + position - place, "a row writes another slot")
                _require(position - place < rows, "a row does not see itself")
                digest = _mix(digest, values[row], position)
                self._digests[slots[row]] = digest
                self._ends[row] = digest

    def _history(self, blocks: list[list[int]], start: int, root: int) -> int:
        """The digest before position `start`, after a look at every border between its blocks."""
        digest = root
        for index in range(-(-start // KV_BLOCK)):
            block, place, _ = blocks[index]
            _require(place == index * KV_BLOCK, "blocks are out of order")
            first = self._digests[block * KV_BLOCK]
            _require(first % (1 << 32) == _link(digest), "a block does not follow the one before it")
            digest = self._digests[block * KV_BLOCK + min(start - place, KV_BLOCK) - 1]
        return digest


_ROOT = 0x1234567
_TABLE: npt.NDArray[np.float32] = (
    np.random.default_rng(7).standard_normal((_TABLE_SIZE, VOCAB)).astype(np.float32) * 2
)


def _link(digest: int) -> int:
    """What the next digest says of this one."""
    return (digest * 0x9E3779B97F4A7C15 >> 20) & 0xFFFFFFFF


def _mix(digest: int, token: int, position: int) -> int:
    """The digest after one more token; its low half names the digest before it."""
    high = (
        digest ^ (token + 1) * 0xBF58476D1CE4E5B9 ^ (position + 1) * 0x94D049BB133111EB
    ) * 0xD1342543DE82EF95
    return (high & _MASK) >> 32 << 32 | _link(digest)


class _Oracle:
    """What one request must answer, from its own tokens alone."""

    def __init__(self, state: GenerationState) -> None:
        self._state = state
        self._tokens = array("i", state.tokens)
        self._digest = _root_of(state.adapter.digest)
        self._shift = _EDIT if any(tap.handler is _edit for tap in state.taps) else 0
        for position, token in enumerate(self._tokens):
            self._digest = _mix(self._digest, token + self._shift, position)

    def token(self, position: int) -> int:
        """The token at a position after the prompt."""
        while len(self._tokens) <= position:
            token = self._next()
            self._digest = _mix(self._digest, token + self._shift, len(self._tokens))
            self._tokens.append(token)
        return self._tokens[position]

    def _next(self) -> int:
        state, logits_1V = self._state, _TABLE[self._digest % _TABLE_SIZE][None]
        if state.params.greedy:
            return int(logits_1V.argmax())
        row = SamplingRow(
            params=state.params,
            seed=state.seed,
            position=len(self._tokens),
            logits_row=0,
            tokens=self._tokens,
            num_prompt=state.num_prompt,
        )
        return int(sample(logits_1V, [row]).token_ids[0])


class _Reader:
    """A tap that keeps the positions it is shown."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def __call__(self, rows: TapRows) -> None:
        """Keep them."""
        self.positions += rows.positions_T.tolist()


def _edit(rows: TapRows) -> F32Array:
    """A tap that changes what every row is computed from."""
    return rows.values_TD + np.float32(_EDIT)


def _fail(rows: TapRows) -> F32Array:
    raise RuntimeError("the tap was told to fail")


def _root_of(adapter: str) -> int:
    """Where the history of a sequence with this adapter begins."""
    return _ROOT ^ int(adapter or "0", 16)


def _prompt(family: int, num_tokens: int) -> tuple[int, ...]:
    """Prompts of one family begin alike."""
    return tuple(1 + (family * 5 + position * position) % (VOCAB - 1) for position in range(num_tokens))


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise MachineFault(what)


def _plan() -> StepPlan:
    table = EmbedTable(data=np.zeros((VOCAB, 8), np.uint16), scales=np.zeros(0, np.float16))
    return mock_plan(VOCAB, (Embed(table=table, name="hook_embed"), Attend(layer=0), Select()))
