"""Text to token ids and back, over the `tokenizers` library, for byte-level BPE vocabularies.

What this adds to the library: text from a user can never become a control token, bytes of single tokens
for streaming (a character may span tokens), a rebuild from GGUF fields, and bounds on what a file may ask
for. Byte-level BPE only: it gives back every text exactly. SentencePiece vocabularies, which rewrite
spaces, are refused with an error rather than read approximately.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.gguf import GgufFile

__all__ = ["Tokenizer"]

_MAX_FILE_BYTES: Final = 64 << 20
_MAX_SPECIAL_TOKENS: Final = 4096
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_T = TypeVar("_T")


class Tokenizer:
    """Encodes and decodes one model's text. Immutable after construction, safe to share between threads."""

    def __init__(self, inner: tokenizers.Tokenizer, source: str) -> None:
        self._inner = inner
        self.source = source
        added = inner.get_added_tokens_decoder()
        specials = {token.content: id for id, token in added.items() if token.special}
        _check_pipeline(inner, specials, source)
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self._specials = specials
        self._special_ids = frozenset(specials.values())
        self._pattern = _any_of(specials)
        self._strips = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        self._bytes = _token_bytes(inner, {id: token.content for id, token in added.items()}, source)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises ModelFormatError if it is damaged or not byte-level BPE."""
        try:
            size = path.stat().st_size
            text = path.read_text("utf-8") if size <= _MAX_FILE_BYTES else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFormatError(f"{path}: cannot be read ({error})") from error
        if not text:
            raise ModelFormatError(f"{path}: has {size} bytes, expected 1 to {_MAX_FILE_BYTES}")
        return cls(_guarded(lambda: tokenizers.Tokenizer.from_str(text), str(path)), str(path))

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> "Tokenizer":
        """Rebuild the tokenizer from a GGUF file's `tokenizer.ggml` fields.

        Raises ModelFormatError naming the field that is missing, inconsistent or not supported.
        """
        tokens, merges, types = _gguf_vocabulary(gguf)
        source = str(gguf.path)
        kind = gguf.metadata.get("tokenizer.ggml.pre")
        if not isinstance(kind, str) or kind not in _PRE_TOKENIZERS:
            raise ModelFormatError(
                f"{source}: tokenizer.ggml.pre is {kind!r}", hint=f"supported: {', '.join(_PRE_TOKENIZERS)}"
            )
        vocabulary = {token: id for id, token in enumerate(tokens)}
        inner = _guarded(lambda: tokenizers.Tokenizer(models.BPE(vocabulary, merges)), source)
        inner.pre_tokenizer = _PRE_TOKENIZERS[kind]()
        inner.decoder = decoders.ByteLevel()
        for token, token_type in zip(tokens, types, strict=True):
            if token_type in (_CONTROL, _USER_DEFINED):
                is_special = token_type == _CONTROL
                inner.add_tokens([tokenizers.AddedToken(token, special=is_special, normalized=False)])
        return cls(inner, source)

    @property
    def vocab_size(self) -> int:
        """Number of token ids; the model's vocabulary may be larger (padding), never smaller."""
        return len(self._bytes)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text."""
        return dict(self._specials)

    def is_special(self, token_id: int) -> bool:
        """True for a control token, which stands for no text."""
        return token_id in self._special_ids

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added. Control tokens in it are plain text unless allowed.

        `allow_special` is for text that tokenmill wrote itself, such as a rendered chat template.
        """
        if not allow_special:
            return list(self._inner.encode(text, add_special_tokens=False).ids)
        return self.encode_marked(text, mark="")

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of `text` with control tokens, after which every `mark` is deleted from the plain parts.

        A mark inside the text of a control token thus makes it plain text.
        """
        ids: list[int] = []
        at = 0
        strip_left = False
        for match in self._pattern.finditer(text):
            special = match.group()
            plain = _without(text[at : match.start()], mark)
            plain = plain.lstrip() if strip_left else plain
            strip_right, strip_left = self._strips[special]
            ids += self.encode(plain.rstrip() if strip_right else plain)
            ids.append(self._specials[special])
            at = match.end()
        plain = _without(text[at:], mark)
        return ids + self.encode(plain.lstrip() if strip_left else plain)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, control tokens vanish unless kept."""
        skipped = self._special_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(each) for each in ids if each not in skipped)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; b"" for an id that only pads the model's vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    @property
    def gguf_pre(self) -> str | None:
        """GGUF's name of this pre-tokenizer (`tokenizer.ggml.pre`); None if it has none."""
        own = _splitting(self._inner.pre_tokenizer)
        return next((name for name, make in _PRE_TOKENIZERS.items() if _splitting(make()) == own), None)

    def to_json(self) -> str:
        """The `tokenizer.json` of this tokenizer."""
        return str(self._inner.to_str())


