"""Embeddings as the OpenAI API has them, from the side of whoever asks for them.

Vectors travel as lists of numbers; the base64 form is not asked for.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from tokenmill.core import EndpointError, Usage
from tokenmill.wire.call import Prompt
from tokenmill.wire.fields import count_of, decode_reply, encode_json

__all__ = ["read_openai_embeddings", "write_openai_embeddings"]


class _Vector(msgspec.Struct):
    index: int
    embedding: list[float]


class _Vectors(msgspec.Struct):
    data: list[_Vector]
    usage: dict[str, Any] = {}


def write_openai_embeddings(model: str, texts: Sequence[Prompt]) -> bytes:
    """The body of POST /v1/embeddings. Raises UsageError for half a surrogate pair."""
    return encode_json({"model": model, "input": list(texts), "encoding_format": "float"})


def read_openai_embeddings(body: bytes, num_texts: int) -> tuple[tuple[tuple[float, ...], ...], Usage]:
    """The vector of each text, in order, and the tokens that were read. Raises EndpointError."""
    found = decode_reply(body, _Vectors)
    vectors = {each.index: tuple(each.embedding) for each in found.data}
    if sorted(vectors) != list(range(num_texts)) or len(found.data) != num_texts:
        raise EndpointError(f"the answer has {len(found.data)} vectors for {num_texts} texts")
    if len({len(vector) for vector in vectors.values()}) > 1:
        raise EndpointError("the vectors of the answer differ in length")
    num_tokens = count_of(found.usage, "prompt_tokens")
    usage = Usage(num_prompt_tokens=num_tokens, num_cached_tokens=0, num_output_tokens=0)
    return tuple(vectors[at] for at in range(num_texts)), usage
