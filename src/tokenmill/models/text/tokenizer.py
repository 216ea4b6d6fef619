"""Text to token ids and back, over the `tokenizers` library: byte-level BPE and SentencePiece vocabularies.

What this adds to the library: text from a user can never become a control token, bytes of single tokens
for streaming (a character may span tokens), a rebuild from GGUF fields, and bounds on what a file may ask
for. Encoding equals the library's own, text by text and between control tokens; a control token is found in
the raw text, longest first.

A byte-level vocabulary with all bytes and no normaliser gives back every text exactly. SentencePiece
rewrites spaces: one is put in front of a text, and taken away when a text is decoded from its start. Tokens
that continue a text (`encode_after`, `token_bytes`, a stream) have no such space added or taken.
"""

import ctypes
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import tokenizers

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.text.charsmap import check_charsmaps
from tokenmill.models.text.gguf_fields import gguf_tokenizer
from tokenmill.models.text.pipeline import guarded, read_pipeline

__all__ = ["Tokenizer"]

_MAX_FILE_BYTES: Final = 64 << 20
_MAX_TOKEN_CHARS: Final = 4096
_LONG_CONTENT: Final = re.compile(rf'"content"\s*:\s*"(?:[^"\\]|\\.){{{_MAX_TOKEN_CHARS}}}')
_LONG_TEXT: Final = 1024
# White space as Unicode and the library have it; `str.strip` would take four control characters more.
_WHITE: Final = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

# Of glibc; other C libraries have none.
_MALLOC_TRIM: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


class Tokenizer:
    """Encodes and decodes one model's text. Immutable after construction, safe to share between threads."""

    def __init__(self, inner: tokenizers.Tokenizer, source: str) -> None:
        self.source = source
        self._parts = parts = read_pipeline(inner, source)
        # Kept as text only if the pipeline is not the whole of it any more.
        self._json = None if parts.start is inner else inner.to_str().encode()
        self._control_ids = frozenset(parts.controls.values())
        self._pattern = _any_of(parts.controls)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises ModelFormatError if it is damaged or of a kind not supported."""
        try:
            size = path.stat().st_size
            text = path.read_text("utf-8") if size <= _MAX_FILE_BYTES else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFormatError(f"{path}: cannot be read ({error})") from error
        if not text:
            raise ModelFormatError(f"{path}: has {size} bytes, expected 1 to {_MAX_FILE_BYTES}")
        if _LONG_CONTENT.search(text):  # the library takes 75 bytes for each of theirs
            raise ModelFormatError(f"{path}: added_tokens has a token of over {_MAX_TOKEN_CHARS} characters")
        check_charsmaps(text, str(path))
        tokenizer = cls(guarded(lambda: tokenizers.Tokenizer.from_str(text), str(path)), str(path))
        _return_freed_memory()
        return tokenizer

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> "Tokenizer":
        """Rebuild the tokenizer from a GGUF file's `tokenizer.ggml` fields.

        Raises ModelFormatError naming the field that is missing, inconsistent or not supported.
        """
        return cls(gguf_tokenizer(gguf), str(gguf.path))

    @property
    def vocab_size(self) -> int:
        """Number of token ids; the model's vocabulary may be larger (padding), never smaller."""
        return len(self._parts.token_bytes)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text."""
        return dict(self._parts.controls)

    @property
    def prompt_prefix(self) -> tuple[int, ...]:
        """The tokens that the model wants in front of a prompt: often none, else one for "text begins".

        A chat template writes them itself.
        """
        return self._parts.prompt_prefix

    def is_special(self, token_id: int) -> bool:
        """True for a control token, which stands for no text."""
        return token_id in self._control_ids

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of a text, nothing added. Control tokens in it are plain text unless allowed.

        `allow_special` is for text that tokenmill wrote itself, such as a rendered chat template.
        """
        if not allow_special:
            return _ids(self._parts.start, text)
        return self.encode_marked(text, mark="")

    def encode_after(self, text: str) -> list[int]:
        """Token ids of plain text that continues another: their bytes are those of `text`, if lossless."""
        return _ids(self._parts.after, text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a plain text to be continued, with what the model wants in front of it."""
        return [*self.prompt_prefix, *self.encode(text)]

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of `text` with control tokens, after which every `mark` is deleted from the plain parts.

        A mark inside the text of a control token thus makes it plain text.
        """
        ids: list[int] = []
        at = 0
        strip_left = False
        for match in self._pattern.finditer(text):
            control = match.group()
            plain = _without(text[at : match.start()], mark)
            plain = plain.lstrip(_WHITE) if strip_left else plain
            strip_right, strip_left = self._parts.strips[control]
            ids += self._plain_ids(plain.rstrip(_WHITE) if strip_right else plain, at)
            ids.append(self._parts.controls[control])
            at = match.end()
        plain = _without(text[at:], mark)
        return ids + self._plain_ids(plain.lstrip(_WHITE) if strip_left else plain, at)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids, from its start; control tokens vanish unless kept.

        Bytes that are no UTF-8 become U+FFFD. The space that encoding put in front is taken away again.
        """
        skipped = self._control_ids if skip_special else frozenset()
        tokens = [self.token_bytes(each) for each in ids if each not in skipped]
        if tokens and self._parts.lead == "first token":
            tokens[0] = tokens[0].replace(b" ", b"")
        data = b"".join(tokens)
        if self._parts.lead == "one space":
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for in a text; b"" for an id that only pads the vocabulary."""
        table = self._parts.token_bytes
        return table[token_id] if 0 <= token_id < len(table) else b""

    def to_json(self) -> str:
        """The `tokenizer.json` of this tokenizer."""
        return str(self._parts.start.to_str()) if self._json is None else self._json.decode()

    def _plain_ids(self, plain: str, at: int) -> list[int]:
        """Token ids of a plain part of a text that began `at` characters before it."""
        return self.encode(plain) if at == 0 or self._parts.restarts else self.encode_after(plain)


def _ids(inner: tokenizers.Tokenizer, text: str) -> list[int]:
    """Token ids of a text. Other threads run meanwhile if it is long: of the library's ways only that for
    batches lets them.
    """
    if len(text) < _LONG_TEXT:
        return list(inner.encode(text, add_special_tokens=False).ids)
    return list(inner.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _without(text: str, mark: str) -> str:
    return text.replace(mark, "") if mark else text


def _return_freed_memory() -> None:
    """Give back what parsing a vocabulary took: glibc would keep some 40 MB for the rest of the process."""
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing if there are none."""
    longest_first = sorted(texts, key=lambda text: -len(text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
