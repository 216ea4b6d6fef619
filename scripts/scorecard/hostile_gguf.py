"""Hostile GGUF files: each number of a small sound file a lie, and fields that do not fit together.

The same files every time. Each case names the field that the error has to name, and some cases are sound,
so that files are not refused for the wrong reason.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from scripts.scorecard.gguf_borders import Border, borders
from scripts.scorecard.hostile_files import Content, Expected, Fifo, HostileCase
from tests.fast.model_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    U64,
    Tensor,
    gguf_bytes,
    text,
    tiny_llama,
    value_bytes,
)

__all__ = ["hostile_gguf", "small_gguf"]

_HUGE = (2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_TARGET = "in/hostile.gguf"
_F64, _I64, _U8 = 12, 11, 0

_NAMES: Mapping[str, str] = {
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


def hostile_gguf() -> list[HostileCase]:
    """More than 300 cases."""
    cases = [
        *_sound(),
        *_heads(),
        *_truncated(),
        *_lies(),
        *_strings(),
        *_metadata_types(),
        *_metadata_numbers(),
        *_arrays(),
        *_tensor_tables(),
        *_values(),
        *_vocabularies(),
        *_sizes(),
        *_no_files(),
    ]
    titles = [case.title for case in cases]
    assert len(set(titles)) == len(titles), sorted(title for title in titles if titles.count(title) > 1)
    return cases


@cache
def _parts() -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    metadata, tensors = tiny_llama()
    return metadata, tuple(tensors)


def small_gguf(
    changes: Mapping[str, Any] | None = None,
    tensors: Sequence[Tensor] | None = None,
    *,
    without: Sequence[str] = (),
    alignment: int = 32,
) -> bytes:
    """The sound file, with other metadata (bytes: a value as it is, type included) or other tensors."""
    metadata, own = _parts()
    metadata = {key: value for key, value in {**metadata, **(changes or {})}.items() if key not in without}
    return gguf_bytes(metadata, own if tensors is None else tensors, alignment)


def _case(
    family: str,
    name: str,
    data: Content,
    field: str,
    expected: Expected = "refused",
    exit_code: int = 4,
    target: str = _TARGET,
) -> HostileCase:
    return HostileCase(
        family=f"gguf {family}",
        name=name,
        files={target: data},
        target=target,
        field=field,
        expected=expected,
        exit_code=exit_code,
    )


def _loads(name: str, data: bytes) -> HostileCase:
    return _case("sound", name, data, "", "loads")


def _sound() -> Iterator[HostileCase]:
    """What looks odd and is right."""
    data = small_gguf()
    yield _loads("as it is", data)
    yield _loads("version 2", _patched(data, 4, struct.pack("<I", 2)))
    yield _loads("aligned to 64", small_gguf({"general.alignment": 64}, alignment=64))
    yield _loads("without a template", small_gguf(without=["tokenizer.chat_template"]))
    yield _loads("unknown keys", small_gguf({"x.y": value_bytes(1.5), "x.z": value_bytes([1, 2])}))
    yield _loads("padded once more", data + bytes(31))
    metadata, tensors = _parts()
    yield _loads("keys in another order", gguf_bytes(dict(reversed(metadata.items())), tensors))
    yield _loads("tensors in another order", small_gguf(tensors=tensors[::-1]))
    names = ["Ġthe \x1b[31m" + "x" * 200, "\u202e"]
    yield _loads("key of an array of odd texts", small_gguf({"x.names": names}))


def _heads() -> Iterator[HostileCase]:
    data = small_gguf()
    for magic in (b"", b"GGU", b"GGML", b"FUGG", b"gguf", b"PK\x03\x04", b"\x80\x04\x95\x00", b"\x7fELF"):
        yield _case("head", f"magic {magic!r}", magic + data[4:], "magic")
    for version in (0, 1, 4, 2**31, 2**32 - 1):
        yield _case("head", f"version {version}", _patched(data, 4, struct.pack("<I", version)), "version")
    big = b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + data[24:]
    yield _case("head", "big-endian", big, "version")
    for at, field in ((8, "tensor count"), (16, "metadata count")):
        for value in (len(data), *_HUGE):
            wrong = _patched(data, at, struct.pack("<Q", value))
            yield _case("head", f"{field} {value}", wrong, f"{field}|key|tensor")
        (count,) = struct.unpack_from("<Q", data, at)
        for value in (0, count - 1, count + 1):
            wrong = _patched(data, at, struct.pack("<Q", value))
            yield _case("head", f"{field} {value} of {count}", wrong, "")
    yield _case("head", "only a head", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture")
    yield _case("head", "zeros", bytes(4096), "magic")
    yield _case("head", "text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "magic")
    yield _case("head", "a web page", b"<!DOCTYPE html><html><body>404</body></html>" * 20, "magic")
    yield _case("head", "endless magic", b"GGUF" * 4096, "version")


def _truncated() -> Iterator[HostileCase]:
    """The file ends at each border of the header, and in its data."""
    data = small_gguf()
    found = list(borders(data))
    last = max(border.at + border.size for border in found)
    tensors = [name for name in dict.fromkeys(each.owner for each in found) if name.endswith(".weight")]
    chosen = [each for each in found if each.owner not in tensors[2:-1]]
    counts = "|tensor count|metadata count"
    for border in chosen:
        for at in {border.at, border.at + border.size // 2}:
            name = f"{border.owner}, {border.kind} at {at}"
            yield _case("truncated", name, data[:at], _owner(border) + counts)
    for at in (last, last + 1, (last + len(data)) // 2, len(data) - 200, len(data) - 65):
        yield _case("truncated", f"data at {at - last}", data[:at], "tensor|file")


def _owner(border: Border) -> str:
    """What an error about this field may call its owner: by name, or before the name is read by index."""
    other = "tensor token_embd" if border.owner.endswith(".weight") else "key \\d"
    return f"{_escaped(border.owner)}|tensor \\d|^: cannot be read|{other}"


def _lies() -> Iterator[HostileCase]:
    """Every count, length, type, dimension and offset of a few keys and tensors."""
    data = small_gguf()
    owners = {"llama.block_count", "general.license", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}
    owners |= {"token_embd.weight", "blk.1.attn_q.weight", "output_norm.weight"}
    for border in borders(data):
        if border.owner not in owners or border.size not in (4, 8) or border.kind in ("value", "string"):
            continue
        if border.kind in ("key", "tensor name"):
            continue
        values = [each for each in _HUGE if each < 1 << 8 * border.size]
        if border.kind not in ("offset", "tensor type", "type", "item type"):
            values.append(0)
        for value in values:
            wrong = _patched(data, border.at, value.to_bytes(border.size, "little"))
            field = f"{_owner(border)}|general.alignment|count|leaves a gap"
            yield _case("lie", f"{border.owner}, {border.kind} at {border.at} is {value}", wrong, field)


def _strings() -> Iterator[HostileCase]:
    """Keys, names and texts: empty, too long, no UTF-8, with characters that no name has."""
    odd = {
        "empty": b"",
        "no UTF-8": b"a\xff\xfe",
        "a surrogate": b"a\xed\xa0\x80",
        "overlong": b"\xc0\xafx",
        "zero byte": b"a\0b",
        "new line": b"a\nb",
        "escape": b"\x1b[2Ja",
        "right to left": "\u202eab".encode(),
        "300 bytes": b"k" * 300,
        "spaces": b"a b",
    }
    metadata, tensors = _parts()
    for name, key in odd.items():
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
        pair = text("general.architecture") + value_bytes("llama")
        yield _case("string", f"key: {name}", head + pair + text(key) + value_bytes(1), "key 1")
        table = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair + text(key)
        entry = table + struct.pack("<IQIQ", 1, 8, 0, 0) + bytes(64)
        yield _case("string", f"tensor name: {name}", entry, "tensor 0")
    for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.chat_template"):
        wrong = small_gguf({key: struct.pack("<I", STRING) + text(b"\xff\xfe")})
        yield _case("string", f"{key} is no UTF-8", wrong, _escaped(key))
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        data = struct.pack("<IIQ", ARRAY, STRING, 1) + text(b"\xff")
        yield _case("string", f"{name} is no UTF-8", small_gguf({name: data}), _escaped(name))
    twice = gguf_bytes(metadata, tensors)
    pairs = text("general.license") + value_bytes("x")
    again = twice[:16] + struct.pack("<Q", len(metadata) + 1) + pairs + twice[24:]
    yield _case("string", "a key twice", again, "general.license")
    for name in (
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        "blk.0.attn_q.weight\\..",
        "blk.00000.attn_q.weight",
    ):
        renamed = [*tensors, dataclasses.replace(tensors[0], name=name)]
        yield _case("string", f"tensor named {name}", small_gguf(tensors=renamed), _escaped(name))
    longest = "general." + "x" * 247
    yield _case(
        "string", "a text beyond the limit", small_gguf({longest: "y" * (1 << 20) + "y"}), "general.x"
    )
    yield _case(
        "string",
        "an architecture of 1 MiB",
        small_gguf({"general.architecture": "y" * (1 << 20)}),
        "general.architecture",
    )


def _metadata_types() -> Iterator[HostileCase]:
    """Metadata of another type than the reader expects, for every key that is read."""
    wrong: dict[str, bytes] = {
        "text": value_bytes("4"),
        "boolean": value_bytes(True),
        "negative": struct.pack("<Ii", I32, -1),
        "NaN": struct.pack("<If", F32, math.nan),
        "infinity": struct.pack("<Id", _F64, math.inf),
        "2^64-1": struct.pack("<IQ", U64, 2**64 - 1),
        "array": value_bytes([1, 2, 3]),
        "array of texts": value_bytes(["1"]),
        "empty array": struct.pack("<IIQ", ARRAY, I32, 0),
    }
    ids = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding")]
    for key in (*_NAMES, *ids, "llama.rope.dimension_count", "llama.attention.value_length"):
        expected: Expected = "either" if "unknown" in key or "padding" in key else "refused"
        for name, value in wrong.items():
            yield _case("type", f"{key} is {name}", small_gguf({key: value}), _named(key), expected)
    texts = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type")
    for key in (*texts, *lists, "general.alignment", "tokenizer.ggml.add_space_prefix"):
        for name, value in wrong.items():
            if name != "text" or not key.endswith("template"):
                yield _case("type", f"{key} is {name}", small_gguf({key: value}), f"{_named(key)}|token_type")
    for key in (*_NAMES, *lists, *texts[:3]):
        if key in ("llama.attention.head_count_kv", "llama.attention.key_length", "llama.rope.freq_base"):
            continue
        yield _case("type", f"{key} is missing", small_gguf(without=[key]), _named(key))
    flag = struct.pack("<IB", BOOL, 2)
    for key in ("tokenizer.ggml.add_space_prefix", "general.license"):
        yield _case("type", f"{key} is a boolean of 2", small_gguf({key: flag}), _escaped(key))
    yield _case(
        "type", "add_space_prefix", small_gguf({"tokenizer.ggml.add_space_prefix": True}), "add_space"
    )


def _metadata_numbers() -> Iterator[HostileCase]:
    """Numbers that no model has, or that do not fit together."""
    whole = [key for key in _NAMES if not key.endswith(("epsilon", "base"))]
    for key in whole:
        for value in (0, 2**31 - 1, 2**32 - 1):
            yield _case("number", f"{key} is {value}", small_gguf({key: value}), _named(key))
        broken = small_gguf({key: struct.pack("<If", F32, 2.5)})
        yield _case("number", f"{key} is 2.5", broken, _named(key))
        yield _case(
            "number", f"{key} is 1e300", small_gguf({key: struct.pack("<Id", _F64, 1e300)}), _named(key)
        )
    for key, values in (
        ("llama.attention.layer_norm_rms_epsilon", (0.0, -1.0, 1e30)),
        ("llama.rope.freq_base", (0.0, -5.0)),
    ):
        for value in values:
            yield _case("number", f"{key} is {value}", small_gguf({key: value}), _named(key))
    for heads, kv in ((3, 2), (4, 3), (2, 4), (1, 2)):
        data = small_gguf({"llama.attention.head_count": heads, "llama.attention.head_count_kv": kv})
        yield _case("number", f"{heads} heads, {kv} of keys", data, "num_attention_heads|head_count|attn_")
    for key, value in (
        ("llama.block_count", 1),
        ("llama.block_count", 3),
        ("llama.block_count", 1024),
        ("llama.embedding_length", 128),
        ("llama.feed_forward_length", 64),
        ("llama.attention.head_count", 8),
        ("llama.attention.head_count_kv", 4),
        ("llama.attention.key_length", 15),
        ("llama.attention.key_length", 32),
        ("llama.rope.dimension_count", 8),
        ("llama.attention.value_length", 8),
    ):
        data = small_gguf({key: value})
        yield _case("number", f"{key} is {value}, the tensors say another", data, f"{_named(key)}|tensor")
    for key, value in (
        ("rope.scaling.type", "linear"),
        ("rope.scaling.type", 7),
        ("rope.scaling.factor", float("nan")),
        ("expert_count", 2**32 - 1),
        ("expert_count", "8"),
        ("attention.sliding_window", "many"),
        ("attention.sliding_window", [1, 2]),
    ):
        data = small_gguf({f"llama.{key}": value})
        yield _case("number", f"llama.{key} is {value}", data, _escaped(key))
    for token in ("bos", "eos"):
        for number in (262, 263, 267, 2**31, 2**32 - 1):
            key = f"tokenizer.ggml.{token}_token_id"
            data = small_gguf({key: struct.pack("<II", U32, number)})
            yield _case(
                "number",
                f"{token} is token {number}",
                data,
                f"{token}_token_id",
                "refused" if number > 262 else "loads",
            )
    for alignment in (0, 3, 31, 1 << 20, 2**32 - 1):
        data = small_gguf({"general.alignment": alignment})
        yield _case("number", f"alignment {alignment}", data, "general.alignment")
    for alignment in (64, 4096, 1 << 16):
        data = small_gguf({"general.alignment": alignment})
        yield _case("number", f"alignment {alignment} of a file that is not", data, "aligned|tensor")


def _arrays() -> Iterator[HostileCase]:
    """Arrays in arrays, of unknown types, and that claim more than there is."""
    for depth in (1, 2, 8, 1000, 100_000):
        value = struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 0)
        yield _case("array", f"nested {depth} deep", small_gguf({"x.deep": value}), "x.deep")
    for kind in (13, 14, 255, 2**31, 2**32 - 1):
        value = struct.pack("<IIQ", ARRAY, kind, 1) + bytes(64)
        yield _case("array", f"of type {kind}", small_gguf({"x.odd": value}), "x.odd")
        yield _case(
            "array",
            f"a value of type {kind}",
            small_gguf({"x.odd": struct.pack("<I", kind) + bytes(8)}),
            "x.odd",
        )
    for kind in (_U8, U32, F32, BOOL, STRING, U64, _I64, _F64):
        for count in (2**20, *_HUGE):
            value = struct.pack("<IIQ", ARRAY, kind, count)
            head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x.many") + value
            yield _case("array", f"{count} of type {kind}", head + bytes(64), "x.many")
    for length in (2**16, *_HUGE):
        value = struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + struct.pack("<Q", length)
        yield _case("array", f"a text of {length}", small_gguf({"x.text": value}), "x.text")
    value = struct.pack("<IIQ", ARRAY, BOOL, 4) + b"\0\1\2\3"
    yield _case("array", "booleans of 2 and 3", small_gguf({"x.flags": value}), "x.flags")


def _tensor_tables() -> Iterator[HostileCase]:
    """Tensors: twice, missing, unknown, overlapping, apart, of other shapes and types."""
    _, tensors = _parts()
    first, second, *rest = tensors
    name = _escaped(second.name)

    def table(family: str, changed: Sequence[Tensor], field: str) -> HostileCase:
        return _case("tensors", family, small_gguf(tensors=changed), field)

    yield table("one twice", [first, second, second, *rest], name)
    yield table("an unknown one", [*tensors, dataclasses.replace(second, name="blk.0.evil.weight")], "evil")
    yield table(
        "one of layer 9999", [*tensors, dataclasses.replace(second, name="blk.9999.attn_norm.weight")], "9999"
    )
    yield table(
        "one of layer 01",
        [*tensors, dataclasses.replace(second, name="blk.01.attn_norm.weight")],
        "attn_norm|beyond",
    )
    yield table("none", [], "token_embd")
    for index in (0, 1, 3, len(tensors) - 1):
        lacking = [*tensors[:index], *tensors[index + 1 :]]
        kind = tensors[index].name.removesuffix(".weight").rpartition(".")[2]
        yield table(f"without {tensors[index].name}", lacking, f"{kind}|missing")
    yield table("overlapping", [first, dataclasses.replace(second, offset=0), *rest], "overlaps")
    half = len(first.data) // 64 * 32
    yield table("half overlapping", [first, dataclasses.replace(second, offset=half), *rest], "overlaps")
    for offset in (1, 31, 33, 2**32 + 1, 2**63 + 7):
        yield table(f"at offset {offset}", [first, dataclasses.replace(second, offset=offset), *rest], name)
    for offset in (1 << 20, 1 << 40, 2**63, 2**64 - 32):
        yield table(
            f"beyond the end at {offset}",
            [first, dataclasses.replace(second, offset=offset), *rest],
            f"{name}|leaves a gap",
        )
    shapes: list[tuple[int, ...]] = [
        (),
        (0,),
        (0, 64),
        (64, 0),
        (1, 1, 1, 1, 1),
        (65,),
        (32,),
        (2**63, 2),
        (2**32, 2**32),
    ]
    shapes += [
        (2**62, 4),
        (2**64 - 1,),
        (2**64 - 1,) * 4,
        (2**33, 2**31),
        (64, 1),
        (1, 64),
        (8, 8),
        (1, 1, 1, 64),
    ]
    for shape in shapes:
        yield table(
            f"shape {shape}",
            [first, dataclasses.replace(second, shape=shape), *rest],
            f"{name}|tensor 1|dimensions|overlaps|gap",
        )
    for kind in (4, 5, 9, 31, 32, 33, 36, 37, 38, 40, 255, 2**31, 2**32 - 1):
        yield table(f"type {kind}", [dataclasses.replace(first, type_id=kind), second, *rest], first.name)
    for kind in (16, 17, 18, 19, 22, 24, 27, 28, 29, 34, 35, 39):
        yield table(
            f"a type that is not read, {kind}",
            [dataclasses.replace(first, type_id=kind), second, *rest],
            first.name,
        )
    for kind in (2, 3, 8):
        wrong = dataclasses.replace(second, type_id=kind, shape=(33,))
        yield table(f"rows of 33 in type {kind}", [first, wrong, *rest], name)
    data = small_gguf()
    yield _case(
        "tensors",
        "a megabyte between two",
        small_gguf(tensors=[first, dataclasses.replace(second, data=second.data + bytes(1 << 20)), *rest]),
        "tensor|file",
    )
    zip_end = b"PK\x05\x06" + bytes(18)
    yield _case("polyglot", "ZIP directory at the end", data + bytes(64) + zip_end, "file|tensor")
    yield _case("polyglot", "64 KiB of zeros at the end", data + bytes(1 << 16), "file|tensor")
    yield _case("polyglot", "a second GGUF at the end", data + data, "file|tensor")


def _values() -> Iterator[HostileCase]:
    """Scales and weights that are no finite numbers, in each stored type."""
    _, tensors = _parts()
    halves = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}
    for label, value in halves.items():
        for at, tensor in ((0, tensors[0]), (3, tensors[3])):
            data = _patched(tensor.data, 0, np.float16(value).tobytes())
            changed = [*tensors[:at], dataclasses.replace(tensor, data=data), *tensors[at + 1 :]]
            yield _case("value", f"{tensor.dtype} scale is {label}", small_gguf(tensors=changed), tensor.name)
        tensor = tensors[3]
        minimum = dataclasses.replace(tensor, data=_patched(tensor.data, 2, np.float16(value).tobytes()))
        changed = [*tensors[:3], minimum, *tensors[4:]]
        yield _case("value", f"{tensor.dtype} minimum is {label}", small_gguf(tensors=changed), tensor.name)
        norm = tensors[-1]
        for dtype, stored in (("F32", np.float32), ("F16", np.float16)):
            values = np.full(norm.shape, value, stored)
            last = dataclasses.replace(norm, dtype=dtype, data=values.tobytes())
            yield _case(
                "value", f"{dtype} weight is {label}", small_gguf(tensors=[*tensors[:-1], last]), norm.name
            )
    norm = tensors[-1]
    huge = dataclasses.replace(norm, data=np.full(norm.shape, 3.4e38, np.float32).tobytes())
    yield _case(
        "value",
        "a float32 that no bfloat16 holds",
        small_gguf(tensors=[*tensors[:-1], huge]),
        norm.name,
        "either",
    )


def _vocabularies() -> Iterator[HostileCase]:
    """Tokens, merges, types and template that do not fit together."""
    metadata, _ = _parts()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges: list[str] = metadata["tokenizer.ggml.merges"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]

    def vocabulary(name: str, field: str, expected: Expected = "refused", **changes: Any) -> HostileCase:
        data = small_gguf({f"tokenizer.ggml.{key}": value for key, value in changes.items()})
        return _case("vocabulary", name, data, field, expected)

    yield vocabulary("no token", "tokens|token_type", tokens=struct.pack("<IIQ", ARRAY, STRING, 0))
    yield vocabulary("a token twice", "tokens", tokens=[*tokens[:-1], tokens[-2]])
    yield vocabulary("a control token twice", "tokens", tokens=[tokens[1], *tokens[1:]])
    yield vocabulary(
        "more tokens than embeddings", "tokens|tokenizer", tokens=[*tokens, "zz"], token_type=[*types, 1]
    )
    yield vocabulary(
        "far more tokens",
        "tokens|tokenizer",
        tokens=[*tokens, *(f"t{i}" for i in range(9000))],
        token_type=[*types, *[1] * 9000],
    )
    yield vocabulary("an empty token", "token", "either", tokens=[*tokens[:-1], ""])
    yield vocabulary("a token of other characters", "token", tokens=[*tokens[:-1], "\u4e16"])
    yield vocabulary("a token with a zero", "token", tokens=[*tokens[:-1], "a\0b"])
    yield vocabulary("a token of 100,000", "token", "either", tokens=[*tokens[:-1], "x" * 100_000])
    for count in (0, 1, len(types) - 1, len(types) + 1):
        short = (types + [1])[:count]
        value = short or struct.pack("<IIQ", ARRAY, I32, 0)
        yield vocabulary(f"{count} types", "token_type", token_type=value)
    for kind in (-1, 7, 2**31 - 1):
        yield vocabulary(f"a type {kind}", "token_type", token_type=[*types[:-1], kind])
    yield vocabulary(
        "types as floats",
        "token_type",
        token_type=struct.pack(f"<IIQ{len(types)}f", ARRAY, F32, len(types), *types),
    )
    many = [f"<|{i}|>" for i in range(5000)]
    yield vocabulary(
        "5,000 control tokens", "token_type|tokens", tokens=[*tokens, *many], token_type=[*types, *[3] * 5000]
    )
    yield vocabulary(
        "a control token of one character", "special|control", token_type=[*types[:10], 3, *types[11:]]
    )
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
        yield vocabulary(f"a merge {name}", "merges|tokenizer", merges=[*merges, merge])
    yield vocabulary("a merge twice", "merges", "either", merges=[*merges, merges[0]])
    yield vocabulary("no merges", "merges", merges=[])
    for pre in ("", "default", "nobody", "../../evil", "x" * 10_000):
        yield vocabulary(f"pre-tokenizer {pre[:20]!r}", r"tokenizer\.ggml\.pre", pre=pre)
    for model in ("", "wordpiece", "os.system", "gpt2\x1b[31m", "x" * 10_000):
        yield vocabulary(f"model {model[:20]!r}", r"tokenizer\.ggml\.model", model=model)
    template = "tokenizer.chat_template"
    for name, source in _templates():
        is_bomb = name in ("an endless output", "a doubling", "an endless loop")
        data = small_gguf({template: source})
        yield _case("template", name, data, "chat_template", exit_code=7 if is_bomb else 4)


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


def _sizes() -> Iterator[HostileCase]:
    """Many of everything: bounded, and quick to refuse."""

    def keys(count: int) -> dict[str, Any]:
        return {f"x.{index}": 1 for index in range(count)}

    yield _case("size", "5,000 keys", small_gguf(keys(5000)), "metadata count")
    yield _loads("3,000 keys", small_gguf(keys(3000)))
    entry = b"".join(text(f"blk.{i}.x") + struct.pack("<IQIQ", 1, 1, 0, 0) for i in range(16_000))
    head = b"GGUF" + struct.pack("<IQQ", 3, 16_000, 1) + text("general.architecture") + value_bytes("llama")
    yield _case("size", "16,000 tensors in one place", head + entry + bytes(64), "overlaps")
    entry = b"".join(text(f"blk.{i}.x") + struct.pack("<IQIQ", 1, 1, 0, 32 * i) for i in range(16_000))
    yield _case("size", "16,000 tensors", head + entry + bytes(32 * 16_001), "general|missing|llama|tensor")
    yield _case(
        "size", "70,000 tensors", head[:8] + struct.pack("<Q", 70_000) + head[16:] + entry, "tensor count"
    )
    flags = struct.pack("<IIQ", ARRAY, BOOL, 1 << 20) + bytes(1 << 20)
    yield _loads("a million flags", small_gguf({"x.flags": flags}))
    texts = struct.pack("<IIQ", ARRAY, STRING, 200_000) + b"".join(text(f"{i:06}") for i in range(200_000))
    yield _loads("200,000 unused texts", small_gguf({"x.texts": texts}))


def _no_files() -> Iterator[HostileCase]:
    """What is no file, or has a name that no model can have."""
    yield _case("path", "empty file", b"", "empty|cannot be read|magic")
    yield _case("path", "a pipe without a writer", Fifo(), "file", exit_code=3)
    for name in ("..gguf.gguf", "a b.gguf", "con.gguf", "-rf.gguf", "x" * 150 + ".gguf", "\u202e.gguf"):
        yield _case(
            "path", f"file named {name[:20]!r}", small_gguf(), "model name", exit_code=2, target=f"in/{name}"
        )


def _patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def _escaped(name: str) -> str:
    """A name as a regular expression."""
    return "".join(char if char.isalnum() else f"\\{char}" for char in name)


def _named(key: str) -> str:
    names = [key, _NAMES.get(key, key), key.removeprefix("tokenizer.ggml."), key.removeprefix("tokenizer.")]
    return "|".join(map(_escaped, dict.fromkeys(names)))
