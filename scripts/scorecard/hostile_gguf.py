"""Hostile GGUF files: each number of a small sound file a lie, and fields that do not fit together.

The same files every time. Each case names the field that the error has to name, and some cases are sound,
so that files are not refused for the wrong reason.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from scripts.scorecard.gguf_borders import Border, borders
from scripts.scorecard.gguf_cases import NAMES, case, escaped, loads, named, parts, patched, small_gguf
from scripts.scorecard.hostile_files import Expected, Fifo, HostileCase
from scripts.scorecard.hostile_gguf_content import gguf_content
from scripts.scorecard.hostile_gguf_kinds import gguf_kinds
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
    value_bytes,
)

__all__ = ["hostile_gguf"]

_HUGE = (2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_F64, _I64, _U8 = 12, 11, 0


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
        *_metadata_mismatches(),
        *_arrays(),
        *_tensor_tables(),
        *_tensor_shapes(),
        *gguf_content(),
        *gguf_kinds(),
        *_sizes(),
        *_no_files(),
    ]
    titles = [each.title for each in cases]
    assert len(set(titles)) == len(titles), sorted(title for title in titles if titles.count(title) > 1)
    return cases


def _sound() -> Iterator[HostileCase]:
    """What looks odd and is right."""
    data = small_gguf()
    yield loads("as it is", data)
    yield loads("version 2", patched(data, 4, struct.pack("<I", 2)))
    yield loads("aligned to 64", small_gguf({"general.alignment": 64}, alignment=64))
    yield loads("without a template", small_gguf(without=["tokenizer.chat_template"]))
    yield loads("unknown keys", small_gguf({"x.y": value_bytes(1.5), "x.z": value_bytes([1, 2])}))
    yield loads("padded once more", data + bytes(31))
    metadata, tensors = parts()
    yield loads("keys in another order", gguf_bytes(dict(reversed(metadata.items())), tensors))
    yield loads("tensors in another order", small_gguf(tensors=tensors[::-1]))
    names = ["Ġthe \x1b[31m" + "x" * 200, "\u202e"]
    yield loads("key of an array of odd texts", small_gguf({"x.names": names}))


def _heads() -> Iterator[HostileCase]:
    data = small_gguf()
    for magic in (b"", b"GGU", b"GGML", b"FUGG", b"gguf", b"PK\x03\x04", b"\x80\x04\x95\x00", b"\x7fELF"):
        yield case("head", f"magic {magic!r}", magic + data[4:], "magic")
    for version in (0, 1, 4, 2**31, 2**32 - 1):
        yield case("head", f"version {version}", patched(data, 4, struct.pack("<I", version)), "version")
    big = b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + data[24:]
    yield case("head", "big-endian", big, "version")
    for at, field in ((8, "tensor count"), (16, "metadata count")):
        for value in (len(data), *_HUGE):
            wrong = patched(data, at, struct.pack("<Q", value))
            yield case("head", f"{field} {value}", wrong, f"{field}|key|tensor")
        (count,) = struct.unpack_from("<Q", data, at)
        for value in (0, count - 1, count + 1):
            wrong = patched(data, at, struct.pack("<Q", value))
            yield case("head", f"{field} {value} of {count}", wrong, "")
    yield case("head", "only a head", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture")
    yield case("head", "zeros", bytes(4096), "magic")
    yield case("head", "text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "magic")
    yield case("head", "a web page", b"<!DOCTYPE html><html><body>404</body></html>" * 20, "magic")
    yield case("head", "endless magic", b"GGUF" * 4096, "version")


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
            yield case("truncated", name, data[:at], _owner(border) + counts)
    for at in (last, last + 1, (last + len(data)) // 2, len(data) - 200, len(data) - 65):
        yield case("truncated", f"data at {at - last}", data[:at], "tensor|file")


def _owner(border: Border) -> str:
    """What an error about this field may call its owner: by name, or before the name is read by index."""
    other = "tensor token_embd" if border.owner.endswith(".weight") else "key \\d"
    return f"{escaped(border.owner)}|tensor \\d|^: cannot be read|{other}"


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
            wrong = patched(data, border.at, value.to_bytes(border.size, "little"))
            field = f"{_owner(border)}|general.alignment|count|leaves a gap"
            yield case("lie", f"{border.owner}, {border.kind} at {border.at} is {value}", wrong, field)


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
    metadata, tensors = parts()
    for name, odd_key in odd.items():
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
        pair = text("general.architecture") + value_bytes("llama")
        yield case("string", f"key: {name}", head + pair + text(odd_key) + value_bytes(1), "key 1")
        table = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair + text(odd_key)
        entry = table + struct.pack("<IQIQ", 1, 8, 0, 0) + bytes(64)
        yield case("string", f"tensor name: {name}", entry, "tensor 0")
    for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.chat_template"):
        wrong = small_gguf({key: struct.pack("<I", STRING) + text(b"\xff\xfe")})
        yield case("string", f"{key} is no UTF-8", wrong, escaped(key))
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        data = struct.pack("<IIQ", ARRAY, STRING, 1) + text(b"\xff")
        yield case("string", f"{name} is no UTF-8", small_gguf({name: data}), escaped(name))
    twice = gguf_bytes(metadata, tensors)
    pairs = text("general.license") + value_bytes("x")
    again = twice[:16] + struct.pack("<Q", len(metadata) + 1) + pairs + twice[24:]
    yield case("string", "a key twice", again, "general.license")
    for name in (
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        "blk.0.attn_q.weight\\..",
        "blk.00000.attn_q.weight",
    ):
        renamed = [*tensors, dataclasses.replace(tensors[0], name=name)]
        yield case("string", f"tensor named {name}", small_gguf(tensors=renamed), escaped(name))
    longest = "general." + "x" * 247
    yield case("string", "a text beyond the limit", small_gguf({longest: "y" * (1 << 20) + "y"}), "general.x")
    yield case(
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
    for key in (*NAMES, *ids, "llama.rope.dimension_count", "llama.attention.value_length"):
        expected: Expected = "either" if "unknown" in key or "padding" in key else "refused"
        for name, value in wrong.items():
            yield case("type", f"{key} is {name}", small_gguf({key: value}), named(key), expected)
    texts = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type")
    for key in (*texts, *lists, "general.alignment", "tokenizer.ggml.add_space_prefix"):
        for name, value in wrong.items():
            if name != "text" or not key.endswith("template"):
                yield case("type", f"{key} is {name}", small_gguf({key: value}), f"{named(key)}|token_type")
    for key in (*NAMES, *lists, *texts[:3]):
        if key in ("llama.attention.head_count_kv", "llama.attention.key_length", "llama.rope.freq_base"):
            continue
        yield case("type", f"{key} is missing", small_gguf(without=[key]), named(key))
    flag = struct.pack("<IB", BOOL, 2)
    for key in ("tokenizer.ggml.add_space_prefix", "general.license"):
        yield case("type", f"{key} is a boolean of 2", small_gguf({key: flag}), escaped(key))
    yield case("type", "add_space_prefix", small_gguf({"tokenizer.ggml.add_space_prefix": True}), "add_space")


def _metadata_numbers() -> Iterator[HostileCase]:
    """Numbers that no model has, or that do not fit together."""
    whole = [key for key in NAMES if not key.endswith(("epsilon", "base"))]
    for key in whole:
        for value in (0, 2**31 - 1, 2**32 - 1):
            yield case("number", f"{key} is {value}", small_gguf({key: value}), named(key))
        broken = small_gguf({key: struct.pack("<If", F32, 2.5)})
        yield case("number", f"{key} is 2.5", broken, named(key))
        yield case(
            "number", f"{key} is 1e300", small_gguf({key: struct.pack("<Id", _F64, 1e300)}), named(key)
        )
    for key, values in (
        ("llama.attention.layer_norm_rms_epsilon", (0.0, -1.0, 1e30)),
        ("llama.rope.freq_base", (0.0, -5.0)),
    ):
        for real in values:
            yield case("number", f"{key} is {real}", small_gguf({key: real}), named(key))


def _metadata_mismatches() -> Iterator[HostileCase]:
    """Numbers that do not fit each other or the tensors, and features that are not computed."""
    for heads, kv in ((3, 2), (4, 3), (2, 4), (1, 2)):
        data = small_gguf({"llama.attention.head_count": heads, "llama.attention.head_count_kv": kv})
        yield case("number", f"{heads} heads, {kv} of keys", data, "num_attention_heads|head_count|attn_")
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
        yield case("number", f"{key} is {value}, the tensors say another", data, f"{named(key)}|tensor")
    unsupported: tuple[tuple[str, Any, str], ...] = (
        ("rope.scaling.type", "linear", "rope_scaling: factor"),
        ("rope.scaling.type", 7, "rope_scaling: rope_type"),
        ("rope.scaling.factor", float("nan"), "rope_scaling: factor"),
        ("expert_count", 2**32 - 1, "num_local_experts"),
        ("expert_count", "8", "num_local_experts"),
        ("attention.sliding_window", "many", "sliding_window"),
        ("attention.sliding_window", [1, 2], r"attention\.sliding_window"),
    )
    for key, setting, field in unsupported:
        data = small_gguf({f"llama.{key}": setting, "llama.expert_used_count": 2})
        yield case("number", f"llama.{key} is {setting}", data, field)
    data = small_gguf({"llama.expert_count": 8})
    yield case("number", "llama.expert_used_count is missing", data, "expert_used_count")
    for token in ("bos", "eos"):
        for number in (262, 263, 267, 2**31, 2**32 - 1):
            key = f"tokenizer.ggml.{token}_token_id"
            data = small_gguf({key: struct.pack("<II", U32, number)})
            yield case(
                "number",
                f"{token} is token {number}",
                data,
                f"{token}_token_id",
                "refused" if number > 262 else "loads",
            )
    for alignment in (0, 3, 31, 1 << 20, 2**32 - 1):
        data = small_gguf({"general.alignment": alignment})
        yield case("number", f"alignment {alignment}", data, "general.alignment")
    for alignment in (64, 4096, 1 << 16):
        data = small_gguf({"general.alignment": alignment})
        yield case("number", f"alignment {alignment} of a file that is not", data, "aligned|tensor")


def _arrays() -> Iterator[HostileCase]:
    """Arrays in arrays, of unknown types, and that claim more than there is."""
    for depth in (1, 2, 8, 1000, 100_000):
        value = struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 0)
        yield case("array", f"nested {depth} deep", small_gguf({"x.deep": value}), "x.deep")
    for kind in (13, 14, 255, 2**31, 2**32 - 1):
        value = struct.pack("<IIQ", ARRAY, kind, 1) + bytes(64)
        yield case("array", f"of type {kind}", small_gguf({"x.odd": value}), "x.odd")
        yield case(
            "array",
            f"a value of type {kind}",
            small_gguf({"x.odd": struct.pack("<I", kind) + bytes(8)}),
            "x.odd",
        )
    for kind in (_U8, U32, F32, BOOL, STRING, U64, _I64, _F64):
        for count in (2**20, *_HUGE):
            value = struct.pack("<IIQ", ARRAY, kind, count)
            head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x.many") + value
            yield case("array", f"{count} of type {kind}", head + bytes(64), "x.many")
    for length in (2**16, *_HUGE):
        value = struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + struct.pack("<Q", length)
        yield case("array", f"a text of {length}", small_gguf({"x.text": value}), "x.text")
    value = struct.pack("<IIQ", ARRAY, BOOL, 4) + b"\0\1\2\3"
    yield case("array", "booleans of 2 and 3", small_gguf({"x.flags": value}), "x.flags")


def _table(family: str, changed: Sequence[Tensor], field: str) -> HostileCase:
    return case("tensors", family, small_gguf(tensors=changed), field)


def _tensor_tables() -> Iterator[HostileCase]:
    """Tensors: twice, missing, unknown, overlapping, apart, of other shapes and types."""
    _, tensors = parts()
    first, second, *rest = tensors
    name = escaped(second.name)

    yield _table("one twice", [first, second, second, *rest], name)
    yield _table("an unknown one", [*tensors, dataclasses.replace(second, name="blk.0.evil.weight")], "evil")
    yield _table(
        "one of layer 9999", [*tensors, dataclasses.replace(second, name="blk.9999.attn_norm.weight")], "9999"
    )
    yield _table(
        "one of layer 01",
        [*tensors, dataclasses.replace(second, name="blk.01.attn_norm.weight")],
        "attn_norm|beyond",
    )
    yield _table("none", [], "token_embd")
    for index in (0, 1, 3, len(tensors) - 1):
        lacking = [*tensors[:index], *tensors[index + 1 :]]
        kind = tensors[index].name.removesuffix(".weight").rpartition(".")[2]
        yield _table(f"without {tensors[index].name}", lacking, f"{kind}|missing")
    yield _table("overlapping", [first, dataclasses.replace(second, offset=0), *rest], "overlaps")
    half = len(first.data) // 64 * 32
    yield _table("half overlapping", [first, dataclasses.replace(second, offset=half), *rest], "overlaps")
    for offset in (1, 31, 33, 2**32 + 1, 2**63 + 7):
        yield _table(f"at offset {offset}", [first, dataclasses.replace(second, offset=offset), *rest], name)
    for offset in (1 << 20, 1 << 40, 2**63, 2**64 - 32):
        yield _table(
            f"beyond the end at {offset}",
            [first, dataclasses.replace(second, offset=offset), *rest],
            f"{name}|leaves a gap",
        )


def _tensor_shapes() -> Iterator[HostileCase]:
    """Shapes and types that no tensor has, and data that are not of the file."""
    first, second, *rest = parts()[1]
    name = escaped(second.name)
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
        yield _table(
            f"shape {shape}",
            [first, dataclasses.replace(second, shape=shape), *rest],
            f"{name}|tensor 1|dimensions|overlaps|gap",
        )
    for type_id in (4, 5, 9, 31, 32, 33, 36, 37, 38, 40, 255, 2**31, 2**32 - 1):
        yield _table(
            f"type {type_id}", [dataclasses.replace(first, type_id=type_id), second, *rest], first.name
        )
    for type_id in (16, 17, 18, 19, 22, 24, 27, 28, 29, 34, 35, 39):
        yield _table(
            f"a type that is not read, {type_id}",
            [dataclasses.replace(first, type_id=type_id), second, *rest],
            first.name,
        )
    for type_id in (2, 3, 8):
        wrong = dataclasses.replace(second, type_id=type_id, shape=(33,))
        yield _table(f"rows of 33 in type {type_id}", [first, wrong, *rest], name)
    data = small_gguf()
    yield case(
        "tensors",
        "a megabyte between two",
        small_gguf(tensors=[first, dataclasses.replace(second, data=second.data + bytes(1 << 20)), *rest]),
        "tensor|file",
    )
    zip_end = b"PK\x05\x06" + bytes(18)
    yield case("polyglot", "ZIP directory at the end", data + bytes(64) + zip_end, "file|tensor")
    yield case("polyglot", "64 KiB of zeros at the end", data + bytes(1 << 16), "file|tensor")
    yield case("polyglot", "a second GGUF at the end", data + data, "file|tensor")


def _sizes() -> Iterator[HostileCase]:
    """Many of everything: bounded, and quick to refuse."""

    def keys(count: int) -> dict[str, Any]:
        return {f"x.{index}": 1 for index in range(count)}

    yield case("size", "5,000 keys", small_gguf(keys(5000)), "metadata count")
    yield loads("3,000 keys", small_gguf(keys(3000)))
    entry = b"".join(text(f"blk.{i}.x") + struct.pack("<IQIQ", 1, 1, 0, 0) for i in range(16_000))
    head = b"GGUF" + struct.pack("<IQQ", 3, 16_000, 1) + text("general.architecture") + value_bytes("llama")
    yield case("size", "16,000 tensors in one place", head + entry + bytes(64), "overlaps")
    entry = b"".join(text(f"blk.{i}.x") + struct.pack("<IQIQ", 1, 1, 0, 32 * i) for i in range(16_000))
    yield case("size", "16,000 tensors", head + entry + bytes(32 * 16_001), "general|missing|llama|tensor")
    yield case(
        "size", "70,000 tensors", head[:8] + struct.pack("<Q", 70_000) + head[16:] + entry, "tensor count"
    )
    flags = struct.pack("<IIQ", ARRAY, BOOL, 1 << 20) + bytes(1 << 20)
    yield loads("a million flags", small_gguf({"x.flags": flags}))
    texts = struct.pack("<IIQ", ARRAY, STRING, 200_000) + text("unused") * 200_000
    yield loads("200,000 unused texts", small_gguf({"x.texts": texts}))


def _no_files() -> Iterator[HostileCase]:
    """What is no file, or has a name that no model can have."""
    yield case("path", "empty file", b"", "empty|cannot be read|magic")
    yield case("path", "a pipe without a writer", Fifo(), "file", exit_code=3)
    for name in ("..gguf.gguf", "a b.gguf", "con.gguf", "-rf.gguf", "x" * 150 + ".gguf", "\u202e.gguf"):
        yield case(
            "path", f"file named {name[:20]!r}", small_gguf(), "model name", exit_code=2, target=f"in/{name}"
        )
