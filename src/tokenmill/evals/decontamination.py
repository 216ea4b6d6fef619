"""Is evaluation data in the training data? Three searches, the strictest that finds a row names it.

    exact       the same words
    ngram       13 words in a row in common, as GPT-3 was checked (Brown et al. 2020, appendix C)
    near        at least 0.7 of the 5-character pieces of both in common (Jaccard)

The evaluation rows are held in memory, the training rows pass by one at a time. Near-duplicates are found by
prefix filtering (Chaudhuri, Ganti and Kaushik 2006), which misses none, where MinHash misses some. Rewordings
and translations are not found. Words are letters and digits, without case.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import ceil
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenmill.core import UsageError

__all__ = ["Contamination", "Decontaminator", "Kind", "Overlap", "TextRow", "decontaminate"]

Kind: TypeAlias = Literal["exact", "ngram", "near"]

_RANK: Final = {"near": 0, "ngram": 1, "exact": 2}
_PIECE: Final = 5
_TEMPLATE_ROWS: Final = 10
"""Words in a row that more evaluation rows than these share are a template of the data, and no evidence."""
_WORD: Final = re.compile(r"\w+")
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)

_Hashes: TypeAlias = NDArray[np.uint64]


@dataclass(frozen=True)
class TextRow:
    """A row of data: where it stands, and its text."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """An evaluation row and a training row that has it. `share` is the part of the evaluation row's runs of
    words that is there for "ngram", else how alike the two are; `excerpt` what they share.
    """

    kind: Kind
    eval_row: str
    train_row: str
    share: float
    excerpt: str


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """For each evaluation row that was found, its worst overlap, the worst first; and how many training rows
    had any.
    """

    num_eval_rows: int
    num_train_rows: int
    num_train_rows_found: int
    num_template_grams: int
    overlaps: tuple[Overlap, ...]


class Decontaminator:
    """The evaluation rows, ready to be looked for."""

    def __init__(self, rows: Iterable[TextRow], *, ngram: int = 13, near: float = 0.7) -> None:
        """Raises UsageError if there are no rows, or a bound means nothing."""
        if ngram < 2 or not 0.1 <= near <= 1:
            raise UsageError(
                f"ngram {ngram} and near {near:g} mean nothing", hint="ngram >= 2 and 0.1 <= near <= 1"
            )
        self.ngram = ngram
        self.near = near
        self._rows = [(row.name, _words(row.text)) for row in rows]
        if not self._rows:
            raise UsageError("there are no evaluation rows", hint="give a file with at least one")
        self._exact = {" ".join(words): at for at, (_, words) in reversed([*enumerate(self._rows)])}
        grams = [np.unique(_grams(words, ngram)) for _, words in self._rows]
        self._grams, self.num_template_grams = _without_templates(grams)
        self._num_grams = np.array([len(each) for each in grams])
        self._postings = _postings(self._grams)
        self._pieces = [_pieces(words) for _, words in self._rows]
        # Rare pieces first: few rows share them, so few candidates are compared in full.
        pieces, counts = np.unique(np.concatenate(self._pieces), return_counts=True)
        self._known = pieces
        self._place = np.argsort(np.lexsort((pieces, counts)))
        self._prefixes = _postings([self._prefix(each) for each in self._pieces])

    @property
    def num_rows(self) -> int:
        """Evaluation rows."""
        return len(self._rows)

    def find(self, row: TextRow) -> list[Overlap]:
        """The evaluation rows that a training row has, each once, with the strictest search that finds it."""
        words = _words(row.text)
        found: dict[int, Overlap] = {}
        for at, share in self._near_rows(words):
            found[at] = self._overlap("near", at, row, share, " ".join(self._rows[at][1]))
        for at, share, excerpt in self._gram_rows(words):
            found[at] = self._overlap("ngram", at, row, share, excerpt)
        text = " ".join(words)
        if words and text in self._exact:
            # Equal evaluation rows are all near to each other: each is found, each as exact.
            for at in found.keys() | {self._exact[text]}:
                if self._rows[at][1] == words:
                    found[at] = self._overlap("exact", at, row, 1.0, text)
        return [found[at] for at in sorted(found)]

    def _overlap(self, kind: Kind, at: int, row: TextRow, share: float, excerpt: str) -> Overlap:
        shown = excerpt if len(excerpt) <= 160 else f"{excerpt[:157]}..."
        return Overlap(kind=kind, eval_row=self._rows[at][0], train_row=row.name, share=share, excerpt=shown)

    def _gram_rows(self, words: list[str]) -> Iterator[tuple[int, float, str]]:
        """Rows that share a run of words, with the share of theirs and the first one."""
        grams = _grams(words, self.ngram)
        hits: dict[int, int] = {}
        first: dict[int, int] = {}
        _, places = np.unique(grams, return_index=True)
        for place in sorted(places.tolist()):
            for at in self._postings.get(int(grams[place]), ()):
                hits[at] = hits.get(at, 0) + 1
                first.setdefault(at, place)
        for at, count in hits.items():
            excerpt = " ".join(words[first[at] : first[at] + self.ngram])
            yield at, count / int(self._num_grams[at]), excerpt

    def _near_rows(self, words: list[str]) -> Iterator[tuple[int, float]]:
        """Rows whose pieces are as alike as `near` asks."""
        pieces = _pieces(words)
        candidates = {at for piece in self._prefix(pieces).tolist() for at in self._prefixes.get(piece, ())}
        for at in candidates:
            other = self._pieces[at]
            if not self.near * len(pieces) <= len(other) + 1e-9 <= len(pieces) / self.near + 2e-9:
                continue
            common = len(np.intersect1d(pieces, other, assume_unique=True))
            share = common / (len(pieces) + len(other) - common)
            if share >= self.near:
                yield at, share

    def _prefix(self, pieces: _Hashes) -> _Hashes:
        """Pieces of which one must be in common: the first in the order of rarity, unknown ones before."""
        if not len(self._known):
            return self._known
        length = len(pieces) - ceil(self.near * len(pieces) - 1e-9) + 1
        spots = np.searchsorted(self._known, pieces)
        spots[spots == len(self._known)] = 0
        is_known = self._known[spots] == pieces
        rarest = np.argsort(self._place[spots[is_known]])
        known: _Hashes = pieces[is_known][rarest]
        return known[: max(0, length - int((~is_known).sum()))]


def decontaminate(
    train: Iterable[TextRow], evaluation: Iterable[TextRow], *, ngram: int = 13, near: float = 0.7
) -> Contamination:
    """Look for every evaluation row in all training rows. Raises UsageError as `Decontaminator` does."""
    index = Decontaminator(evaluation, ngram=ngram, near=near)
    worst: dict[str, Overlap] = {}
    num_rows = num_found = 0
    for row in train:
        found = index.find(row)
        num_rows += 1
        num_found += bool(found)
        for each in found:
            before = worst.get(each.eval_row)
            if before is None or (_RANK[before.kind], before.share) < (_RANK[each.kind], each.share):
                worst[each.eval_row] = each
    return Contamination(
        num_eval_rows=index.num_rows,
        num_train_rows=num_rows,
        num_train_rows_found=num_found,
        num_template_grams=index.num_template_grams,
        overlaps=tuple(sorted(worst.values(), key=lambda each: (-_RANK[each.kind], -each.share))),
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _grams(words: list[str], size: int) -> _Hashes:
    """A hash for each run of `size` words, in order; none if there are fewer words."""
    return _rolled(np.array([_word_hash(word) for word in words], np.uint64), size)


def _pieces(words: list[str]) -> _Hashes:
    """A hash for each different piece of the text, sorted; a shorter text is one piece."""
    text = " ".join(words)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    return np.unique(_rolled(codes, max(1, min(_PIECE, len(codes)))))


def _rolled(codes: _Hashes, size: int) -> _Hashes:
    """A hash of each `size` codes in a row, in order."""
    num = len(codes) - size + 1
    if num < 1:
        return np.empty(0, np.uint64)
    mixed = np.zeros(num, np.uint64)
    for at in range(size):
        mixed = (mixed ^ codes[at : at + num]) * _ODD
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _without_templates(rows: list[_Hashes]) -> tuple[list[_Hashes], int]:
    """The rows without what too many of them share, and how many hashes that is."""
    hashes, counts = np.unique(np.concatenate(rows), return_counts=True)
    common = hashes[counts > _TEMPLATE_ROWS]
    return [each[~np.isin(each, common)] for each in rows], len(common)


def _postings(rows: list[_Hashes]) -> dict[int, list[int]]:
    """Which rows have each hash."""
    found: dict[int, list[int]] = {}
    for at, hashes in enumerate(rows):
        for each in hashes.tolist():
            found.setdefault(each, []).append(at)
    return found
