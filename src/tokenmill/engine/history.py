"""Speculation from what was said before: in this sequence, and in finished answers of the same tenant.

Answers of one tenant repeat: the same files edited again, the same forms filled in (SuffixDecoding,
Oliaro et al. 2024). Each sequence has a suffix automaton of its own tokens, each tenant one of its finished
answers. Nothing crosses from tenant to tenant: a draft that stands is faster, and so tells what is in
the history.

An automaton cannot forget. So a text is kept in two generations: when the younger is full it becomes the
older, and the older, with the oldest tokens, is dropped.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenmill.engine.proposers import (
    NO_DRAFT,
    Draft,
    DraftRow,
    SequenceKey,
    expected_length,
)
from tokenmill.engine.suffix import BORDER, ROOT, Match, SuffixAutomaton

__all__ = ["SuffixConfig", "SuffixProposer"]

_TOKENS_PER_CALL = 512
_MAX_MATCH = 64
_START = Match(ROOT, 0)


@dataclass(frozen=True, kw_only=True)
class SuffixConfig:
    """How much is remembered, in tokens. A token costs about 150 bytes.

    Between a half and all of `sequence_tokens` latest tokens of each living sequence, and of
    `history_tokens` of finished answers of each of the `max_tenants` tenants seen last.
    """

    sequence_tokens: int = 1 << 15
    history_tokens: int = 1 << 16
    max_tenants: int = 16

    def __post_init__(self) -> None:
        assert self.sequence_tokens > 1 and self.history_tokens > 1 and self.max_tenants > 0, self


class SuffixProposer:
    """Drafts from each sequence's own tokens and its tenant's history, whichever promises more.

    A call indexes at most 512 tokens: of its rows first, then of finished answers. A row that is behind
    gets drafts from the history only.
    """

    def __init__(self, config: SuffixConfig | None = None) -> None:
        self._config = config or SuffixConfig()
        self._states: dict[SequenceKey, _State] = {}
        self._histories: OrderedDict[str, _Generations] = OrderedDict()
        self._finished: deque[_Finished] = deque()
        self._num_finished = 0

    @property
    def num_tokens(self) -> int:
        """Tokens remembered, those of finished answers that are not indexed yet included."""
        texts = [*self._histories.values(), *(state.own for state in self._states.values())]
        return self._num_finished + sum(text.num_tokens for text in texts)

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """Continue each row as its context was continued before."""
        budget = _TOKENS_PER_CALL
        drafts = []
        for row in rows:
            if row.key not in self._states:
                self._states[row.key] = _State(row, self._config.sequence_tokens)
            state = self._states[row.key]
            state.tokens = row.tokens
            budget -= state.own.extend(row.tokens, state.own.num_seen, budget)
            drafts.append(self._draft(row, state))
        while self._finished and budget > 0:
            budget -= self._index_finished(budget)
        return drafts

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        """Nothing to learn: what was right is in the tokens."""

    def forget(self, key: SequenceKey) -> None:
        """Drop the sequence; its answer joins the tenant's history."""
        state = self._states.pop(key, None)
        if state is None or len(state.tokens) <= state.num_prompt:
            return
        answer = state.tokens[state.num_prompt :][-(self._config.history_tokens // 2) :]
        self._finished.append(_Finished(state.tenant, array("i", [*answer, BORDER])))
        self._num_finished += len(answer) + 1
        while self._num_finished > self._config.history_tokens:
            self._num_finished -= len(self._finished.popleft().tokens)

    def _draft(self, row: DraftRow, state: "_State") -> Draft:
        """The best continuation in own tokens and history."""
        if row.max_tokens == 0:
            return NO_DRAFT
        drafts = [NO_DRAFT]
        own, history = state.own, self._histories.get(row.tenant)
        if own.num_seen == len(row.tokens):
            drafts.append(own.younger.follow(own.younger.end, row.max_tokens))
        automata = [own.older, *((history.younger, history.older) if history else ())]
        automata = [each for each in automata if each.num_tokens]
        for automaton in automata:
            drafts.append(automaton.follow(state.cursor(automaton, row.tokens), row.max_tokens))
        state.keep(automata)
        if history:
            self._histories.move_to_end(row.tenant)
        return max(drafts, key=lambda draft: expected_length(draft.probabilities))

    def _index_finished(self, budget: int) -> int:
        """Move a part of the oldest finished answer to its tenant's history; returns its tokens."""
        tenant, tokens = self._finished.popleft()
        history = self._histories.pop(tenant, None) or _Generations(self._config.history_tokens)
        self._histories[tenant] = history
        while len(self._histories) > self._config.max_tenants:
            self._histories.popitem(last=False)
        num_taken = history.extend(tokens, 0, budget)
        self._num_finished -= num_taken
        if num_taken < len(tokens):
            self._finished.appendleft(_Finished(tenant, tokens[num_taken:]))
        return num_taken


class _Finished(NamedTuple):
    """An answer, or what is left of it, that waits to be indexed."""

    tenant: str
    tokens: "array[int]"


class _Generations:
    """A growing text of which at least the latest half of `capacity` tokens, and at most all, is kept."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.num_seen = 0
        self.younger, self.older = SuffixAutomaton(), SuffixAutomaton()

    @property
    def num_tokens(self) -> int:
        return self.younger.num_tokens + self.older.num_tokens

    def extend(self, tokens: "array[int]", start: int, budget: int) -> int:
        """Append at most `budget` of the tokens from `start` on; returns how many it were."""
        stop = min(len(tokens), start + budget)
        for token in tokens[start:stop]:
            if self.younger.num_tokens >= self._capacity // 2:
                self.younger, self.older = SuffixAutomaton(), self.younger
            self.younger.extend(token)
        num_taken = max(0, stop - start)
        self.num_seen += num_taken
        return num_taken


class _State:
    """One sequence: its own text, and where its end occurs in other automata."""

    def __init__(self, row: DraftRow, capacity: int) -> None:
        self.tenant, self.tokens, self.num_prompt = row.tenant, row.tokens, row.num_prompt
        self.own = _Generations(capacity)
        self._cursors: dict[SuffixAutomaton, _Cursor] = {}

    def cursor(self, automaton: SuffixAutomaton, tokens: "array[int]") -> Match:
        """The longest match of the end of the tokens, followed from the last call on."""
        cursor = self._cursors.get(automaton, _Cursor(_START, 0))
        match = cursor.match
        if len(tokens) - cursor.num_seen > _MAX_MATCH:
            match = _START
        for token in tokens[max(cursor.num_seen, len(tokens) - _MAX_MATCH) :]:
            match = automaton.after(match, token)
        self._cursors[automaton] = _Cursor(match, len(tokens))
        return match

    def keep(self, automata: Sequence[SuffixAutomaton]) -> None:
        """Let go of automata that were dropped since."""
        if len(self._cursors) > len(automata):
            self._cursors = {each: self._cursors[each] for each in automata}


class _Cursor(NamedTuple):
    """A match, and how many tokens of the sequence it was found with."""

    match: Match
    num_seen: int
