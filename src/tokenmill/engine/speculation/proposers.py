"""What speculation asks for: draft tokens that may come next, each with its chance of being right.

A draft is only a guess. The target model draws its own token at every position, and a draft token stands
if it is that token, so nothing here can change an answer, only its speed. When a draft is worth its rows
is decided in `controller.py`.

Proposers keep state for each sequence, up to date lazily: a call does a bounded amount of work, and a
sequence for which that was not enough gets no draft yet. None of them is safe to use from two threads.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tokenmill.core import SamplingParams

__all__ = [
    "NO_DRAFT",
    "Calibration",
    "CombinedProposer",
    "Draft",
    "DraftRow",
    "Proposer",
    "SequenceKey",
    "expected_length",
    "match_probability",
]

SequenceKey = int | str

_MEMORY = 0.95
_PRIOR_WEIGHT = 2.0
_MAX_PROBABILITY = 0.98
_ENOUGH = 0.5


class Draft(NamedTuple):
    """Tokens that may come next, and the chance of each to be right if all before it are."""

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]

    def cut(self, length: int) -> "Draft":
        """The first `length` tokens of it."""
        return Draft(self.tokens[:length], self.probabilities[:length])


NO_DRAFT = Draft((), ())
"""Nothing is proposed."""


class DraftRow(NamedTuple):
    """One sequence, as a proposer sees it.

    `key` is unique in the engine and stands for one sequence for its whole life; its `tokens`, prompt and
    answer so far, only grow from call to call. The array is read, never kept longer than until `forget`.
    At most `max_tokens` drafts are wanted. `seed` is the noise that the target draws with.
    """

    key: SequenceKey
    tenant: str
    tokens: "array[int]"
    num_prompt: int
    max_tokens: int
    params: SamplingParams
    seed: int


class Proposer(Protocol):
    """Anything that guesses. Whatever it answers, output is the same."""

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """A draft, possibly empty, for each row, of at most its `max_tokens`."""
        ...

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        """Learn how many tokens of a draft, as far as it was verified, were right."""
        ...

    def forget(self, key: SequenceKey) -> None:
        """Drop the state of a sequence that ended. No-op if it is unknown."""
        ...


class Calibration:
    """Corrects a proposer's estimates for one sequence by how often they came true lately.

    The factor is right tokens over expected ones, both with exponential forgetting, and starts at 1.
    """

    def __init__(self) -> None:
        self._hits = _PRIOR_WEIGHT
        self._expected = _PRIOR_WEIGHT

    @property
    def factor(self) -> float:
        """What to multiply an estimate with."""
        return self._hits / self._expected

    def apply(self, probabilities: Sequence[float]) -> tuple[float, ...]:
        """The corrected estimates."""
        factor = self.factor
        return tuple([min(_MAX_PROBABILITY, factor * each) for each in probabilities])

    def update(self, probabilities: Sequence[float], num_accepted: int) -> None:
        """Learn from a draft with these estimates. Tokens after the first wrong one say nothing."""
        for index, probability in enumerate(probabilities[: num_accepted + 1]):
            self._hits = _MEMORY * self._hits + (index < num_accepted)
            self._expected = _MEMORY * self._expected + max(probability, 1e-3)


class _Proposed(NamedTuple):
    """Who made the draft of a sequence, and what it said before correction."""

    source: int
    draft: Draft


class CombinedProposer:
    """Takes for each row the draft with the best expected length, each proposer's estimates corrected.

    Proposers are asked in order, the cheapest first. A row that can expect half of what it wants is not
    passed on, so a dear proposer runs only where the cheap ones have little to say.
    """

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        assert proposers, "nothing to combine"
        self._proposers = tuple(proposers)
        self._proposed: dict[SequenceKey, _Proposed] = {}
        self._calibrations: dict[SequenceKey, list[Calibration]] = {}

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """The best draft for each row; its probabilities are corrected ones."""
        best = [NO_DRAFT] * len(rows)
        lengths = [0.0] * len(rows)
        for source, proposer in enumerate(self._proposers):
            asked = [i for i, row in enumerate(rows) if lengths[i] < _ENOUGH * max(1, row.max_tokens)]
            drafts = proposer.propose([rows[i] for i in asked]) if asked else []
            for i, draft in zip(asked, drafts, strict=True):
                if not draft.tokens:
                    continue
                key = rows[i].key
                corrected = self._calibration(key, source).apply(draft.probabilities)
                length = expected_length(corrected)
                if length > lengths[i]:
                    best[i], lengths[i] = Draft(draft.tokens, corrected), length
                    self._proposed[key] = _Proposed(source, draft)
        return best

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        """Pass on to the proposer whose draft it was."""
        proposed = self._proposed.pop(key, None)
        if proposed is None or not draft.tokens:
            return
        raw = proposed.draft.cut(len(draft.tokens))
        self._calibration(key, proposed.source).update(raw.probabilities, num_accepted)
        self._proposers[proposed.source].observe(key, raw, num_accepted)

    def forget(self, key: SequenceKey) -> None:
        """Pass on to every proposer."""
        self._proposed.pop(key, None)
        self._calibrations.pop(key, None)
        for proposer in self._proposers:
            proposer.forget(key)

    def _calibration(self, key: SequenceKey, source: int) -> Calibration:
        if key not in self._calibrations:
            self._calibrations[key] = [Calibration() for _ in self._proposers]
        return self._calibrations[key][source]


def expected_length(probabilities: Sequence[float]) -> float:
    """Tokens that are accepted on average: the sum of the products of the leading probabilities."""
    total, chance = 0.0, 1.0
    for probability in probabilities:
        chance *= probability
        total += chance
    return total


def match_probability(num_followed: int, num_seen: int, length: int) -> float:
    """Chance that a token follows again that followed `num_followed` of `num_seen` equal contexts.

    One doubt that it is something new, worth 2 / `length` sightings: a long context repeats more surely.
    """
    return num_followed / (num_seen + 2.0 / length)
