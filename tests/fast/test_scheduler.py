"""The scheduler alone, in integers: progress, budgets, order, preemption, and every guard."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.core import Request, ResourceError, SamplingParams, Tier
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.schedule import Chunk, Schedule, StepLimits
from tokenmill.engine.scheduler import MAX_PREEMPTIONS, Scheduler
from tokenmill.engine.sequence import TIER_DELAY_S, GenerationState, ScoringState, SequenceState
from tokenmill.kernels import KV_BLOCK
from tokenmill.kvcache import BlockPool, PrefixChain, prefix_root

LIMITS = StepLimits(max_rows=64, max_out_rows=8, max_sequences=8)


def generation(name: str, num_prompt: int, num_new: int) -> GenerationState:
    return GenerationState(
        Request(request_id=name, prompt=(1,) * num_prompt, params=SamplingParams(ignore_eos=True)),
        index=0,
        seed=0,
        max_total=num_prompt + num_new,
        detokenizer=Detokenizer(lambda _: b"x"),
        end_token_ids=frozenset(),
        submitted_s=0.0,
    )


@dataclass
class Simulator:
    """Drives a scheduler without a model and keeps what happened."""

    scheduler: Scheduler
    finished: list[SequenceState] = field(default_factory=list)
    steps: list[Schedule] = field(default_factory=list)

    def step(self) -> Schedule:
        schedule = self.scheduler.schedule()
        self.steps.append(schedule)
        self.scheduler.check_integrity()
        self.scheduler.commit(schedule)
        for chunk in schedule.chunks:
            self._take_logits(chunk)
            if chunk.sequence.finished:
                self.scheduler.remove(chunk.sequence)
                self.finished.append(chunk.sequence)
        self.scheduler.check_integrity()
        return schedule

    def run(self, sequences: Sequence[SequenceState]) -> None:
        for sequence in sequences:
            self.scheduler.submit(sequence)
        while self.scheduler.has_work:
            self.step()
            assert len(self.steps) < 20_000, "no end in sight"

    def _take_logits(self, chunk: Chunk) -> None:
        for position in range(chunk.stop - chunk.num_out_rows, chunk.stop):
            if isinstance(chunk.sequence, GenerationState):
                assert position == chunk.sequence.num_total - 1
                chunk.sequence.append(1, None, now_s=0.0)
            elif isinstance(chunk.sequence, ScoringState):
                chunk.sequence.append(position, [-1.0])


def simulator(num_blocks: int, limits: StepLimits = LIMITS) -> Simulator:
    return Simulator(Scheduler(BlockPool(num_blocks), limits))


SHAPES = st.lists(
    st.tuples(st.sampled_from(["generate", "score"]), st.integers(1, 150), st.integers(1, 100)),
    min_size=1,
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=SHAPES,
    num_blocks=st.integers(8, 64),
    max_rows=st.integers(1, 80),
    max_out_rows=st.integers(1, 9),
    max_sequences=st.integers(1, 9),
)
def test_everything_ends_within_every_budget(
    shapes: list[tuple[str, int, int]],
    num_blocks: int,
    max_rows: int,
    max_out_rows: int,
    max_sequences: int,
) -> None:
    max_out_rows += max_sequences - 1
    limits = StepLimits(max_rows=max_rows, max_out_rows=max_out_rows, max_sequences=max_sequences)
    sim = simulator(num_blocks, limits)
    sequences: list[SequenceState] = [
        generation(str(i), prompt, new)
        if kind == "generate"
        else ScoringState(str(i), range(prompt + new), prompt)
        for i, (kind, prompt, new) in enumerate(shapes)
    ]
    sim.run(sequences)
    assert {id(s) for s in sim.finished} == {id(s) for s in sequences}, "each ends once"
    assert len(sim.finished) == len(sequences)
    for schedule in sim.steps:
        sampled = sum(c.num_out_rows for c in schedule.chunks if isinstance(c.sequence, GenerationState))
        assert 0 < schedule.num_rows <= max_rows and sampled <= max_out_rows
        assert len(schedule.chunks) <= max_sequences
    assert sim.scheduler.pool.num_free == num_blocks


def test_a_long_prompt_is_computed_in_chunks_and_samples_once() -> None:
    sim = simulator(16)
    sim.scheduler.submit(generation("a", 150, 3))
    chunks = [sim.step().chunks[0] for _ in range(3)]
    assert [(c.start, c.stop, c.num_out_rows) for c in chunks] == [(0, 64, 0), (64, 128, 0), (128, 150, 1)]


def test_prefill_and_decode_share_a_step() -> None:
    sim = simulator(16)
    sim.scheduler.submit(generation("a", 10, 5))
    sim.step()
    sim.scheduler.submit(generation("b", 100, 5))
    assert [(c.sequence.request_id, c.num_rows) for c in sim.step().chunks] == [("a", 1), ("b", 63)]


def test_sampled_rows_stop_short_of_their_budget() -> None:
    sim = simulator(16, StepLimits(max_rows=64, max_out_rows=3, max_sequences=3))
    first = generation("first", 10, 20)
    sim.scheduler.submit(first)
    sim.step()
    for name in ("second", "third"):
        sim.scheduler.submit(generation(name, 10, 2))
    first.drafts.extend([1] * 9)
    assert [(c.num_rows, c.num_out_rows) for c in sim.scheduler.schedule().chunks] == [(3, 3), (9, 0), (9, 0)]


def test_scored_rows_are_not_bounded_by_the_sampling_budget() -> None:
    sim = simulator(16)
    sim.scheduler.submit(ScoringState("s", range(60), 20))
    assert [(c.num_rows, c.num_out_rows) for c in sim.step().chunks] == [(59, 40)]


def test_the_latest_arrival_is_preempted_and_resumes_with_its_tokens() -> None:
    sim = simulator(4)
    first, second = generation("first", 30, 80), generation("second", 30, 60)
    sim.run([first, second])
    preempting = next(schedule for schedule in sim.steps if schedule.preempted)
    assert preempting.preempted == (second,)
    assert first.num_preemptions == 0 and second.num_preemptions >= 1
    # Sampled tokens were kept: the restart computes prompt and sampled tokens as one prompt.
    restarts = [c for s in sim.steps for c in s.chunks if c.sequence is second and c.start == 0]
    assert restarts[-1].stop > 30
    assert first.num_total == 110 and second.num_total == 90


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), num_blocks=st.integers(12, 40), load=st.integers(2, 6))
def test_under_any_load_nothing_is_preempted_often(seed: int, num_blocks: int, load: int) -> None:
    draw = random.Random(seed)
    limits = StepLimits(max_rows=256, max_out_rows=64, max_sequences=64)
    sim = simulator(num_blocks, limits)
    sequences: list[SequenceState] = []
    while sum(-(-s.max_computed // KV_BLOCK) for s in sequences) < load * num_blocks:
        sequences.append(generation(str(len(sequences)), draw.randint(1, 120), draw.randint(1, 200)))
    sim.run(sequences)
    assert max(s.num_preemptions for s in sequences) <= MAX_PREEMPTIONS


def test_a_start_leaves_a_block_for_each_that_runs() -> None:
    sim = simulator(4)
    for name in ("first", "second", "third"):
        sim.scheduler.submit(generation(name, 20, 20))
    sim.step()
    assert (len(sim.scheduler.running), len(sim.scheduler.waiting)) == (2, 1)


def test_what_was_preempted_too_often_starts_only_when_it_can_stay() -> None:
    sim = simulator(8)
    old, tried = generation("old", 32, 96), generation("tried", 32, 128)
    tried.num_preemptions = MAX_PREEMPTIONS
    sim.run([old, tried])
    assert [s.request_id for s in sim.finished] == ["old", "tried"]
    first_step = {c.sequence.request_id: i for i, s in enumerate(sim.steps) for c in s.chunks if not c.start}
    assert first_step == {"old": 0, "tried": 96}, "8 blocks do not hold 4 and 5"
    assert tried.num_preemptions == MAX_PREEMPTIONS


def test_what_can_never_fit_is_refused_at_submission() -> None:
    sim = simulator(2)
    sim.scheduler.submit(generation("fits", 33, 32))
    with pytest.raises(ResourceError, match="may need 65 tokens of KV cache, which holds 64") as error:
        sim.scheduler.submit(generation("never", 33, 33))
    assert "kv_tokens" in error.value.hint
    sim.run([])
    assert [s.request_id for s in sim.finished] == ["fits"]


def test_removal_frees_blocks_at_any_moment() -> None:
    sim = simulator(8)
    running, waiting = generation("running", 100, 10), generation("waiting", 200, 10)
    sim.scheduler.submit(running)
    sim.scheduler.submit(waiting)
    sim.step()
    assert (len(sim.scheduler.running), len(sim.scheduler.waiting)) == (1, 1)
    sim.scheduler.remove(running)
    sim.scheduler.remove(running)
    assert sim.scheduler.pool.num_free == 8
    sim.scheduler.remove(waiting)
    assert not sim.scheduler.has_work
    sim.scheduler.check_integrity()


def test_committing_twice_is_an_assertion() -> None:
    sim = simulator(8)
    sim.scheduler.submit(generation("a", 10, 10))
    schedule = sim.scheduler.schedule()
    sim.scheduler.commit(schedule)
    with pytest.raises(AssertionError, match="committed twice"):
        sim.scheduler.commit(schedule)


def test_integrity_sees_a_leak() -> None:
    sim = simulator(8)
    sequence = generation("a", 40, 10)
    sim.scheduler.submit(sequence)
    sim.scheduler.schedule()
    sequence.table.clear()
    with pytest.raises(AssertionError, match="leaked"):
        sim.scheduler.check_integrity()


def chained(name: str, tokens: Sequence[int], num_new: int, tenant: str = "") -> GenerationState:
    """A generation that uses the prefix cache."""
    state = generation(name, len(tokens), num_new)
    state.tokens = array("i", tokens)
    root = prefix_root(tenant=tenant, model="m", layout="bf16", adapter="", intervention="")
    state.chain = PrefixChain(root, KV_BLOCK)
    return state


def test_a_known_prefix_is_not_computed_again() -> None:
    sim = simulator(32)
    sim.run([chained("first", range(100), 5)])
    second = chained("second", [*range(100), 7, 7, 7], 5)
    other = chained("other", range(100), 5, tenant="another")
    sim.scheduler.submit(second)
    sim.scheduler.submit(other)
    assert [(c.sequence.request_id, c.start) for c in sim.step().chunks] == [("second", 96), ("other", 0)]
    assert (second.num_cached, other.num_cached) == (96, 0), "tenants share nothing"
    sim.run([])


def test_the_row_whose_logits_are_wanted_is_never_skipped() -> None:
    sim = simulator(32)
    sim.run([chained("first", range(64), 2)])
    again = chained("again", range(64), 2)
    sim.scheduler.submit(again)
    assert [(c.start, c.stop) for c in sim.step().chunks] == [(32, 64)]


def test_two_that_run_share_the_blocks_of_a_prefix() -> None:
    sim = simulator(8)
    sim.scheduler.submit(chained("first", range(128), 20))
    sim.step()
    sim.step()
    sim.step()
    sim.scheduler.submit(chained("second", range(128), 20))
    sim.step()
    first, second = sim.scheduler.running
    assert (
        first.table.blocks[:3] == second.table.blocks[:3]
        and first.table.blocks[3:] != second.table.blocks[3:]
    )
    sim.run([])
    assert sim.scheduler.pool.num_in_use == 0


def test_damaged_content_is_not_kept() -> None:
    sim = simulator(8)
    first = chained("first", range(100), 5)
    sim.scheduler.submit(first)
    for _ in range(3):
        sim.step()
    sim.scheduler.remove(first, damaged=True)
    assert (sim.scheduler.pool.num_free, sim.scheduler.pool.num_cached) == (8, 0)


def test_a_fork_shares_full_blocks_and_copies_the_last() -> None:
    sim = simulator(8)
    parent, child = generation("parent", 40, 30), generation("child", 40, 30)
    sim.scheduler.submit(parent)
    sim.step()
    child.append(1, None, now_s=0.0)
    sim.scheduler.fork(parent, child)
    schedule = sim.step()
    assert parent.table.blocks[0] == child.table.blocks[0]
    assert schedule.moves.copies == ((parent.table.blocks[1], child.table.blocks[1]),)
    assert [(c.sequence, c.start, c.stop) for c in schedule.chunks] == [(parent, 40, 41), (child, 40, 41)]
    sim.run([])
    assert sim.scheduler.pool.num_free == 8


def test_a_fork_without_room_waits_and_is_computed_from_its_tokens() -> None:
    sim = simulator(8, StepLimits(max_rows=64, max_out_rows=1, max_sequences=1))
    parent, child = generation("parent", 40, 3), generation("child", 40, 3)
    sim.scheduler.submit(parent)
    sim.step()
    child.append(1, None, now_s=0.0)
    sim.scheduler.fork(parent, child)
    assert list(sim.scheduler.waiting) == [child] and child.num_computed == 0
    sim.run([])
    assert [s.request_id for s in sim.finished] == ["parent", "child"]


def ranked(
    name: str, tier: Tier, submitted_s: float, num_prompt: int = 10, num_new: int = 5
) -> GenerationState:
    state = generation(name, num_prompt, num_new)
    state.tier, state.rank_s = tier, submitted_s + TIER_DELAY_S[tier]
    return state


def test_tiers_go_first_and_age() -> None:
    sim = simulator(64, StepLimits(max_rows=64, max_out_rows=1, max_sequences=1))
    late_s = TIER_DELAY_S["batch"]
    order = [
        ranked("old batch", "batch", 0.0),
        ranked("standard", "standard", late_s),
        ranked("fast", "fast", late_s + 1),
        ranked("batch", "batch", late_s),
    ]
    for state in reversed(order):
        sim.scheduler.submit(state)
    sim.run([])
    assert [s.request_id for s in sim.finished] == ["old batch", "fast", "standard", "batch"]


def test_fast_work_takes_the_place_of_batch_work_and_of_nothing_else() -> None:
    tiers: list[tuple[Tier, bool]] = [("batch", True), ("standard", False)]
    for tier, displaced in tiers:
        sim = simulator(64, StepLimits(max_rows=64, max_out_rows=1, max_sequences=1))
        running = ranked("running", tier, 0.0, num_new=50)
        sim.scheduler.submit(running)
        sim.step()
        sim.scheduler.submit(ranked("fast", "fast", 1.0))
        assert sim.step().preempted == ((running,) if displaced else ())
        sim.run([])
        assert sim.finished[0].request_id == ("fast" if displaced else "running")


def test_a_long_prompt_leaves_most_of_each_step_to_short_ones_and_keeps_a_quarter() -> None:
    sim = simulator(256)
    long = generation("long", 1000, 2)
    sim.scheduler.submit(long)
    sim.step()
    for name in ("b", "a"):
        sim.scheduler.submit(generation(name, 30, 50))
    assert [(c.sequence.request_id, c.num_rows) for c in sim.step().chunks] == [
        ("b", 30),
        ("a", 18),
        ("long", 16),
    ]
    assert [(c.sequence.request_id, c.num_rows) for c in sim.step().chunks] == [
        ("b", 1),
        ("a", 12),
        ("long", 51),
    ]


def test_a_lower_row_limit_still_serves_every_sequence_that_lacks_one_row() -> None:
    sim = simulator(256)
    for name in "abc":
        sim.scheduler.submit(generation(name, 10, 9))
    sim.step()
    sim.scheduler.submit(generation("long", 1000, 2))
    assert [c.num_rows for c in sim.scheduler.schedule(max_rows=2).chunks] == [1, 1, 1]


def test_drafts_take_only_what_is_left() -> None:
    sim = simulator(3, StepLimits(max_rows=8, max_out_rows=6, max_sequences=2))
    first, second = generation("first", 4, 70), generation("second", 4, 20)
    for state in (first, second):
        sim.scheduler.submit(state)
    sim.step()
    first.drafts.extend([1] * 9)
    second.drafts.extend([1] * 9)
    schedule = sim.scheduler.schedule()
    assert [(c.num_rows, c.num_out_rows) for c in schedule.chunks] == [(5, 5), (1, 1)], "six places"
    assert (len(first.drafts), len(second.drafts)) == (4, 0)


def test_guesses_that_were_wrong_do_not_count_as_computed() -> None:
    sim = simulator(8)
    state = generation("a", 4, 20)
    sim.scheduler.submit(state)
    sim.step()
    state.drafts.extend([1, 1, 9])
    schedule = sim.scheduler.schedule()
    assert [(c.start, c.stop) for c in schedule.chunks] == [(4, 8)]
    for _ in range(3):
        state.append(1, None, now_s=0.0)
    sim.scheduler.commit(schedule)
    assert (state.num_computed, state.num_total, len(state.drafts)) == (7, 8, 0)


def swapping(num_blocks: int, num_slots: int) -> Simulator:
    return Simulator(Scheduler(BlockPool(num_blocks), LIMITS, swap=BlockPool(num_slots)))


def test_swapped_blocks_come_back_and_nothing_is_computed_twice() -> None:
    sim = swapping(4, 8)
    sim.run([generation("first", 30, 80), generation("second", 30, 60)])
    outs = [slot for schedule in sim.steps for _, slot in schedule.moves.outs]
    ins = [slot for schedule in sim.steps for slot, _ in schedule.moves.ins]
    assert outs == ins and len(outs) >= 2, "all that went out came back"
    rows = [(c.sequence.request_id, p) for s in sim.steps for c in s.chunks for p in range(c.start, c.stop)]
    assert len(rows) == len(set(rows))
    assert sim.scheduler.swap is not None and sim.scheduler.swap.num_free == 8


def test_without_free_slots_or_where_it_costs_more_it_is_computed_again() -> None:
    costly = Scheduler(BlockPool(4), LIMITS, swap=BlockPool(8), prefer_swap=lambda tokens, blocks: False)
    for sim in (swapping(4, 1), Simulator(costly)):
        sim.run([generation("first", 30, 80), generation("second", 30, 60)])
        assert any(s.preempted for s in sim.steps) and not any(s.moves.outs or s.moves.ins for s in sim.steps)


def test_a_swapped_sequence_that_is_removed_gives_its_slots_back() -> None:
    sim = swapping(4, 8)
    first, second = generation("first", 30, 80), generation("second", 30, 60)
    for state in (first, second):
        sim.scheduler.submit(state)
    while not sim.step().preempted:
        pass
    assert second.swap_slots
    sim.scheduler.remove(second)
    sim.scheduler.check_integrity()
    assert sim.scheduler.swap is not None and sim.scheduler.swap.num_free == 8


def test_the_queue_is_bounded() -> None:
    sim = simulator(8, StepLimits(max_rows=8, max_out_rows=1, max_sequences=1, max_waiting=2))
    for name in "ab":
        sim.scheduler.submit(generation(name, 4, 4))
    with pytest.raises(ResourceError, match="2 requests are waiting already"):
        sim.scheduler.submit(generation("c", 4, 4))
    sim.run([])
    assert len(sim.finished) == 2
