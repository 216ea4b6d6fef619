"""A draft model against one that starts afresh for every call: catching up, rolling back, giving way."""

import random
from array import array
from collections.abc import Sequence

import numpy as np
import pytest

from tests.fast.engine_fakes import VOCAB, FakeExecutor, fake_hash, fake_logits, reference_tokens
from tests.fast.proposer_fakes import draft_row
from tokenmill.core import SamplingParams, UsageError
from tokenmill.engine.draft_model import DraftModel
from tokenmill.engine.proposers import NO_DRAFT, DraftRow
from tokenmill.engine.sampler import SamplingRow, sample
from tokenmill.kernels import KV_BLOCK

SAMPLED = SamplingParams(temperature=0.8, top_p=0.9)


def draft_model(
    *, num_blocks: int = 64, max_rows: int = 64, max_out_rows: int = 8, context: int = 1000
) -> tuple[DraftModel, FakeExecutor]:
    executor = FakeExecutor(num_blocks=num_blocks, max_rows=max_rows, max_out_rows=max_out_rows)
    return DraftModel(executor, num_blocks=num_blocks, context=context, target_vocab_size=VOCAB), executor


def fresh_draft(row: DraftRow) -> tuple[int, ...]:
    """The same draft computed without any cache."""
    tokens = list(row.tokens)
    for _ in range(row.max_tokens):
        logits_LV = fake_logits(tokens)[None]
        text = array("i", tokens)
        result = sample(logits_LV, [SamplingRow(row.params, row.seed, len(tokens), 0, text, row.num_prompt)])
        tokens.append(int(result.token_ids[0]))
    return tuple(tokens[len(row.tokens) :])


def prompts(num: int, size: int) -> list["array[int]"]:
    rng = random.Random(5)
    return [array("i", (rng.randrange(256) for _ in range(size))) for _ in range(num)]


def drafted(model: DraftModel, rows: Sequence[DraftRow]) -> list[tuple[int, ...]]:
    drafts = [draft.tokens for draft in model.propose(rows)]
    model.check_integrity()
    return drafts


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED])
def test_drafts_are_what_the_model_would_say_with_the_same_noise(params: SamplingParams) -> None:
    model, _ = draft_model()
    rows = [draft_row(p, key, params=params, seed=key + 1) for key, p in enumerate(prompts(3, 10))]
    assert drafted(model, rows) == [fresh_draft(row) for row in rows]
    first = model.propose(rows)[0]
    logits_V = fake_logits(list(rows[0].tokens)).astype(np.float64)
    shares_V = np.exp(logits_V - logits_V.max())
    assert first.probabilities[0] == pytest.approx(shares_V[first.tokens[0]] / shares_V.sum(), rel=1e-5)


def test_another_seed_is_another_draft() -> None:
    row = draft_row(prompts(1, 10)[0], params=SAMPLED, seed=3, max_tokens=6)
    assert drafted(draft_model()[0], [row]) != drafted(draft_model()[0], [row._replace(seed=4)])


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_was_accepted_the_next_draft_is_that_of_a_fresh_model(
    params: SamplingParams, seed: int
) -> None:
    model, executor = draft_model(max_rows=32)
    rng = random.Random(seed)
    texts = prompts(4, 20)
    for _ in range(25):
        rows = [
            draft_row(text, key, params=params, seed=key, max_tokens=rng.randrange(6))
            for key, text in enumerate(texts)
            if rng.random() < 0.8
        ]
        drafts = drafted(model, rows)
        for row, draft in zip(rows, drafts, strict=True):
            assert draft in (fresh_draft(row), ()), "a row that is behind has no draft"
            num_accepted = rng.randint(0, len(draft))
            row.tokens.extend([*draft[:num_accepted], rng.randrange(256)])
        for text in texts:
            # Steps without it, or drafts of others that stood.
            text.extend([rng.randrange(256)] * rng.choice((0, 0, 1, 4)))
    assert len(executor.steps) > 25


def test_after_a_draft_only_the_new_tokens_are_computed() -> None:
    model, executor = draft_model()
    text = prompts(1, 30)[0]
    row = draft_row(text, max_tokens=4)
    (draft,) = drafted(model, [row])
    assert [step.num_rows for step in executor.steps] == [30, 1, 1, 1], "the last draft is not computed"
    text.extend([*draft[:2], 7])
    executor.steps.clear()
    assert drafted(model, [row]) == [fresh_draft(row)]
    assert [step.num_rows for step in executor.steps] == [1, 1, 1, 1], "accepted drafts are not again"
    (draft,) = drafted(model, [row])
    text.extend([*draft, 7])
    executor.steps.clear()
    assert drafted(model, [row]) == [fresh_draft(row)]
    assert executor.steps[0].num_rows == 2, "the last draft, and what came after it"


def test_a_long_prompt_is_caught_up_in_full_steps_without_drafts() -> None:
    model, executor = draft_model(max_rows=16)
    row = draft_row(prompts(1, 40)[0], max_tokens=2)
    assert drafted(model, [row]) == [()] and drafted(model, [row]) == [()]
    assert [step.num_rows for step in executor.steps] == [16, 16]
    assert drafted(model, [row]) == [fresh_draft(row)]


