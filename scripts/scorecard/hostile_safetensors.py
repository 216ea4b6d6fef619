"""Hostile safetensors files: headers that lie, names that climb, values that are no numbers, shards astray.

Each case is a folder in the Hugging Face layout, sound but for one file. The same every time.
`hostile_folders.py` has the other files of such a folder.
"""

import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from scripts.scorecard.hostile_files import Content, Expected, Hole, HostileCase
from tests.fast.model_files import tiny_gguf
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model

__all__ = [
    "folder_case",
    "hostile_safetensors",
    "put",
    "sound_folder",
    "take",
    "weights_parts",
    "with_header",
]

_WEIGHTS = "model.safetensors"
_HUGE = (2**31, 2**48, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
_Change = Callable[[dict[str, Any]], object]


def hostile_safetensors() -> list[HostileCase]:
    """More than 200 cases."""
    cases = [*_sound(), *_lengths(), *_json(), *_entries(), *_offsets(), *_tensors(), *_names(), *_values()]
    return [*cases, *_polyglots()]


@cache
def sound_folder() -> Mapping[str, bytes]:
    """The files of a sound tiny model, by name."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "sound.gguf"
        path.write_bytes(tiny_gguf())
        model = import_model(path, Library(Path(name) / "home"))
        names = [each.name for each in model.path.iterdir()]
        return {name: (model.path / name).read_bytes() for name in names if name not in _NOT_THERE}


_NOT_THERE = ("model.gguf", "tokenmill.json")


def folder_case(
    family: str,
    name: str,
    changes: Mapping[str, Content | None],
    field: str,
    expected: Expected = "refused",
    *,
    exit_code: int = 4,
    others: Mapping[str, Content] | None = None,
) -> HostileCase:
    """The sound folder with these files instead (None: without), and `others` outside it."""
    files: dict[str, Content | None] = {**sound_folder(), **changes}
    inside = {f"in/folder/{each}": content for each, content in files.items() if content is not None}
    return HostileCase(
        family=family,
        name=name,
        files={**inside, **(others or {})},
        target="in/folder",
        expected=expected,
        field=field,
        exit_code=exit_code,
    )


def with_header(change: _Change | None = None, text: bytes | None = None, data: bytes | None = None) -> bytes:
    """The sound weights with their header changed in place, or replaced, and with other data."""
    header, own = weights_parts()
    if change is not None:
        header = copy.deepcopy(header)
        change(header)
    written = json.dumps(header).encode() if text is None else text
    return len(written).to_bytes(8, "little") + written + (own if data is None else data)


@cache
def weights_parts() -> tuple[dict[str, Any], bytes]:
    """Header and data of the sound weights."""
    weights = sound_folder()[_WEIGHTS]
    size = int.from_bytes(weights[:8], "little")
    header: dict[str, Any] = json.loads(weights[8 : 8 + size])
    return header, weights[8 + size :]


def _case(
    family: str, name: str, weights: Content, field: str, expected: Expected = "refused"
) -> HostileCase:
    return folder_case(f"safetensors {family}", name, {_WEIGHTS: weights}, field, expected)


def _sound() -> Iterator[HostileCase]:
    yield folder_case("safetensors sound", "as it is", {}, "", "loads")
    yield _case("sound", "without metadata", with_header(take("__metadata__")), "", "loads")
    header, _ = weights_parts()
    turned = json.dumps(dict(reversed(header.items()))).encode()
    yield _case("sound", "names in another order", with_header(text=turned), "", "loads")
    yield _case("sound", "header with spaces at its end", with_header(text=turned + b" " * 99), "", "loads")
    as_float32 = _retyped("F32", lambda bits: (bits.astype(np.uint32) << 16).tobytes())
    yield _case("sound", "in float32", as_float32, "", "loads")


def put(fields: Mapping[str, Any], inside: str = "") -> _Change:
    """A change that sets fields of an object, or of one of the objects in it."""

    def change(value: dict[str, Any]) -> None:
        (value[inside] if inside else value).update(fields)

    return change


def take(key: str, inside: str = "") -> _Change:
    """A change that takes a field away."""

    def change(value: dict[str, Any]) -> None:
        (value[inside] if inside else value).pop(key)

    return change


def _renamed(old: str, new: str) -> _Change:
    def change(value: dict[str, Any]) -> None:
        value[new] = value.pop(old)

    return change


def _filled(item: Any) -> Callable[[Any], bytes]:
    return lambda values: bytes(item.tobytes() * values.size)


def _retyped(dtype: str, convert: Callable[[Any], bytes]) -> bytes:
    """All tensors in another type."""
    header, data = weights_parts()
    out, stored = {}, b""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        values = convert(np.frombuffer(data[first:last], np.uint16))
        out[name] = {**entry, "dtype": dtype, "data_offsets": [len(stored), len(stored) + len(values)]}
        stored += values
    return with_header(text=json.dumps(out).encode(), data=stored)


def _lengths() -> Iterator[HostileCase]:
    """The eight bytes that say how long the header is, and files that end early."""
    sound = sound_folder()[_WEIGHTS]
    size = int.from_bytes(sound[:8], "little")
    for value in (0, 1, size - 1, size + 1, len(sound), len(sound) - 7, 1 << 24, 100 << 20, *_HUGE[:-1]):
        wrong = value.to_bytes(8, "little") + sound[8:]
        yield _case("length", f"header of {value}", wrong, "header|tensor|file")
    for at in (0, 1, 7, 8, 9, 8 + size // 2, 7 + size, 8 + size, 9 + size, len(sound) // 2, len(sound) - 1):
        yield _case("length", f"ends at {at}", sound[:at], "header|tensor|file|empty|read")
    for more in (1, 7, 64, 1 << 20):
        yield _case("length", f"{more} bytes more", sound + bytes(more), "file")
    yield _case("length", "only zeros", bytes(4096), "header|file")
    yield _case("length", "a hole of a gigabyte", Hole(1 << 26), "header|file")


def _json() -> Iterator[HostileCase]:
    """Headers that are no JSON, or JSON that no header is."""
    texts = {
        "no JSON": b"nobody",
        "a list": b"[]",
        "null": b"null",
        "a number": b"1",
        "a text": b'"x"',
        "two objects": b"{}{}",
        "an open object": b'{"a":',
        "no UTF-8": b'{"\xff": 1}',
        "a surrogate": b'{"\\ud800": 1}',
        "a zero": b'{"a\\u0000": 1}',
        "zeros after it": b"{}" + bytes(64),
        "a byte order mark": b"\xef\xbb\xbf{}",
        "UTF-16": "{}".encode("utf-16"),
        "a comment": b"{} // none",
        "single quotes": b"{'a': 1}",
        "nothing in it": b"{}",
        "100,000 lists": b"[" * 100_000,
        "100,000 objects": b'{"a":' * 100_000,
        "100,000 lists that close": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a number of 100,000 digits": b'{"a": ' + b"9" * 100_000 + b"}",
        "a number of 4,000 digits": b'{"a": ' + b"9" * 4_000 + b"}",
        "an exponent": b'{"a": 1e999999999}',
        "NaN": b'{"a": NaN}',
        "a name of a megabyte": b'{"' + b"a" * (1 << 20) + b'": 1}',
    }
    for name, text in texts.items():
        yield _case("json", name, with_header(text=text), "header|tensor")
    header, _ = weights_parts()
    first = json.dumps({next(iter(header)): next(iter(header.values()))})[:-1]
    yield _case(
        "json", "a key twice", with_header(text=(first + "," + json.dumps(header)[1:]).encode()), "twice"
    )
    name = "model.norm.weight"
    twice = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    yield _case("json", "a tensor twice", with_header(text=twice.encode()), "twice")
    entry = json.dumps(header[name])
    inside = json.dumps(header).replace(entry, entry[:-1] + ', "dtype": "F32"}')
    yield _case("json", "a dtype twice", with_header(text=inside.encode()), "twice")
    bad_metadata: tuple[Any, ...] = (1, None, [], "x", {"a": 1}, {"a": {}}, {"a": None}, {"a": "x" * 70_000})
    for value in bad_metadata:
        label = f"metadata {str(value)[:20]}"
        yield _case("json", label, with_header(put({"__metadata__": value})), "__metadata__")
    for item in (b"[],", b"{},", b"300,", b'"",'):
        text = b'{"a": [' + item * (7_900_000 // len(item)) + b"0]}"
        yield _case("json", f"8 MB of {item.decode()}", with_header(text=text), "header|tensor a")
    many = {f"t{index}": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]} for index in range(50_000)}
    yield _case("json", "50,000 empty tensors", with_header(put(many)), "t0|t1|tensor|header")


def _entries() -> Iterator[HostileCase]:
    """What a tensor's entry may say: type, shape and offsets that are none, or lie."""
    name = "model.norm.weight"

    def entry(label: str, **changes: Any) -> HostileCase:
        return _case("entry", label, with_header(put(changes, name)), name)

    dtypes: tuple[Any, ...] = ("F128", "", "bf16", None, 1, [], {}, "BF16\x00", "x" * 100_000, "O", "Q8_0")
    for dtype in dtypes:
        yield entry(f"dtype {str(dtype)[:20]!r}", dtype=dtype)
    for dtype in ("F32", "F64", "U8", "I64", "BOOL", "F8_E4M3"):
        yield entry(f"dtype {dtype} of the same bytes", dtype=dtype)
    shapes: list[Any] = [
        None,
        64,
        "64",
        {},
        ["64"],
        [64.0],
        [-64],
        [64, -1],
        [True],
        [None],
        [[64]],
        [63],
        [65],
        [],
    ]
    shapes += [
        [0],
        [0, 2**60],
        [1] * 9,
        [64] + [1] * 1000,
        [64, 1],
        [8, 8],
        [2**63, 2],
        [2**32, 2**32],
        [2**48] * 8,
    ]
    shapes += [[math.nan], [math.inf], *([value] for value in _HUGE)]
    for shape in shapes:
        yield entry(f"shape {shape!r:.40}", shape=shape)


def _offsets() -> Iterator[HostileCase]:
    """Places that are none, or lie, and entries that lack or have a field."""
    name = "model.norm.weight"
    header, data = weights_parts()
    first, last = header[name]["data_offsets"]
    offsets: list[Any] = [
        None,
        0,
        "0",
        {},
        [],
        [first],
        [first, last, last],
        [last, first],
        [first, None],
        ["0", "1"],
    ]
    offsets += [[-2, last], [first + 0.5, last], [first, last + 2], [first + 2, last], [first - 2, last - 2]]
    offsets += [
        [True, last],
        [0, 128],
        [len(data), len(data) + 128],
        *([value, value + 128] for value in _HUGE),
    ]
    for pair in offsets:
        found = "tensor|file" if isinstance(pair, list) and len(pair) == 2 else name
        data_case = with_header(put({"data_offsets": pair}, name))
        yield _case("entry", f"offsets {pair!r:.60}", data_case, found)
    for key in ("dtype", "shape", "data_offsets"):
        yield _case("entry", f"no {key}", with_header(take(key, name)), name)
    yield _case("entry", "one field more", with_header(put({"evil": 1}, name)), name)
    entries: tuple[Any, ...] = (None, 1, "x", [], {})
    for value in entries:
        yield _case("entry", f"is {value!r}", with_header(put({name: value})), name)


def _tensors() -> Iterator[HostileCase]:
    """Tensors that are missing, too many, of other shapes; data that overlap or have holes."""
    header, data = weights_parts()
    names = [name for name in header if name != "__metadata__"]
    one = "model.layers.1.mlp.up_proj.weight"
    lm_head = {"dtype": "BF16", "shape": [0], "data_offsets": [len(data), len(data)]}

    for name in (names[0], one, names[-1]):
        yield _case(
            "tensors",
            f"{name} renamed",
            with_header(_renamed(name, "evil")),
            "evil|missing",
        )
        yield _case("tensors", f"{name} taken out", with_header(take(name)), "tensor|file")
    for extra in (
        "lm_head.weight",
        "model.layers.2.mlp.up_proj.weight",
        "evil",
        "model.layers.-1.x",
        "x" * 200,
    ):
        more = with_header(put({extra: lm_head}))
        yield _case("tensors", f"one more, {extra[:40]}", more, f"{extra[:40]}|lm_head")
    for shape in ([64, 96], [96 * 64], [96, 64, 1], [48, 128]):
        yield _case("tensors", f"{one} as {shape}", with_header(put({"shape": shape}, one)), one)
    other = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    yield _case(
        "tensors",
        "two in one place",
        with_header(put({"data_offsets": other}, one)),
        "overlaps",
    )
    yield _case("tensors", "all in one place", with_header(_all_in_one_place), "overlaps|tensor|file")
    yield _case("tensors", "a hole at the start", with_header(_moved(2), data=b"xx" + data), "gap")
    yield _case("tensors", "none", with_header(text=b'{"__metadata__": {}}', data=b""), "missing")


def _all_in_one_place(header: dict[str, Any]) -> None:
    for entry in header.values():
        if "data_offsets" in entry:
            first, last = entry["data_offsets"]
            entry["data_offsets"] = [0, last - first]


def _moved(by: int) -> _Change:
    def change(header: dict[str, Any]) -> None:
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [each + by for each in entry["data_offsets"]]

    return change


def _names() -> Iterator[HostileCase]:
    """Names that climb out of a folder, or that terminals and shells take for something else."""
    names = [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "C:\\x",
        "a..b",
        "-rf",
        "~",
        "$(id)",
    ]
    names += [
        "a\nb",
        "a\x00b",
        "\x1b[31mred",
        "\u202eevil",
        "caf\u00e9",
        "a b",
        "x" * 300,
        "%s%n",
        "__class__.__init__",
    ]
    for name in names:
        entry = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
        wrong = with_header(put({name: entry}))
        yield _case("name", repr(name)[:40], wrong, "tensor")


def _values() -> Iterator[HostileCase]:
    """Weights that are no finite numbers, in each type and place."""
    header, data = weights_parts()
    for label, bits in (
        ("NaN", 0x7FC0),
        ("infinity", 0x7F80),
        ("minus infinity", 0xFF80),
        ("odd NaN", 0xFF81),
    ):
        for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
            last = header[name]["data_offsets"][1]
            wrong = data[: last - 2] + bits.to_bytes(2, "little") + data[last:]
            yield _case("value", f"{label} in {name}", with_header(data=wrong), name)
    for dtype, bits in (("F16", 0x7C00), ("F16", 0x7E00)):
        wrong = _retyped(dtype, _filled(np.uint16(bits)))
        yield _case("value", f"{dtype} of {bits:x}", wrong, "tensor")
    wrong = _retyped("F32", _filled(np.float32(math.nan)))
    yield _case("value", "F32 of NaN", wrong, "tensor")
    for dtype, size in (("I64", 8), ("U8", 1), ("BOOL", 1), ("F64", 8), ("F8_E5M2", 1)):
        wrong = _retyped(dtype, _filled(np.zeros((), f"V{size}")[()]))
        yield _case("value", f"weights in {dtype}", wrong, "tensor")


def _polyglots() -> Iterator[HostileCase]:
    """Files that are also something else."""
    sound = sound_folder()[_WEIGHTS]
    yield _case("polyglot", "a ZIP at the end", sound + b"PK\x05\x06" + bytes(18), "file")
    yield _case("polyglot", "a ZIP at the start", b"PK\x03\x04" + bytes(26) + sound, "header")
    yield _case("polyglot", "a GGUF", tiny_gguf(), "header")
    yield _case("polyglot", "HTML", b"<html>" * 999, "header")
    metadata = {"a": "PK\x05\x06" + "\0" * 18}
    yield _case(
        "polyglot",
        "a ZIP in the metadata",
        with_header(put({"__metadata__": metadata})),
        "",
        "either",
    )
