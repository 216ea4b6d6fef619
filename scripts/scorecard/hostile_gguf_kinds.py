"""Hostile GGUF files of the newer kinds: K types, experts in one tensor, rotary divisors, SentencePiece.

Each group begins with files that are sound, so that none is refused for its kind alone. The same every time.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from scripts.scorecard.gguf_cases import case, escaped, loads, parts, patched, small_gguf
from scripts.scorecard.hostile_files import Expected, HostileCase
from tests.fast.model_files import ARRAY, F32, Tensor, floats, gguf_bytes

__all__ = ["damaged_charsmaps", "gguf_kinds", "small_charsmap"]

_KINDS: Final = {"Q4_K": (12, 144, (0, 2)), "Q5_K": (13, 176, (0, 2)), "Q6_K": (14, 210, (208,))}
"""Number, bytes of a block of 256 weights, and where in it its float16 scales are."""

_U8: Final = 0
_ROPE: Final = "rope_freqs.weight"


def gguf_kinds() -> Iterator[HostileCase]:
    """More than 100 cases."""
    yield from _k_types()
    yield from _mixtures()
    yield from _expert_settings()
    yield from _divisors()
    yield from _scores()
    yield from _byte_tokens()
    yield from _unigrams()


def _k_types() -> Iterator[HostileCase]:
    """Blocks that are cut, that rows do not fill, and scales that are no numbers."""
    name = "blk.0.ffn_down.weight"
    for kind, (type_id, size, scales) in _KINDS.items():
        metadata, tensors = _wide(kind)
        sound = gguf_bytes(metadata, tensors)
        last = tensors[-1]
        yield loads(f"a file of {kind}", sound)
        for lost in (1, size - 1, size, len(last.data) - 1, len(last.data)):
            yield case("K type", f"{kind} without its last {lost} bytes", sound[:-lost], escaped(name))
        short = dataclasses.replace(last, data=last.data[:-size])
        first = [short, *tensors[:-1]]
        yield case("K type", f"{kind} of one block less", gguf_bytes(metadata, first), "tensor")
        for at in scales:
            for value in (math.nan, math.inf, -math.inf):
                data = patched(last.data, len(last.data) - size + at, np.float16(value).tobytes())
                changed = [*tensors[:-1], dataclasses.replace(last, data=data)]
                yield case("K type", f"{kind} with {value} at {at}", gguf_bytes(metadata, changed), name)
        narrow = dataclasses.replace(parts()[1][3], dtype=kind, type_id=type_id)
        changed = [narrow if each.name == narrow.name else each for each in parts()[1]]
        yield case("K type", f"{kind} of rows of 64", small_gguf(tensors=changed), escaped(narrow.name))
        for other in _KINDS:
            if other != kind:
                lie = dataclasses.replace(last, type_id=_KINDS[other][0])
                changed = [*tensors[:-1], lie]
                yield case(
                    "K type", f"{kind} that claims {other}", gguf_bytes(metadata, changed), "tensor|file"
                )
    for type_id in (10, 11, 15, 16, 19, 22, 29, 34, 39):
        metadata, tensors = _wide("Q4_K")
        changed = [*tensors[:-1], dataclasses.replace(tensors[-1], type_id=type_id)]
        yield case("K type", f"the other type {type_id}", gguf_bytes(metadata, changed), escaped(name))


def _wide(kind: str) -> tuple[dict[str, Any], list[Tensor]]:
    """A sound model of one layer, 256 wide, whose matrices are of a K type. The last tensor is of it."""
    rng = np.random.default_rng(0)
    changes = {"block_count": 1, "embedding_length": 256, "feed_forward_length": 256}
    changes |= {"attention.head_count": 4, "attention.head_count_kv": 1}
    metadata = {**parts()[0], **{f"llama.{key}": value for key, value in changes.items()}}
    metadata["tokenizer.chat_template"] = ""
    shapes = {"attn_q": (256, 256), "attn_k": (64, 256), "attn_v": (64, 256), "attn_output": (256, 256)}
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), (256, 256))
    tensors = [floats(rng, name, (256,)) for name in ("output_norm.weight", "blk.0.attn_norm.weight")]
    tensors.append(floats(rng, "blk.0.ffn_norm.weight", (256,)))
    tensors.append(_blocks(rng, "token_embd.weight", (len(metadata["tokenizer.ggml.tokens"]), 256), kind))
    tensors += [_blocks(rng, f"blk.0.{name}.weight", shape, kind) for name, shape in shapes.items()]
    return metadata, tensors


def _blocks(rng: np.random.Generator, name: str, shape: tuple[int, int], kind: str) -> Tensor:
    """Random blocks with sane scales."""
    type_id, size, scales = _KINDS[kind]
    blocks = rng.integers(0, 256, (math.prod(shape) // 256, size), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return Tensor(name=name, shape=shape, dtype=kind, type_id=type_id, data=blocks.tobytes())


def _mixture(
    changes: Mapping[str, Any] | None = None, replaced: Mapping[str, Tensor | None] | None = None
) -> bytes:
    """A mixture of four experts, with other settings, and other tensors (None: without)."""
    rng = np.random.default_rng(1)
    tensors = {each.name: each for each in parts()[1] if ".ffn_" not in each.name or "norm" in each.name}
    for layer in range(2):
        shapes = {"gate_inp": (4, 64), "gate_exps": (4, 96, 64), "up_exps": (4, 96, 64)}
        for name, shape in {**shapes, "down_exps": (4, 64, 96)}.items():
            tensor = floats(rng, f"blk.{layer}.ffn_{name}.weight", shape)
            tensors[tensor.name] = tensor
    tensors |= {name: each for name, each in (replaced or {}).items() if each is not None}
    for name in [name for name, each in (replaced or {}).items() if each is None]:
        del tensors[name]
    settings = {"llama.expert_count": 4, "llama.expert_used_count": 2, **(changes or {})}
    return small_gguf(settings, list(tensors.values()))


def _mixtures() -> Iterator[HostileCase]:
    """Tensors of experts: of other counts and shapes, missing, twice, and in the older form."""
    yield loads("a mixture of experts", _mixture())
    rng = np.random.default_rng(2)
    shapes: Mapping[str, Sequence[tuple[int, ...]]] = {
        "gate_exps": ((3, 96, 64), (5, 96, 64), (96, 64), (4, 64, 96), (96, 4, 64), (1, 4, 96, 64)),
        "up_exps": ((3, 96, 64), (8, 48, 64), (4 * 96, 64), (4, 96, 32)),
        "down_exps": ((3, 64, 96), (5, 64, 96), (4, 96, 64), (64, 96)),
        "gate_inp": ((3, 64), (5, 64), (4, 32), (64, 4), (4, 64, 1), (256,)),
    }
    for kind, others in shapes.items():
        name = f"blk.1.ffn_{kind}.weight"
        for shape in others:
            data = _mixture(replaced={name: floats(rng, name, shape)})
            yield case("experts", f"{kind} of {shape}", data, escaped(name))
        yield case("experts", f"without {kind}", _mixture(replaced={name: None}), escaped(name))
        sound = floats(rng, name, (4, 64) if kind == "gate_inp" else (4, 96, 64))
        for value in (math.nan, math.inf):
            stored = patched(sound.data, len(sound.data) - 4, struct.pack("<f", value))
            shape = (4, 64, 96) if kind == "down_exps" else sound.shape
            data = _mixture(replaced={name: dataclasses.replace(sound, shape=shape, data=stored)})
            yield case("experts", f"{kind} ends with {value}", data, escaped(name))
    one = floats(rng, "blk.0.ffn_gate.3.weight", (96, 64))
    yield case("experts", "one by one as well", _mixture(replaced={one.name: one}), escaped(one.name))
    dense = floats(rng, "blk.0.ffn_gate.weight", (96, 64))
    yield case("experts", "and a dense layer", _mixture(replaced={dense.name: dense}), escaped(dense.name))
    shared = floats(rng, "blk.0.ffn_gate_shexp.weight", (96, 64))
    yield case("experts", "and a shared one", _mixture(replaced={shared.name: shared}), escaped(shared.name))


def _expert_settings() -> Iterator[HostileCase]:
    """Settings of a mixture that do not fit its tensors, or that are not computed."""
    for count in (0, 1, 3, 5, 1024, 1025, 2**31):
        fields = "expert_count|num_local_experts|num_experts_per_tok|tensor"
        yield case("experts", f"{count} claimed", _mixture({"llama.expert_count": count}), fields)
    for count in (0, 5, 2**31):
        data = _mixture({"llama.expert_used_count": count})
        yield case("experts", f"{count} used", data, "num_experts_per_tok|expert_used_count")
    wrong: Mapping[str, Any] = {
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "expert_weights_scale": 2.5,
        "expert_count": [4, 4],
        "expert_used_count": "2",
    }
    for key, value in wrong.items():
        fields = f"{key}|num_experts_per_tok"
        yield case("experts", f"{key} is {value}", _mixture({f"llama.{key}": value}), fields)
    for name in ("qwen3moe", "olmoe"):
        metadata = {key.replace("llama.", f"{name}."): value for key, value in parts()[0].items()}
        metadata |= {"general.architecture": name, f"{name}.expert_count": 4, f"{name}.expert_used_count": 2}
        fields = "tensor|expert_feed_forward_length"
        yield case("experts", f"a dense {name}", gguf_bytes(metadata, parts()[1]), fields)


def _divisors() -> Iterator[HostileCase]:
    """Llama 3's rotary scaling is a tensor: of other sizes, of no numbers, and of numbers of nobody."""
    turns = 8192 / 10000 ** (np.arange(8, dtype=np.float32) / 8) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    sound = (1 / ((1 - smooth) / 8 + smooth)).astype("<f4")

    def scaled(values: Any, shape: tuple[int, ...] = (8,), dtype: str = "F32") -> bytes:
        stored = np.asarray(values, "<f2" if dtype == "F16" else "<f4").tobytes()
        return small_gguf(tensors=[*parts()[1], Tensor(name=_ROPE, shape=shape, dtype=dtype, data=stored)])

    yield loads("rotary divisors", scaled(sound))
    fields = "rope_freqs|rope_scaling"
    for value in (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, 1e-30):
        for at in (0, 7):
            values = sound.copy()
            values[at] = value
            yield case("divisors", f"{value} at {at}", scaled(values), fields)
        yield case("divisors", f"all {value}", scaled([value] * 8), fields)
    yield case("divisors", "all 1", scaled([1.0] * 8), fields, "either")
    yield case("divisors", "the other way round", scaled(sound[::-1]), fields)
    yield case("divisors", "of other numbers", scaled(sound * 2), fields)
    for size in (1, 4, 9, 16):
        yield case("divisors", f"{size} of them", scaled(np.resize(sound, size), (size,)), fields)
    yield case("divisors", "in two dimensions", scaled(sound, (2, 4)), fields)
    yield case("divisors", "as float16 that is NaN", scaled([math.nan] * 8, dtype="F16"), fields)
    narrow = Tensor(name=_ROPE, shape=(8,), dtype="Q8_0", data=bytes(34))
    yield case("divisors", "in blocks of 32", small_gguf(tensors=[*parts()[1], narrow]), "rope_freqs")
    yield case("divisors", "cut short", scaled(sound)[:-4], "rope_freqs")


