"""Trimming a vocabulary: what is said stays sayable, what is cut as before computes as before."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers

from tests.train.tiny_teacher import ANSWERS, TEXTS, make_teacher, rendered, tokenizer_json
from tokenmill.compress import trim_vocabulary
from tokenmill.compress.vocabulary import trim_tokenizer
from tokenmill.core import ModelFormatError, UsageError
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder

CORPUS = [rendered(*pair) for pair in zip(TEXTS[:24], ANSWERS[:24], strict=True)]
STRANGE = ["", " ", "héllo 世界 🎉", "\x00\x01\x7f", "<|im_end|>", " a  b\n\n\tc", "please play anna", "ﬁn"]


def counts_of(text: str, corpus: list[str]) -> Counter[int]:
    inner = tokenizers.Tokenizer.from_str(text)
    return Counter(token for each in corpus for token in inner.encode(each).ids)


def random_texts(count: int) -> list[str]:
    """Words of the corpus, their pieces, and anything else, in any order."""
    draw = random.Random(3)
    words = [word for text in [*TEXTS, *ANSWERS] for word in text.split()]
    texts = []
    for _ in range(count):
        parts = [draw.choice(words) for _ in range(draw.randint(1, 6))]
        parts += [draw.choice(words)[: draw.randint(1, 4)], chr(draw.randint(1, 0x2FFF))]
        draw.shuffle(parts)
        texts.append(draw.choice(["", " "]).join(parts))
    return texts


@pytest.mark.parametrize("size", [268, 290, 320])
def test_every_text_comes_back_and_kept_tokens_cut_as_before(size: int) -> None:
    text = tokenizer_json()
    trimmed = trim_tokenizer(text, counts_of(text, CORPUS), size, "test")
    before, after = (tokenizers.Tokenizer.from_str(each) for each in (text, trimmed.text))
    assert after.get_vocab_size() == len(trimmed.kept) == size
    new_ids = {old: new for new, old in enumerate(trimmed.kept)}
    same = 0
    for each in [*STRANGE, *CORPUS, *random_texts(400)]:
        ids = after.encode(each).ids
        assert after.decode(ids, skip_special_tokens=False) == before.decode(
            before.encode(each).ids, skip_special_tokens=False
        )
        old = before.encode(each).ids
        if all(token in new_ids for token in old):
            same += 1
            assert ids == [new_ids[token] for token in old]
    assert same > 10


def test_a_vocabulary_that_takes_whole_words_keeps_them() -> None:
    """As Llama 3: a word that is a token is one, whatever merges say."""
    text = tokenizer_json()
    description = json.loads(text)
    description["model"]["ignore_merges"] = True
    description["model"]["vocab"]["Ġplxy"] = len(description["model"]["vocab"])  # no merge leads to it
    text = json.dumps(description)
    corpus = [*["please plxy"] * 50, *CORPUS]
    trimmed = trim_tokenizer(text, counts_of(text, corpus), 300, "test")
    before, after = (tokenizers.Tokenizer.from_str(each) for each in (text, trimmed.text))
    new_ids = {old: new for new, old in enumerate(trimmed.kept)}
    same = 0
    for each in [*STRANGE, *corpus, *random_texts(100)]:
        old, new = before.encode(each).ids, after.encode(each).ids
        assert after.decode(new, skip_special_tokens=False) == before.decode(old, skip_special_tokens=False)
        if all(token in new_ids for token in old):
            same += 1
            assert new == [new_ids[token] for token in old]
    assert "Ġplxy" in after.encode("please plxy").tokens and same > 10


def sentencepiece_json() -> str:
    """As Llama 2: spaces are written as a sign, characters that are not there as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeghilmnoprstuy"]
    merges = [
        ("l", "a"),
        ("▁", "p"),
        ("▁p", "la"),
        ("▁pla", "y"),
        ("a", "n"),
        ("an", "n"),
        ("ann", "a"),
        ("s", "o"),
    ]
    vocab = {piece: number for number, piece in enumerate([*pieces, *map("".join, merges)])}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return str(inner.to_str())


def test_sentencepiece_vocabularies_fall_back_to_bytes() -> None:
    text = sentencepiece_json()
    counts = counts_of(text, ["play anna", "play play"])
    trimmed = trim_tokenizer(text, counts, 3 + 256 + 1 + 8, "test")
    before, after = (tokenizers.Tokenizer.from_str(each) for each in (text, trimmed.text))
    assert after.encode("play").tokens == ["▁play"]
    assert "<0x73>" in after.encode("some song").tokens  # an s, which is no token any more
    for each in ["play anna", "some song", "héllo 世界", "", "  two  spaces"]:
        assert after.decode(after.encode(each).ids) == before.decode(before.encode(each).ids)


