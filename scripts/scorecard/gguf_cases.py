"""How a hostile GGUF case is made: the sound file, changed in one place."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from scripts.scorecard.hostile_files import Content, Expected, HostileCase
from tests.fast.model_files import (
    Tensor,
    gguf_bytes,
    tiny_llama,
    value_bytes,
)

__all__ = ["NAMES", "TARGET", "case", "escaped", "loads", "named", "parts", "patched", "small_gguf"]

TARGET = "in/hostile.gguf"
NAMES: Mapping[str, str] = {
    "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.feed_forward_length": "intermediate_size",
    "llama.context_length": "max_position_embeddings",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
}
"""Numbers of the configuration; an error may name the key or what Hugging Face calls it."""


@cache
def parts() -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Metadata and tensors of the sound file."""
    metadata, tensors = tiny_llama()
    return metadata, tuple(tensors)


@cache
def _stored_metadata() -> Mapping[str, Any]:
    """The metadata of the sound file, each value in its bytes: they are in hundreds of files."""
    return {key: value_bytes(value) for key, value in parts()[0].items()}


def small_gguf(
    changes: Mapping[str, Any] | None = None,
    tensors: Sequence[Tensor] | None = None,
    *,
    without: Sequence[str] = (),
    alignment: int = 32,
) -> bytes:
    """The sound file, with other metadata (bytes: a value as it is, type included) or other tensors."""
    metadata = {**_stored_metadata(), **(changes or {})}
    metadata = {key: value for key, value in metadata.items() if key not in without}
    return gguf_bytes(metadata, parts()[1] if tensors is None else tensors, alignment)


def case(
    family: str,
    name: str,
    data: Content,
    field: str,
    expected: Expected = "refused",
    exit_code: int = 4,
    target: str = TARGET,
) -> HostileCase:
    """A file by itself."""
    return HostileCase(
        family=f"gguf {family}",
        name=name,
        files={target: data},
        target=target,
        field=field,
        expected=expected,
        exit_code=exit_code,
    )


def loads(name: str, data: bytes) -> HostileCase:
    """A file that is sound."""
    return case("sound", name, data, "", "loads")


def patched(data: bytes, at: int, value: bytes) -> bytes:
    """Other bytes at a place."""
    return data[:at] + value + data[at + len(value) :]


def escaped(name: str) -> str:
    """A name as a regular expression."""
    return "".join(char if char.isalnum() else f"\\{char}" for char in name)


def named(key: str) -> str:
    """What an error may call a key."""
    names = [key, NAMES.get(key, key), key.removeprefix("tokenizer.ggml."), key.removeprefix("tokenizer.")]
    return "|".join(map(escaped, dict.fromkeys(names)))
