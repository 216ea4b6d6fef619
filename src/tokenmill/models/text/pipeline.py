"""What a `tokenizer.json` does with text, read part by part: which parts are accepted, and what they mean.

Two kinds are accepted. *Byte-level* vocabularies write every byte as a printable stand-in. *SentencePiece*
vocabularies (BPE or Unigram) write a space as `▁`, most of them put one in front of a text, and write
characters that they lack as `<0xNN>`. All else is refused with the name of the part, as a tokenizer that is
nearly right makes fluent rubbish. Vocabularies of words (BERT's) are not covered.

**Text is encoded by a pipeline in which control tokens do not exist**: their pieces are renamed to what no
text can contain, and merges that lead to them are gone. So no text becomes one, not even through a
normaliser, a merge or a Unigram piece. The one exception is the vocabulary's unknown token, which stands
for a character that cannot be written otherwise; vocabularies with all 256 bytes never need it.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeVar

import tokenizers
from tokenizers import models

from tokenmill.core.errors import ModelFormatError

__all__ = ["Lead", "Pipeline", "guarded", "parts_of", "read_pipeline"]

Lead = Literal["kept", "one space", "first token"]
"""What decoding takes from the start of a text: nothing, a space, or every space of the first token."""

_MAX_CONTROL_TOKENS: Final = 4096
_MAX_CONTROL_CHARS: Final = 1 << 17
_MAX_ADDED_TOKENS: Final = 1 << 16
_MAX_VOCABULARY: Final = 1 << 22
_SPACE: Final = "▁"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
_TEXT_DECODERS: Final = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The working parts of one tokenizer."""

    start: tokenizers.Tokenizer
    """Encodes plain text at the start of a text. Knows no control token, nor does the next."""
    after: tokenizers.Tokenizer
    """Encodes plain text that continues a text: the same without a space in front."""
    restarts: bool
    """Whether text after a control token is encoded like the start of a text."""
    controls: Mapping[str, int]
    """Control tokens by their text."""
    strips: Mapping[str, tuple[bool, bool]]
    """Whether a control token takes the white space on its left and right along."""
    token_bytes: tuple[bytes, ...]
    """The bytes of every id; b"" for one that has no token."""
    lead: Lead
    prompt_prefix: tuple[int, ...]
    """The tokens that the file puts in front of a prompt, usually none or one that says: text begins."""


def read_pipeline(inner: tokenizers.Tokenizer, source: str) -> Pipeline:
    """The working parts of a tokenizer as the library reads it. Raises ModelFormatError."""
    inner.no_truncation()
    inner.no_padding()
    added = inner.get_added_tokens_decoder()
    controls = {token.content: token_id for token_id, token in added.items() if token.special}
    if len(added) > _MAX_ADDED_TOKENS or len(controls) > _MAX_CONTROL_TOKENS:
        raise ModelFormatError(f"{source}: added_tokens: too many")
    if sum(map(len, controls)) > _MAX_CONTROL_CHARS:  # they become one pattern
        raise ModelFormatError(
            f"{source}: added_tokens: over {_MAX_CONTROL_CHARS} characters of control tokens"
        )
    if any(len(text) < 2 for text in controls):
        raise ModelFormatError(f"{source}: added_tokens: a control token shorter than two characters")
    _check_model(inner, source)
    vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
    # Before all that writes the vocabulary out: for a far id the library makes a list of the holes before it.
    _check_ids(vocabulary, source)
    is_byte_level = _is_byte_level(inner, source)
    # The text of other added tokens is decoded like that of pieces.
    verbatim = added.keys() if is_byte_level else set(controls.values())
    start = _without_controls(inner, controls, source)
    after, restarts = _continuation(start, source)
    return Pipeline(
        start=start,
        after=after,
        restarts=restarts,
        controls=controls,
        strips={token.content: (token.lstrip, token.rstrip) for token in added.values()},
        token_bytes=_token_bytes(inner, vocabulary, verbatim, is_byte_level),
        lead="kept" if is_byte_level else _lead(inner, source),
        prompt_prefix=_prompt_prefix(inner, source),
    )


def guarded(build: Callable[[], _T], source: str) -> _T:
    """Call into the library; its errors, and its panics (which are no Exception), name the file."""
    try:
        return build()
    except (KeyboardInterrupt, SystemExit, ModelFormatError):
        raise
    except BaseException as error:
        raise ModelFormatError(f"{source}: no usable tokenizer ({str(error)[:200]})") from error


