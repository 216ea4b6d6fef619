"""A tokenizer as the `tokenizer.ggml` fields of a GGUF file: what `tokenizer_gguf.py` reads, written.

Two kinds exist: byte-level BPE (`gpt2`, with its merges and the name of its pre-tokenizer) and the BPE of
SentencePiece (`llama`), where programs that read GGUF merge by score. A score is here minus the rank of the
first merge that gives the token, which is the order in which `tokenizer.json` merges.

It does not cover Unigram vocabularies, nor a pipeline that GGUF has no name for: both are refused.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from tokenmill.core.errors import UsageError
from tokenmill.models.formats.gguf_writer import MetadataItem
from tokenmill.models.text.splits import SPLITS
from tokenmill.models.text.tokenizer import Tokenizer

__all__ = ["vocabulary_fields", "vocabulary_notes"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-F]{2}>")
_FIELD: Final = "tokenizer.ggml"
_SPACE: Final = "▁"
_USUAL: Final = ("smollm", "olmo")
"""Of several names that mean the same, the one to write."""

_HINT: Final = "GGUF knows a few kinds of tokenizers only; --to hf keeps any"


def vocabulary_fields(
    tokenizer: Tokenizer, config: Mapping[str, Any], num_tokens: int
) -> dict[str, MetadataItem]:
    """The fields of a tokenizer and its `tokenizer_config.json`, for a model of `num_tokens` embeddings.

    Ids that no token has get an unused one. First and end tokens are the architecture's, and not here.
    Raises UsageError for a tokenizer that GGUF cannot describe.
    """
    described = json.loads(tokenizer.to_json())
    fields = _kind_fields(described, tokenizer.source)
    tokens, types = _tokens(described, num_tokens)
    fields[f"{_FIELD}.tokens"] = tokens
    fields[f"{_FIELD}.token_type"] = np.array(types, np.int32)
    if described["model"].get("byte_fallback"):
        fields[f"{_FIELD}.scores"] = _scores(tokens, described["model"])
    for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
        token_id = tokenizer.special_tokens.get(_text(config.get(name)))
        if token_id is not None:
            fields[f"{_FIELD}.{key}_token_id"] = token_id
    fields[f"{_FIELD}.add_bos_token"] = _flag(config.get("add_bos_token"), bool(tokenizer.prompt_prefix))
    return fields


def vocabulary_notes(tokenizer: Tokenizer) -> list[str]:
    """What programs that read the fields do otherwise, one line each."""
    described = json.loads(tokenizer.to_json())
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    if not any(step.get("prepend_scheme") == "first" for step in steps):
        return []
    return [
        "GGUF puts a space before text that begins with one or follows a control token; this model does not"
    ]


def _kind_fields(described: Mapping[str, Any], source: str) -> dict[str, MetadataItem]:
    """What tells one kind of tokenizer from the other."""
    model = described["model"]
    if model.get("type") != "BPE":
        raise UsageError(f"{source}: a tokenizer of type {model.get('type')} in GGUF", hint=_HINT)
    if model.get("byte_fallback"):
        adds_space = _adds_space(described, source)
        return {
            f"{_FIELD}.model": "llama",
            f"{_FIELD}.pre": "default",
            f"{_FIELD}.add_space_prefix": adds_space,
        }
    merges = [f"{left} {right}" for left, right in _merges(model)]
    return {f"{_FIELD}.model": "gpt2", f"{_FIELD}.pre": _pre(described, source), f"{_FIELD}.merges": merges}


def _pre(described: Mapping[str, Any], source: str) -> str:
    """GGUF's name of how a byte-level tokenizer cuts text into words."""
    cuts = [_without_offsets(step) for step in _steps(described.get("pre_tokenizer"), "pretokenizers")]
    changes = _steps(described.get("normalizer"), "normalizers")
    is_nfc = [step["type"] for step in changes] == ["NFC"]
    ignore_merges = bool(described["model"].get("ignore_merges"))
    names = [
        name
        for name, split in SPLITS.items()
        if [_without_offsets(step) for step in split.pre_tokenizers] == cuts
        and (split.is_nfc, split.ignore_merges) == (is_nfc, ignore_merges)
    ]
    if not names or (changes and not is_nfc):
        raise UsageError(f"{source}: its way to cut a text into words has no name in GGUF", hint=_HINT)
    return next((name for name in names if name in _USUAL), names[0])


def _steps(part: Mapping[str, Any] | None, field: str) -> list[Mapping[str, Any]]:
    """The steps of a part of the pipeline, also if it is a sequence of sequences."""
    if part is None or part["type"] != "Sequence":
        return [part] if part else []
    return [step for each in part[field] for step in _steps(each, field)]


def _without_offsets(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step without what does not change where it cuts."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _tokens(tokenizer: Mapping[str, Any], num_tokens: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    tokens = [f"[PAD{id}]" for id in range(num_tokens)]
    types = [_UNUSED] * num_tokens
    model = tokenizer["model"]
    has_bytes = bool(model.get("byte_fallback"))
    for text, id in model["vocab"].items():
        is_byte = has_bytes and _BYTE_TOKEN.fullmatch(text) is not None
        tokens[id], types[id] = text, _BYTE if is_byte else _NORMAL
    for added in tokenizer["added_tokens"]:
        id = added["id"]
        tokens[id], types[id] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    if has_bytes and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = _UNKNOWN
    return tokens, types


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank."""
    return [(left, right) for left, right in model["merges"]]


def _scores(tokens: list[str], model: Mapping[str, Any]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Minus the rank of the first merge that gives a token; what nothing merges to comes last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    last = len(ranks) + len(tokens)
    return np.array([-float(ranks.get(token, last)) for token in tokens], np.float32)


def _adds_space(described: Mapping[str, Any], source: str) -> bool:
    """True if a space is put before a text. Raises UsageError for a pipeline that is not SentencePiece's."""
    steps = _steps(described.get("normalizer"), "normalizers")
    steps += _steps(described.get("pre_tokenizer"), "pretokenizers")
    for step in steps:
        is_escape = step.get("pattern") == {"String": " "} and step.get("content") == _SPACE
        is_metaspace = step["type"] == "Metaspace" and step.get("replacement") == _SPACE
        is_prefix = step["type"] == "Prepend" and step.get("prepend") == _SPACE
        if not (is_escape or is_metaspace or is_prefix):
            raise UsageError(f"{source}: a tokenizer with the step {step['type']} in GGUF", hint=_HINT)
    return any(step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)


def _flag(value: object, default: bool) -> bool:
    return value if isinstance(value, bool) else default


def _text(token: object) -> str:
    """A token in `tokenizer_config.json`: text, an object with `content`, or null."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