def test_without_its_parents_a_token_is_never_made() -> None:
    """The control: the closure under merges is what makes kept tokens appear."""
    text = tokenizer_json()
    trimmed = json.loads(trim_tokenizer(text, counts_of(text, CORPUS), 330, "test").text)
    inner = tokenizers.Tokenizer.from_str(json.dumps(trimmed))
    longest = max(trimmed["model"]["vocab"], key=lambda piece: 0 if "<|" in piece else len(piece))
    said = inner.decoder.decode([longest])
    assert inner.encode(said).tokens == [longest]
    parents = {part for pair in trimmed["model"]["merges"] for part in pair if "".join(pair) == longest}
    parent = max(parents, key=len)
    trimmed["model"]["merges"] = [
        pair for pair in trimmed["model"]["merges"] if parent not in (*pair, "".join(pair))
    ]
    assert tokenizers.Tokenizer.from_str(json.dumps(trimmed)).encode(said).tokens != [longest]


def test_logits_of_kept_tokens_are_the_same_to_the_bit(tmp_path: Path) -> None:
    model = make_teacher(tmp_path / "full")
    small = trim_vocabulary(model, CORPUS, 330, tmp_path / "small")
    kept = trim_tokenizer((model.path / "tokenizer.json").read_text(), token_counts(model), 330, "test").kept
    before, after = model.tokenizer(), small.tokenizer()
    twins = [TorchDecoder.load(each.architecture, each.weights()) for each in (model, small)]
    compared = 0
    for text in CORPUS:
        old, new = (each.encode(text, allow_special=True) for each in (before, after))
        if [kept[token] for token in new] == old:
            compared += 1
            with torch.inference_mode():
                full, cut = (
                    twin(torch.tensor([ids]))[0] for twin, ids in zip(twins, (old, new), strict=True)
                )
            assert torch.equal(full[:, list(kept)], cut)
    assert compared > 10


def token_counts(model: ModelDirectory) -> Counter[int]:
    tokenizer = model.tokenizer()
    return Counter(token for text in CORPUS for token in tokenizer.encode(text, allow_special=True))


def test_ids_are_renumbered_wherever_they_stand(tmp_path: Path) -> None:
    model = make_teacher(tmp_path / "full")
    path = model.path / "tokenizer.json"
    moved = json.loads(path.read_text())
    last = len(moved["model"]["vocab"]) - 1
    swap = {2: last, last: 2}
    moved["model"]["vocab"] = {piece: swap.get(i, i) for piece, i in moved["model"]["vocab"].items()}
    for each in moved["added_tokens"]:
        each["id"] = swap.get(each["id"], each["id"])
    moved["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [last], "tokens": ["<|im_end|>"]}},
    }
    path.write_text(json.dumps(moved))
    for name, change in (
        ("config.json", {"eos_token_id": last}),
        ("generation_config.json", {"eos_token_id": [last]}),
    ):
        config: dict[str, Any] = json.loads((model.path / name).read_text())
        (model.path / name).write_text(json.dumps(config | change))
    (model.path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(last): {"content": "<|im_end|>"}}})
    )
    small = trim_vocabulary(ModelDirectory.open(model.path), CORPUS, 320, tmp_path / "small")
    tokenizer = small.tokenizer()
    (end,) = small.architecture.eos_token_ids
    assert tokenizer.special_tokens["<|im_end|>"] == end == 319
    assert tokenizer.prompt_prefix == (end,)
    assert json.loads((small.path / "tokenizer_config.json").read_text())["added_tokens_decoder"].keys() == {
        "319"
    }


def test_lineage_is_in_the_manifest(tmp_path: Path) -> None:
    model = make_teacher(tmp_path / "full")
    small = trim_vocabulary(model, CORPUS, 320, tmp_path / "small")
    assert small.manifest is not None
    assert small.manifest.parent == f"sha256:{model.digest}"
    assert small.manifest.licences == ("CC0-1.0",)
    assert small.manifest.recipe["tokens"].startswith("320 of ")
    small.verify()


def test_what_cannot_be_trimmed_is_refused() -> None:
    unigram = tokenizers.Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    with pytest.raises(ModelFormatError, match="Unigram, and only a BPE vocabulary can be trimmed"):
        trim_tokenizer(unigram.to_str(), {}, 1, "test")
    plain = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    with pytest.raises(ModelFormatError, match="has 2 of the 256 bytes"):
        trim_tokenizer(plain.to_str(), {}, 2, "test")
    with pytest.raises(UsageError, match="no room for the 259"):
        trim_tokenizer(tokenizer_json(), {}, 100, "test")
    with pytest.raises(UsageError, match="nothing to trim"):
        trim_tokenizer(tokenizer_json(), {}, 100_000, "test")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    model = make_teacher(tmp_path / "full")
    with pytest.raises(UsageError, match="exists already"):
        trim_vocabulary(model, CORPUS, 320, tmp_path / "full")
