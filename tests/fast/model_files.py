"""Tiny model files, made byte by byte so that a test can make any part of them wrong."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
GGML = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of a file to be: `shape` row-major; `data` its stored bytes; None lies about nothing."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: bytes
    offset: int | None = None
    type_id: int | None = None


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value_bytes(value: object) -> bytes:
    """A metadata value with its type in front. Lists are of strings or of int32."""
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    assert isinstance(value, list)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text, value))
    return struct.pack("<IIQ", ARRAY, I32, len(value)) + struct.pack(f"<{len(value)}i", *value)


def gguf_bytes(metadata: Mapping[str, Any], tensors: Sequence[Tensor], alignment: int = 32) -> bytes:
    """A GGUF file. A metadata value that is bytes is taken as it is, type included."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key) + (value if isinstance(value, bytes) else value_bytes(value))
    data = b""
    for tensor in tensors:
        at = len(data) if tensor.offset is None else tensor.offset
        kind = GGML[tensor.dtype] if tensor.type_id is None else tensor.type_id
        out += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)) + struct.pack("<IQ", kind, at)
        data += tensor.data + bytes(-len(tensor.data) % alignment)
    return out + bytes(-len(out) % alignment) + data


def quantised(rng: np.random.Generator, name: str, shape: tuple[int, int], dtype: str) -> Tensor:
    """Random blocks with sane float16 scales (and minima)."""
    size = BLOCK_BYTES[dtype]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // 32, size), dtype=np.uint8)
    for at in (0, 2) if dtype == "Q4_1" else (0,):
        halves = rng.uniform(-0.02, 0.02, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return Tensor(name=name, shape=shape, dtype=dtype, data=blocks.tobytes())


def floats(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name=name, shape=shape, dtype="F32", data=rng.normal(1, 0.1, shape).astype("<f4").tobytes())


def byte_characters() -> list[str]:
    """GPT-2's stand-in for each byte, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def tiny_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges, token types: three control tokens, all bytes, a few merges."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_characters()]
    merges = ["h e", "l l", "he ll", "Ġ t"]
    tokens += ["he", "ll", "hell", "Ġt"]
    return tokens, merges, [3, 3, 3, *[1] * (len(tokens) - 3)]


def tiny_llama(seed: int = 0, **changes: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Metadata and tensors of a two-layer Llama (64 wide, 4 and 2 heads of 16); `changes` to the metadata."""
    rng = np.random.default_rng(seed)
    tokens, merges, types = tiny_vocabulary()
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.license": "apache-2.0",
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }
    metadata.update({key.replace("__", "."): value for key, value in changes.items()})
    tensors = [quantised(rng, "token_embd.weight", (len(tokens), 64), "Q8_0")]
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    for layer in range(2):
        tensors += [floats(rng, f"blk.{layer}.{name}.weight", (64,)) for name in ("attn_norm", "ffn_norm")]
        for name, shape in shapes.items():
            tensors.append(quantised(rng, f"blk.{layer}.{name}.weight", shape, "Q4_1"))
    return metadata, [*tensors, floats(rng, "output_norm.weight", (64,))]


def tiny_gguf(seed: int = 0, **changes: Any) -> bytes:
    """The bytes of a whole, sound tiny model."""
    return gguf_bytes(*tiny_llama(seed, **changes))
