"""The tokenizer over a tiny vocabulary: exact round trips, control tokens only where allowed, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast.model_files import tiny_gguf, tiny_vocabulary
from tokenmill.core import ModelFormatError
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return from_gguf(tmp_path_factory.mktemp("tokenizer"))


def from_gguf(folder: Path, **changes: Any) -> Tokenizer:
    path = folder / "model.gguf"
    path.write_bytes(tiny_gguf(**changes))
    with GgufFile.open(path) as file:
        return Tokenizer.from_gguf(file)


def from_json(folder: Path, tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    description = json.loads(tokenizer.to_json())
    change(description)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(description))
    return Tokenizer.from_file(path)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_control_tokens_in_text_are_text(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>\n<|im_start|>system"
    ids = tokenizer.encode(text)
    assert not any(map(tokenizer.is_special, ids))
    assert tokenizer.decode(ids) == text


def test_control_tokens_where_allowed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>", allow_special=True)
    assert (ids[0], ids[-1]) == (1, 2) and len(ids) == 4
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"


def test_a_mark_makes_plain_text_and_vanishes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_marked("<|im_start|>~hell<~|im_end|>", mark="~")
    assert ids == [1, *tokenizer.encode("hell<|im_end|>")]


def test_merges_and_digits(tokenizer: Tokenizer) -> None:
    tokens, _, _ = tiny_vocabulary()
    assert tokenizer.encode("hell t") == [tokens.index("hell"), tokens.index("Ġt")]
    assert len(tokenizer.encode("1234")) == 4


def test_ids_outside_the_vocabulary_are_padding(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == len(tiny_vocabulary()[0])
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([tokenizer.encode("é")[0]]) == "\N{REPLACEMENT CHARACTER}"


def test_json_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = from_json(tmp_path, tokenizer, lambda _: None)
    text = "hello <|im_end|> thé 12\n\n\t日本"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)
    assert again.special_tokens == tokenizer.special_tokens


def test_tokens_that_take_spaces_along(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def strip_right(description: dict[str, Any]) -> None:
        description["added_tokens"][2]["rstrip"] = True

    stripping = from_json(tmp_path, tokenizer, strip_right)
    assert stripping.encode("a <|im_end|>  b", allow_special=True) == [
        *stripping.encode("a "),
        2,
        *stripping.encode("b"),
    ]


BAD_FIELDS = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.pre": "mystery",
    "tokenizer.ggml.tokens": [1, 2, 3],
    "tokenizer.ggml.merges": ["one", "two"],
    "tokenizer.ggml.token_type": [1, 1],
    "tokenizer.ggml.add_space_prefix": True,
}


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS.items())
def test_bad_gguf_fields_are_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ModelFormatError, match=field):
        from_gguf(tmp_path, **{field: value})


def test_inconsistent_vocabularies(tmp_path: Path) -> None:
    tokens, merges, types = tiny_vocabulary()
    for changes in (
        {"tokenizer.ggml.tokens": [*tokens[:-1], tokens[0]]},
        {"tokenizer.ggml.merges": [*merges, "no such"]},
        {"tokenizer.ggml.tokens": ["<", *tokens[1:]], "tokenizer.ggml.token_type": types},
    ):
        with pytest.raises(ModelFormatError, match=r"model\.gguf"):
            from_gguf(tmp_path, **changes)


def begin_with(token_id: int) -> dict[str, Any]:
    part: list[Any] = [{"SpecialToken": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"B": {"id": "B", "ids": [token_id], "tokens": ["B"]}}
    return {"type": "TemplateProcessing", "single": part, "pair": part, "special_tokens": tokens}


BAD_CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "no model": lambda each: each.pop("model"),
    "another kind": lambda each: each.update(
        model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    ),
    "random merges": lambda each: each["model"].update(dropout=0.5),
    "parts of words": lambda each: each["model"].update(continuing_subword_prefix="##"),
    "decoder of words": lambda each: each.update(
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}
    ),
    "decoder of another kind": lambda each: each.update(decoder={"type": "Fuse"}),
    "post-processor": lambda each: each.update(
        post_processor={"type": "BertProcessing", "sep": ["<|im_end|>", 2], "cls": ["<|im_start|>", 1]}
    ),
    "post-processor beyond the vocabulary": lambda each: each.update(post_processor=begin_with(9999)),
    "no pre-tokenizer": lambda each: each.update(pre_tokenizer=None),
    "spaces rewritten": lambda each: each.update(
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    ),
    "a space put in front": lambda each: each["pre_tokenizer"]["pretokenizers"][1].update(
        add_prefix_space=True
    ),
    "no decoder": lambda each: each.update(decoder=None),
    "short control token": lambda each: each["added_tokens"].append(
        {**each["added_tokens"][0], "id": each["model"]["vocab"]["!"], "content": "!"}
    ),
}


@pytest.mark.parametrize("change", BAD_CHANGES.values(), ids=BAD_CHANGES)
def test_bad_tokenizer_files(
    tokenizer: Tokenizer, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        from_json(tmp_path, tokenizer, change)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"PK\x03\x04"])
def test_damaged_tokenizer_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)
    with pytest.raises(ModelFormatError, match="absent"):
        Tokenizer.from_file(tmp_path / "absent.json")
