"""Scoring many pairs: what they share is computed once, and no bit of a result depends on that."""

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.core import Score
from tokenmill.engine import LLM, LLMConfig, Progress
from tokenmill.engine.mock import MockModel, MockScript
from tokenmill.engine.sequence import ScoringState, SequenceState
from tokenmill.engine.shared_prefix import SharedPrefixQueue
from tokenmill.kernels import KV_BLOCK


def open_llm(**config: object) -> LLM:
    model = MockModel(MockScript(context_length=1024))
    return LLM(model, LLMConfig(**config), create=model.create)  # type: ignore[arg-type]


def score(llm: LLM, pairs: Sequence[tuple[str, str]]) -> tuple[list[Score], int]:
    """The scores, and the rows that it took."""
    rows: list[int] = []

    def count(progress: Progress) -> None:
        rows.append(progress.step.num_rows)

    scores = llm.score([one for one, _ in pairs], [two for _, two in pairs], on_progress=count)
    return scores, sum(rows)


SHOTS = "five shots of some subject " * 6  # 162 tokens: one a byte
QUESTIONS = [SHOTS + f"question {i}: " + "what is it? " * (3 + i) for i in range(8)]


@pytest.mark.parametrize("max_rows", [64, 512])
def test_letters_are_one_computation_and_shots_are_computed_once(max_rows: int) -> None:
    pairs = list(product(QUESTIONS, "ABCD"))
    scores, num_rows = score(open_llm(max_rows=max_rows), pairs)
    shared = len(SHOTS) // KV_BLOCK * KV_BLOCK
    own = sum(len(question) - shared for question in QUESTIONS)
    assert num_rows <= shared + own, "a row was computed twice"
    for pair, together in zip(pairs, scores, strict=True):
        assert together == score(open_llm(), [pair])[0][0], "alone, to the bit"


def test_choices_share_their_question() -> None:
    context, choices = QUESTIONS[0], [f" choice number {i}" for i in range(4)]
    scores, num_rows = score(open_llm(), [(context, choice) for choice in choices])
    alone = [score(open_llm(), [(context, choice)]) for choice in choices]
    assert scores == [each for (each,), _ in alone]
    assert num_rows <= alone[0][1] + 3 * (len(context) % KV_BLOCK + len(choices[0]) - 1 + KV_BLOCK)


def test_what_is_counted_adds_up_to_what_was_computed() -> None:
    llm = open_llm()
    scores, num_rows = score(llm, list(product(QUESTIONS, "ABCD")))
    num_input = sum(each.num_input_tokens for each in scores)
    num_cached = sum(each.num_cached_tokens for each in scores)
    assert num_input == sum(len(question) for question in QUESTIONS) + 4 * len(QUESTIONS)
    assert num_input - num_cached == num_rows + 4 * len(QUESTIONS), "the letters are never computed"
    assert num_cached > 0.5 * num_input


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.text("ab", max_size=90), st.text("ab", min_size=1, max_size=4)).filter(
            lambda pair: len(pair[0] + pair[1]) > 1
        ),
        min_size=1,
        max_size=12,
    ),
    max_rows=st.sampled_from([16, 64]),
    max_batch=st.sampled_from([1, 3, 16]),
    prefix_cache=st.booleans(),
)
def test_any_pairs_in_any_limits(
    pairs: list[tuple[str, str]], max_rows: int, max_batch: int, prefix_cache: bool
) -> None:
    """Few letters, so that beginnings are shared; small caches, so that they are lost again."""
    pairs = [(context * 3, continuation) for context, continuation in pairs]
    config = {"max_rows": max_rows, "max_batch": max_batch, "prefix_cache": prefix_cache, "kv_tokens": 320}
    scores, _ = score(open_llm(**config), pairs)
    plain = open_llm()
    assert scores == [score(plain, [pair])[0][0] for pair in pairs]


def states(*texts: bytes) -> list[SequenceState]:
    return [ScoringState(str(i), [*text, 1], len(text)) for i, text in enumerate(texts)]


def test_the_others_wait_for_what_they_share() -> None:
    start, middle = b"s" * KV_BLOCK, b"m" * KV_BLOCK
    one, two, three, other = states(start + middle + b"1", start + middle + b"2", start + b"z", b"other")
    queue = SharedPrefixQueue([two, other, three, one], 1000)
    assert set(queue.take()) == {one, other}, "the first in order of tokens goes ahead"
    one.num_computed = KV_BLOCK
    assert queue.take() == [three]
    one.num_computed = 2 * KV_BLOCK
    assert queue.take() == [two]
    assert queue.take() == []


def test_a_failed_one_keeps_nobody_waiting() -> None:
    start = b"s" * 2 * KV_BLOCK
    one, two = states(start + b"1", start + b"2")
    queue = SharedPrefixQueue([one, two], 1000)
    assert queue.take() == [one]
    one.fail("it broke", now_s=0.0)
    assert queue.take() == [two]


def test_only_so_many_rows_are_under_way() -> None:
    many = states(*(bytes([65 + i]) * 100 for i in range(10)))
    queue = SharedPrefixQueue(many, 250)
    first = queue.take()
    assert len(first) == 3 and queue.take() == []
    first[0].fail("done", now_s=0.0)
    assert len(queue.take()) == 1
