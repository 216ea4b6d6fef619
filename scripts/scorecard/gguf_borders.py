"""Where each number and text of a sound GGUF file lies: what the corpus and the fuzzer lie about."""

import struct
from collections.abc import Generator, Iterator
from typing import NamedTuple

__all__ = ["Border", "borders"]

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class Border(NamedTuple):
    """A field of the header: its place and size in bytes, what it says, and whose it is.

    `owner` is what an error about it has to name: a key, a tensor, or a number of the file's head.
    """

    at: int
    size: int
    kind: str
    owner: str


def borders(data: bytes) -> Iterator[Border]:
    """Every field of the header, front to back. The file must be sound."""
    yield Border(0, 4, "magic", "magic")
    yield Border(4, 4, "version", "version")
    yield Border(8, 8, "count", "tensor count")
    yield Border(16, 8, "count", "metadata count")
    num_tensors, num_keys = struct.unpack_from("<QQ", data, 8)
    at = 24
    for _ in range(num_keys):
        at = yield from _pair(data, at)
    for _ in range(num_tensors):
        at = yield from _tensor(data, at)


def _text(data: bytes, at: int, kind: str, owner: str) -> Iterator[Border]:
    length = _number(data, at, 8)
    yield Border(at, 8, f"length of {kind}", owner)
    if length:
        yield Border(at + 8, length, kind, owner)


def _pair(data: bytes, at: int) -> Generator[Border, None, int]:
    length = _number(data, at, 8)
    key = data[at + 8 : at + 8 + length].decode()
    yield from _text(data, at, "key", key)
    at += 8 + length
    kind = _number(data, at, 4)
    yield Border(at, 4, "type", key)
    at += 4
    if kind == _ARRAY:
        item, count = struct.unpack_from("<IQ", data, at)
        yield Border(at, 4, "item type", key)
        yield Border(at + 4, 8, "array length", key)
        return (yield from _items(data, at + 12, item, count, key))
    return (yield from _items(data, at, kind, 1, key))


def _items(data: bytes, at: int, kind: int, count: int, key: str) -> Generator[Border, None, int]:
    """The items of an array, or a single value; of many strings only the first and the last."""
    if kind != _STRING:
        yield Border(at, _SIZES[kind] * count, "value", key)
        return at + _SIZES[kind] * count
    for index in range(count):
        if index in (0, count - 1):
            yield from _text(data, at, "string", key)
        at += 8 + _number(data, at, 8)
    return at


def _tensor(data: bytes, at: int) -> Generator[Border, None, int]:
    length = _number(data, at, 8)
    name = data[at + 8 : at + 8 + length].decode()
    yield from _text(data, at, "tensor name", name)
    at += 8 + length
    num_dims = _number(data, at, 4)
    yield Border(at, 4, "dimensions", name)
    for dim in range(num_dims):
        yield Border(at + 4 + 8 * dim, 8, "dim", name)
    at += 4 + 8 * num_dims
    yield Border(at, 4, "tensor type", name)
    yield Border(at + 4, 8, "offset", name)
    return at + 12


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")
