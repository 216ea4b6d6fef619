"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), equal to the package `rouge-score` without stemming.

Words are runs of the letters a to z and digits, in lower case; so texts in other scripts have no words and
score 0.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

__all__ = ["best_rouge", "rouge"]

_WORD: Final = re.compile(r"[a-z0-9]+")


def rouge(reference: str, text: str) -> dict[str, float]:
    """F1 of words (`rouge1`), of pairs of words (`rouge2`) and of the longest common subsequence
    (`rougeL`).
    """
    wanted, said = _WORD.findall(reference.lower()), _WORD.findall(text.lower())
    return {
        "rouge1": _ngram_f1(wanted, said, 1),
        "rouge2": _ngram_f1(wanted, said, 2),
        "rougeL": _f1(_common_length(wanted, said), len(wanted), len(said)),
    }


def best_rouge(references: Sequence[str], text: str) -> dict[str, float]:
    """For each kind the best over several references."""
    scores = [rouge(reference, text) for reference in references]
    return {name: max(score[name] for score in scores) for name in scores[0]}


def _ngram_f1(wanted: Sequence[str], said: Sequence[str], n: int) -> float:
    counts = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (wanted, said)]
    return _f1((counts[0] & counts[1]).total(), counts[0].total(), counts[1].total())


def _f1(common: int, num_wanted: int, num_said: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / num_said, common / num_wanted
    return 2 * precision * recall / (precision + recall)


def _common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit for each place of `left` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(left)) - 1
    row = full
    for word in right:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(left) - row.bit_count()