def _without(text: str, mark: str) -> str:
    return text.replace(mark, "") if mark else text


def _guarded(build: Callable[[], _T], source: str) -> _T:
    """Call into the library; its errors, and its panics (which are no Exception), name the file."""
    try:
        return build()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ModelFormatError(f"{source}: no usable tokenizer ({str(error)[:200]})") from error


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _gpt2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


# Values of `tokenizer.ggml.pre`. An unknown one is refused: the wrong split gives fluent rubbish.
_PRE_TOKENIZERS: Final[Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]]] = {
    "smollm": _smollm_pre_tokenizer,
    "gpt-2": _gpt2_pre_tokenizer,
}


def _gguf_vocabulary(gguf: GgufFile) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    source, field = str(gguf.path), "tokenizer.ggml"
    metadata = gguf.metadata
    if metadata.get(f"{field}.model") != "gpt2":
        raise ModelFormatError(f"{source}: {field}.model is not gpt2 (byte-level BPE)")
    if metadata.get(f"{field}.add_space_prefix", False):
        raise ModelFormatError(f"{source}: {field}.add_space_prefix is not supported")
    tokens = _strings(metadata.get(f"{field}.tokens"), f"{source}: {field}.tokens")
    if len(set(tokens)) != len(tokens):
        raise ModelFormatError(f"{source}: {field}.tokens has a token twice")
    pairs = [
        line.split(" ") for line in _strings(metadata.get(f"{field}.merges"), f"{source}: {field}.merges")
    ]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelFormatError(f"{source}: {field}.merges has an entry that is no pair")
    types = metadata.get(f"{field}.token_type")
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise ModelFormatError(f"{source}: {field}.token_type is not one number a token")
    if np.count_nonzero(types != _NORMAL) > _MAX_SPECIAL_TOKENS:
        raise ModelFormatError(f"{source}: {field}.token_type has over {_MAX_SPECIAL_TOKENS} special tokens")
    return tokens, [(left, right) for left, right in pairs], types.tolist()


def _strings(value: object, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ModelFormatError(f"{field} is missing or no list of strings")
    return value


def _check_pipeline(inner: tokenizers.Tokenizer, specials: Mapping[str, int], source: str) -> None:
    """Refuse what would not give text back exactly, and what makes a control token hard to tell from text."""
    pre_tokenizer = _settings(inner.pre_tokenizer)
    steps = [pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]
    kinds = {step.get("type") for step in steps}
    if not isinstance(inner.model, models.BPE) or "ByteLevel" not in kinds or "Metaspace" in kinds:
        raise ModelFormatError(f"{source}: not a byte-level BPE tokenizer", hint="no other kind is supported")
    if any(step.get("add_prefix_space") for step in steps):
        raise ModelFormatError(f"{source}: add_prefix_space is not supported")
    if _settings(inner.decoder).get("type") != "ByteLevel":
        raise ModelFormatError(f"{source}: the decoder is not ByteLevel")
    if len(specials) > _MAX_SPECIAL_TOKENS or any(len(text) < 2 for text in specials):
        raise ModelFormatError(f"{source}: too many special tokens, or one shorter than two characters")


def _settings(component: Any) -> dict[str, Any]:
    """The JSON that a part of the pipeline pickles to; {} for a part that is not there."""
    return {} if component is None else dict(json.loads(component.__getstate__()))


def _splitting(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what does not change where it splits."""
    settings = _settings(pre_tokenizer)
    steps = settings.get("pretokenizers", [settings])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing if there are none."""
    longest_first = sorted(texts, key=lambda text: -len(text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _token_bytes(inner: tokenizers.Tokenizer, added: Mapping[int, str], source: str) -> tuple[bytes, ...]:
    """Bytes of every id. Ids must be dense: 0 to the number of tokens."""
    vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1 if len(vocabulary) < 1 << 22 else 0)
    if not table or len(table) > 2 * len(vocabulary):
        raise ModelFormatError(f"{source}: the vocabulary is empty, too large or has holes")
    alphabet = _byte_alphabet()
    for text, id in vocabulary.items():
        try:
            table[id] = added[id].encode() if id in added else text.translate(alphabet).encode("latin-1")
        except UnicodeEncodeError:
            raise ModelFormatError(f"{source}: token {text[:40]!r} is not made of byte characters") from None
    return tuple(table)


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's stand-ins to bytes: printable Latin-1 is itself, the others are U+0100 and up.

    Latin-1 characters that are no stand-in go to U+FFFF, which no byte is.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = sorted(set(range(256)) - printable)
    return dict.fromkeys(others, 0xFFFF) | {0x100 + index: byte for index, byte in enumerate(others)}
