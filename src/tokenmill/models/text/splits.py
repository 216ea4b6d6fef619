"""How byte-level BPE families cut a text into words before merging, by the names that GGUF files give them.

A GGUF file holds only a name (`tokenizer.ggml.pre`) of what a `tokenizer.json` spells out. Each entry here
is the pipeline of the original `tokenizer.json`, not llama.cpp's imitation of it, and so has the original's
normaliser too (Qwen's NFC, for example). An unknown name is refused: the wrong cut gives fluent rubbish.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

__all__ = ["SPLITS", "Split"]


class Split(NamedTuple):
    """What a family does around BPE, in the words of `tokenizer.json`."""

    pre_tokenizers: tuple[Mapping[str, Any], ...]
    is_nfc: bool = False
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges make of it."""
    add_bos: bool = False
    """What holds if the file does not say."""


def _regex(pattern: str) -> Mapping[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> Mapping[str, Any]:
    """The change to stand-ins of bytes, after GPT-2's own cut if wanted."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_CASED: Final = (
    # Letters that have a case, without those of some scripts: DeepSeek's list.
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-"
    "\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ENDINGS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL_1: Final = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAMEL_2: Final = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_DIGIT: Final[Mapping[str, Any]] = {"type": "Digits", "individual_digits": True}
_GPT2: Final = (_bytes(True),)
_STARCODER: Final = (_DIGIT, _bytes(True))
_LLAMA3: Final = (_regex(rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"), _bytes(False))
_QWEN2: Final = (_regex(rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"), _bytes(False))
_TEKKEN: Final = (_regex(rf"{_CAMEL_1}|{_CAMEL_2}|\p{{N}}|{_PATHS}|{_SPACES}"), _bytes(False))
_GPT_4O: Final = (
    _regex(rf"{_CAMEL_1}{_ENDINGS}?|{_CAMEL_2}{_ENDINGS}?|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"),
    _bytes(False),
)
_DEEPSEEK_LLM: Final = (
    _regex(r"[\r\n]"),
    _regex(rf"\s?[{_CASED}]+"),
    _regex("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
    _regex(r"\s+$"),
    _regex(_CJK),
    _DIGIT,
    _bytes(False),
)
_DEEPSEEK_CODER: Final = (
    _regex(r"[\r\n]"),
    _regex(r"\s?\p{L}+"),
    _regex(r"\s?\p{P}+"),
    _regex(_CJK),
    _DIGIT,
    _bytes(False),
)
_FALCON: Final[tuple[Mapping[str, Any], ...]] = (
    {"type": "Punctuation", "behavior": "Contiguous"},
    _bytes(True),
    {"type": "Digits", "individual_digits": False},
    _regex("[0-9][0-9][0-9]"),
)

SPLITS: Final[Mapping[str, Split]] = MappingProxyType(
    {
        "command-r": Split(_STARCODER, is_nfc=True),
        "dbrx": Split(_LLAMA3),
        "deepseek-coder": Split(_DEEPSEEK_CODER),
        "deepseek-llm": Split(_DEEPSEEK_LLM),
        "deepseek-r1-qwen": Split(_QWEN2),
        "falcon": Split(_FALCON),
        "gpt-2": Split(_GPT2),
        "gpt-4o": Split(_GPT_4O),
        "llama-bpe": Split(_LLAMA3, ignore_merges=True, add_bos=True),
        "mpt": Split(_GPT2, is_nfc=True),
        "olmo": Split(_GPT2, is_nfc=True),
        "qwen2": Split(_QWEN2, is_nfc=True),
        "refact": Split(_STARCODER),
        "smollm": Split(_STARCODER),
        "starcoder": Split(_STARCODER),
        "tekken": Split(_TEKKEN, ignore_merges=True, add_bos=True),
    }
)
"""Values of `tokenizer.ggml.pre` that are supported."""