def _spm(
    name: str,
    field: str,
    expected: Expected = "refused",
    changes: Mapping[str, Any] | None = None,
    **fields: Any,
) -> HostileCase:
    """A SentencePiece vocabulary: bytes, three letters and a pair of them."""
    data = small_gguf(_spm_fields(**{**fields, **(changes or {})}))
    return case("sentencepiece", name, data, field, expected)


def _spm_fields(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    fields: dict[str, Any] = {"model": "llama", "pre": "default", "tokens": tokens, "merges": []}
    fields |= {"token_type": [2, 3, 3, *[6] * 256, *[1] * 4], "scores": _reals([0.0] * 259 + [-1.0] * 4)}
    fields |= {"unknown_token_id": 0, **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def _reals(values: Sequence[float]) -> bytes:
    return struct.pack("<IIQ", ARRAY, F32, len(values)) + struct.pack(f"<{len(values)}f", *values)


def _scores() -> Iterator[HostileCase]:
    """Scores: one a token, each a number."""
    yield loads("a SentencePiece vocabulary", small_gguf(_spm_fields()))
    scores = [0.0] * 259 + [-1.0] * 4
    for value in (math.nan, math.inf, -math.inf):
        for at in (0, 100, 262):
            changed = _reals([*scores[:at], value, *scores[at + 1 :]])
            for model in ("llama", "t5"):
                yield _spm(f"{model}: score {at} is {value}", "scores", model=model, scores=changed)
    for count in (0, 1, 262, 264):
        yield _spm(f"{count} scores", "scores", scores=_reals((scores * 2)[:count]))
    yield _spm("scores that are texts", "scores", scores=["1"] * 263)
    yield _spm("the greatest scores", "scores", "either", scores=_reals([3.4e38] * 263))
    yield _spm("equal scores", "scores", "loads", scores=_reals([0.0] * 263))
    for key in ("scores", "token_type", "tokens"):
        yield _spm(f"{key} is a number", key, changes={key: 1})
    for value in (-1, 263, 2**31):
        setting = struct.pack("<Iq", 11, value)
        for key in ("unknown_token_id", "bos_token_id"):
            yield _spm(f"{key} is {value}", key, changes={key: setting})
    yield _spm("a space prefix of text", "add_space_prefix", add_space_prefix="yes")


def _byte_tokens() -> Iterator[HostileCase]:
    """Tokens of bytes out of order, missing, twice, or of other kinds."""
    own = _spm_fields()
    tokens: list[str] = own["tokenizer.ggml.tokens"]
    types: list[int] = own["tokenizer.ggml.token_type"]
    swapped = [*tokens[:3], *reversed(tokens[3:259]), *tokens[259:]]
    yield _spm("bytes in reverse", "", "loads", tokens=swapped)  # each names its own byte
    for text in ("<0x00>", "<0x4G>", "<0x041>", "<0xab>", "x41", "", "<0x", "\0"):
        changed = [*tokens[:68], text, *tokens[69:]]
        yield _spm(f"a byte named {text!r}", "token", "either", tokens=changed)
    for kind in (1, 2, 3, 4, 5):
        changed_types = [*types[:68], kind, *types[69:]]
        yield _spm(f"a byte of type {kind}", "token", "either", token_type=changed_types)
    letters = [*types[:260], 6, *types[261:]]
    yield _spm("a letter that is a byte", "token", "either", token_type=letters)
    yield _spm("all bytes control", "token", "either", token_type=[2, 3, 3, *[3] * 256, *[1] * 4])
    yield _spm("no token of text", "token", "either", token_type=[2, 3, 3, *[6] * 260])
    yield _spm("a piece of 300", "tokens", tokens=[*tokens[:262], "a" * 300])


def _unigrams() -> Iterator[HostileCase]:
    """Unigram vocabularies with a table of characters that is damaged."""
    yield _spm("a Unigram vocabulary", "", "loads", model="t5")
    sound = small_charsmap()
    yield _spm("a sound table", "", "loads", model="t5", precompiled_charsmap=_bytes(sound))
    for name, table in damaged_charsmaps().items():
        value = _bytes(table)
        yield _spm(f"a table {name}", "precompiled_charsmap", model="t5", precompiled_charsmap=value)
    for other in ("x", 1, True, [1, 2], ["a"]):
        yield _spm(
            f"a table that is {other!r}", "precompiled_charsmap", model="t5", precompiled_charsmap=other
        )
    for key in ("remove_extra_whitespaces", "treat_whitespace_as_suffix", "add_space_prefix"):
        yield _spm(f"{key} is 1", key, changes={"model": "t5", key: 1})


def _bytes(data: bytes) -> bytes:
    return struct.pack("<IIQ", ARRAY, _U8, len(data)) + data


def small_charsmap() -> bytes:
    """A table that makes "a" of "A" and of nothing else: a trie of 512 units, and one text."""
    units = [0] * 512
    units[0] = 256 << 10
    units[256 ^ ord("A")] = ord("A") << 10 | 1 << 8 | ord("A")  # a leaf; its value is at 256
    units[256] = 1 << 31
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + b"a\0"


def damaged_charsmaps() -> dict[str, bytes]:
    """Tables that lead a reader astray who believes them."""
    sound = small_charsmap()
    letter = 4 + 4 * (256 ^ ord("A"))
    leaf = 4 + 4 * 256
    return {
        "empty": b"",
        "of one byte": b"\0",
        "of zeros": bytes(64),
        "that claims 2^32 bytes": b"\xff" * 4 + sound[4:],
        "that claims 4 GB": struct.pack("<I", 2**32 - 4) + sound[4:],
        "that claims more than it has": struct.pack("<I", len(sound)) + sound[4:],
        "whose size is no multiple": struct.pack("<I", 2047) + sound[4:],
        "cut in half": sound[: len(sound) // 2],
        "of 16 units": struct.pack("<I", 64) + sound[4:68] + b"a\0",
        "whose first unit points outside": patched(sound, 4, struct.pack("<I", 512 << 10)),
        "whose first unit points far": patched(sound, 4, b"\xff" * 4),
        "whose letter points outside": patched(sound, letter, struct.pack("<I", 1 << 30 | 1 << 9 | ord("A"))),
        "whose letter has no value": patched(sound, letter, struct.pack("<I", 512 << 10 | 1 << 8 | ord("A"))),
        "whose value points outside": patched(sound, leaf, struct.pack("<I", 1 << 31 | 3)),
        "whose value points far": patched(sound, leaf, b"\xff" * 4),
        "whose value is in a character": patched(sound, leaf, struct.pack("<I", 1 << 31 | 1))[:-2]
        + b"\xc3\xa4",
        "of no UTF-8": sound[:-2] + b"\xff\0",
        "of noise": np.random.default_rng(3).integers(0, 256, 4096, dtype=np.uint8).tobytes(),
    }
