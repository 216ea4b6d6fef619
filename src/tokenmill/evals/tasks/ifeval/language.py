"""Which language a text is in, in pure Python: by script, and by the commonest words where scripts are
shared.

It knows the thirty languages of IFEval, which is what it is for. The official checker uses the package
langdetect (character n-grams, with random draws); tests/slow/test_ifeval_oracle.py compares the two where
that is installed. Scraps, names and mixtures are guesses in both.
"""

import json
import string
import unicodedata
from collections import Counter
from importlib.resources import files
from typing import Final

__all__ = ["language_of"]

_MAX_CHARS: Final = 20_000
_MARKS: Final = string.punctuation + "\u201c\u201d\u2018\u2019\u00ab\u00bb\u2026\u060c\u061f\u06d4\u0964"
_SCRIPTS: Final = {
    "BENGALI": "bn",
    "THAI": "th",
    "TAMIL": "ta",
    "TELUGU": "te",
    "HANGUL": "ko",
    "HEBREW": "he",
    "KANNADA": "kn",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "MALAYALAM": "ml",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
}
# Common words of the languages that share a script.
_WORDS: Final[dict[str, dict[str, str]]] = json.loads(
    files("tokenmill.evals.tasks.ifeval").joinpath("common_words.json").read_text("utf-8")
)
_LISTS: Final = {
    script: {language: frozenset(words.split()) for language, words in languages.items()}
    for script, languages in _WORDS.items()
}


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language; None if it has no letters of a known script."""
    text = text[:_MAX_CHARS].lower()
    counts = Counter(_script(char) for char in text if char.isalpha())
    if counts["HIRAGANA"] + counts["KATAKANA"] > 0.1 * counts["CJK"] > 0:
        return "ja"
    script = max(counts, key=counts.__getitem__, default="")
    if script in _SCRIPTS:
        return _SCRIPTS[script]
    if script not in _LISTS:
        return None
    words = Counter(word.strip(_MARKS) for word in text.split())
    hits = {
        language: sum(count for word, count in words.items() if word in common)
        for language, common in _LISTS[script].items()
    }
    return max(hits, key=hits.__getitem__)


def _script(char: str) -> str:
    return unicodedata.name(char, "").partition(" ")[0]
