"""GGUF vocabularies: against SentencePiece's algorithms written plainly, byte-level families, refusals."""

import itertools
import json
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from scripts.scorecard.vocabularies import description
from tests.fast.model_files import ARRAY, F32, tiny_gguf, tiny_vocabulary
from tests.fast.tokenizer_texts import many_scripts
from tokenmill.core import Message, ModelFormatError
from tokenmill.engine.llm import LLM
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.store.assemble import Origin, from_gguf
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.text.splits import SPLITS
from tokenmill.models.text.tokenizer import Tokenizer

U8 = 0
TEXTS = ["", " ", "   ", "a", " a", "a  b ", "aaaaaaaaaaaaa", "\n\n\n", *many_scripts(300)]


def floats(values: Sequence[float]) -> bytes:
    return struct.pack("<IIQ", ARRAY, F32, len(values)) + struct.pack(f"<{len(values)}f", *values)


def opened(folder: Path, **fields: Any) -> Tokenizer:
    path = folder / "model.gguf"
    path.write_bytes(tiny_gguf(**{f"tokenizer__ggml__{name}": value for name, value in fields.items()}))
    with GgufFile.open(path) as file:
        return Tokenizer.from_gguf(file)


def spm_fields(**changes: Any) -> dict[str, Any]:
    """A `llama` vocabulary whose scores are in the order in which its pieces were learned."""
    model = description("sentencepiece, each part")["model"]
    tokens = [token for token in model["vocab"] if token not in ("</", "<u", "<s", "<un", "<unk", "</s")]
    scores = [0.0] * 259 + [-float(index) for index in range(len(tokens) - 259)]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    fields = {"model": "llama", "tokens": tokens, "token_type": types, "scores": floats(scores)}
    return {**fields, "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}


def unigram_fields(**changes: Any) -> dict[str, Any]:
    pieces = description("unigram")["model"]["vocab"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    tokens, scores = [piece for piece, _ in pieces], floats([score for _, score in pieces])
    fields = {"model": "t5", "tokens": tokens, "token_type": types, "scores": scores, "unknown_token_id": 0}
    return {**fields, "add_space_prefix": True, "eos_token_id": 2, **changes}


def sentencepiece_bpe(pieces: Mapping[str, float], plain: str) -> list[str]:
    """Join the neighbours that make the piece with the best score, the leftmost of equals, until none do."""
    symbols = list(plain)
    while True:
        joined = [left + right for left, right in itertools.pairwise(symbols)]
        scored = [(pieces[each], -index) for index, each in enumerate(joined) if each in pieces]
        if not scored:
            return symbols
        index = -max(scored)[1]
        symbols[index : index + 2] = [joined[index]]


def best_score(pieces: Mapping[str, float], plain: str, unknown: float) -> float:
    """The best sum of scores of pieces that make up a text, by dynamic programming over its characters."""
    best = [0.0, *[-np.inf] * len(plain)]
    for end in range(1, len(plain) + 1):
        for start in range(max(0, end - 40), end):
            score = pieces.get(plain[start:end], unknown if end - start == 1 else -np.inf)
            best[end] = max(best[end], best[start] + score)
    return float(best[-1])


@pytest.mark.parametrize("is_prefixed", [True, False])
def test_spm_equals_the_algorithm(tmp_path: Path, is_prefixed: bool) -> None:
    fields = spm_fields(add_space_prefix=is_prefixed)
    tokenizer = opened(tmp_path, **fields)
    ids = {token: index for index, token in enumerate(fields["tokens"])}
    pieces = {token: -float(index) for token, index in ids.items() if index >= 259}
    for each in TEXTS:
        escaped = (("▁" if is_prefixed and each else "") + each).replace(" ", "▁")
        symbols = sentencepiece_bpe(pieces, escaped)
        expected = [
            token_id
            for symbol in symbols
            for token_id in ([ids[symbol]] if symbol in pieces else [3 + byte for byte in symbol.encode()])
        ]
        assert tokenizer.encode(each) == expected
        assert tokenizer.decode(expected) == each.replace("▁", " ")
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_after(each))).decode() == each


def test_unigram_finds_the_best_pieces(tmp_path: Path) -> None:
    fields = unigram_fields()
    tokenizer = opened(tmp_path, **fields)
    scores = {token: score for token, score in description("unigram")["model"]["vocab"][259:]}
    scores = {token: float(np.float32(score)) for token, score in scores.items()}
    unknown = min(scores.values()) - 10
    for each in TEXTS:
        ids = tokenizer.encode(each)
        assert tokenizer.decode(ids) == each.replace("▁", " ")
        escaped = ("▁" + each).replace(" ", "▁") if each else ""
        groups = itertools.groupby(ids, lambda token_id: token_id < 259)
        found = 0.0
        for is_bytes, group in groups:
            members = list(group)
            run = b"".join(map(tokenizer.token_bytes, members)).decode() if is_bytes else ""
            found += unknown * len(run) + (
                0 if is_bytes else sum(scores[fields["tokens"][i]] for i in members)
            )
        assert found == pytest.approx(best_score(scores, escaped, unknown), abs=1e-6)


