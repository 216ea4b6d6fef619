"""From a schedule to the flat batch and back: rows, slots, blocks, and the head in several passes."""

import numpy as np

from tests.fast.engine_fakes import FakeExecutor, fake_logits
from tokenmill.engine.runner import OutRows, Runner
from tokenmill.engine.schedule import BlockMoves, Chunk, Schedule
from tokenmill.engine.sequence import ScoringState


def sequence(num_tokens: int, blocks: list[int], first_token: int = 0) -> ScoringState:
    state = ScoringState("s", [(first_token + i) % 250 for i in range(num_tokens + 1)], 1)
    state.table.extend(blocks)
    return state


def schedule(*chunks: tuple[ScoringState, int, int, int]) -> Schedule:
    made = tuple(Chunk(sequence=s, start=a, stop=b, num_out_rows=n) for s, a, b, n in chunks)
    return Schedule(chunks=made, moves=BlockMoves((), (), ()), preempted=())


def test_the_flat_batch_names_every_row_and_block() -> None:
    executor = FakeExecutor(num_blocks=8, max_rows=64, max_out_rows=8)
    first, second = sequence(40, [5, 2], 100), sequence(3, [7])
    runner = Runner(executor)
    list(runner.run(schedule((first, 0, 30, 0))))
    list(runner.run(schedule((first, 30, 34, 1), (second, 0, 3, 2))))
    batch = executor.steps[1]
    assert batch.tokens.tolist() == [130, 131, 132, 133, 0, 1, 2]
    assert batch.positions.tolist() == [30, 31, 32, 33, 0, 1, 2]
    assert batch.kv_slots.tolist() == [190, 191, 64, 65, 224, 225, 226]
    assert batch.row_starts.tolist() == [0, 4, 7]
    assert batch.block_starts.tolist() == [0, 2, 3]
    assert batch.blocks.tolist() == [[5, 0, 32], [2, 32, 2], [7, 0, 3]]
    assert batch.out_rows.tolist() == [3, 5, 6]


def test_more_rows_than_the_head_holds_come_in_passes_over_one_body() -> None:
    executor = FakeExecutor(num_blocks=8, max_rows=64, max_out_rows=4)
    first, second = sequence(10, [3], 100), sequence(12, [1])
    seen = []
    for out in Runner(executor).run(schedule((first, 0, 10, 7), (second, 0, 12, 3))):
        assert isinstance(out, OutRows)
        assert out.logits_LV.shape[0] == len(out.rows) <= 4
        for row, logits_V in zip(out.rows, out.logits_LV, strict=True):
            tokens = row.sequence.tokens[: row.position + 1]
            assert np.array_equal(logits_V, fake_logits(tokens))
            seen.append((row.sequence is first, row.position))
    assert seen == [(True, p) for p in range(3, 10)] + [(False, p) for p in range(9, 12)]
    assert executor.num_body_runs == 1 and len(executor.steps) == 3


def test_a_step_without_logits_does_not_run_the_head() -> None:
    executor = FakeExecutor(num_blocks=8, max_rows=64, max_out_rows=4)
    assert list(Runner(executor).run(schedule((sequence(40, [1, 2]), 0, 20, 0)))) == []
    assert executor.num_body_runs == 1


def test_a_wrong_block_gives_other_logits() -> None:
    """The fake must be able to fail: the same tokens through a block that holds others."""
    executor = FakeExecutor(num_blocks=8, max_rows=64, max_out_rows=4)
    state = sequence(40, [5, 2])
    runner = Runner(executor)
    list(runner.run(schedule((state, 0, 34, 0))))
    state.table.clear()
    state.table.extend([4, 2])
    (out,) = list(runner.run(schedule((state, 34, 35, 1))))
    assert isinstance(out, OutRows)
    assert not np.array_equal(out.logits_LV[0], fake_logits(state.tokens[:35]))
