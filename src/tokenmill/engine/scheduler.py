"""Which rows of which sequences the next step computes, and which blocks they get.

There are no phases. A sequence has `num_total` tokens, of which `num_computed` are in the cache, and a step
lets the second number catch up with the first. Every step is planned in this order:

    displace urgent work that finds no room takes that of running batch work
    grow     each sequence that lacks one row gets it, and a block where it needs one; while fast requests
             run the others take turns, and beside others batch work gets only so many rows as it is given
    draft    guessed tokens, where rows and blocks are left over
    admit    waiting sequences start, as long as the first of them fits
    fill     the other rows: a quarter of them to the sequence that has waited longest, the rest to those
             that lack least, so that neither long nor short prompts stand still

Sequences are ordered by `place`: the time of submission plus a delay for later tiers. When blocks run out,
the last in that order gives its blocks back: to a swap file, or to be computed again later, whichever
is cheaper. After `MAX_PREEMPTIONS` it starts again only with all blocks that it can ever need, and stays.

Everything is integers. No clock is read here and no tensor is touched, so it runs unchanged in a simulator.
"""

from bisect import insort
from collections.abc import Callable, Sequence, Set

from tokenmill.core import ResourceError
from tokenmill.engine.counts import EngineCounts
from tokenmill.engine.schedule import BlockMoves, Schedule, StepDraft, StepLimits
from tokenmill.engine.sequence import SequenceState
from tokenmill.kvcache import BlockPool

__all__ = ["MAX_PREEMPTIONS", "Scheduler"]

MAX_PREEMPTIONS = 4
"""A sequence is preempted at most so often; then it waits until it can stay."""


