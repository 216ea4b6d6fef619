"""The suffix automaton against counting by hand; what is remembered, for how long and for whom."""

import random
from array import array
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.proposer_fakes import draft_row
from tokenmill.engine.history import SuffixConfig, SuffixProposer
from tokenmill.engine.proposers import NO_DRAFT, Draft
from tokenmill.engine.suffix import BORDER, ROOT, Match, SuffixAutomaton

SHORT = st.lists(st.integers(0, 2), max_size=16)
"""As long as counts are exact."""
LONG = st.lists(st.integers(0, 3), max_size=80)


def automaton_of(tokens: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for token in tokens:
        automaton.extend(token)
    return automaton


def match_of(automaton: SuffixAutomaton, tokens: list[int]) -> Match:
    match = Match(ROOT, 0)
    for token in tokens:
        match = automaton.after(match, token)
    return match


def occurrences(text: list[int], context: list[int]) -> list[int]:
    """Where the context ends in the text."""
    return [end for end in range(len(context), len(text) + 1) if text[end - len(context) : end] == context]


def substrings(text: list[int]) -> list[list[int]]:
    return [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]


@settings(max_examples=100, deadline=None)
@given(text=SHORT)
def test_every_context_is_counted_and_its_likeliest_continuation_known(text: list[int]) -> None:
    automaton = automaton_of(text)
    assert automaton.num_states <= max(2, 2 * len(text))
    for context in substrings(text):
        state, length = match_of(automaton, context)
        ends = occurrences(text, context)
        assert length == len(context) and automaton.count(state) == len(ends)
        followers = Counter(text[end] for end in ends if end < len(text))
        draft = automaton.follow(Match(state, length), 1)
        if length >= 2 and followers:
            most = max(followers.values())
            assert followers[draft.tokens[0]] == most
            num_seen = len(ends) - (state == automaton.end.state)
            assert draft.probabilities[0] == most / (num_seen + 2 / length)


@settings(max_examples=100, deadline=None)
@given(text=LONG, query=LONG)
def test_a_match_is_the_longest_suffix_that_occurs(text: list[int], query: list[int]) -> None:
    automaton = automaton_of(text)
    match = Match(ROOT, 0)
    for end, token in enumerate(query, start=1):
        match = automaton.after(match, token)
        longest = max(n for n in range(end + 1) if n == 0 or occurrences(text, query[end - n : end]))
        assert match.length == longest


@settings(max_examples=100, deadline=None)
@given(text=LONG, query=LONG, step=st.integers(1, 5))
def test_a_match_survives_the_growth_of_the_automaton(text: list[int], query: list[int], step: int) -> None:
    growing, match, taken = SuffixAutomaton(), Match(ROOT, 0), 0
    for end, token in enumerate(query, start=1):
        match = growing.after(match, token)
        # Whatever was split since, it is the state that holds this very context now.
        assert match == match_of(growing, query[end - match.length : end])
        for more in text[taken : taken + step]:
            growing.extend(more)
        taken += step


def test_a_match_whose_state_was_split_since_is_not_taken_for_a_longer_one() -> None:
    growing = automaton_of([9, 1, 2])
    match = growing.after(Match(ROOT, 0), 2)
    for token in (8, 1, 2, 3):
        growing.extend(token)
    assert growing.after(match, 3) == match_of(growing, [2, 3])


@settings(max_examples=100, deadline=None)
@given(text=LONG)
def test_the_end_is_the_longest_suffix_seen_before(text: list[int]) -> None:
    match = automaton_of(text).end
    repeated = [n for n in range(1, len(text)) if len(occurrences(text, text[-n:])) > 1]
    assert match.length == max(repeated, default=0)


@settings(max_examples=100, deadline=None)
@given(text=LONG)
def test_probabilities_are_probabilities_and_drafts_occur(text: list[int]) -> None:
    automaton = automaton_of(text)
    draft = automaton.follow(automaton.end, 8)
    assert all(0.0 < probability < 1.0 for probability in draft.probabilities)
    for token, context in zip(draft.tokens[:1], [text[-automaton.end.length :]], strict=False):
        assert occurrences(text, [*context, token])


def test_a_draft_ends_before_a_border_and_no_match_reaches_over_it() -> None:
    automaton = automaton_of([1, 2, 3, BORDER, 4, 5, 6])
    assert automaton.follow(match_of(automaton, [1, 2]), 5).tokens == (3,)
    assert automaton.follow(match_of(automaton, [2, 3]), 5) == NO_DRAFT
    assert match_of(automaton, [3, 4, 5]).length == 2


def test_a_draft_ends_where_it_becomes_unlikely() -> None:
    rng = random.Random(1)
    text = [rng.randrange(3) for _ in range(3000)]
    draft = automaton_of(text).follow(match_of(automaton_of(text), text[5:8]), 64)
    assert 1 <= len(draft.tokens) < 12


@pytest.mark.parametrize(("alphabet", "num_states"), [(1, 6001), (2, 12000), (3000, 9000)])
def test_states_are_at_most_two_a_token_and_no_count_is_too_high(alphabet: int, num_states: int) -> None:
    rng = random.Random(1)
    text = [rng.randrange(alphabet) for _ in range(6000)]
    automaton = automaton_of(text)
    assert 6000 < automaton.num_states <= num_states
    for length in (1, 2, 3):
        context = text[100 : 100 + length]
        assert 0 < automaton.count(match_of(automaton, context).state) <= len(occurrences(text, context))


def tell(proposer: SuffixProposer, answer: list[int], tenant: str = "", key: str = "past") -> None:
    """A whole answer of a tenant, up to its place in the history."""
    proposer.propose([draft_row(answer, key, tenant=tenant)])
    proposer.forget(key)
    for _ in range(-(-len(answer) // 400) + 1):
        proposer.propose([])


def ask(proposer: SuffixProposer, tokens: list[int], tenant: str = "", key: str = "now") -> Draft:
    """The draft after these tokens, in a sequence of its own."""
    draft = proposer.propose([draft_row(tokens, key, tenant=tenant, num_prompt=len(tokens))])[0]
    proposer.forget(key)
    return draft


def test_own_tokens_are_continued_from_prompt_and_answer() -> None:
    proposer = SuffixProposer()
    tokens = array("i", [1, 2, 3, 4, 9, 1, 2])
    assert proposer.propose([draft_row(tokens)])[0].tokens[:2] == (3, 4)
    tokens.extend([7, 8, 1, 2])
    assert proposer.propose([draft_row(tokens)])[0].tokens[0] == 7, "of equal counts the latest"


def test_finished_answers_of_the_tenant_are_continued_and_prompts_are_not() -> None:
    proposer = SuffixProposer()
    for tokens in ([50, 51, 52, 1, 2], [50, 51, 52, 1, 2, 3, 4]):
        proposer.propose([draft_row(tokens, "past", num_prompt=3)])
    proposer.forget("past")
    proposer.propose([])
    assert ask(proposer, [9, 1, 2]).tokens == (3, 4)
    assert ask(proposer, [9, 50, 51]) == NO_DRAFT


def test_nothing_crosses_from_tenant_to_tenant() -> None:
    proposer = SuffixProposer()
    tell(proposer, [1, 2, 3, 4, 5], tenant="a")
    assert ask(proposer, [1, 2], tenant="a").tokens == (3, 4, 5)
    assert ask(proposer, [1, 2], tenant="b") == NO_DRAFT
    both = [draft_row([1, 2], "x", tenant="b"), draft_row([1, 2], "y", tenant="a")]
    assert [draft.tokens[:1] for draft in proposer.propose(both)] == [(), (3,)]


def test_a_living_sequence_is_seen_by_itself_only() -> None:
    proposer = SuffixProposer()
    rows = [draft_row([1, 2, 3, 4], "a"), draft_row([1, 2], "b")]
    assert proposer.propose(rows)[1] == NO_DRAFT


def test_memory_is_bounded_and_the_oldest_history_is_dropped() -> None:
    proposer = SuffixProposer(SuffixConfig(sequence_tokens=64, history_tokens=64, max_tenants=2))
    for number in range(40):
        start = 100 * number
        tell(proposer, list(range(start, start + 12)), tenant="a")
        assert proposer.num_tokens <= 3 * 64
    assert ask(proposer, [3900, 3901], tenant="a").tokens[:1] == (3902,)
    assert ask(proposer, [3800, 3801], tenant="a").tokens[:1] == (3802,), "half of it at least stays"
    assert ask(proposer, [0, 1], tenant="a") == NO_DRAFT
    for tenant in "bc":
        tell(proposer, [1, 2, 3], tenant=tenant)
    assert ask(proposer, [3900, 3901], tenant="a") == NO_DRAFT, "the tenant seen longest ago went"
    assert ask(proposer, [1, 2], tenant="b").tokens == (3,)


def test_answers_that_wait_to_be_indexed_are_bounded_too() -> None:
    proposer = SuffixProposer(SuffixConfig(history_tokens=64))
    for key in range(50):
        proposer.propose([draft_row(range(20), key)])
    for key in range(50):
        proposer.forget(key)
    assert proposer.num_tokens <= 64


def test_a_long_sequence_keeps_its_latest_tokens() -> None:
    proposer = SuffixProposer(SuffixConfig(sequence_tokens=64))
    tokens = array("i", range(200))
    tokens.extend([180, 181])
    assert proposer.propose([draft_row(tokens)])[0].tokens[:2] == (182, 183)
    assert proposer.num_tokens <= 64
    assert proposer.propose([draft_row([*range(200), 10, 11], 1)]) == [NO_DRAFT]


def test_a_long_prompt_is_indexed_in_parts_and_history_serves_meanwhile() -> None:
    proposer = SuffixProposer()
    tell(proposer, [1, 2, 3])
    prompt = [*range(10, 1200), 1, 2]
    row = draft_row([*prompt, 5, 10, 11], "long")
    assert ask(proposer, prompt).tokens == (3,)
    assert [bool(proposer.propose([row])[0].tokens) for _ in range(3)] == [False, False, True]


def test_rows_that_want_nothing_are_kept_up_to_date() -> None:
    proposer = SuffixProposer()
    assert proposer.propose([draft_row([1, 2, 3, 1, 2], max_tokens=0)]) == [NO_DRAFT]
    assert proposer.num_tokens == 5
    assert len(proposer.propose([draft_row([1, 2, 3, 1, 2], max_tokens=2)])[0].tokens) == 2


def test_unknown_keys_are_forgotten_in_silence() -> None:
    SuffixProposer().forget("nobody")
