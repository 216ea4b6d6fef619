"""Fewer tokens for a model: what a workload's texts need stays, and every text can still be said.

The embedding and the head of a small model are a large part of its cost, and a narrow task uses few of its
tokens. Kept are its bytes, all added tokens, the tokens that the given texts have (the most frequent first)
with every token that merges pass through on the way to them, and, as far as there is room, the first merges.
The merges that remain are in their old order, so a text whose tokens are all kept is cut as before (each
merge that was taken then is there, and no other comes before it), and its logits are rows of the old ones.
Other texts are cut finer, and come back as they came back before.

Which size is right, and healing what other texts lose, are for the callers. Only BPE vocabularies that know
bytes can be cut like this.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import tokenizers

from tokenmill.compress.made import MadeModel, check_target, write_made
from tokenmill.core import ModelFormatError, UsageError
from tokenmill.models.formats.bfloat16 import U16Array
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["Trimmed", "trim_tokenizer", "trim_vocabulary"]

_EMBEDDINGS: Final = frozenset({"model.embed_tokens.weight", "lm_head.weight"})
_SPACE: Final = "▁"
_FEWEST_BYTES: Final = 200
"""Some published vocabularies lack the bytes that their training text did not have (SmolLM2: 21)."""


class Trimmed(NamedTuple):
    """A smaller `tokenizer.json`, and the old id of each new one, rising."""

    text: str
    kept: tuple[int, ...]


def trim_vocabulary(
    model: ModelDirectory, texts: Iterable[str], size: int, folder: Path, *, chat_template: str = ""
) -> ModelDirectory:
    """Write `model` with a vocabulary of `size` tokens as the new model directory `folder`.

    `texts` are what the model will read and write, as it sees it: control tokens in them count. It gets
    `chat_template` in the place of its own, if that is given (`folding`). Raises ModelFormatError for a
    vocabulary that cannot be cut, UsageError for a size that cannot be had.
    """
    check_target(folder)
    source = model.path / "tokenizer.json"
    tokenizer, digest = model.tokenizer(), hashlib.sha256()
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text, allow_special=True))
        digest.update(f"{len(text)} {text}".encode())
    trimmed = trim_tokenizer(source.read_text("utf-8"), counts, size, str(source))
    kept = np.array(trimmed.kept)
    new_ids = {old: new for new, old in enumerate(trimmed.kept)}
    weights, architecture = model.weights(), model.architecture

    def load(name: str) -> U16Array:
        values = weights.bf16(name)
        return values[kept] if name in _EMBEDDINGS else values

    files = {"tokenizer.json": trimmed.text, **_renumbered_files(model.path, new_ids)}
    if chat_template:
        files["chat_template.jinja"] = chat_template
    bos = architecture.bos_token_id
    made = MadeModel(
        architecture=replace(
            architecture,
            vocab_size=len(kept),
            bos_token_id=None if bos is None else new_ids.get(bos),
            eos_token_ids=tuple(new_ids[each] for each in architecture.eos_token_ids if each in new_ids),
        ),
        load=load,
        recipe={
            "step": "trim vocabulary",
            "tokens": f"{len(kept)} of {architecture.vocab_size}",
            "texts": f"sha256:{digest.hexdigest()}",
        },
        texts=files,
    )
    return write_made(made, model, folder)


def trim_tokenizer(text: str, counts: Mapping[int, int], size: int, source: str) -> Trimmed:
    """The `tokenizer.json` in `text` with `size` of its tokens; `counts` says how often each is needed.

    Errors as in `trim_vocabulary`; `source` is what they call the file.
    """
    description = json.loads(text)
    model = description["model"]
    _check_kind(description, source)
    vocab: dict[str, int] = model["vocab"]
    merges = [_pair(each) for each in model["merges"]]
    needed = _always_kept(description, vocab, source)
    if size < len(needed):
        raise UsageError(
            f"a vocabulary of {size} tokens has no room for the {len(needed)} bytes and control tokens",
            hint=f"use a size of {len(needed)} or more",
        )
    num_tokens = len(vocab.keys() | {each["content"] for each in description["added_tokens"]})
    if size >= num_tokens:
        raise UsageError(
            f"{source} has {num_tokens} tokens, so there is nothing to trim to {size}",
            hint="use a smaller size, or the model as it is",
        )
    kept = _choose(description, counts, needed, merges, size)
    return _rewritten(description, kept, merges)


def _check_kind(description: Mapping[str, Any], source: str) -> None:
    kind = description["model"].get("type")
    if kind != "BPE":
        raise ModelFormatError(
            f"{source}: model is {kind}, and only a BPE vocabulary can be trimmed",
            hint="leave the vocabulary as it is",
        )


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _always_kept(description: Mapping[str, Any], vocab: Mapping[str, int], source: str) -> dict[str, int]:
    """Added tokens, the 256 bytes, and what stands for a space or an unknown character, with their ids."""
    model = description["model"]
    kept = {each["content"]: each["id"] for each in description["added_tokens"]}
    alphabet = _byte_tokens(description)
    if len(bytes_kept := [each for each in alphabet if each in vocab]) < _FEWEST_BYTES:
        raise ModelFormatError(
            f"{source}: the vocabulary has {len(bytes_kept)} of the 256 bytes, without which a smaller "
            "one could not say every text",
            hint="leave the vocabulary as it is",
        )
    extra = [_SPACE] if model.get("byte_fallback") else []
    extra += [model["unk_token"]] if model.get("unk_token") else []
    return kept | {each: vocab[each] for each in (*alphabet, *extra) if each in vocab}


def _byte_tokens(description: Mapping[str, Any]) -> list[str]:
    """The 256 bytes as this kind of vocabulary writes them."""
    if description["model"].get("byte_fallback"):
        return [f"<0x{byte:02X}>" for byte in range(256)]
    return tokenizers.pre_tokenizers.ByteLevel.alphabet()


def _choose(
    description: Mapping[str, Any],
    counts: Mapping[int, int],
    needed: Mapping[str, int],
    merges: list[tuple[str, str]],
    size: int,
) -> dict[str, int]:
    """Which tokens stay: `needed`, those of the counts with what they are made of, then the first merges."""
    vocab: dict[str, int] = description["model"]["vocab"]
    pieces = {token_id: piece for piece, token_id in vocab.items()}
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    kept = dict(needed)
    for token_id, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0])):
        if token_id not in pieces or pieces[token_id] in kept:
            continue
        new = [each for each in _made_of(pieces[token_id], ranks, vocab) if each not in kept]
        if len(kept) + len(new) <= size:
            kept |= {each: vocab[each] for each in new}
    for left, right in merges:
        if len(kept) == size:
            break
        piece = left + right
        if left in kept and right in kept and piece in vocab:
            kept.setdefault(piece, vocab[piece])
    return kept


def _made_of(piece: str, ranks: Mapping[tuple[str, str], int], vocab: Mapping[str, int]) -> list[str]:
    """A token and every token that merging its characters passes through."""
    passed = {piece: None}
    parts = list(piece)
    while True:
        passed |= dict.fromkeys(part for part in parts if part in vocab)
        pairs = [ranks.get(pair, len(ranks)) for pair in pairwise(parts)]
        if not pairs or min(pairs) == len(ranks):
            return list(passed)
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _rewritten(
    description: dict[str, Any], kept: Mapping[str, int], merges: list[tuple[str, str]]
) -> Trimmed:
    """The file with these tokens only, numbered in their old order."""
    old_ids = sorted(set(kept.values()))
    new_ids = {old: new for new, old in enumerate(old_ids)}
    model = description["model"]
    vocab = {
        piece: new_ids[old]
        for piece, old in sorted(model["vocab"].items(), key=lambda each: each[1])
        if piece in kept
    }
    stay = [
        list(pair) if isinstance(given, list) else given
        for given, pair in zip(model["merges"], merges, strict=True)
        if pair[0] in kept and pair[1] in kept and "".join(pair) in kept
    ]
    added = [{**each, "id": new_ids[each["id"]]} for each in description["added_tokens"]]
    changed = {
        **description,
        "added_tokens": added,
        "post_processor": _renumbered_template(description.get("post_processor"), new_ids),
        "model": {**model, "vocab": vocab, "merges": stay},
    }
    return Trimmed(text=json.dumps(changed, ensure_ascii=False), kept=tuple(old_ids))


def _renumbered_template(part: Any, new_ids: Mapping[int, int]) -> Any:
    """A post-processor with the new ids of the control tokens that it puts around a text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        return {**part, "processors": [_renumbered_template(each, new_ids) for each in part["processors"]]}
    if part.get("type") != "TemplateProcessing":
        return part
    special = {
        name: {**each, "ids": [new_ids[token_id] for token_id in each["ids"]]}
        for name, each in part["special_tokens"].items()
    }
    return {**part, "special_tokens": special}


def _renumbered_files(folder: Path, new_ids: Mapping[int, int]) -> dict[str, str]:
    """`generation_config.json` and `tokenizer_config.json` with the new ids, where the model has them."""
    texts = {}
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text("utf-8"))
            texts[name] = json.dumps(_renumbered_config(config, new_ids), indent=2, ensure_ascii=False)
    return texts


def _renumbered_config(config: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Fields that hold token ids, as `eos_token_id` does, and the table of added tokens by id."""
    changed = dict(config)
    for name, value in config.items():
        if name.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            new = [new_ids[each] for each in ids if each in new_ids]
            changed[name] = new if isinstance(value, list) else (new[0] if new else None)
    table = config.get("added_tokens_decoder")
    if isinstance(table, dict):
        kept = {int(old): each for old, each in table.items() if int(old) in new_ids}
        changed["added_tokens_decoder"] = {str(new_ids[old]): each for old, each in kept.items()}
    return changed
