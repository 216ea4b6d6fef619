"""A request's JSON before it is believed: its depth, its numbers, and names that stand twice.

JSON that two readers understand differently is refused: what stands twice in an object is read by one as
the first, by another as the last. The depth is found by a scan, before any parser goes down into it, so
that it depends on no stack.
"""

import json
import re
from typing import Any, Final

import numpy as np

from tokenmill.core import UsageError

__all__ = ["MAX_CONTAINERS", "MAX_DEPTH", "BadJsonError", "check_json"]

MAX_DEPTH: Final = 64
"""Objects and lists within each other, the outermost included."""
MAX_CONTAINERS: Final = 1 << 18
"""Objects and lists in one body: each costs far more to read than the bytes that say it."""

_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_LONG: Final = re.compile(rb"(?<![0-9.eE+])-?[0-9]{19,}+(?![.eE])")
_MAX_DIGITS: Final = 20
_LOW: Final = -(1 << 63)
_HIGH: Final = 1 << 64
_OPEN: Final = (ord("["), ord("{"))
_CLOSE: Final = (ord("]"), ord("}"))


class BadJsonError(UsageError):
    """A text that is not taken; `path` is the field, where one is to blame."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def check_json(body: bytes) -> None:
    """Raise BadJsonError for depth, whole numbers beyond 64 bits and doubled names; ValueError if no JSON."""
    may_be_deep = body.count(b"[") + body.count(b"{") > MAX_DEPTH
    if may_be_deep or _LONG.search(body):
        bare = _STRING.sub(b"", body)
        _check_depth(bare)
        if any(_is_huge(found[0]) for found in _LONG.finditer(bare)):
            raise BadJsonError("a whole number has over 64 bits", _path_of_huge(body))
    json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_refuse)


def _check_depth(bare: bytes) -> None:
    num_opened = bare.count(b"[") + bare.count(b"{")
    if num_opened <= MAX_DEPTH:
        return
    if num_opened > MAX_CONTAINERS:
        raise BadJsonError(f"it has over {MAX_CONTAINERS} objects and lists")
    chars = np.frombuffer(bare, np.uint8)
    ups, downs = np.isin(chars, _OPEN), np.isin(chars, _CLOSE)
    if int(np.cumsum(ups.astype(np.int32) - downs.astype(np.int32)).max()) > MAX_DEPTH:
        raise BadJsonError(f"it is nested over {MAX_DEPTH} deep")


def _is_huge(digits: bytes) -> bool:
    return len(digits) > _MAX_DIGITS or not _LOW <= int(digits) < _HIGH


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadJsonError(f"the name {name[:40]!r} stands twice in one object", name[:80])
    return found


def _refuse(word: str) -> None:
    raise BadJsonError(f"{word} is no JSON")


class _Huge:
    """Stands for a number that is out of bounds."""


def _path_of_huge(body: bytes) -> str:
    """The path of the first such number, as of a field."""

    def read(digits: str) -> Any:
        return _Huge() if _is_huge(digits.encode()) else 0

    waiting: list[tuple[str, Any]] = [("", json.loads(body.decode(), parse_int=read))]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, _Huge):
            return path
        if isinstance(value, dict):
            waiting += [(f"{path}.{name[:40]}" if path else name[:40], each) for name, each in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{at}]", each) for at, each in enumerate(value)]
    return ""
