"""A tokenizer as the `tokenizer.ggml` fields of a GGUF file: what `Tokenizer.from_gguf` reads, written.

Two kinds exist: byte-level BPE (`gpt2`, with its merges and the name of its pre-tokenizer) and BPE with byte
fallback (`llama`, SentencePiece's), where programs that read GGUF merge by score. A score is here minus the
rank of the first merge that gives the token, which is the order in which `tokenizer.json` merges.

It does not cover Unigram vocabularies, nor a pre-tokenizer that GGUF has no name for: both are refused.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from tokenmill.core.errors import UsageError
from tokenmill.models.gguf_writer import MetadataItem
from tokenmill.models.tokenizer import Tokenizer

__all__ = ["vocabulary_fields"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-F]{2}>")
_FIELD: Final = "tokenizer.ggml"


def vocabulary_fields(
    tokenizer: Tokenizer, config: Mapping[str, Any], num_tokens: int
) -> dict[str, MetadataItem]:
    """The fields of a tokenizer and its `tokenizer_config.json`, for a model of `num_tokens` embeddings.

    Ids that no token has get an unused one. First and end tokens are the architecture's, and not here.
    Raises UsageError for a tokenizer that GGUF cannot describe.
    """
    described = json.loads(tokenizer.to_json())
    fields = _kind_fields(described, num_tokens, tokenizer)
    tokens, types = _tokens(described, num_tokens)
    fields[f"{_FIELD}.tokens"] = tokens
    fields[f"{_FIELD}.token_type"] = np.array(types, np.int32)
    if described["model"].get("byte_fallback"):
        fields[f"{_FIELD}.scores"] = _scores(tokens, described["model"])
    for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
        token_id = tokenizer.special_tokens.get(_text(config.get(name)))
        if token_id is not None:
            fields[f"{_FIELD}.{key}_token_id"] = token_id
    fields[f"{_FIELD}.add_bos_token"] = _adds_bos(config, described)
    return fields


def _kind_fields(
    described: Mapping[str, Any], num_tokens: int, tokenizer: Tokenizer
) -> dict[str, MetadataItem]:
    """What tells one kind of tokenizer from the other."""
    model = described["model"]
    if model.get("type") != "BPE":
        hint = "GGUF export takes BPE only; --to hf keeps any"
        raise UsageError(f"{tokenizer.source}: a tokenizer of type {model.get('type')}", hint=hint)
    if model.get("byte_fallback"):
        adds_space = _adds_space(described)
        return {
            f"{_FIELD}.model": "llama",
            f"{_FIELD}.pre": "default",
            f"{_FIELD}.add_space_prefix": adds_space,
        }
    if tokenizer.gguf_pre is None:
        hint = "GGUF names a few ways to split text only, and this is none of them; --to hf keeps any"
        raise UsageError(f"{tokenizer.source}: its pre-tokenizer has no name in GGUF", hint=hint)
    merges = [f"{left} {right}" for left, right in _merges(model)]
    return {f"{_FIELD}.model": "gpt2", f"{_FIELD}.pre": tokenizer.gguf_pre, f"{_FIELD}.merges": merges}


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


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """True if a space is put before the text, in either of the two ways of saying so."""
    normalizer, pre_tokenizer = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [normalizer, *normalizer.get("normalizers", []), pre_tokenizer]
    return any(
        step.get("type") == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps
    )


def _adds_bos(config: Mapping[str, Any], described: Mapping[str, Any]) -> bool:
    """True if encoding a text puts the first token in front: as the configuration says, else the pipeline."""
    says = config.get("add_bos_token")
    if isinstance(says, bool):
        return says
    processor = described.get("post_processor") or {}
    steps = [processor, *processor.get("processors", [])]
    templates = [step.get("single") for step in steps if step.get("type") == "TemplateProcessing"]
    return any(template and "SpecialToken" in template[0] for template in templates)


def _text(token: object) -> str:
    """A token in `tokenizer_config.json`: text, an object with `content`, or null."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
