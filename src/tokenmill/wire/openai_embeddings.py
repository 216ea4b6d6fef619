"""POST /v1/embeddings, from the side of whoever answers: the body to texts, vectors to a body.

Vectors are numbers, or base64 of 32-bit floats, the lowest byte first, as OpenAI's own client asks for.
"""

import base64
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from tokenmill.core import Tier, Usage
from tokenmill.wire.call import Prompt
from tokenmill.wire.fields import FieldError, decode_request, encode_json
from tokenmill.wire.openai_parse import tier_of

__all__ = ["EMBEDDING_REQUEST", "EmbeddingCall", "parse_embedding_call", "shortened", "write_embeddings"]

_MAX_TEXTS: Final = 2048


class _Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    service_tier: str | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingCall:
    """Texts to be embedded; `dimensions` is how much of each vector is wanted, None for all of it."""

    model: str
    texts: tuple[Prompt, ...]
    as_base64: bool = False
    dimensions: int | None = None
    user: str = ""
    tier: Tier | None = None


def parse_embedding_call(body: bytes) -> EmbeddingCall:
    """The call in the body. Raises FieldError."""
    request = decode_request(body, _Request)
    if not request.model:
        raise FieldError("model", "is empty", hint="name the model")
    if request.dimensions is not None and request.dimensions < 1:
        raise FieldError("dimensions", f"is {request.dimensions}", hint="use a whole number from 1")
    return EmbeddingCall(
        model=request.model,
        texts=_texts(request.input),
        as_base64=request.encoding_format == "base64",
        dimensions=request.dimensions,
        user=request.user or "",
        tier=tier_of(request.service_tier),
    )


def shortened(vectors: Sequence[Sequence[float]], dimensions: int | None) -> list[list[float]]:
    """The first `dimensions` of each vector, of length 1 again. Raises FieldError for more than there are."""
    if dimensions is None:
        return [list(vector) for vector in vectors]
    size = len(vectors[0])
    if dimensions > size:
        raise FieldError("dimensions", f"is {dimensions}, the model has {size}", hint="use fewer, or none")
    return [_unit(vector[:dimensions]) for vector in vectors]


def write_embeddings(
    model: str, vectors: Sequence[Sequence[float]], usage: Usage, *, as_base64: bool
) -> bytes:
    """The body of an answer."""
    data = [
        {"object": "embedding", "index": at, "embedding": _base64(vector) if as_base64 else vector}
        for at, vector in enumerate(vectors)
    ]
    counts = {"prompt_tokens": usage.num_prompt_tokens, "total_tokens": usage.num_total_tokens}
    return encode_json({"object": "list", "data": data, "model": model, "usage": counts})


def _texts(given: str | list[Any]) -> tuple[Prompt, ...]:
    texts: list[Any] = given if isinstance(given, list) else [given]
    if texts and all(isinstance(each, int) for each in texts):
        texts = [texts]
    kinds = {type(each) for each in texts}
    if len(kinds) != 1 or int in kinds:
        hint = "give a text, texts, token ids, or lists of token ids"
        raise FieldError("input", "is empty" if not texts else "is no text", hint=hint)
    if len(texts) > _MAX_TEXTS:
        raise FieldError("input", f"has {len(texts)} texts", hint=f"give at most {_MAX_TEXTS}")
    return tuple(_text(each, f"input[{at}]" if len(texts) > 1 else "input") for at, each in enumerate(texts))


def _text(text: str | list[int], path: str) -> Prompt:
    if not text:
        raise FieldError(path, "is empty", hint="give some text")
    if isinstance(text, str):
        return text
    if not all(0 <= each < 1 << 31 for each in text):
        raise FieldError(path, "has token ids that cannot be", hint="use whole numbers from 0")
    return tuple(text)


def _unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)


def _base64(vector: Sequence[float]) -> str:
    values = array("f", vector)
    if array("H", [1]).tobytes() != b"\x01\x00":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


EMBEDDING_REQUEST: Final = _Request
"""The type of a body of POST /v1/embeddings, for the OpenAPI document."""
