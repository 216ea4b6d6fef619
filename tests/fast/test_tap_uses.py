"""What is built on taps and the final norm, on random small models: embeddings and calibration."""

from collections.abc import Iterable

import numpy as np
import pytest

from tests.fast.tap_tools import (
    HIDDEN,
    ISAS,
    POST,
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
from tokenmill.core import ModelFormatError, UsageError
from tokenmill.engine.calibration import calibrate
from tokenmill.engine.embedding import EmbeddingState, Pooling, embeddings
from tokenmill.engine.sequence import ScoringState
from tokenmill.engine.tapping import FINAL_NORM, input_points
from tokenmill.engine.taps import (
    Recording,
    steer,
)


@pytest.mark.parametrize("isa", ISAS)
def test_embeddings_pool_the_final_norm_and_stop_before_the_vocabulary(isa: str) -> None:
    texts = [tokens(seed, count) for seed, count in enumerate((1, 5, 40))]
    recording = Recording()
    states = [scoring(str(i), [*text, 0], read(FINAL_NORM, recording)) for i, text in enumerate(texts)]
    drive(engine(executor(isa)), states)
    hidden = [recording.rows(str(i), FINAL_NORM).values_TD for i in range(3)]
    wanted = {
        "mean": [rows_TD.mean(axis=0) for rows_TD in hidden],
        "last": [rows_TD[-1] for rows_TD in hidden],
    }
    poolings: tuple[Pooling, ...] = ("mean", "last")
    for pooling in poolings:
        results = []
        for max_rows, max_out_rows in ((64, 8), (7, 3)):
            watched = executor(isa, max_rows=max_rows, max_out_rows=max_out_rows)
            batch = [embedding(str(i), text, pooling) for i, text in enumerate(texts)]
            drive(engine(watched), batch)
            assert all(last is not None and last < len(watched.plan.ops) for _, last in watched.runs)
            results.append(embeddings(batch, hidden_size=HIDDEN, normalize=False))
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_allclose(results[0], wanted[pooling], rtol=1e-5, atol=1e-6)
        unit_ND = embeddings(batch, hidden_size=HIDDEN, normalize=True)
        np.testing.assert_allclose(np.linalg.norm(unit_ND, axis=1), 1, rtol=1e-6)
        assert unit_ND.dtype == np.float32
    assert embeddings([], hidden_size=HIDDEN, normalize=True).shape == (0, HIDDEN)


def test_embeddings_share_a_step_with_generation_and_scores() -> None:
    text = tokens(4, 20)
    alone = [embedding("e", text, "mean"), generation("g", text, 4), scoring("s", text)]
    for state in alone:
        drive(engine(executor()), [state])
    together = [embedding("e", text, "mean"), generation("g", text, 4), scoring("s", text)]
    drive(engine(executor()), together)
    assert isinstance(alone[0], EmbeddingState) and isinstance(together[0], EmbeddingState)
    np.testing.assert_array_equal(alone[0].embedding(), together[0].embedding())
    assert alone[1].tokens == together[1].tokens
    assert isinstance(alone[2], ScoringState) and isinstance(together[2], ScoringState)
    assert alone[2].score() == together[2].score()


def test_taps_reach_embeddings() -> None:
    text = tokens(4, 20)
    states = [
        embedding("a", text, "last"),
        embedding("b", text, "last", steer(FINAL_NORM, np.ones(HIDDEN, np.float32))),
    ]
    drive(engine(executor()), states)
    np.testing.assert_allclose(states[1].embedding() - states[0].embedding(), 1, atol=1e-5)


def test_embeddings_that_are_no_numbers_or_have_another_pooling_are_refused() -> None:
    state = EmbeddingState("e", [1], "last")
    state.append(0, np.full(HIDDEN, np.nan, np.float32))
    with pytest.raises(ModelFormatError, match="not finite"):
        embeddings([state], hidden_size=HIDDEN, normalize=True)
    with pytest.raises(UsageError, match="pooling is 'first'; use one of mean, last"):
        EmbeddingState("e", [1], "first")  # type: ignore[arg-type]


def test_calibration_sums_up_what_the_linears_read() -> None:
    plan = small_plan()
    names = input_points(plan)
    assert names[:4] == (
        "blocks.0.ln1.hook_normalized",
        "blocks.0.attn.hook_z",
        "blocks.0.ln2.hook_normalized",
        "blocks.0.mlp.hook_post",
    )
    assert names[-1] == FINAL_NORM and len(names) == len(plan.linears)
    windows = [tokens(seed, 30 + seed) for seed in range(6)]
    watched = executor(max_rows=16)
    stats = calibrate(engine(watched), windows, names, second_moment=True)
    assert list(stats) == list(names)
    recording = Recording()
    reads = [read(name, recording) for name in names]
    states = [scoring(str(i), [*ids, 0], *reads) for i, ids in enumerate(windows)]
    drive(engine(executor()), states)
    for name, linear in zip(names, plan.linears, strict=True):
        rows_TK = np.concatenate([recording.rows(str(i), name).values_TD for i in range(6)])
        wide_TK = rows_TK.astype(np.float64)
        assert stats[name].num_rows == len(rows_TK) == sum(map(len, windows))
        np.testing.assert_array_equal(stats[name].abs_max_K, np.abs(rows_TK).max(axis=0))
        np.testing.assert_allclose(stats[name].mean_square_K, (wide_TK**2).mean(axis=0))
        moment_KK = stats[name].second_moment_KK
        assert moment_KK is not None and moment_KK.shape == (linear.num_in, linear.num_in)
        np.testing.assert_allclose(moment_KK, wide_TK.T @ wide_TK / len(wide_TK), atol=1e-12)
    assert all(last is not None and last < len(plan.ops) for _, last in watched.runs)
    assert calibrate(engine(watched), windows[:1], [POST])[POST].second_moment_KK is None


def test_calibration_reads_windows_as_it_needs_them_and_leaves_nothing_behind() -> None:
    core = engine(executor())
    numbers: list[int] = []

    def windows() -> Iterable[list[int]]:
        for number in range(9):
            numbers.append(number)
            if number == 7:
                raise OSError("the text ends in a fault")
            yield tokens(number, 60)

    with pytest.raises(OSError, match="the text ends"):
        calibrate(core, windows(), [POST], max_in_flight=2)
    assert numbers == list(range(8)) and not core.has_work
    core.check_integrity()
    with pytest.raises(UsageError, match="no text to calibrate on"):
        calibrate(core, [], [POST])