def parts_of(description: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer with an empty vocabulary and these parts of a `tokenizer.json`."""
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return tokenizers.Tokenizer.from_str(json.dumps({**empty, **description}))


def _settings(component: Any) -> dict[str, Any]:
    """The JSON that a part of the pipeline pickles to; {} for a part that is not there."""
    return {} if component is None else dict(json.loads(component.__getstate__()))


def _steps(settings: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    """The steps of a part, one by one, also if it is a sequence of sequences."""
    if settings.get("type") != "Sequence":
        return [settings] if settings else []
    return [step for each in settings[field] for step in _steps(each, field)]


def _check_model(inner: tokenizers.Tokenizer, source: str) -> None:
    model = inner.model
    if not isinstance(model, models.BPE | models.Unigram):
        raise ModelFormatError(
            f"{source}: model is {type(model).__name__}", hint="supported are BPE and Unigram vocabularies"
        )
    if isinstance(model, models.Unigram):  # one without an unknown token fails at a character that it lacks
        lacking = next(char for char in map(chr, range(0x10FFFF, 0, -1)) if model.token_to_id(char) is None)
        guarded(lambda: model.tokenize(lacking), source)
    if isinstance(model, models.BPE):
        if model.dropout:
            raise ModelFormatError(f"{source}: model.dropout makes encoding random")
        if model.continuing_subword_prefix or model.end_of_word_suffix:
            raise ModelFormatError(f"{source}: model has a prefix or suffix for parts of words")


def _is_byte_level(inner: tokenizers.Tokenizer, source: str) -> bool:
    """Whether tokens are written in stand-ins of bytes. Refuses what would mix the two kinds up."""
    decoders = [step["type"] for step in _steps(_settings(inner.decoder), "decoders")]
    steps = _steps(_settings(inner.pre_tokenizer), "pretokenizers")
    kinds = [step["type"] for step in steps]
    if decoders != ["ByteLevel"]:
        if not decoders or not _TEXT_DECODERS.issuperset(decoders) or "ByteLevel" in kinds:
            raise ModelFormatError(
                f"{source}: decoder is {'+'.join(decoders) or 'missing'}",
                hint=f"supported are ByteLevel, and sequences of {', '.join(sorted(_TEXT_DECODERS))}",
            )
        if getattr(inner.model, "ignore_merges", False):
            raise ModelFormatError(f"{source}: model.ignore_merges is only supported for byte-level BPE")
        return False
    if not isinstance(inner.model, models.BPE) or "ByteLevel" not in kinds or "Metaspace" in kinds:
        raise ModelFormatError(f"{source}: the decoder is ByteLevel, but the other parts are not")
    if any(step["type"] == "ByteLevel" and step["add_prefix_space"] for step in steps):
        raise ModelFormatError(
            f"{source}: pre_tokenizer.add_prefix_space is not supported for byte-level BPE"
        )
    return True


def _lead(inner: tokenizers.Tokenizer, source: str) -> Lead:
    """What a SentencePiece decoder strips. Refuses one that rewrites more than spaces."""
    lead: Lead = "kept"
    for step in _steps(_settings(inner.decoder), "decoders"):
        if step["type"] == "Replace" and (step["pattern"], step["content"]) != ({"String": _SPACE}, " "):
            raise ModelFormatError(f"{source}: decoder replaces {step['pattern']}, not {_SPACE} by a space")
        if step["type"] == "Metaspace":
            if step["replacement"] != _SPACE:
                raise ModelFormatError(f"{source}: decoder replaces {step['replacement']!r}, not {_SPACE}")
            lead = "kept" if step["prepend_scheme"] == "never" else "first token"
        if step["type"] == "Strip":
            if (step["content"], step["start"], step["stop"]) != (" ", 1, 0):
                raise ModelFormatError(f"{source}: decoder strips more than one leading space")
            lead = "one space"
    return lead


def _without_controls(
    inner: tokenizers.Tokenizer, controls: Mapping[str, int], source: str
) -> tokenizers.Tokenizer:
    """The tokenizer in which no text leads to a control token; the same object if that is so already."""
    inner.encode_special_tokens = True
    held = {text: token_id for text, token_id in controls.items() if inner.token_to_id(text) == token_id}
    held = {text: token_id for text, token_id in held.items() if inner.model.token_to_id(text) is not None}
    if not held or _are_out_of_reach(inner, held):
        return inner
    description = json.loads(inner.to_str())
    model = description["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [("" if piece in held else piece, score) for piece, score in model["vocab"]]
    else:
        # A raw space is in no piece that text is made of: they are stand-ins of bytes, or have ▁ for it.
        names = {text: f" {token_id}" for text, token_id in held.items()}
        model["vocab"] = {names.get(text, text): token_id for text, token_id in model["vocab"].items()}
        model["merges"] = [
            pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))
        ]
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    description["added_tokens"] = [
        each for each in description["added_tokens"] if each["content"] not in held
    ]
    start = guarded(lambda: tokenizers.Tokenizer.from_str(json.dumps(description)), source)
    start.encode_special_tokens = True
    _check_same_ids(inner, start, source)
    return start


def _are_out_of_reach(inner: tokenizers.Tokenizer, held: Collection[str]) -> bool:
    """Whether no text is cut into these pieces, each of two characters or more.

    Merges make a piece inside a text only if they make it alone: there the same pairs come in the same order.
    """
    model = inner.model
    if not isinstance(model, models.BPE) or model.ignore_merges:
        return False
    return all(text not in (token.value for token in model.tokenize(text)) for text in held)


def _continuation(start: tokenizers.Tokenizer, source: str) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer without a space in front, sharing the vocabulary, and whether each text gets one."""
    parts = {"normalizer": _settings(start.normalizer), "pre_tokenizer": _settings(start.pre_tokenizer)}
    schemes = [
        step["prepend_scheme"]
        for step in _steps(parts["pre_tokenizer"], "pretokenizers")
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never"
    ]
    prepends = any(step["type"] == "Prepend" for step in _steps(parts["normalizer"], "normalizers"))
    if not schemes and not prepends:
        return start, False
    after = guarded(lambda: parts_of({name: _unprefixed(part) for name, part in parts.items()}), source)
    after.model = start.model
    added = start.get_added_tokens_decoder()
    after.add_tokens([added[token_id] for token_id in sorted(added)])
    after.encode_special_tokens = True
    _check_same_ids(start, after, source)
    return after, prepends or "always" in schemes


def _unprefixed(part: dict[str, Any]) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer without what puts a space in front."""
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    for field in ("normalizers", "pretokenizers"):
        if field in part:
            steps = map(_unprefixed, part[field])
            return {**part, field: [step for step in steps if step is not None]}
    return part or None


def _check_same_ids(before: tokenizers.Tokenizer, now: tokenizers.Tokenizer, source: str) -> None:
    """Refuse a file whose added tokens the library would number anew."""
    for token_id, token in now.get_added_tokens_decoder().items():
        if before.token_to_id(token.content) != token_id:
            raise ModelFormatError(f"{source}: added_tokens: {token.content[:40]!r} has no id of its own")


def _prompt_prefix(inner: tokenizers.Tokenizer, source: str) -> tuple[int, ...]:
    """What the post-processor puts in front of a text. What it puts behind would end the text: left out."""
    prefix: list[int] = []
    for step in _steps(_settings(inner.post_processor), "processors"):
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise ModelFormatError(f"{source}: post_processor {step['type']} is not supported")
        for part in step["single"]:
            if "SpecialToken" not in part:
                break
            special = step["special_tokens"].get(part["SpecialToken"]["id"])
            if special is None:
                raise ModelFormatError(
                    f"{source}: post_processor: {part['SpecialToken']['id'][:40]!r} is unknown"
                )
            prefix += special["ids"]
    unknown = [token_id for token_id in prefix if inner.id_to_token(token_id) is None]
    if unknown:
        raise ModelFormatError(f"{source}: post_processor: id {unknown[0]} is not in the vocabulary")
    return tuple(prefix)


def _check_ids(vocabulary: Mapping[str, int], source: str) -> None:
    """Ids must be nearly dense, from 0 on."""
    highest = max(vocabulary.values(), default=-1)
    if not 0 <= highest < min(2 * len(vocabulary), _MAX_VOCABULARY):
        raise ModelFormatError(f"{source}: the vocabulary is empty, too large or has holes")


def _token_bytes(
    inner: tokenizers.Tokenizer,
    vocabulary: Mapping[str, int],
    verbatim: Collection[int],
    is_byte_level: bool,
) -> tuple[bytes, ...]:
    """Bytes of every id; those of `verbatim` ids are their text."""
    kinds = {step["type"] for step in _steps(_settings(inner.decoder), "decoders")}
    written = _stand_in_bytes() if is_byte_level else partial(_piece_bytes, "ByteFallback" in kinds)
    table = [b""] * (max(vocabulary.values()) + 1)
    for text, token_id in vocabulary.items():
        table[token_id] = text.encode() if token_id in verbatim else written(text)
    return tuple(table)


def _piece_bytes(has_byte_tokens: bool, text: str) -> bytes:
    """The bytes of a SentencePiece token."""
    byte = _BYTE_TOKEN.fullmatch(text) if has_byte_tokens else None
    return bytes.fromhex(byte[1]) if byte else text.replace(_SPACE, " ").encode()


def _stand_in_bytes() -> Callable[[str], bytes]:
    """From a byte-level token to its bytes; one that is not all stand-ins is its own text, as in the library.

    GPT-2's stand-ins: printable Latin-1 is itself, the other bytes are U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = sorted(set(range(256)) - printable)
    # Latin-1 characters that are no stand-in go to U+FFFF, which no byte is.
    alphabet = dict.fromkeys(others, 0xFFFF) | {0x100 + index: byte for index, byte in enumerate(others)}

    def written(text: str) -> bytes:
        try:
            return text.translate(alphabet).encode("latin-1")
        except UnicodeEncodeError:
            return text.encode()

    return written
