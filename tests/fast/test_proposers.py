"""Guesses from a sequence's own tokens, and the choice between several guesses."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.proposer_fakes import ScriptedProposer, always_right, draft_row, never_right
from tokenmill.engine.speculation.ngram import NgramProposer
from tokenmill.engine.speculation.proposers import (
    NO_DRAFT,
    Calibration,
    CombinedProposer,
    Draft,
    DraftRow,
    expected_length,
    match_probability,
)

TEXTS = st.lists(st.integers(0, 2), max_size=40)


def longest_match(tokens: list[int], limit: int = 16) -> tuple[int, int]:
    """Where the longest earlier match of the end is continued, the latest of them, and its length."""
    places = []
    for place in range(2, len(tokens)):
        length = 0
        while length < min(limit, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        places.append((length, place))
    length, place = max(places, default=(0, 0))
    return (place, length) if length >= 2 else (0, 0)


@settings(max_examples=100, deadline=None)
@given(tokens=TEXTS, chunks=st.lists(st.integers(1, 9), max_size=12))
def test_lookup_continues_the_longest_latest_match_however_the_text_grew(
    tokens: list[int], chunks: list[int]
) -> None:
    proposer = NgramProposer()
    growing = array("i")
    for size in [*chunks, len(tokens)]:
        growing.extend(tokens[len(growing) : len(growing) + size])
        draft = proposer.propose([draft_row(growing, max_tokens=5)])[0]
    place, length = longest_match(tokens)
    assert len(draft.tokens) == (5 if length else 0)
    for offset, token in enumerate(draft.tokens):
        assert token == [*tokens, *draft.tokens][place + offset]
        assert draft.probabilities[offset] == match_probability(1, 1, length + offset)


def test_lookup_repeats_a_period_beyond_the_end() -> None:
    draft = NgramProposer().propose([draft_row([1, 2, 3, 1, 2, 3, 1, 2], max_tokens=7)])[0]
    assert draft.tokens == (3, 1, 2, 3, 1, 2, 3)


def test_lookup_reads_few_places_and_indexes_a_long_prompt_in_parts() -> None:
    proposer = NgramProposer()
    row = draft_row([7] * 9000)
    assert [bool(proposer.propose([row])[0].tokens) for _ in range(3)] == [False, False, True]
    for key, num_between, token in ((1, 20, 5), (2, 40, 9)):
        # The long match at the beginning is found unless too many short ones are nearer.
        tokens = [9, 7, 7, 5, *([8, 7, 7] * num_between), 9, 7, 7]
        assert proposer.propose([draft_row(tokens, key)])[0].tokens[0] == token


def test_lookup_keeps_sequences_apart_and_forgets_them() -> None:
    proposer = NgramProposer()
    seen, other = draft_row([1, 2, 3, 1, 2], "a"), draft_row([5, 1, 2], "b")
    assert [d.tokens[:1] for d in proposer.propose([seen, other])] == [(3,), ()]
    proposer.forget("a")
    proposer.forget("a")
    assert proposer.propose([draft_row([9, 1, 2], "a")]) == [NO_DRAFT]


def test_expected_length_sums_the_chances_to_get_there() -> None:
    assert expected_length(()) == 0.0
    assert expected_length((0.5, 0.5, 1.0)) == 1.0


def test_calibration_learns_the_share_that_comes_true() -> None:
    calibration = Calibration()
    assert calibration.apply((0.5, 0.25)) == (0.5, 0.25)
    for _ in range(200):
        calibration.update((0.8, 0.8, 0.8), 0)
    assert calibration.apply((0.8,))[0] < 0.01
    for _ in range(200):
        calibration.update((0.5,), 1)
    assert calibration.factor == pytest.approx(2.0, rel=0.01)
    assert calibration.apply((0.8,)) == (0.98,)


def test_calibration_ignores_what_comes_after_the_first_wrong_token() -> None:
    first, second = Calibration(), Calibration()
    first.update((0.5, 0.5, 0.9, 0.9), 1)
    second.update((0.5, 0.5), 1)
    assert first.factor == second.factor


class Fixed:
    """Proposes one draft for every row."""

    def __init__(self, tokens: tuple[int, ...], probability: float) -> None:
        self.draft = Draft(tokens, (probability,) * len(tokens))
        self.asked: list[object] = []
        self.observed: list[tuple[Draft, int]] = []
        self.forgotten: list[object] = []

    def propose(self, rows: list[DraftRow]) -> list[Draft]:
        self.asked += [row.key for row in rows]
        return [self.draft.cut(row.max_tokens) for row in rows]

    def observe(self, key: object, draft: Draft, num_accepted: int) -> None:
        self.observed.append((draft, num_accepted))

    def forget(self, key: object) -> None:
        self.forgotten.append(key)


def combined(*fakes: Fixed | ScriptedProposer) -> CombinedProposer:
    return CombinedProposer(fakes)  # type: ignore[arg-type]


def test_the_draft_with_the_best_expected_length_wins() -> None:
    short, long = Fixed((1,), 0.9), Fixed((2, 2, 2), 0.5)
    both = combined(short, long)
    assert both.propose([draft_row([0], max_tokens=4)])[0].tokens == (1,)
    for _ in range(30):
        both.observe(0, Draft((1,), (0.9,)), 0)
        both.propose([draft_row([0], max_tokens=4)])
    assert both.propose([draft_row([0], max_tokens=4)])[0].tokens == (2, 2, 2), "it never came true"
    assert both.propose([draft_row([0], 1, max_tokens=4)])[0].tokens == (1,), "others are judged alone"


def test_a_dear_proposer_is_not_asked_where_a_cheap_one_promises_enough() -> None:
    cheap, dear = Fixed((1, 1), 0.9), Fixed((2,) * 8, 0.9)
    assert combined(cheap, dear).propose([draft_row([0], max_tokens=2)])[0].tokens == (1, 1)
    assert not dear.asked
    assert combined(cheap, dear).propose([draft_row([0], max_tokens=8)])[0].tokens == (2,) * 8


def test_what_was_accepted_is_told_to_the_author_uncorrected_and_cut() -> None:
    cheap, dear = Fixed((1,), 0.1), Fixed((2, 2, 2), 0.9)
    both = combined(cheap, dear)
    draft = both.propose([draft_row([0])])[0]
    both.observe(0, draft.cut(2), 1)
    assert dear.observed == [(Draft((2, 2), (0.9, 0.9)), 1)] and not cheap.observed
    both.observe(0, draft, 1)
    both.observe("unknown", draft, 1)
    assert len(dear.observed) == 1, "a draft is observed once"
    both.forget(0)
    assert cheap.forgotten == dear.forgotten == [0]


def test_scripted_proposers_do_as_they_say() -> None:
    row = draft_row([1, 2, 3], max_tokens=3)
    right, wrong = always_right().propose([row])[0], never_right().propose([row])[0]
    assert all(a != b for a, b in zip(right.tokens, wrong.tokens, strict=True)) and right.tokens
