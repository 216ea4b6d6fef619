"""Prompt lookup: what followed the last time that the sequence said this.

The draft is the continuation of the longest earlier match of the sequence's end in its own tokens, of two
equally long ones the more recent (Saxena 2023, prompt lookup decoding). Places are found as in LZ77
compressors: each pair of tokens points to its last place, each place to the one before with the same
pair, so an update is O(1) and a look-up reads a bounded number of places. Other sequences are not looked
at; see `suffix.py`.
"""

from array import array
from collections.abc import Sequence

from tokenmill.engine.speculation.proposers import NO_DRAFT, Draft, DraftRow, SequenceKey, match_probability

__all__ = ["NgramProposer"]

_MIN_MATCH = 2
_MAX_MATCH = 16
_MAX_PLACES = 32
_TOKENS_PER_CALL = 4096
_MAX_DRAFT = 64
# By length of the match.
_CHANCES = (0.0, *(match_probability(1, 1, length) for length in range(1, _MAX_MATCH + _MAX_DRAFT)))


class NgramProposer:
    """Prompt lookup for many sequences. A call indexes at most 4096 tokens; a longer prompt takes several.

    Memory is about 130 bytes a token of the sequences that live.
    """

    def __init__(self) -> None:
        self._places: dict[SequenceKey, _Places] = {}

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """Continue each row after its longest earlier match."""
        budget = _TOKENS_PER_CALL
        drafts = []
        for row in rows:
            places = self._places.setdefault(row.key, _Places())
            budget -= places.update(row.tokens, budget)
            drafts.append(_draft(places, row))
        return drafts

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        """Nothing to learn."""

    def forget(self, key: SequenceKey) -> None:
        """Drop the index of a sequence."""
        self._places.pop(key, None)


class _Places:
    """Where each pair of tokens was followed by something.

    A place is the index of the token after the pair. `before[place]` is the place before it with the same
    pair; 0 is none.
    """

    def __init__(self) -> None:
        self.latest: dict[int, int] = {}
        self.before = array("i", [0] * _MIN_MATCH)

    def update(self, tokens: "array[int]", budget: int) -> int:
        """Index up to `budget` more places of [2, len(tokens)); returns how many it were."""
        start = len(self.before)
        stop = min(len(tokens), start + budget)
        latest, before = self.latest, self.before
        for place in range(start, stop):
            pair = tokens[place - 2] << 32 | tokens[place - 1]
            before.append(latest.get(pair, 0))
            latest[pair] = place
        return max(0, stop - start)

    def longest(self, tokens: "array[int]") -> tuple[int, int]:
        """The place with the longest match to the end of the tokens, and its length; (0, 0) if none."""
        size = len(tokens)
        if size <= _MIN_MATCH or len(self.before) < size:
            return 0, 0
        best, best_length = 0, 0
        place = self.latest.get(tokens[-2] << 32 | tokens[-1], 0)
        for _ in range(_MAX_PLACES):
            if place == 0 or best_length == _MAX_MATCH:
                break
            length = _match_length(tokens, place)
            if length > best_length:
                best, best_length = place, length
            place = self.before[place]
        return best, best_length


def _match_length(tokens: "array[int]", place: int) -> int:
    """Tokens before `place` that equal the last tokens, at most 16; the pair is known to match."""
    length, size = _MIN_MATCH, len(tokens)
    longest = min(_MAX_MATCH, place)
    while length < longest and tokens[place - 1 - length] == tokens[size - 1 - length]:
        length += 1
    return length


def _draft(places: _Places, row: DraftRow) -> Draft:
    place, length = places.longest(row.tokens)
    if length == 0 or row.max_tokens == 0:
        return NO_DRAFT
    wanted = min(row.max_tokens, _MAX_DRAFT)
    copied = row.tokens[place : place + wanted].tolist()
    period = len(row.tokens) - place
    while len(copied) < wanted:
        # The match reaches the end, so the text repeats itself; so does the draft.
        copied.append(copied[-period])
    return Draft(tuple(copied), _CHANCES[length : length + len(copied)])
