"""Sentences and words as IFEval counts them.

The official checker uses NLTK: Punkt for sentences, Treebank rules for words. The rules here are theirs, also
where they are odd (`e.g.` ends a sentence, and so does the full stop in `**so.**`). What Punkt learned from
newspapers, which words are abbreviations and which begin a sentence if they have a capital, is two short
lists here: there the two can differ.
"""

import json
import re
from importlib.resources import files
from itertools import pairwise
from typing import Final

__all__ = ["count_sentences", "words_of"]

_WORDS: Final[dict[str, list[str]]] = json.loads(
    files("tokenmill.evals.tasks.ifeval").joinpath("sentence_words.json").read_text("utf-8")
)
_LISTS: Final = {name: frozenset(" ".join(lines).split()) for name, lines in _WORDS.items()}
_ABBREVIATIONS: Final = _LISTS["abbreviations"]  # without the last full stop
# With a capital these begin a sentence after an abbreviation; those of _SMALL only after an initial.
_STARTERS: Final = _LISTS["starters"]
_SMALL: Final = _LISTS["small"]
# What ends a word, without white space; the class goes into the patterns below.
_MARK: Final = r"""[)";}\]*:@'({\[\u2018\u2019\u201c\u201d\u00ab\u00bb!?]"""
# The last mark of a word that something follows, and what that is.
_CANDIDATE: Final = re.compile(rf"(?<!\S)\S*[.?!](?=({_MARK}|\s+\S+))")
_TOKEN: Final = re.compile(
    rf"--+|\.\.+|(?![`#&,-]|{_MARK}(?<![!?']))\S+?(?=\s|$|{_MARK}|--|\.\.|,(?:\s|$|{_MARK}|--|\.\.))|\S"
)
_CLOSING: Final = re.compile(
    r"""["')\]}\u2018\u2019\u201c\u201d\u00ab\u00bb]+?(?:\s+|(?=--)|$)""", re.MULTILINE
)
_NUMBER: Final = re.compile(r"-?[.,]?\d[\d,.-]*\.")
_INNER: Final = (";", ":", ",", ".", "!", "?")
_INITIAL: Final = re.compile(r"[^\W\d]\.")

# Marks that are words of their own; none of them counts here.
_APART: Final = re.compile(
    r"""[\u2018-\u201e\u00ab\u00bb\u2012-\u2015`";@#$%&?!*()\[\]{}<>]|--|\.\.+|[:,](?!\d)"""
)
_QUOTED: Final = re.compile(r"(?i)(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)|(?<=[^'\s])'(?=\s|$)")
_CLITIC: Final = re.compile(r"(?<=[^'\s])('(?:[sSmMdD]|ll|LL|re|RE|ve|VE)|n't|N'T)(?=\s|$)")
_JOINED: Final = re.compile(r"(?i)\b(can(?=not\b)|(?:gim|lem)(?=me\b)|(?:gon|wan)(?=na\b)|got(?=ta\b))")


def count_sentences(text: str) -> int:
    """How many sentences a text has; a rest without an end counts as one."""
    count = start = 0
    for match in _CANDIDATE.finditer(text):
        tokens = _TOKEN.findall(match.group() + match.group(1))
        if not any(_is_end(token, after) for token, after in pairwise(tokens)):
            continue
        count += bool(text[start : match.end()].strip())
        closing = _CLOSING.match(text, match.end())
        start = closing.end() if closing else match.end()
    return count + bool(text[start:].strip())


def _is_end(token: str, after: str) -> bool:
    """Whether a sentence ends with `token`, which `after` follows."""
    if token in (".", "?", "!"):
        return True
    if not token.endswith("."):
        return False
    if token.endswith(".."):
        return _begins(after)
    short = token[:-1].lower()
    is_short = short in _ABBREVIATIONS or short.rpartition("-")[2] in _ABBREVIATIONS
    if _INITIAL.fullmatch(token):
        return not is_short and (not after[:1].isalpha() or _begins(after, _STARTERS | _SMALL))
    if _NUMBER.fullmatch(token):
        return not after[:1].islower() and after not in _INNER
    return not is_short or _begins(after)


def _begins(word: str, starters: frozenset[str] = _STARTERS) -> bool:
    return word[:1].isupper() and word.rstrip(".").lower() in starters


def words_of(text: str) -> list[str]:
    """Words without marks: hyphenated words are one, `DON'T` is two, `'S` stands alone."""
    text = _QUOTED.sub(" ", _APART.sub(" ", text))
    return _JOINED.sub(r"\1 ", _CLITIC.sub(r" \1", text)).split()
