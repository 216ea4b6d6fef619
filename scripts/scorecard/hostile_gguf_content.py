"""Hostile content of GGUF files: values that are no numbers, vocabularies and templates that do not fit."""

import dataclasses
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from scripts.scorecard.gguf_cases import case, parts, patched, small_gguf
from scripts.scorecard.hostile_files import Expected, HostileCase
from tests.fast.model_files import (
    ARRAY,
    F32,
    I32,
    STRING,
)

__all__ = ["gguf_content"]


def gguf_content() -> Iterator[HostileCase]:
    """Cases whose structure is sound."""
    yield from _values()
    yield from _vocabularies()
    yield from _merges()


def _values() -> Iterator[HostileCase]:
    """Scales and weights that are no finite numbers, in each stored type."""
    _, tensors = parts()
    halves = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}
    for label, value in halves.items():
        for at, tensor in ((0, tensors[0]), (3, tensors[3])):
            data = patched(tensor.data, 0, np.float16(value).tobytes())
            changed = [*tensors[:at], dataclasses.replace(tensor, data=data), *tensors[at + 1 :]]
            yield case("value", f"{tensor.dtype} scale is {label}", small_gguf(tensors=changed), tensor.name)
        tensor = tensors[3]
        minimum = dataclasses.replace(tensor, data=patched(tensor.data, 2, np.float16(value).tobytes()))
        changed = [*tensors[:3], minimum, *tensors[4:]]
        yield case("value", f"{tensor.dtype} minimum is {label}", small_gguf(tensors=changed), tensor.name)
        norm = tensors[-1]
        for dtype, stored in (("F32", np.float32), ("F16", np.float16)):
            values = np.full(norm.shape, value, stored)
            last = dataclasses.replace(norm, dtype=dtype, data=values.tobytes())
            yield case(
                "value", f"{dtype} weight is {label}", small_gguf(tensors=[*tensors[:-1], last]), norm.name
            )
    norm = tensors[-1]
    huge = dataclasses.replace(norm, data=np.full(norm.shape, 3.4e38, np.float32).tobytes())
    yield case(
        "value",
        "a float32 that no bfloat16 holds",
        small_gguf(tensors=[*tensors[:-1], huge]),
        norm.name,
        "either",
    )


def _vocabulary(name: str, field: str, expected: Expected = "refused", **changes: Any) -> HostileCase:
    data = small_gguf({f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    return case("vocabulary", name, data, field, expected)


def _vocabularies() -> Iterator[HostileCase]:
    """Tokens, merges, types and template that do not fit together."""
    metadata, _ = parts()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]

    yield _vocabulary("no token", "tokens|token_type", tokens=struct.pack("<IIQ", ARRAY, STRING, 0))
    yield _vocabulary("a token twice", "tokens", tokens=[*tokens[:-1], tokens[-2]])
    yield _vocabulary("a control token twice", "tokens", tokens=[tokens[1], *tokens[1:]])
    yield _vocabulary(
        "more tokens than embeddings", "tokens|tokenizer", tokens=[*tokens, "zz"], token_type=[*types, 1]
    )
    yield _vocabulary(
        "far more tokens",
        "tokens|tokenizer",
        tokens=[*tokens, *(f"t{i}" for i in range(9000))],
        token_type=[*types, *[1] * 9000],
    )
    yield _vocabulary("an empty token", "token", "either", tokens=[*tokens[:-1], ""])
    yield _vocabulary("a token of other characters", "token", tokens=[*tokens[:-1], "\u4e16"])
    yield _vocabulary("a token with a zero", "token", tokens=[*tokens[:-1], "a\0b"])
    yield _vocabulary("a token of 100,000", "token", "either", tokens=[*tokens[:-1], "x" * 100_000])
    for count in (0, 1, len(types) - 1, len(types) + 1):
        short = [*types, 1][:count]
        value = short or struct.pack("<IIQ", ARRAY, I32, 0)
        yield _vocabulary(f"{count} types", "token_type", token_type=value)
    for kind in (-1, 7, 2**31 - 1):
        yield _vocabulary(f"a type {kind}", "token_type", token_type=[*types[:-1], kind])
    yield _vocabulary(
        "types as floats",
        "token_type",
        token_type=struct.pack(f"<IIQ{len(types)}f", ARRAY, F32, len(types), *types),
    )
    many = [f"<|{i}|>" for i in range(5000)]
    yield _vocabulary(
        "5,000 control tokens", "token_type|tokens", tokens=[*tokens, *many], token_type=[*types, *[3] * 5000]
    )
    yield _vocabulary(
        "a control token of one character", "special|control", token_type=[*types[:10], 3, *types[11:]]
    )


def _merges() -> Iterator[HostileCase]:
    """Merges, kinds and templates."""
    merges: list[str] = parts()[0]["tokenizer.ggml.merges"]
    broken = {
        "of one": "he",
        "of three": "h e l",
        "empty": "",
        "of unknown parts": "q\u0120 zz",
        "with two spaces": "h  e",
        "of a space": " ",
        "whose result is no token": "z z",
        "of 100,000": "x" * 50_000 + " " + "y" * 50_000,
    }
    for name, merge in broken.items():
        yield _vocabulary(f"a merge {name}", "merges|tokenizer", merges=[*merges, merge])
    yield _vocabulary("a merge twice", "merges", "either", merges=[*merges, merges[0]])
    yield _vocabulary("no merges", "merges", merges=[])
    for pre in ("", "default", "nobody", "../../evil", "x" * 10_000):
        yield _vocabulary(f"pre-tokenizer {pre[:20]!r}", r"tokenizer\.ggml\.pre", pre=pre)
    for model in ("", "wordpiece", "os.system", "gpt2\x1b[31m", "x" * 10_000):
        yield _vocabulary(f"model {model[:20]!r}", r"tokenizer\.ggml\.model", model=model)
    template = "tokenizer.chat_template"
    for name, source in _templates():
        is_bomb = name in ("an endless output", "a doubling", "an endless loop")
        data = small_gguf({template: source})
        yield case("template", name, data, "chat_template", exit_code=7 if is_bomb else 4)


def _templates() -> Iterator[tuple[str, str]]:
    """A few; the hundred are a corpus of their own."""
    yield "a syntax error", "{% if %}"
    yield "an endless output", "{% set x = 'x' * 1000000 %}{% for i in range(100000) %}{{ x }}{% endfor %}"
    yield (
        "a doubling",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    )
    yield "an endless loop", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    yield "300,000 characters", "x" * 300_000
    yield "a way to Python", "{{ messages.__class__.__mro__[1].__subclasses__()[0]('touch canary') }}"
    yield "an include of a file", "{% include '/etc/passwd' %}"