def test_catching_up_serves_rows_in_order_and_shares_a_step() -> None:
    model, executor = draft_model(max_rows=16)
    first, second = (draft_row(p, key, max_tokens=1) for key, p in enumerate(prompts(2, 10)))
    assert drafted(model, [first, second]) == [fresh_draft(first), ()]
    assert drafted(model, [first, second]) == [fresh_draft(first), fresh_draft(second)]
    assert [step.num_rows for step in executor.steps] == [16, 5]


def test_more_rows_than_logits_fit_draft_in_turn() -> None:
    model, _ = draft_model(max_out_rows=2)
    rows = [draft_row(p, key, max_tokens=2) for key, p in enumerate(prompts(3, 5))]
    assert drafted(model, rows) == [fresh_draft(rows[0]), fresh_draft(rows[1]), ()]
    assert drafted(model, rows[2:]) == [fresh_draft(rows[2])]


def test_a_row_that_wants_nothing_costs_nothing() -> None:
    model, executor = draft_model()
    row = draft_row(prompts(1, 10)[0], max_tokens=0)
    assert drafted(model, [row]) == [()] and not executor.steps


def test_blocks_come_back() -> None:
    model, _ = draft_model()
    model.propose([draft_row(p, key) for key, p in enumerate(prompts(3, 40))])
    assert model.num_blocks_in_use == 6
    model.forget(1)
    model.forget(1)
    model.check_integrity()
    assert model.num_blocks_in_use == 4


def test_the_least_recently_used_sequence_gives_way_and_is_computed_again() -> None:
    model, executor = draft_model(num_blocks=4)
    rows = [draft_row(p, key) for key, p in enumerate(prompts(3, 40))]
    for row in (rows[0], rows[1], rows[0], rows[2]):
        assert drafted(model, [row]) == [fresh_draft(row)]
    executor.steps.clear()
    assert drafted(model, [rows[0]]) == [fresh_draft(rows[0])]
    assert executor.steps[0].num_rows == 1, "used lately, so it stayed"
    assert drafted(model, [rows[1]]) == [fresh_draft(rows[1])]
    assert executor.steps[4].num_rows == 40, "its blocks were taken"


def test_of_too_many_rows_the_first_keep_their_blocks_call_after_call() -> None:
    model, executor = draft_model(num_blocks=4, max_rows=128)
    rows = [draft_row(p, key) for key, p in enumerate(prompts(3, 40))]
    for _ in range(3):
        assert drafted(model, rows) == [fresh_draft(rows[0]), fresh_draft(rows[1]), ()]
    assert executor.num_body_runs == 3 * 4 and executor.steps[4].num_rows == 2, "nobody is computed twice"
    for row in rows[:1]:
        row.tokens.extend([1] * 30)
    assert drafted(model, rows) == [fresh_draft(rows[0]), (), ()], "a row that grows takes from the last"


def test_a_sequence_that_can_never_fit_takes_nothing_from_others() -> None:
    model, _ = draft_model(num_blocks=2)
    small, large = draft_row(prompts(1, 10)[0], "small"), draft_row(prompts(1, 3 * KV_BLOCK)[0], "large")
    assert drafted(model, [small]) == [fresh_draft(small)]
    assert drafted(model, [large, small]) == [(), fresh_draft(small)]
    assert model.num_blocks_in_use == 1


def test_drafts_end_with_the_context() -> None:
    model, _ = draft_model(context=12)
    row = draft_row(prompts(1, 10)[0], max_tokens=8)
    assert drafted(model, [row]) == [fresh_draft(row)[:3]]
    assert drafted(model, [draft_row(prompts(1, 13)[0], 1)]) == [()]


def test_a_row_with_broken_logits_drafts_no_further() -> None:
    model, executor = draft_model()
    broken, sound = (draft_row(p, key) for key, p in enumerate(prompts(2, 10)))
    executor.nan_hashes.add(fake_hash([*broken.tokens, *fresh_draft(broken)[:1]]))
    assert drafted(model, [broken, sound]) == [fresh_draft(broken)[:1], fresh_draft(sound)]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_executor_that_fails_leaves_a_valid_state(failing: int) -> None:
    model, executor = draft_model()
    row = draft_row(prompts(1, 10)[0])
    executor.fail_at[failing] = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        model.propose([row])
    model.check_integrity()
    assert drafted(model, [row]) == [fresh_draft(row)]


def test_another_vocabulary_is_refused() -> None:
    executor = FakeExecutor(num_blocks=1, max_rows=1, max_out_rows=1)
    with pytest.raises(UsageError, match="has 260 tokens, the model 100"):
        DraftModel(executor, num_blocks=1, context=1, target_vocab_size=100)


def test_greedy_drafts_are_the_greedy_answer() -> None:
    row = draft_row(list(b"the"), max_tokens=5)
    assert list(draft_model()[0].propose([row])[0].tokens)[:2] == reference_tokens(b"the", 5)[:2]
    assert draft_model()[0].propose([]) == []
    assert draft_model()[0].propose([row._replace(max_tokens=0)]) == [NO_DRAFT]
