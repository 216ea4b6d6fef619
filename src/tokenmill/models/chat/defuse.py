"""Text that cannot become part of a control token, whatever a chat template puts around it.

A mark, a character that occurs nowhere else, is put into every piece of text that is a control token, or
could be completed to one; it breaks the match, and is deleted before what is left is encoded as plain text.
Upper and lower case count as equal, because a template may change them. What the marks cannot see through
is a template that deletes text from the middle of a string and so joins its two sides.
"""

import functools
import re
from collections.abc import Iterable
from itertools import chain, islice

from tokenmill.core import ModelFormatError, UsageError

__all__ = ["Defuser", "unused_character"]


def unused_character(texts: Iterable[str]) -> str:
    """A character that is in none of the texts, and that JSON and `repr` leave as it is if they can.

    Rare ideographs first, of which a conversation that uses all is hard to imagine, then private use.
    """
    given = list(texts)
    candidates = map(chr, chain(range(0x2A6D6, 0x20000, -1), range(0x10FFFD, 0xF0000, -1)))
    for char in islice(candidates, 16):  # one of them will do, and a search is quicker than a set
        if not any(char in text for text in given):
            return char
    used = set().union(*given)
    for char in candidates:
        if char not in used:
            return char
    raise UsageError("the conversation uses every character there is", hint="shorten it")


class Defuser:
    """Puts `mark` into text, for a vocabulary with these control tokens."""

    def __init__(self, specials: Iterable[str], mark: str) -> None:
        self._parts = _parts(frozenset(specials))
        self._mark = mark

    def __call__(self, text: str) -> str:
        """`text` with the mark inside every control token, and at an end that could complete one."""
        parts, mark = self._parts, self._mark
        while parts.pattern.search(text):  # again, because occurrences may overlap
            text = parts.pattern.sub(lambda match: f"{match[0][0]}{mark}{match[0][1:]}", text)
        core = text.strip()
        if not core:
            return text
        begin = text.find(core)
        lower = core.lower()
        opens = any(lower[-size:] in parts.starts for size in parts.sizes) or lower in parts.text
        closes = any(lower[:size] in parts.ends for size in parts.sizes)
        inner = (mark if closes else "") + core + (mark if opens else "")
        return text[:begin] + inner + text[begin + len(core) :]


class _Parts:
    """What to look for: whole control tokens, how they start and end, all of them as one text."""

    def __init__(self, specials: frozenset[str]) -> None:
        if any(len(special) < 2 for special in specials):
            raise ModelFormatError("the tokenizer has a control token shorter than two characters")
        lower = {special.lower() for special in specials}
        longest_first = sorted(specials, key=lambda special: -len(special))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)", re.IGNORECASE)
        self.starts = frozenset(each[:size] for each in lower for size in range(1, len(each)))
        self.ends = frozenset(each[-size:] for each in lower for size in range(1, len(each)))
        self.sizes = range(1, max(map(len, lower), default=1))
        self.text = "\n".join(sorted(lower))


@functools.lru_cache(maxsize=8)
def _parts(specials: frozenset[str]) -> _Parts:
    """Kept, because a vocabulary may have a thousand control tokens."""
    return _Parts(specials)
