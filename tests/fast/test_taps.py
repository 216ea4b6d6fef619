"""Taps on random small models, on every executor: reads, edits and failures."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.fast.random_plan import make_batch, make_plan
from tests.fast.tap_tools import (
    HIDDEN,
    ISAS,
    MID,
    POST,
    Watched,
    drive,
    embedding,
    engine,
    executor,
    generation,
    read,
    scoring,
    small_plan,
    tokens,
)
from tokenmill.core import UsageError
from tokenmill.engine.runner import OutRows, Runner, TapFailure
from tokenmill.engine.schedule import BlockMoves, Chunk, Schedule
from tokenmill.engine.sequence import ScoringState
from tokenmill.engine.taps.points import FINAL_NORM, tap_points
from tokenmill.engine.taps.tap import (
    Recording,
    Tap,
    TapHandler,
    TapRows,
    ablate,
    cacheable_prefix,
    intervention_digest,
    replace_values,
    steer,
)
from tokenmill.kernels import (
    F32Array,
    Linear,
    Norm,
    Quantize,
)

WIDTHS = {
    "hook_embed": HIDDEN,
    "blocks.0.attn.hook_z": 192,
    MID: HIDDEN,
    "blocks.1.mlp.hook_post": 192,
    "blocks.1.hook_resid_post": HIDDEN,
    FINAL_NORM: HIDDEN,
}


def logprobs(watched: Watched, *states: ScoringState) -> list[tuple[float, ...]]:
    drive(engine(watched), states)
    return [state.score().logprobs for state in states]


def recorded(watched: Watched, *taps: Tap, points: Sequence[str] = tuple(WIDTHS)) -> dict[str, F32Array]:
    """What every point holds for one text, with some taps before the reads."""
    recording = Recording()
    reads = [read(point, recording) for point in points]
    drive(engine(watched), [scoring("s", tokens(1, 41), *taps, *reads)])
    return {point: recording.rows("s", point).values_TD for point in points}


def rows_of(chunks: Sequence[Chunk]) -> Schedule:
    return Schedule(chunks=tuple(chunks), moves=BlockMoves((), (), ()), preempted=())


@pytest.mark.parametrize("kind", ["i8c", "i4g", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_head_in_four_operations_is_the_head_in_three(isa: str, kind: str) -> None:
    plan = make_plan(kind, seed=2)
    *body, select, norm, quantize, head = plan.ops
    assert isinstance(norm, Norm) and isinstance(quantize, Quantize) and isinstance(head, Linear)
    fused = replace(plan, ops=(*body, select, replace(norm, act=quantize.act), head))
    batch = make_batch([(tokens(5, 20), 0, [3])], out_rows=[19, 0, 7])
    results = []
    for each in (plan, fused):
        ex = executor(isa, plan=each)
        ex.run(batch)
        results.append(ex.buffer("logits")[:3].copy())
    np.testing.assert_array_equal(results[0], results[1])


def test_without_taps_a_step_is_one_call() -> None:
    watched = executor()
    recording = Recording()
    tap = Tap(point=POST, handler=recording, positions=range(100, 200))
    drive(engine(watched), [generation("a", tokens(1, 9), 3), generation("b", tokens(2, 5), 3, tap)])
    assert watched.runs == [(0, None)] * 3


def test_a_step_stops_once_at_each_point_whoever_asks() -> None:
    watched = executor()
    recording = Recording()
    states = [
        generation("a", tokens(1, 9), 1, read(MID, recording), read(POST, recording)),
        generation("b", tokens(2, 5), 1),
        generation("c", tokens(3, 7), 1, read(POST, recording), steer(POST, np.zeros(1, np.float32))),
    ]
    drive(engine(watched), states)
    stops = [tap_points(watched.plan)[name].stop for name in (MID, POST)]
    assert watched.runs == [(0, stops[0]), (stops[0], stops[1]), (stops[1], None)]
    assert recording.rows("c", POST).positions_T.tolist() == list(range(7))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "numpy"])
@pytest.mark.parametrize("kind", ["i8c", "bf16"])
def test_native_taps_equal_numpy_taps(isa: str, kind: str) -> None:
    vectors = np.random.default_rng(6).standard_normal((2, HIDDEN)).astype(np.float32)
    seen = []
    for name in (isa, "numpy"):
        recording = Recording()
        plan = make_plan(kind, seed=3)
        edits = [steer(POST, vectors[0]), ablate("blocks.1.attn.hook_z", positions=range(4, 20, 3))]
        reads = [read(point, recording) for point in tap_points(plan)]
        state = generation("a", tokens(1, 20), 4, *edits, *reads, steer(FINAL_NORM, vectors[1]))
        drive(engine(executor(name, plan=plan)), [state, generation("b", tokens(2, 6), 3)])
        rows = [recording.rows("a", point) for point in tap_points(plan)]
        assert all(each.positions_T.tolist() == list(range(23)) for each in rows)
        seen.append((list(state.tokens), [each.values_TD for each in rows]))
    assert seen[0][0] == seen[1][0]
    for native, twin in zip(seen[0][1], seen[1][1], strict=True):
        np.testing.assert_array_equal(native, twin)


def test_chunks_and_company_change_neither_what_is_read_nor_what_is_edited() -> None:
    vector_D = np.random.default_rng(7).standard_normal(HIDDEN).astype(np.float32)
    seen = []
    for max_rows, company in ((64, 0), (7, 0), (16, 3)):
        recording = Recording()
        points = [*WIDTHS, "blocks.1.ln1.hook_normalized"]
        taps = [steer(MID, vector_D, positions=(3, 20)), *(read(point, recording) for point in points)]
        state = generation("a", tokens(1, 30), 5, *taps)
        others = [generation(f"o{i}", tokens(10 + i, 9), 4) for i in range(company)]
        drive(engine(executor(max_rows=max_rows)), [*others, state])
        seen.append((list(state.tokens), [recording.rows("a", point).values_TD for point in points]))
    for other in seen[1:]:
        assert other[0] == seen[0][0]
        for got, want in zip(other[1], seen[0][1], strict=True):
            np.testing.assert_array_equal(got, want)


def test_answers_are_tapped_as_they_are_made() -> None:
    recording = Recording()
    taps = [Tap(point=point, handler=recording, positions=range(10, 13)) for point in (POST, FINAL_NORM)]
    state = generation("a", tokens(1, 10), 6, *taps)
    drive(engine(executor()), [state])
    whole = Recording()
    again = scoring("s", list(state.tokens), *(read(point, whole) for point in (POST, FINAL_NORM)))
    drive(engine(executor()), [again])
    for point in (POST, FINAL_NORM):
        assert recording.rows("a", point).positions_T.tolist() == [10, 11, 12]
        expected_TD = whole.rows("s", point).values_TD[10:13]
        np.testing.assert_array_equal(recording.rows("a", point).values_TD, expected_TD)


@pytest.mark.parametrize("isa", ISAS)
def test_neighbours_of_an_edit_keep_every_bit(isa: str) -> None:
    texts = [tokens(seed, 15 + seed) for seed in range(3)]
    alone = [logprobs(executor(isa), scoring("s", text))[0] for text in texts]
    edits = [ablate(POST), steer(FINAL_NORM, np.full(HIDDEN, 3, np.float32))]
    states = [scoring("0", texts[0]), scoring("1", texts[1], *edits), scoring("2", texts[2])]
    together = logprobs(executor(isa), *states)
    assert together[0] == alone[0] and together[2] == alone[2]
    assert together[1] != alone[1]


@pytest.mark.parametrize("point", WIDTHS)
def test_an_edit_changes_its_positions_and_what_comes_after(point: str) -> None:
    plain = recorded(executor())
    edited = recorded(executor(), ablate(point, positions=range(20, 41)))
    names = list(WIDTHS)
    for name in names:
        np.testing.assert_array_equal(edited[name][:20], plain[name][:20])
        changed_T = (edited[name][20:] != plain[name][20:]).any(axis=1)
        assert changed_T.all() == (names.index(name) >= names.index(point))
    assert not edited[point][20:].any()


def test_an_edit_at_one_position_reaches_later_positions_through_the_cache() -> None:
    last = "blocks.1.hook_resid_post"
    plain, edited = (
        recorded(executor(), *taps, points=(POST, last)) for taps in ((), (ablate(MID, positions=(5,)),))
    )
    np.testing.assert_array_equal(edited[last][:5], plain[last][:5])
    assert (edited[last][5:] != plain[last][5:]).any(axis=1).all()
    changed_T = (edited[POST] != plain[POST]).any(axis=1)
    assert np.flatnonzero(changed_T).tolist() == [5]


@pytest.mark.parametrize("point", WIDTHS)
def test_replacing_values_by_themselves_changes_no_bit(point: str) -> None:
    factors_K = np.random.default_rng(8).uniform(0.1, 3, WIDTHS[point]).astype(np.float32)
    for smoothing in ({}, {point: factors_K}):
        plan = replace(small_plan(), smoothing=smoothing)
        text = tokens(1, 41)
        values_TD = recorded(executor(plan=plan))[point]
        want = logprobs(executor(plan=plan), scoring("s", text))
        edits = [
            replace_values(point, values_TD, range(40)),
            Tap(point=point, handler=lambda rows: rows.values_TD, intervention="same"),
        ]
        assert logprobs(executor(plan=plan), scoring("s", text, *edits)) == want
        moved = replace_values(point, values_TD + np.float32(1), range(40))
        assert logprobs(executor(plan=plan), scoring("s", text, moved)) != want


def test_values_are_in_true_units_where_the_plan_is_smoothed() -> None:
    rng = np.random.default_rng(9)
    points = {"blocks.0.ln1.hook_normalized": HIDDEN, "blocks.1.mlp.hook_post": 192, FINAL_NORM: HIDDEN}
    smoothing = {name: rng.uniform(0.1, 3, size).astype(np.float32) for name, size in points.items()}
    plain = small_plan()
    smoothed = replace(plain, smoothing=smoothing)
    own, true = (recorded(executor(plan=plan), points=list(points)) for plan in (plain, smoothed))
    for name in points:
        np.testing.assert_array_equal(true[name], own[name] * smoothing[name])
    new_TD = rng.standard_normal((40, HIDDEN)).astype(np.float32)
    edit = replace_values(FINAL_NORM, new_TD, range(40))
    inside = replace_values(FINAL_NORM, new_TD / smoothing[FINAL_NORM], range(40))
    got, want = (
        logprobs(executor(plan=plan), scoring("s", tokens(1, 41), tap))
        for plan, tap in ((smoothed, edit), (plain, inside))
    )
    assert got == want
    states = [embedding("e", tokens(1, 9), "mean") for _ in range(2)]
    for plan, state in zip((plain, smoothed), states, strict=True):
        drive(engine(executor(plan=plan)), [state])
    np.testing.assert_allclose(
        states[1].embedding(), states[0].embedding() * smoothing[FINAL_NORM], rtol=1e-4, atol=1e-6
    )


def test_handlers_get_copies() -> None:
    def spoil(rows: TapRows) -> None:
        rows.values_TD[:] = 0
        rows.positions_T[:] = 0

    text = tokens(1, 30)
    want = logprobs(executor(), scoring("s", text))
    taps = [read(point, spoil) for point in WIDTHS]
    assert logprobs(executor(), scoring("s", text, *taps)) == want


def test_a_handler_may_edit_the_copy_it_got_in_place() -> None:
    def add_one(rows: TapRows) -> F32Array:
        rows.values_TD[:] += 1
        return rows.values_TD

    text = tokens(1, 30)
    in_place = Tap(point=POST, handler=add_one, intervention="add 1")
    added = logprobs(executor(), scoring("s", text, steer(POST, np.ones(HIDDEN, np.float32))))
    assert logprobs(executor(), scoring("s", text, in_place)) == added
    assert added != logprobs(executor(), scoring("s", text))


def test_taps_on_one_point_run_in_order() -> None:
    recording, later = Recording(), Recording()
    two = np.full(HIDDEN, 2, np.float32)
    double = Tap(point=POST, handler=lambda rows: rows.values_TD * np.float32(2), intervention="double")
    taps = [read(POST, recording), steer(POST, two), double, read(POST, later)]
    drive(engine(executor()), [scoring("s", tokens(1, 9), *taps)])
    first_TD, last_TD = (each.rows("s", POST).values_TD for each in (recording, later))
    np.testing.assert_array_equal(last_TD, (first_TD + 2) * 2)


def _raise(rows: TapRows) -> F32Array:
    raise RuntimeError("a handler's own fault")


FAULTS: dict[str, tuple[TapHandler, str | None, str]] = {
    "raises": (_raise, "edit", "own fault"),
    "shape": (lambda rows: rows.values_TD[:, 1:], "edit", r"returned shape \(\d+, \d+\); return values of"),
    "not finite": (lambda rows: rows.values_TD * np.float32(np.nan), "edit", "not finite"),
    "a read that edits": (lambda rows: rows.values_TD, None, "the read of .* returned values"),
}


@pytest.mark.parametrize("point", [MID, "blocks.1.ln2.hook_normalized", FINAL_NORM])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_handler_that_fails_fails_its_own_request(fault: str, point: str) -> None:
    handler, intervention, message = FAULTS[fault]
    if "ln2" in point:
        handler, intervention = _raise, None
        message = "own fault"
    texts = [tokens(seed, 12) for seed in range(3)]
    want = logprobs(executor(), *(scoring("s", text) for text in texts))
    watched = executor(max_out_rows=4)
    states = [scoring(str(i), text) for i, text in enumerate(texts)]
    for i, state in enumerate(states):
        state.table.extend([i])
    later = Recording()
    broken = Tap(point=point, handler=handler, intervention=intervention)
    states[1].taps = (broken, read(point, later), read(FINAL_NORM, later))
    outputs = list(Runner(watched).run(rows_of([Chunk(state, 0, 11, 11) for state in states])))
    failures = [each for each in outputs if isinstance(each, TapFailure)]
    assert [each.sequence for each in failures] == [states[1]]
    for name in (point, FINAL_NORM):
        with pytest.raises(UsageError, match="nothing was read"):
            later.rows("1", name)
    with pytest.raises(Exception, match=message):
        raise failures[0].error
    rows = [row for each in outputs if isinstance(each, OutRows) for row in each.rows]
    assert rows == [(state, position) for state in (states[0], states[2]) for position in range(11)]
    together = [scoring(str(i), text) for i, text in enumerate(texts)]
    del together[1]
    assert logprobs(executor(), *together) == [want[0], want[2]]


def test_a_request_fails_alone_while_others_are_generating() -> None:
    want = generation("a", tokens(1, 9), 6)
    drive(engine(executor()), [want])
    for point in (MID, FINAL_NORM):
        broken = Tap(point=point, handler=_raise, positions=range(11, 12), intervention="x")
        states = [generation("a", tokens(1, 9), 6), generation("b", tokens(2, 9), 6, broken)]
        core = engine(executor())
        drive(core, states)
        core.check_integrity()
        assert states[0].tokens == want.tokens and states[0].finish_reason == "length"
        assert states[1].finish_reason == "failed" and states[1].num_total == 12


def test_the_prefix_cache_never_mixes_edited_and_plain_state() -> None:
    prompt = tokens(1, 70)
    edits = {"plain": (), "ablated": (ablate(POST),), "steered": (steer(POST, np.ones(HIDDEN, np.float32)),)}
    want = {}
    for name, taps in edits.items():
        alone = generation(name, prompt, 6, *taps)
        drive(engine(executor()), [alone])
        want[name] = alone.tokens
    assert len({tuple(each) for each in want.values()}) == 3
    core = engine(executor(), prefix_cache=True)
    for again in (False, True):
        for name, taps in edits.items():
            state = generation(name, prompt, 6, *taps)
            drive(core, [state])
            assert state.tokens == want[name]
            assert state.num_cached == (64 if again else 0), "the test needs hits"
    core.check_integrity()


def test_a_read_sees_rows_that_the_cache_has_and_leaves_them_to_others() -> None:
    prompt = tokens(1, 70)
    core = engine(executor(), prefix_cache=True)
    recording = Recording()
    late = Tap(point=POST, handler=recording, positions=range(40, 80))
    states = [generation("a", prompt, 4), generation("b", prompt, 4, read(POST, recording))]
    states += [generation("c", prompt, 4, late), generation("d", prompt, 4)]
    for state in states:
        drive(core, [state])
    assert [state.num_cached for state in states] == [0, 0, 32, 64]
    every, some = recording.rows("b", POST), recording.rows("c", POST)
    assert every.positions_T.tolist() == list(range(73)) and some.positions_T.tolist() == list(range(40, 73))
    np.testing.assert_array_equal(every.values_TD[40:], some.values_TD)


def test_blocks_of_a_request_whose_tap_failed_are_not_kept() -> None:
    prompt = tokens(1, 70)
    core = engine(executor(), prefix_cache=True)
    half = Tap(point=POST, handler=ablate(POST).handler, intervention="half")
    broken = Tap(point=MID, handler=_raise, positions=range(69, 70), intervention="other")
    fine = replace(broken, handler=lambda rows: None)
    for taps in ((half, broken), (half, fine)):
        state = generation("a", prompt, 4, *taps)
        drive(core, [state])
        assert state.num_cached == 0
        assert state.finish_reason == ("failed" if broken in taps else "length")


def test_after_a_preemption_reads_come_once_and_edits_again() -> None:
    vector_D = np.random.default_rng(7).standard_normal(HIDDEN).astype(np.float32)
    prompts = [tokens(seed, 40) for seed in range(3)]
    want = [generation(str(i), prompt, 40, steer(POST, vector_D)) for i, prompt in enumerate(prompts)]
    for state in want:
        drive(engine(executor()), [state])
    recording = Recording()
    taps = [steer(POST, vector_D), read(POST, recording), read(FINAL_NORM, recording)]
    states = [generation(str(i), prompt, 40, *taps) for i, prompt in enumerate(prompts)]
    assert drive(engine(executor(), num_blocks=8), states) > 0, "the test needs preemptions"
    for state, other in zip(states, want, strict=True):
        assert state.tokens == other.tokens
        for point in (POST, FINAL_NORM):
            positions_T = recording.rows(state.request_id, point).positions_T
            assert positions_T.tolist() == list(range(79))


def test_taps_that_cannot_be_are_refused_at_once() -> None:
    core = engine(executor())
    with pytest.raises(
        UsageError,
        match=r"no point is named blocks\.2\.hook_resid_post; there are blocks\.1\.hook_resid_post",
    ):
        core.submit(generation("a", [1], 1, ablate("blocks.2.hook_resid_post")))
    with pytest.raises(UsageError, match=r"blocks\.0\.ln1\.hook_normalized can only be read"):
        core.submit(generation("a", [1], 1, ablate("blocks.0.ln1.hook_normalized")))
    assert not core.has_work
    for positions in (range(3, 0, -1), (4, -1), range(-2, 2)):
        with pytest.raises(UsageError, match="count from 0"):
            Tap(point=POST, handler=_raise, positions=positions)
    with pytest.raises(UsageError, match="empty intervention"):
        Tap(point=POST, handler=_raise, intervention="")
    with pytest.raises(UsageError, match="2 rows for 3 positions"):
        replace_values(POST, np.zeros((2, HIDDEN), np.float32), (1, 2, 3))
    with pytest.raises(UsageError, match=r"nothing was read of a at blocks\.0"):
        Recording().rows("a", POST)


def test_a_tapped_request_has_no_guessed_rows() -> None:
    assert generation("a", [1], 1).can_draft
    assert not generation("a", [1], 1, read(POST, Recording())).can_draft


def test_the_digest_tells_edits_apart_and_knows_no_reads() -> None:
    vector_D = np.ones(4, np.float32)
    reads = [read(POST, Recording())]
    assert intervention_digest([]) == intervention_digest(reads) == ""
    different = [
        [steer(POST, vector_D)],
        [steer(MID, vector_D)],
        [steer(POST, vector_D * 2)],
        [steer(POST, vector_D, positions=range(3))],
        [ablate(POST, vector_D)],
        [ablate(POST)],
        [replace_values(POST, np.ones((1, 4), np.float32), (0,))],
        [steer(POST, vector_D), ablate(POST)],
        [ablate(POST), steer(POST, vector_D)],
        [Tap(point=POST, handler=_raise, intervention="steer")],
    ]
    digests = [intervention_digest(taps) for taps in different]
    assert len(set(digests)) == len(different) and all(len(digest) == 64 for digest in digests)
    assert intervention_digest([*reads, steer(POST, vector_D.copy())]) == digests[0]


def test_a_prefix_hit_ends_before_the_first_read() -> None:
    def reading(positions: "range | tuple[int, ...] | None") -> Tap:
        return Tap(point=POST, handler=Recording(), positions=positions)

    assert cacheable_prefix([], 10) == 10
    assert cacheable_prefix([ablate(POST)], 10) == 10
    assert cacheable_prefix([reading(None)], 10) == 0
    assert cacheable_prefix([reading((7, 4)), reading(range(6, 1 << 40))], 10) == 4
    assert cacheable_prefix([reading(range(0)), reading(())], 10) == 10
    assert cacheable_prefix([reading(range(12, 20))], 10) == 10
