"""The scheduler alone, in integers: progress, budgets, order, preemption, and every guard."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.core import Request, ResourceError, SamplingParams
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.scheduler import MAX_PREEMPTIONS, Chunk, Schedule, Scheduler, StepLimits
from tokenmill.engine.sequence import GenerationState, ScoringState, SequenceState
from tokenmill.kernels import KV_BLOCK
from tokenmill.kvcache import BlockPool

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
                chunk.sequence.append(position, -1.0)


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
