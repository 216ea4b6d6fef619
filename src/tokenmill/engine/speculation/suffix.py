"""A suffix automaton that counts: for any context, what followed it most often.

The automaton of a token sequence (Blumer et al. 1985) has a state for each set of contexts that occur at
the same places, at most two a token, and grows token by token. Each state counts its occurrences, and
knows its most frequent continuation (of equals, the latest). Who may see which tokens, and when old ones
are dropped, is decided in `history.py`.

States are integers and their fields lie in `array('i')`. Most states have one continuation; the best one
lies in the arrays, the others in a dictionary only where there are any.
"""

from array import array
from typing import NamedTuple

from tokenmill.engine.speculation.proposers import Draft, match_probability

__all__ = ["BORDER", "ROOT", "Match", "SuffixAutomaton"]

ROOT = 0
"""The state of the empty context."""

BORDER = -2
"""Stands between two texts in one automaton. It is no token, so no match and no draft reaches over it."""

_NONE = -1
_MIN_MATCH = 2
_MIN_CHANCE = 1 / 16
# The end of a repetitive text occurs in ever more lengths elsewhere; only the longest are counted.
_MAX_COUNTED = 16


class Match(NamedTuple):
    """The longest suffix of some text that occurs in an automaton: its state, and its length in tokens."""

    state: int
    length: int


class SuffixAutomaton:
    """The contexts of one growing token sequence.

    Counts are exact for texts of up to 16 tokens, and for others but for the shortest contexts in long
    repetitions, which are counted too low.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._last = ROOT
        self._length = array("i", [0])
        self._link = array("i", [_NONE])
        self._count = array("i", [0])
        self._token = array("i", [_NONE])
        self._next = array("i", [_NONE])
        self._others: dict[int, dict[int, int]] = {}

    @property
    def num_states(self) -> int:
        """States, the root included; at most twice the tokens."""
        return len(self._length)

    @property
    def end(self) -> Match:
        """The longest suffix of the text itself that occurs before its end, too."""
        state = max(ROOT, self._link[self._last])
        return Match(state, self._length[state])

    def count(self, state: int) -> int:
        """Occurrences of the contexts of a state; overlapping ones count."""
        return self._count[state]

    def follow(self, match: Match, max_tokens: int) -> Draft:
        """What followed most often after a match, token after token, up to a border or until it is unlikely.

        Past the end of the text it goes on with what followed the longest suffix that occurs before.
        """
        tokens: list[int] = []
        chances: list[float] = []
        chance = 1.0
        state, length = match
        while length >= _MIN_MATCH and len(tokens) < max_tokens and chance > _MIN_CHANCE:
            token = self._token[state]
            if token == _NONE:
                state = self._link[state]
                length = self._length[state]
                continue
            if token == BORDER:
                break
            following = self._next[state]
            num_followed = self._count[following]
            # Where the text ends nothing followed, so that the place is no sighting; counts may be low.
            num_seen = max(self._count[state] - (state == self._link[self._last]), num_followed)
            probability = match_probability(num_followed, num_seen, length)
            tokens.append(token)
            chances.append(probability)
            chance *= probability
            state, length = following, length + 1
        return Draft(tuple(tokens), tuple(chances))

    def after(self, match: Match, token: int) -> Match:
        """The match of a text after one more token. A match stays usable while the automaton grows."""
        state, length = match
        while length <= self._length[link := max(ROOT, self._link[state])] and state != ROOT:
            state = link  # The state was split since, and the shorter contexts moved to its link.
        while (following := self._step(state, token)) == _NONE:
            if state == ROOT:
                return Match(ROOT, 0)
            state = self._link[state]
            length = self._length[state]
        return Match(following, length + 1)

    def extend(self, token: int) -> None:
        """Append a token to the text."""
        tokens, others, links = self._token, self._others, self._link
        before, current = self._last, self._add(self._length[self._last] + 1, count=0)
        self._last = current
        self.num_tokens += 1
        state = before
        while state != _NONE and tokens[state] != token:
            if tokens[state] == _NONE:
                tokens[state], self._next[state] = token, current
            elif token in (branches := others.setdefault(state, {})):
                break
            else:
                branches[token] = current
            state = links[state]
        if state == _NONE:
            links[current] = ROOT
        else:
            following = self._step(state, token)
            fits = self._length[state] + 1 == self._length[following]
            links[current] = following if fits else self._split(state, token, following)
        self._sight(before, token)

    def _step(self, state: int, token: int) -> int:
        if self._token[state] == token:
            return self._next[state]
        others = self._others.get(state)
        return _NONE if others is None else others.get(token, _NONE)

    def _add(self, length: int, count: int) -> int:
        self._length.append(length)
        self._link.append(_NONE)
        self._count.append(count)
        self._token.append(_NONE)
        self._next.append(_NONE)
        return len(self._length) - 1

    def _split(self, state: int, token: int, following: int) -> int:
        """Give the shorter contexts of `following`, which now occur at more places, their own state."""
        clone = self._add(self._length[state] + 1, self._count[following])
        self._token[clone], self._next[clone] = self._token[following], self._next[following]
        if following in self._others:
            self._others[clone] = dict(self._others[following])
        self._link[clone] = self._link[following]
        self._link[following] = clone
        while state != _NONE and self._step(state, token) == following:
            if self._token[state] == token:
                self._next[state] = clone
            else:
                self._others[state][token] = clone
            state = self._link[state]
        return clone

    def _sight(self, state: int, token: int) -> None:
        """Count that `token` followed this state's contexts and all their suffixes."""
        # The loop that everything waits for: fields as locals, `_step` written out.
        counts, tokens, nexts, links = self._count, self._token, self._next, self._link
        counted = _NONE
        for _ in range(_MAX_COUNTED):
            if state == _NONE:
                return
            is_best = tokens[state] == token
            following = nexts[state] if is_best else self._others[state][token]
            if following != counted:
                counts[following] += 1
                counted = following
            if not is_best and counts[following] >= counts[nexts[state]]:
                self._promote(state, token, following)
            state = links[state]

    def _promote(self, state: int, token: int, following: int) -> None:
        """Make a transition the best one of its state."""
        others = self._others[state]
        del others[token]
        others[self._token[state]] = self._next[state]
        self._token[state], self._next[state] = token, following
