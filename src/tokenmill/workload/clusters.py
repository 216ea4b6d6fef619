"""Which rows belong together: those of one conversation, and those that ask nearly the same.

What trains a model must not be what certifies it in other words. Texts are compared without their system
prompts, by 5-character pieces. Who may be alike is seen by MinHash (Broder 1997) on 64 hashes, which are 256
bytes a row however long its text is, and then counted: of pairs that are 0.7 alike 99 % are found, of those
at 0.8 all but one in 10,000. Rewordings with other words are not found.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenmill.workload.row import Row, prompt_text

__all__ = ["clusters", "signatures"]

_PIECE: Final = 5
_HASHES: Final = 64
_BAND: Final = 4
_MAX_CHARS: Final = 1 << 15
_LOOKED_AT: Final = 8
"""Rows of a bucket with which a new one is compared."""
_NOISE: Final = 0.2
"""More than three standard deviations of an estimate from 64 hashes."""
_MOST_TURNS: Final = 50
"""A conversation with more rows than this, and than a tenth of all, is no conversation: a service asks."""
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)


def clusters(rows: Sequence[Row], near: float) -> list[int]:
    """For each row the first row of its cluster. Rows are in one if they share a conversation, ask the same,
    or have `near` of their pieces in common (Jaccard, 0 to 1), also by way of others.
    """
    heads = _Heads(len(rows))
    most = max(_MOST_TURNS, len(rows) // 10)
    turns = Counter(row.conversation for row in rows)
    by_name: dict[str, int] = {}
    texts: list[str] = []
    by_text: dict[str, int] = {}
    for at, row in enumerate(rows):
        if row.conversation and turns[row.conversation] <= most:
            heads.join(at, by_name.setdefault(row.conversation, at))
        text = _plain(prompt_text(row.request, with_system=False))
        first = by_text.setdefault(text, at)
        heads.join(at, first)
        if first == at:
            texts.append(text)
    places = list(by_text.values())
    for first, second in _near_pairs(texts, near):
        heads.join(places[first], places[second])
    return [heads.of(at) for at in range(len(rows))]


class _Heads:
    """Disjoint sets of numbers, each named by its least."""

    def __init__(self, num: int) -> None:
        self._up = list(range(num))

    def of(self, at: int) -> int:
        while self._up[at] != at:
            self._up[at] = self._up[self._up[at]]
            at = self._up[at]
        return at

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self.of(first), self.of(second)))
        self._up[high] = low


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures `[T, 64]` of texts: the share of equal columns estimates the Jaccard likeness."""
    factors = np.random.Generator(np.random.PCG64(20_261_122)).integers(
        1, 1 << 62, _HASHES, np.uint64
    ) | np.uint64(1)
    found = np.empty((len(texts), _HASHES), np.uint32)
    for at, text in enumerate(texts):
        mixed = _pieces(text)[:, None] * factors
        found[at] = (mixed >> np.uint64(32)).min(axis=0)
    return found


def _near_pairs(texts: Sequence[str], near: float) -> Iterator[tuple[int, int]]:
    """Pairs with at least `near` of their pieces in common, out of those with four equal columns in a row."""
    rows = signatures(texts)
    for start in range(0, _HASHES, _BAND):
        buckets: dict[bytes, list[int]] = {}
        band = np.ascontiguousarray(rows[:, start : start + _BAND])
        for at in range(len(rows)):
            bucket = buckets.setdefault(band[at].tobytes(), [])
            for other in bucket:
                estimate = float((rows[at] == rows[other]).mean())
                if estimate >= near - _NOISE and _likeness(texts[at], texts[other]) >= near:
                    yield at, other
                    break
            else:
                if len(bucket) < _LOOKED_AT:
                    bucket.append(at)


def _likeness(first: str, second: str) -> float:
    """The share of pieces in common."""
    pieces, others = np.unique(_pieces(first)), np.unique(_pieces(second))
    common = len(np.intersect1d(pieces, others, assume_unique=True))
    return common / (len(pieces) + len(others) - common)


def _plain(text: str) -> str:
    """Without case, odd forms of characters and runs of spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _pieces(text: str) -> NDArray[np.uint64]:
    """A hash for each piece of the beginning of a text, in order; a shorter text is one piece."""
    data = text[:_MAX_CHARS].encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(data, np.uint32).astype(np.uint64)
    size = max(1, min(_PIECE, len(codes)))
    num = max(1, len(codes) - size + 1)
    mixed = np.zeros(num, np.uint64)
    for at in range(min(size, len(codes))):
        mixed = (mixed ^ codes[at : at + num]) * _ODD
        mixed ^= mixed >> np.uint64(29)
    return mixed
