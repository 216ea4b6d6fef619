"""A tokenizer out of the `tokenizer.ggml` fields of a GGUF file, as the `tokenizer.json` that it once was.

`tokenizer.ggml.model` names the kind: `gpt2` is byte-level BPE, `llama` SentencePiece's BPE, `t5` its
Unigram, `gemma4` BPE over text with `▁`. SentencePiece's BPE has no list of merges: it joins the two
neighbours whose piece has the best score, the leftmost of equals. The same choice is written as merges here:
all ways to make a piece, the pieces ordered by score.

WordPiece (`bert`), RWKV and others are not covered; they are refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import tokenizers
from tokenizers import models, normalizers

from tokenmill.core.errors import ModelFormatError
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.text.charsmap import check_charsmap
from tokenmill.models.text.pipeline import guarded, parts_of
from tokenmill.models.text.splits import SPLITS

__all__ = ["gguf_tokenizer"]

_FIELD: Final = "tokenizer.ggml"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE: Final = "▁"
_MAX_PIECE_CHARS: Final = 256
_ESCAPE: Final[Mapping[str, Any]] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREFIX: Final[Mapping[str, Any]] = {"type": "Prepend", "prepend": _SPACE}
# A Unigram model of the library would take the text <0x41> for the byte token: it is cut after the <.
_CUT_BYTE_TEXT: Final[Mapping[str, Any]] = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_MERGE_SPACES: Final[tuple[Mapping[str, Any], ...]] = (
    {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
)


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The fields that all kinds share: one type a token."""

    source: str
    metadata: Mapping[str, Any]
    tokens: Sequence[str]
    types: Sequence[int]

    @property
    def ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self.tokens)}

    def flag(self, name: str, default: bool) -> bool:
        """A boolean field. Raises ModelFormatError if it is something else."""
        value = self.metadata.get(f"{_FIELD}.{name}", default)
        if not isinstance(value, bool):
            raise ModelFormatError(f"{self.source}: {_FIELD}.{name} is no true or false")
        return value

    def token_id(self, name: str, default: int | None = None) -> int:
        """A field that is a token's id. Raises ModelFormatError if it is missing or out of range."""
        value = self.metadata.get(f"{_FIELD}.{name}_token_id", default)
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise ModelFormatError(
                f"{self.source}: {_FIELD}.{name}_token_id is {value!r}, there are {len(self.tokens)} tokens"
            )
        return value

    def scores(self) -> list[float]:
        """One number a token. Raises ModelFormatError."""
        values: Any = self.metadata.get(f"{_FIELD}.scores")
        is_list = isinstance(values, np.ndarray) and values.dtype.kind in "fiu"
        if not is_list or len(values) != len(self.tokens) or not np.isfinite(values).all():
            raise ModelFormatError(f"{self.source}: {_FIELD}.scores is not one finite number a token")
        return [float(value) for value in values]


