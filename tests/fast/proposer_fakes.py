"""Proposers whose drafts are right always, never or sometimes, and rows to ask them with."""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from tests.fast.engine_fakes import VOCAB, reference_tokens
from tokenmill.core import SamplingParams
from tokenmill.engine.speculation.controller import Offer, SpeculationController, StepLoad
from tokenmill.engine.speculation.proposers import Draft, DraftRow, SequenceKey

__all__ = [
    "ScriptedProposer",
    "always_right",
    "draft_row",
    "eager_guesses",
    "greedy_future",
    "never_right",
    "sometimes_right",
]

Future = Callable[[DraftRow], Sequence[int]]


class ScriptedProposer:
    """Drafts what comes next, wrong where `is_right` says no; keeps what it was told.

    `future` gives the true next tokens of a row; by default the greedy ones of the fake executor.
    `confidence` is the probability that it claims for every token.
    """

    def __init__(
        self, is_right: Callable[[], bool], future: Future | None = None, confidence: float = 0.9
    ) -> None:
        self._is_right = is_right
        self._future = future or greedy_future
        self._confidence = confidence
        self.asked: list[tuple[SequenceKey, int]] = []
        self.observed: list[tuple[SequenceKey, Draft, int]] = []
        self.forgotten: list[SequenceKey] = []

    @property
    def num_accepted(self) -> int:
        return sum(num_accepted for _, _, num_accepted in self.observed)

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        self.asked += [(row.key, row.max_tokens) for row in rows]
        return [self._draft(row) for row in rows]

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        assert 0 <= num_accepted <= len(draft.tokens)
        self.observed.append((key, draft, num_accepted))

    def forget(self, key: SequenceKey) -> None:
        self.forgotten.append(key)

    def _draft(self, row: DraftRow) -> Draft:
        tokens = list(self._future(row))[: row.max_tokens]
        tokens = [token if self._is_right() else (token + 1) % VOCAB for token in tokens]
        return Draft(tuple(tokens), (self._confidence,) * len(tokens))


def always_right(future: Future | None = None) -> ScriptedProposer:
    """Every draft token is the one that comes."""
    return ScriptedProposer(lambda: True, future)


def never_right(future: Future | None = None) -> ScriptedProposer:
    """No draft token is."""
    return ScriptedProposer(lambda: False, future)


def sometimes_right(share: float, seed: int = 0, future: Future | None = None) -> ScriptedProposer:
    """Each token is right with this probability, whatever became of those before it."""
    rng = random.Random(seed)
    return ScriptedProposer(lambda: rng.random() < share, future)


def greedy_future(row: DraftRow) -> list[int]:
    """What the fake executor says next, greedily."""
    return reference_tokens(list(row.tokens), row.max_tokens)


def draft_row(
    tokens: Iterable[int],
    key: SequenceKey = 0,
    *,
    tenant: str = "",
    num_prompt: int = 0,
    max_tokens: int = 4,
    params: SamplingParams | None = None,
    seed: int = 0,
) -> DraftRow:
    """A row; an array is taken as it is, anything else is copied."""
    kept = tokens if isinstance(tokens, array) else array("i", tokens)
    return DraftRow(key, tenant, kept, num_prompt, max_tokens, params or SamplingParams(), seed)


@contextmanager
def eager_guesses() -> Iterator[None]:
    """Verify whatever is proposed: without this the machine's speed decides what is tried."""

    def everything(
        self: SpeculationController, offers: Sequence[Offer], load: StepLoad, *, room: int
    ) -> list[int]:
        lengths = list[int]()
        for each in offers:
            lengths.append(min(len(each.draft.tokens), room))
            room -= lengths[-1]
        return lengths

    with (
        patch.object(SpeculationController, "choose", everything),
        patch.object(SpeculationController, "active", True),
    ):
        yield