def test_unigram_options(tmp_path: Path) -> None:
    merged = opened(tmp_path, **unigram_fields(remove_extra_whitespaces=True))
    assert merged.decode(merged.encode("  two   mills \n ")) == "two mills \n"
    literal = opened(tmp_path, **unigram_fields())
    assert literal.decode(literal.encode("a <0x41> <0xZZ> b")) == "a <0x41> <0xZZ> b"
    with pytest.raises(ModelFormatError, match="treat_whitespace_as_suffix"):
        opened(tmp_path, **unigram_fields(treat_whitespace_as_suffix=True))
    with pytest.raises(ModelFormatError, match="precompiled_charsmap"):
        opened(tmp_path, **unigram_fields(precompiled_charsmap=[1, 2]))
    broken = struct.pack("<IIQ", ARRAY, U8, 3) + b"abc"
    with pytest.raises(ModelFormatError, match=r"model\.gguf"):
        opened(tmp_path, **unigram_fields(precompiled_charsmap=broken))


@pytest.mark.parametrize("make", [spm_fields, unigram_fields])
def test_the_rebuilt_file_is_the_same_tokenizer(tmp_path: Path, make: Any) -> None:
    tokenizer = opened(tmp_path, **make(add_bos_token=True, bos_token_id=1))
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    again = Tokenizer.from_file(path)
    for each, other in itertools.pairwise(TEXTS):
        marked = f"<s>{each}</s>{other}"
        ids = tokenizer.encode(marked, allow_special=True)
        assert ids == again.encode(marked, allow_special=True)
        assert ids == library.encode(marked, add_special_tokens=False).ids
        if "</s>" not in each:
            assert library.encode(each).ids == again.encode_prompt(each) == [1, *tokenizer.encode(each)]


def test_control_bytes_and_unknown_pieces_are_no_text(tmp_path: Path) -> None:
    """SentencePiece joins ordinary pieces only; llama.cpp would read the signs `</s>` as the token."""
    tokens = [*spm_fields()["tokens"], "</", "</s"]
    types = [*spm_fields()["token_type"], 1, 1]
    scores = floats([0.0] * len(tokens))
    tokenizer = opened(tmp_path, **spm_fields(tokens=tokens, token_type=types, scores=scores))
    for each in ("</s>", "<s>", "<unk>", "<0x0A>"):
        assert tokenizer.decode(tokenizer.encode(each)) == each
        assert not any(map(tokenizer.is_special, tokenizer.encode(each)))


def test_phi_3_control_tokens_take_white_space_along(tmp_path: Path) -> None:
    fields = {f"tokenizer__ggml__{name}": value for name, value in spm_fields().items()}
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf(**fields, general__architecture="phi3"))
    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer.encode("</s>\n mill", allow_special=True) == tokenizer.encode(
        "</s>mill", allow_special=True
    )
    assert tokenizer.encode("<s> mill", allow_special=True) != tokenizer.encode("<s>mill", allow_special=True)


def test_user_defined_tokens_are_found_first(tmp_path: Path) -> None:
    fields = spm_fields()
    tokens, types = [*fields["tokens"], "<tool>"], [*fields["token_type"], 4]
    tokenizer = opened(
        tmp_path, **{**fields, "tokens": tokens, "token_type": types, "scores": floats([0.0] * len(tokens))}
    )
    last = len(tokens) - 1
    assert tokenizer.encode("a<tool>b") == [*tokenizer.encode("a"), last, *tokenizer.encode("b")]
    assert not tokenizer.is_special(last) and tokenizer.token_bytes(last) == b"<tool>"