def gguf_tokenizer(gguf: GgufFile) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file. Raises ModelFormatError naming the field that is wrong."""
    source = str(gguf.path)
    kind = gguf.metadata.get(f"{_FIELD}.model")
    makers = {"gpt2": _byte_level, "llama": _scored_bpe, "t5": _unigram, "gemma4": _merged_text}
    if not isinstance(kind, str) or kind not in makers:
        raise ModelFormatError(
            f"{source}: {_FIELD}.model is {_shown(kind)}", hint=f"supported: {', '.join(makers)}"
        )
    vocabulary = _vocabulary(gguf)
    inner = guarded(lambda: makers[kind](vocabulary), source)
    inner.add_tokens(_added_tokens(vocabulary))
    return inner


def _vocabulary(gguf: GgufFile) -> _Vocabulary:
    source, metadata = str(gguf.path), gguf.metadata
    tokens = _strings(metadata.get(f"{_FIELD}.tokens"), f"{source}: {_FIELD}.tokens")
    if len(set(tokens)) != len(tokens):
        raise ModelFormatError(f"{source}: {_FIELD}.tokens has a token twice")
    types = metadata.get(f"{_FIELD}.token_type")
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise ModelFormatError(f"{source}: {_FIELD}.token_type is not one number a token")
    if len(types) and not 0 <= types.min() <= types.max() <= _BYTE:
        raise ModelFormatError(f"{source}: {_FIELD}.token_type has a type beyond 0 to {_BYTE}")
    return _Vocabulary(source=source, metadata=metadata, tokens=tokens, types=types.tolist())


def _strings(value: object, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ModelFormatError(f"{field} is missing or no list of strings")
    return value


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]


def _added_tokens(vocabulary: _Vocabulary) -> list[tokenizers.AddedToken]:
    """Control tokens, and tokens that are taken out of a text before all else."""
    kind = (vocabulary.metadata.get("general.architecture"), vocabulary.metadata.get(f"{_FIELD}.model"))
    is_phi3 = kind == ("phi3", "llama")
    added = []
    for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if token_type not in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            continue
        # Phi-3's tokens take the white space on their right along, which GGUF has no field for.
        takes_space = is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
        is_control = token_type != _USER_DEFINED
        added.append(tokenizers.AddedToken(token, special=is_control, normalized=False, rstrip=takes_space))
    return added


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    name = vocabulary.metadata.get(f"{_FIELD}.pre")
    if not isinstance(name, str) or name not in SPLITS:
        raise ModelFormatError(
            f"{vocabulary.source}: {_FIELD}.pre is {_shown(name)}", hint=f"supported: {', '.join(SPLITS)}"
        )
    if vocabulary.flag("add_space_prefix", False):
        raise ModelFormatError(f"{vocabulary.source}: {_FIELD}.add_space_prefix is not supported for gpt2")
    split = SPLITS[name]
    bpe = models.BPE(vocabulary.ids, _merges(vocabulary), ignore_merges=split.ignore_merges)
    return _assembled(
        vocabulary,
        bpe,
        [{"type": "NFC"}] if split.is_nfc else [],
        pre_tokenizers=split.pre_tokenizers,
        decoders=[{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
        add_bos=split.add_bos,
    )


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    field = f"{vocabulary.source}: {_FIELD}.merges"
    lines = _strings(vocabulary.metadata.get(f"{_FIELD}.merges"), field)
    ends = [line.find(" ", 1) for line in lines]
    if any(end < 0 for end in ends):
        raise ModelFormatError(f"{field} has an entry that is no pair")
    return [(line[:end], line[end + 1 :]) for line, end in zip(lines, ends, strict=True)]


def _scored_bpe(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    unknown = vocabulary.tokens[vocabulary.token_id("unknown", 0)]
    bpe = models.BPE(
        vocabulary.ids,
        _merges_by_score(vocabulary),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in vocabulary.types,
    )
    is_prefixed = vocabulary.flag("add_space_prefix", True)
    return _assembled(
        vocabulary,
        bpe,
        [_PREFIX, _ESCAPE] if is_prefixed else [_ESCAPE],
        decoders=_text_decoders(is_prefixed),
        add_bos=True,
    )


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the best piece first.

    Of the ways to make one piece, those with the longer left part go first.
    """
    scores = vocabulary.scores()
    pieces = {
        token: token_id
        for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (_NORMAL, _UNUSED)
    }
    ranked = []
    for piece, token_id in pieces.items():
        if len(piece) > _MAX_PIECE_CHARS:
            raise ModelFormatError(f"{vocabulary.source}: {_FIELD}.tokens: {piece[:40]!r}... is too long")
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-scores[token_id], token_id, len(right), left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _unigram(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    if vocabulary.flag("treat_whitespace_as_suffix", False):
        raise ModelFormatError(f"{vocabulary.source}: {_FIELD}.treat_whitespace_as_suffix is not supported")
    pieces = list(zip(vocabulary.tokens, vocabulary.scores(), strict=True))
    unigram = models.Unigram(pieces, vocabulary.token_id("unknown", 2), _BYTE in vocabulary.types)
    is_prefixed = vocabulary.flag("add_space_prefix", False)
    steps = [
        *(_MERGE_SPACES if vocabulary.flag("remove_extra_whitespaces", False) else ()),
        *((_PREFIX,) if is_prefixed else ()),
        _ESCAPE,
    ]
    inner = _assembled(
        vocabulary,
        unigram,
        steps,
        pre_tokenizers=[_CUT_BYTE_TEXT] if _BYTE in vocabulary.types else (),
        decoders=_text_decoders(is_prefixed),
        add_bos=False,
    )
    characters = vocabulary.metadata.get(f"{_FIELD}.precompiled_charsmap")
    if characters is not None:
        field = f"{vocabulary.source}: {_FIELD}.precompiled_charsmap"
        if not isinstance(characters, np.ndarray) or characters.dtype.itemsize != 1:
            raise ModelFormatError(f"{field} is no list of bytes")
        check_charsmap(characters.tobytes(), field)
        precompiled = normalizers.Precompiled(characters.tobytes())
        inner.normalizer = normalizers.Sequence([precompiled, inner.normalizer])
    return inner


def _merged_text(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    unknown = vocabulary.tokens[vocabulary.token_id("unknown", None)]
    bpe = models.BPE(
        vocabulary.ids, _merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    return _assembled(vocabulary, bpe, [_ESCAPE], decoders=_text_decoders(False), add_bos=True)


def _text_decoders(is_prefixed: bool) -> list[Mapping[str, Any]]:
    decoders: list[Mapping[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if is_prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return decoders


def _assembled(
    vocabulary: _Vocabulary,
    model: models.Model,
    normalizer_steps: Sequence[Mapping[str, Any]],
    *,
    pre_tokenizers: Sequence[Mapping[str, Any]] = (),
    decoders: Sequence[Mapping[str, Any]],
    add_bos: bool,
) -> tokenizers.Tokenizer:
    """The parts together, with the token that begins a text if the file, or else `add_bos`, wants it."""
    parts: dict[str, Any] = {
        "normalizer": {"type": "Sequence", "normalizers": normalizer_steps} if normalizer_steps else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    if len(decoders) == 1:
        parts["decoder"] = decoders[0]
    if vocabulary.flag("add_bos_token", add_bos):
        default = 1 if vocabulary.metadata.get(f"{_FIELD}.model") == "llama" else None
        token_id = vocabulary.token_id("bos", default)
        parts["post_processor"] = _begin_with(vocabulary.tokens[token_id], token_id)
    inner = parts_of(parts)
    inner.model = model
    return inner


def _begin_with(token: str, token_id: int) -> Mapping[str, Any]:
    """A post-processor that puts a token in front of a text."""
    first, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
