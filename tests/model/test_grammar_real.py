"""Structured output over the real vocabulary: texts match, forced tokens are the tokenizer's, speed."""

import gzip
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fast.grammar_tools import allowed
from tokenmill.core import Grammar, TokenmillError
from tokenmill.engine.structured.grammar import GrammarCompiler, GrammarState
from tokenmill.models.text.tokenizer import Tokenizer

SCHEMAS = Path(__file__).parents[3] / "shared/data/json_schemas/glaiveai2k.jsonl.gz"
VOCAB, ENDS = 49152, (2, 0)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "day": {"type": "string", "format": "date"},
        "kind": {"enum": ["rain", "sun"]},
        "degrees": {"type": "number", "minimum": -60, "maximum": 60},
    },
    "required": ["city", "day", "kind", "degrees"],
    "additionalProperties": False,
}
TEXT = '{"city": "Paris at the river", "day": "2024-03-05", "kind": "rain", "degrees": 12.5}'


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(model_dir / "tokenizer.json")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    with GrammarCompiler(tokenizer, VOCAB, ENDS) as compiler:
        yield compiler


def schema(value: Any) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(value))


def follow(state: GrammarState, tokens: list[int], num_words: int) -> None:
    """Accept given tokens, each allowed by its mask."""
    mask_W = np.empty(num_words, np.uint32)
    for token in tokens:
        state.fill_mask(mask_W)
        assert int(mask_W[token >> 5]) >> (token & 31) & 1
        state.accept(token)


def test_a_text_of_the_tokenizer_is_followed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = compiler.start(schema(SCHEMA))
    tokens = tokenizer.encode(TEXT)
    assert state.num_valid([*tokens, ENDS[0], tokens[0]]) == len(tokens) + 1
    follow(state, tokens, compiler.num_words)
    assert state.finished


def test_random_texts_match(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    mask_W = np.empty(compiler.num_words, np.uint32)
    for seed in range(5):
        rng, state, tokens = random.Random(seed), compiler.start(schema(SCHEMA)), list[int]()
        while not state.finished and len(tokens) < 400:
            state.fill_mask(mask_W)
            choices = allowed(mask_W)
            assert not any(tokenizer.is_special(each) for each in choices if each not in ENDS)
            tokens.append(rng.choice(choices[:40] if rng.random() < 0.7 else choices))
            state.accept(tokens[-1])
        if state.finished:
            value = json.loads(tokenizer.decode(tokens))
            assert list(value) == ["city", "day", "kind", "degrees"] and -60 <= value["degrees"] <= 60
            assert len(value["city"]) <= 30 and value["kind"] in ("rain", "sun")


def test_forced_tokens_are_the_tokenizers(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    forced = compiler.start(Grammar(kind="regex", source=text)).forced()
    assert forced and list(forced) == tokenizer.encode(text)[: len(forced)]


def test_sixteen_masks_take_a_small_part_of_a_step(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """5 % of a decode step of 16 are 0.6 ms. In processor time, with room for a machine that is busy."""
    tokens = tokenizer.encode(TEXT)
    states = [compiler.start(schema({**SCHEMA, "title": str(index)})) for index in range(16)]
    mask_W = np.empty(compiler.num_words, np.uint32)
    seconds = []
    for token in tokens:
        began = time.process_time()
        for state in states:
            state.fill_mask(mask_W)
        seconds.append(time.process_time() - began)
        for state in states:
            state.accept(token)
    assert statistics.median(seconds) < 4e-3


@pytest.mark.skipif(not SCHEMAS.is_file(), reason="the collected schemas are not at hand")
def test_most_collected_schemas_compile(compiler: GrammarCompiler) -> None:
    with gzip.open(SCHEMAS, "rt") as lines:
        schemas = [json.loads(line)["schema"] for line in lines][::20]
    refused = 0
    for each in schemas:
        try:
            compiler.check(schema(each))
        except TokenmillError:
            refused += 1
    assert refused <= 0.08 * len(schemas)