@pytest.mark.parametrize("name", SPLITS)
def test_every_family_of_byte_level_bpe(tmp_path: Path, name: str) -> None:
    tokenizer = opened(tmp_path, pre=name)
    for each in TEXTS:
        expected = unicodedata.normalize("NFC", each) if SPLITS[name].is_nfc else each
        assert tokenizer.decode(tokenizer.encode(each)) == expected
    assert tokenizer.prompt_prefix == ((1,) if SPLITS[name].add_bos else ())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["It", "'s", " 1234", " AéBc日本", "\n\n", " x"]),
        ("starcoder", ["It", "'s", " ", "1", "2", "3", "4", " AéBc日本", "\n\n", " x"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", " AéBc日本", "\n\n", " x"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", " AéBc日本", "\n\n", " x"]),
        ("falcon", ["It", "'", "s", " ", "123", "4", " AéBc日本", "\n\n", " x"]),
        ("deepseek-coder", ["It", "'", "s", " ", "1", "2", "3", "4", " AéBc", "日本", "\n", "\n", " x"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", " Aé", "Bc日本", "\n\n", " x"]),
        ("gpt-4o", ["It's", " ", "123", "4", " Aé", "Bc日本", "\n\n", " x"]),
    ],
)
def test_how_families_cut(tmp_path: Path, name: str, words: list[str]) -> None:
    inner = tokenizers.Tokenizer.from_str(opened(tmp_path, pre=name).to_json())
    assert inner.pre_tokenizer is not None
    line = "It's 1234 AéBc日本\n\n x"
    found = [line[start:end] for _, (start, end) in inner.pre_tokenizer.pre_tokenize_str(line)]
    assert found == words


def test_a_word_that_is_a_token_is_not_merged(tmp_path: Path) -> None:
    tokens, merges, types = tiny_vocabulary()
    more = {"tokens": [*tokens, "tell"], "merges": merges, "token_type": [*types, 1]}
    assert opened(tmp_path, pre="llama-bpe", **more).encode("tell") == [len(tokens)]
    assert len(opened(tmp_path, pre="dbrx", **more).encode("tell")) == 3


@pytest.mark.parametrize("is_wanted", [True, False])
def test_the_token_that_begins_a_prompt(tmp_path: Path, is_wanted: bool) -> None:
    """Raw prompts begin with it if the file says so; a chat template writes it itself, so never twice."""
    (tmp_path / "model.gguf").write_bytes(
        tiny_gguf(tokenizer__ggml__add_bos_token=is_wanted, tokenizer__ggml__bos_token_id=0)
    )
    from_gguf(tmp_path, Origin(name="tiny", source="test"), lambda *_: None)
    llm = LLM(ModelDirectory.open(tmp_path))
    prefix = [0] if is_wanted else []
    assert llm.encode("hell") == [*prefix, tiny_vocabulary()[0].index("hell")]
    assert llm.encode("") == prefix
    [score] = llm.score([""], ["hellhell"])
    assert len(score.logprobs) == (2 if is_wanted else 1)  # a first token is scored after something only
    assert 0 not in llm.encode_chat([Message(role="user", content="hell")])
    assert (
        json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"] is not None or not is_wanted
    )


BAD_FIELDS: Mapping[str, dict[str, Any]] = {
    "tokenizer.ggml.pre is 'gpt-5'": {"pre": "gpt-5"},
    "supported: command-r, dbrx": {"pre": "llama-7"},
    "tokenizer.ggml.model is 'rwkv'": {"model": "rwkv"},
    "supported: gpt2, llama, t5": {"model": "bert"},
    "scores is not one finite number": spm_fields(scores=[1, 2]),
    "tokenizer.ggml.scores": spm_fields(scores=floats([float("nan")] * len(spm_fields()["tokens"]))),
    "unknown_token_id is 99999": spm_fields(unknown_token_id=99999),
    "bos_token_id is 99999": spm_fields(bos_token_id=99999),
    "bos_token_id is 777": {"add_bos_token": True, "bos_token_id": 777},
    "is too long": spm_fields(tokens=[*spm_fields()["tokens"][:-1], "a" * 300]),
}


@pytest.mark.parametrize("problem", BAD_FIELDS)
def test_what_is_wrong_is_named(tmp_path: Path, problem: str) -> None:
    with pytest.raises(ModelFormatError, match=rf"model\.gguf.*{problem}"):
        opened(tmp_path, **BAD_FIELDS[problem])


def test_a_vocabulary_beyond_the_embeddings_and_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokens, merges, types = tiny_vocabulary()
    changes: dict[str, Any] = {"tokens": [*tokens, "more"], "merges": merges, "token_type": [*types, 1]}
    (tmp_path / "model.gguf").write_bytes(
        tiny_gguf(**{f"tokenizer__ggml__{name}": value for name, value in changes.items()})
    )
    with pytest.raises(ModelFormatError, match=r"tokens, the model has|vocab|token_embd"):
        from_gguf(tmp_path, Origin(name="tiny", source="test"), lambda *_: None)
    tokenizer = opened(tmp_path)
    assert tokenizer.decode([-1, len(tokens), 1 << 40, tokenizer.encode("a")[0]]) == "a"
