"""Token by token to text, for streams: whole characters only, and never a piece of a stop string.

Text is what comes out of the tokens' bytes read as UTF-8. Bytes that can never become a character turn
into U+FFFD at once; bytes that may still become one wait for the next token. If the sequence ends there,
they are dropped: text never ends in half a character, nor in a replacement for one.

A stream continues its prompt, so a token's bytes are shown as they are: the space with which a word of a
SentencePiece vocabulary begins is part of the text. Prompt and stream together are what `Tokenizer.decode`
makes of all the tokens.

Token ids, and so usage counts, are not changed by any of this.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = ["Detokenizer", "Piece", "StopMatcher"]


class Piece(NamedTuple):
    """New text, and whether a stop string ended it, and which."""

    text: str
    stopped: bool
    stop: str = ""


class StopMatcher:
    """Cuts a stream of text before the stop string that is complete first (of two, the longer one).

    The rule speaks of characters only, so the outcome does not depend on how the text was split. Text
    is withheld only while it is a proper prefix of a stop string. A stop string that becomes complete while
    it may not stop the text is text.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._first_chars = frozenset(each[0] for each in stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str, *, may_stop: bool = True) -> Piece:
        """Add text; get back what can be shown."""
        assert not self._stopped, "text after a stop string"
        if not self._held and self._first_chars.isdisjoint(text):
            return Piece(text, False)
        num_before, text = len(self._held), self._held + text
        # What was complete before this text did not stop it then.
        found = [(text.find(stop, max(0, num_before - len(stop) + 1)), stop) for stop in self._stop]
        ends = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
        if ends and may_stop:
            self._held, self._stopped = "", True
            _, at, stop = min(ends)
            return Piece(text[:at], True, stop)
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return Piece(text[: len(text) - num_held], False)

    def finish(self) -> str:
        """The withheld text, which turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """Turns the tokens of one sequence into text. `token_bytes` gives the bytes of one token.

    Stop strings that are complete within the first `min_tokens` tokens do not count.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], stop: tuple[str, ...] = (), min_tokens: int = 0
    ) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = StopMatcher(stop) if stop else None
        self._num_unstoppable = min_tokens

    def push(self, token_id: int) -> Piece:
        """Add a token; get back the text that can be shown now."""
        data = self._token_bytes(token_id)
        text = self._decoder.decode(data)
        if data[-1:] >= b"\x80":
            held = self._decoder.getstate()[0]
            if held[:1] == b"\xed" and held[1:] >= b"\xa0":
                # The first half of an encoded surrogate: no character, but the decoder waits for the rest.
                text += self._decoder.decode(b"", True)
        may_stop = self._num_unstoppable == 0
        self._num_unstoppable -= not may_stop
        return self._matcher.push(text, may_stop=may_stop) if self._matcher else Piece(text, False)

    @property
    def may_stop(self) -> bool:
        """True if a token's text may end the sequence."""
        return self._matcher is not None

    def push_all(self, token_ids: Sequence[int]) -> str:
        """Add tokens of which none may stop the text; the same text as of one after the other."""
        assert self._matcher is None, "a stop string is looked for token by token"
        data = b"".join(map(self._token_bytes, token_ids))
        if b"\xed" in data or self._decoder.getstate()[0].startswith(b"\xed"):
            return "".join([self.push(token_id).text for token_id in token_ids])
        return self._decoder.decode(data)

    def finish(self) -> str:
        """The text that waited for a stop string; an incomplete character is dropped."""
        self._decoder.reset()
        return self._matcher.finish() if self._matcher else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