class Scheduler:
    """Owns the waiting and running sequences and, through their tables, every block in use of the pool.

    `swap` is the pool of slots in the swap file, if there is one; `prefer_swap(num_tokens, num_blocks)` says
    if moving that many blocks out and in again is cheaper than computing that many tokens again.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: StepLimits,
        *,
        swap: BlockPool | None = None,
        prefer_swap: Callable[[int, int], bool] = lambda num_tokens, num_blocks: True,
    ) -> None:
        self.pool = pool
        self.swap = swap
        self.limits = limits
        self._prefer_swap = prefer_swap
        self._waiting: list[SequenceState] = []
        self._running: list[SequenceState] = []
        self._num_arrived = 0
        self._num_turns = 0
        self._copies: list[tuple[int, int]] = []
        self.num_changes = 0
        self.counts = EngineCounts()

    @property
    def has_work(self) -> bool:
        """True if any sequence is not finished."""
        return bool(self._running or self._waiting)

    @property
    def waiting(self) -> Sequence[SequenceState]:
        """Sequences without blocks, in order."""
        return self._waiting

    @property
    def running(self) -> Sequence[SequenceState]:
        """Sequences with blocks, in order."""
        return self._running

    def check_fits(self, sequence: SequenceState) -> None:
        """Raise `ResourceError` if even an empty cache could not hold the sequence to its end."""
        if sequence.table.num_missing(sequence.max_computed) > self.pool.num_blocks:
            size = sequence.table.block_size
            raise ResourceError(
                f"{sequence.request_id} may need {sequence.max_computed} tokens of KV cache, "
                f"which holds {self.pool.num_blocks * size}",
                hint="lower max_tokens, shorten the prompt, or raise kv_tokens",
            )

    def submit(self, sequence: SequenceState) -> None:
        """Queue a sequence. Raises `ResourceError` as `check_fits` does, and if the queue is full."""
        self.check_fits(sequence)
        if len(self._waiting) >= self.limits.max_waiting:
            raise ResourceError(
                f"{len(self._waiting)} requests are waiting already",
                hint="try again later, or raise max_waiting",
            )
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self._queue(sequence)

    def fork(self, parent: SequenceState, child: SequenceState) -> None:
        """Start `child`, which begins with the tokens computed for `parent`, from the parent's blocks.

        Full blocks are shared; the last, which both will write, is copied before the next step. Where
        there is no room the child waits, and is computed from its tokens.
        """
        child.arrival = self._num_arrived
        self._num_arrived += 1
        # Guesses that were right for the parent are not the child's: of its tokens the last is not computed.
        num_computed = min(parent.num_computed, child.num_total - 1)
        shared, rest = divmod(num_computed, parent.table.block_size)
        num_new = child.table.num_missing(child.num_total) - shared
        fits = len(self._running) < self.limits.max_sequences and self.pool.can_allocate(num_new)
        if parent not in self._running or not fits:
            self._queue(child)
            return
        blocks = parent.table.blocks
        self.pool.share(blocks[:shared])
        new = self.pool.allocate(num_new)
        if rest:
            self._copies.append((blocks[shared], new[0]))
        child.table.extend([*blocks[:shared], *new])
        child.num_computed = num_computed
        child.num_published = shared
        self._run(child)

    def schedule(
        self,
        *,
        max_rows: int | None = None,
        max_batch_rows: int | None = None,
        only: SequenceState | None = None,
    ) -> Schedule:
        """Plan a step and allocate its blocks. Never empty while there is work.

        `max_rows` lowers the limit for this step, but every running sequence that lacks one row gets it, as
        far as it is its turn. `max_batch_rows` bounds those of the batch tier: give it only if others run.
        `only` plans a step of one running sequence that has the blocks it needs.
        """
        plan = StepDraft(self.limits, max_rows, max_batch_rows if only is None else None)
        if only is not None:
            assert only in self._running, f"{only.request_id} does not run"
            plan.take(only, only.num_pending)
        else:
            self._displace(plan)
            resting = self._resting()
            self._grow(plan, resting)
            self._draft(plan)
            self._admit(plan)
            self._fill(plan, resting)
        schedule = Schedule(
            chunks=tuple(plan.chunks),
            moves=BlockMoves(tuple(self._copies), tuple(plan.outs), tuple(plan.ins)),
            preempted=tuple(plan.preempted),
        )
        self._copies.clear()
        self._check(schedule)
        return schedule

    @property
    def only_decodes(self) -> bool:
        """True if nobody can start or must make room, and no block is to be copied: all that a step can do
        is to go on with what runs, as far as that has blocks.
        """
        running, waiting = self._running, self._waiting
        full = len(running) >= self.limits.max_sequences
        nobody_starts = not waiting or (full and not self._find_victims(waiting[0]))
        fits = 0 < len(running) <= self.limits.max_rows
        return fits and nobody_starts and not self._copies and not self._takes_turns

    def commit(self, schedule: Schedule) -> None:
        """Record that the rows of a step are in the cache, and name the blocks that they filled."""
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            assert sequence.num_computed == chunk.start, "a schedule is committed twice"
            sequence.num_computed = sequence.num_confirmed(chunk.stop)
            sequence.drafts = sequence.drafts[:0]
            self.publish(sequence)

    def publish(self, sequence: SequenceState) -> None:
        """Name the blocks that are full of computed tokens."""
        chain, size = sequence.chain, sequence.table.block_size
        num_full = sequence.num_computed // size
        if chain is None or num_full <= sequence.num_published:
            return
        blocks = sequence.table.blocks
        for index in range(sequence.num_published, num_full):
            key = chain.key(index, sequence.tokens)
            self.pool.publish(blocks[index], key, chain.tokens_of(index, sequence.tokens), sequence.tenant)
        sequence.num_published = num_full

    def remove(self, sequence: SequenceState, *, damaged: bool = False) -> None:
        """Forget a sequence, at any moment between steps, and free its blocks. No-op if it is unknown.

        `damaged` content is not kept for others.
        """
        self.num_changes += 1
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        if damaged:
            for block in sequence.table.blocks:
                self.pool.forget(block)
        self._free(sequence)

    def check_integrity(self) -> None:
        """Assert that the sequences hold exactly the blocks in use, and that the queues are in order."""
        everyone = [*self._running, *self._waiting]
        self.pool.check_integrity(block for sequence in everyone for block in sequence.table.blocks)
        if self.swap is not None:
            self.swap.check_integrity(slot for sequence in self._waiting for slot in sequence.swap_slots)
        for queue in (self._running, self._waiting):
            places = [sequence.place for sequence in queue]
            assert places == sorted(set(places)), "a queue is out of order"
        assert all(not s.table.num_blocks and (s.swap_slots or not s.num_computed) for s in self._waiting)
        assert all(not s.swap_slots for s in self._running), "a running sequence is swapped out"
        assert all(s.num_preemptions <= MAX_PREEMPTIONS for s in everyone), "preempted too often"

    def _queue(self, sequence: SequenceState) -> None:
        self.num_changes += 1
        insort(self._waiting, sequence, key=lambda each: each.place)

    def _run(self, sequence: SequenceState) -> None:
        self.num_changes += 1
        insort(self._running, sequence, key=lambda each: each.place)

    def _resting(self) -> frozenset[SequenceState]:
        """Who lacks one row and sits this step out, so that fast requests take more steps than others."""
        if not self._takes_turns:
            return frozenset()
        others = [each for each in self._running if each.tier != "fast" and each.num_pending == 1]
        others.sort(key=lambda each: each.turn)
        num_turns = max(1, int(len(others) / self.limits.fast_ratio))
        for number, each in enumerate(others[:num_turns], start=self._num_turns):
            each.turn = number
        self._num_turns += num_turns
        return frozenset(others[num_turns:])

    @property
    def _takes_turns(self) -> bool:
        if self.limits.fast_ratio <= 1.0:
            return False
        num_fast = sum(each.tier == "fast" for each in self._running)
        return 0 < num_fast < len(self._running)

    def _grow(self, plan: StepDraft, resting: Set[SequenceState]) -> None:
        """One row for each sequence that lacks one and has its turn."""
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            has_turn = sequence not in resting and (sequence.tier != "batch" or plan.num_batch_rows)
            if sequence.num_pending == 1 and has_turn:
                if sequence.table.capacity < sequence.num_total and not self._make_room(sequence, plan):
                    continue
                plan.take(sequence, 1)
            index += 1

    def _draft(self, plan: StepDraft) -> None:
        """Rows for guessed tokens: never at the cost of another sequence's blocks, rows or places."""
        for index, chunk in enumerate(plan.chunks):
            sequence = chunk.sequence
            if not sequence.drafts:
                continue
            missing = sequence.table.num_missing(chunk.stop + len(sequence.drafts))
            if missing and self.pool.num_available >= missing + len(self._running):
                sequence.table.extend(self.pool.allocate(missing))
            room = sequence.table.capacity - chunk.stop
            sequence.drafts = sequence.drafts[: max(0, min(room, plan.num_rows, plan.num_places))]
            plan.extend(index, len(sequence.drafts))

    def _admit(self, plan: StepDraft) -> None:
        """Start waiting sequences, in order, as long as the first of them fits and would get rows.

        In a step that preempted somebody nobody else starts: the blocks were needed.
        """
        filling = [s for s in self._running if s.num_pending > 1]
        while self._waiting and plan.num_rows and not plan.preempted:
            sequence = self._waiting[0]
            gets_rows = not filling or sequence.place < filling[0].place
            if not gets_rows:
                first, *others = [each.num_pending for each in filling]
                gets_rows = min(plan.num_rows // 4, first) + sum(others) < plan.num_rows
            if not gets_rows or not self._can_start(sequence):
                break
            self._start(sequence, plan)
            insort(filling, sequence, key=lambda each: each.place)

    def _fill(self, plan: StepDraft, resting: Set[SequenceState]) -> None:
        """Hand out the rows that are left: a quarter to the first in line, the rest to those that lack least.

        So a long prompt is never slower than at a quarter of the machine, and short ones hardly notice it.
        """
        planned = {id(chunk.sequence) for chunk in plan.chunks}
        filling = [
            each
            for each in self._running
            if each.num_pending > 0 and id(each) not in planned and each not in resting
        ]
        num_kept = min(-(-plan.num_rows // 4), filling[0].num_pending) if filling else 0
        for sequence in sorted(filling, key=lambda each: each.num_pending):
            if sequence is filling[0]:
                num_kept = 0
            plan.take(sequence, plan.num_rows - num_kept)

    def _can_start(self, sequence: SequenceState) -> bool:
        if len(self._running) >= self.limits.max_sequences:
            return False
        # Blocks found in the prefix cache cost nothing where somebody holds them already.
        num_held = sum(self.pool.num_owners(block) > 0 for block in self._find_prefix(sequence))
        return self.pool.can_allocate(self._num_wanted(sequence) - num_held)

    def _num_wanted(self, sequence: SequenceState) -> int:
        """Blocks that it takes to start a sequence: room for its tokens, and some to grow.

        One block more for each sequence that runs keeps it from being preempted within a few steps. After
        `MAX_PREEMPTIONS` it takes all that it can ever need, and waits until that leaves the others theirs.
        """
        if sequence.num_preemptions < MAX_PREEMPTIONS:
            return sequence.table.num_missing(sequence.num_total) + len(self._running)
        return sum(each.table.num_missing(each.max_computed) for each in [*self._running, sequence])

    def _displace(self, plan: StepDraft) -> None:
        """Start the first in line, if it is no batch work and such work holds the room for it."""
        if not self._waiting or self._can_start(self._waiting[0]):
            return
        sequence = self._waiting[0]
        victims = self._find_victims(sequence)
        num_blocks = sum(victim.table.num_blocks for victim in victims)
        if not victims or self._num_wanted(sequence) > self.pool.num_available + num_blocks:
            return
        while victims and not self._can_start(sequence):
            self._preempt(victims.pop(), plan)
        if self._can_start(sequence):
            self._start(sequence, plan)

    def _find_victims(self, sequence: SequenceState) -> list[SequenceState]:
        """The batch work that this may displace."""
        if sequence.tier == "batch":
            return []
        behind = [each for each in self._running if each.place > sequence.place]
        return [each for each in behind if each.tier == "batch" and not each.reserved]

    def _start(self, sequence: SequenceState, plan: StepDraft) -> None:
        """Give a waiting sequence its blocks: swapped in, found in the prefix cache, or new."""
        self._waiting.remove(sequence)
        if sequence.swap_slots:
            assert self.swap is not None
            blocks = self.pool.allocate(len(sequence.swap_slots))
            plan.ins += zip(sequence.swap_slots, blocks, strict=True)
            sequence.table.extend(blocks)
            self.swap.free(sequence.swap_slots)
            sequence.swap_slots = []
        else:
            self._take_prefix(sequence)
        sequence.reserved = sequence.num_preemptions >= MAX_PREEMPTIONS
        needed = sequence.max_computed if sequence.reserved else sequence.num_total
        sequence.table.extend(self.pool.allocate(sequence.table.num_missing(needed)))
        self._run(sequence)
        plan.started.append(sequence)

    def _find_prefix(self, sequence: SequenceState) -> list[int]:
        """The blocks, in use or cached, that hold what the sequence begins with."""
        chain, blocks = sequence.chain, list[int]()
        if chain is None or sequence.swap_slots:
            return blocks
        for index in range(sequence.num_skippable // sequence.table.block_size):
            tokens = chain.tokens_of(index, sequence.tokens)
            block = self.pool.find(chain.key(index, sequence.tokens), tokens)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _take_prefix(self, sequence: SequenceState) -> None:
        """Begin after the blocks that the cache has."""
        blocks = self._find_prefix(sequence)
        self.pool.share(blocks)
        sequence.table.extend(blocks)
        sequence.num_computed = len(blocks) * sequence.table.block_size
        sequence.num_published = len(blocks)
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
            self.counts.num_prompt_tokens += sequence.num_total
            self.counts.num_queried_tokens += 0 if sequence.chain is None else sequence.num_total
            self.counts.num_hit_tokens += sequence.num_cached

    def _make_room(self, sequence: SequenceState, plan: StepDraft) -> bool:
        """Allocate a block, preempting from the back; False if `sequence` itself had to go."""
        missing = sequence.table.num_missing(sequence.num_total)
        while not self.pool.can_allocate(missing):
            victim = next(each for each in reversed(self._running) if self._can_preempt(each, plan))
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        sequence.table.extend(self.pool.allocate(missing))
        return True

    def _can_preempt(self, sequence: SequenceState, plan: StepDraft) -> bool:
        """Whoever holds a reservation stays, and so does whoever has rows in this step or starts in it."""
        busy = [chunk.sequence for chunk in plan.chunks] + plan.started
        return not sequence.reserved and all(each is not sequence for each in busy)

    def _preempt(self, victim: SequenceState, plan: StepDraft) -> None:
        """Take all blocks away; the tokens, sampled ones too, are kept."""
        self._running.remove(victim)
        self.counts.num_preempted += 1
        victim.num_preemptions += 1
        victim.drafts = victim.drafts[:0]
        num_blocks = -(-victim.num_computed // victim.table.block_size)
        swaps = self.swap is not None and victim.num_computed and self.swap.can_allocate(num_blocks)
        if swaps and self.swap is not None and self._prefer_swap(victim.num_computed, num_blocks):
            slots = self.swap.allocate(num_blocks)
            plan.outs += zip(victim.table.blocks[:num_blocks], slots, strict=True)
            victim.swap_slots = slots
        else:
            victim.num_computed = 0
        victim.num_published = 0
        self.pool.free(reversed(victim.table.clear()))
        plan.preempted.append(victim)
        self._queue(victim)

    def _free(self, sequence: SequenceState) -> None:
        # The end of a prefix is given up before its beginning.
        self.pool.free(reversed(sequence.table.clear()))
        if sequence.swap_slots:
            assert self.swap is not None
            self.swap.free(sequence.swap_slots)
            sequence.swap_slots = []

    def _check(self, schedule: Schedule) -> None:
        num_places = sum(max(0, c.stop - max(c.start, c.sequence.first_sampled)) for c in schedule.chunks)
        assert schedule.num_rows <= self.limits.max_rows, "more rows than a step has"
        assert num_places <= self.limits.max_out_rows, "more sampled rows than a step has"
        assert len(self._running) <= self.limits.max_sequences, "more sequences than allowed"
        assert all(c.num_rows > 0 for c in schedule.chunks), "an empty chunk"
        assert schedule.chunks or not self.has_work, "there is work, and no step"
