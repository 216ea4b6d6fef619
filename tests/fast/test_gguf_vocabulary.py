"""Vocabularies in GGUF fields: read back, they cut every text as the tokenizer that they were made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from scripts.scorecard.vocabularies import KINDS, description
from tests.fast.model_files import gguf_bytes, tiny_llama
from tests.fast.tokenizer_texts import many_scripts
from tokenmill.core import UsageError
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.formats.gguf_vocabulary import vocabulary_fields, vocabulary_notes
from tokenmill.models.formats.gguf_writer import write_gguf
from tokenmill.models.text.splits import SPLITS
from tokenmill.models.text.tokenizer import Tokenizer

TEXTS = ["", " ", "a", "  a b ", "\n\n", "▁x", "<0x41>", *many_scripts(200)]
FIRST_ONLY = "sentencepiece, first part"
WRITTEN = ["byte level", *(kind for kind in KINDS if kind.startswith("sentencepiece"))]


def made(kind: str, **changes: Any) -> Tokenizer:
    text = json.dumps({**description(kind), **changes})
    return Tokenizer(tokenizers.Tokenizer.from_str(text), kind)


def reread(folder: Path, tokenizer: Tokenizer, padding: int = 0, **config: Any) -> tuple[Tokenizer, GgufFile]:
    fields = vocabulary_fields(tokenizer, config, tokenizer.vocab_size + padding)
    bos = {"tokenizer.ggml.bos_token_id": next(iter(tokenizer.special_tokens.values()), 0)}
    write_gguf(folder / "x.gguf", {"general.architecture": "llama", **fields, **bos}, [], lambda _: [])
    file = GgufFile.open(folder / "x.gguf")
    return Tokenizer.from_gguf(file), file


@pytest.mark.parametrize("kind", WRITTEN)
def test_texts_are_cut_as_before(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind)
    back, _ = reread(tmp_path, tokenizer)
    assert back.special_tokens == tokenizer.special_tokens
    assert bool(vocabulary_notes(tokenizer)) == (kind == FIRST_ONLY)
    controls = list(tokenizer.special_tokens)
    for index, text in enumerate(TEXTS):
        if kind != FIRST_ONLY or (text and not text.startswith((" ", "▁"))):
            assert back.encode(text) == tokenizer.encode(text), text
        if kind != FIRST_ONLY:
            whole = f"{text}{controls[index % len(controls)]}{text}"
            assert back.encode(whole, True) == tokenizer.encode(whole, True), whole
    assert [back.token_bytes(each) for each in range(tokenizer.vocab_size)] == [
        tokenizer.token_bytes(each) for each in range(tokenizer.vocab_size)
    ]


@pytest.mark.parametrize("name", SPLITS)
def test_every_way_to_cut_words_has_its_name(name: str, tmp_path: Path) -> None:
    """Or the name of one that does the same."""
    metadata = {**tiny_llama()[0], "tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata, []))
    with GgufFile.open(tmp_path / "x.gguf") as file:
        fields = vocabulary_fields(Tokenizer.from_gguf(file), {}, len(metadata["tokenizer.ggml.tokens"]))
    found = SPLITS[str(fields["tokenizer.ggml.pre"])]
    wanted = SPLITS[name]
    assert found[:3] == wanted[:3]
    assert fields["tokenizer.ggml.merges"] == metadata["tokenizer.ggml.merges"]
    assert fields["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]


def test_ids_without_a_token_are_unused(tmp_path: Path) -> None:
    tokenizer = made("byte level")
    back, file = reread(tmp_path, tokenizer, padding=3)
    types = np.asarray(file.metadata["tokenizer.ggml.token_type"])
    assert list(types[-3:]) == [5, 5, 5] and 5 not in types[:-3]
    for text in TEXTS:
        assert back.encode(text) == tokenizer.encode(text)


def test_types_of_tokens(tmp_path: Path) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    source = description("sentencepiece, each part")
    added = {"id": len(source["model"]["vocab"]), "content": "<think>", **flags}
    tokenizer = made("sentencepiece, each part", added_tokens=[*source["added_tokens"], added])
    _, file = reread(tmp_path, tokenizer)
    types = dict(
        zip(
            np.asarray(file.metadata["tokenizer.ggml.tokens"]).tolist(),
            np.asarray(file.metadata["tokenizer.ggml.token_type"]).tolist(),
            strict=True,
        )
    )
    assert types["<think>"] == 4 and types["<0x41>"] == 6 and types[source["model"]["unk_token"]] == 2
    controls = [each["content"] for each in source["added_tokens"]]
    assert {types[each] for each in controls if each != source["model"]["unk_token"]} == {3}


def test_tokens_that_the_configuration_names() -> None:
    tokenizer = made("byte level")
    first, second, *_ = tokenizer.special_tokens
    config = {"unk_token": {"content": first}, "pad_token": second, "add_bos_token": True}
    fields = vocabulary_fields(tokenizer, config, tokenizer.vocab_size)
    assert fields["tokenizer.ggml.unknown_token_id"] == tokenizer.special_tokens[first]
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.special_tokens[second]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    plain = vocabulary_fields(tokenizer, {"pad_token": "no such token"}, tokenizer.vocab_size)
    assert "tokenizer.ggml.padding_token_id" not in plain
    assert plain["tokenizer.ggml.add_bos_token"] == bool(tokenizer.prompt_prefix)


_CUT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a tokenizer of type Unigram": ("unigram", {}),
    "cut a text into words has no name": ("byte level, whole words", {}),
    "no name in GGUF": (
        "byte level",
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, _CUT]}},
    ),
    "words has no name": ("byte level", {"normalizer": {"type": "NFKC"}, "pre_tokenizer": _CUT}),
}


@pytest.mark.parametrize(("says", "case"), REFUSED.items(), ids=REFUSED)
def test_what_gguf_cannot_say_is_refused(says: str, case: tuple[str, dict[str, Any]]) -> None:
    kind, changes = case
    tokenizer = made(kind, **changes)
    with pytest.raises(UsageError, match=says) as caught:
        vocabulary_fields(tokenizer, {}, tokenizer.vocab_size)
    assert "--to hf" in caught.value.hint
