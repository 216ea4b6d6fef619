"""Checks SentencePiece's table of characters before the `tokenizers` library follows it.

A table (`precompiled_charsmap`) is a trie, flattened into 32-bit units, and behind it the texts that its
leaves point at. The library believes it: a size that is a lie takes all memory and ends the process, and a
unit that points outside is met only once somebody encodes a text. What a sound table says is not checked.
Source: darts-clone (darts.h), and the library's own reader, spm_precompiled.
"""

import base64
import binascii
import re
from typing import Final

import numpy as np

from tokenmill.core.errors import ModelFormatError

__all__ = ["check_charsmap", "check_charsmaps"]

_NAME: Final = "precompiled_charsmap"
_SPELLED: Final = "".join(rf"(?:{char}|\\u00{ord(char):02x})" for char in _NAME)
_IN_JSON: Final = re.compile(rf'"{_SPELLED}"\s*:\s*"([^"]*)"', re.IGNORECASE)
"""The table in the text of a `tokenizer.json`, however its name is escaped."""

_VALUE_BIT: Final = np.uint32(1 << 31)
_LEAF_BIT: Final = np.uint32(1 << 8)


def check_charsmaps(text: str, source: str) -> None:
    """Check every table in the text of a `tokenizer.json`. Raises ModelFormatError."""
    for match in _IN_JSON.finditer(text):
        try:
            table = base64.b64decode(match[1], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ModelFormatError(f"{source}: {_NAME} is not base64") from error
        check_charsmap(table, f"{source}: {_NAME}")


def check_charsmap(table: bytes, field: str) -> None:
    """Check that no text can lead out of a table. Raises ModelFormatError that begins with `field`."""
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or not 0 < size <= len(table) - 4:
        raise ModelFormatError(f"{field}: has {len(table)} bytes, its trie claims {size}")
    units = np.frombuffer(table, "<u4", size // 4, 4)
    texts = np.frombuffer(table, np.uint8, offset=4 + size)
    # Every unit but values is taken for reachable, the first in any case: a step goes to where the unit
    # points, and from there to any place that differs in the last 8 bits.
    places = np.flatnonzero((units & _VALUE_BIT) == 0)
    places = places if len(places) and places[0] == 0 else np.append(places, 0)
    nodes = units[places]
    shifts = np.where(nodes & np.uint32(1 << 9), 8, 0).astype(np.uint64)
    targets = places.astype(np.uint64) ^ ((nodes >> np.uint32(10)).astype(np.uint64) << shifts)
    if ((targets | np.uint64(0xFF)) >= len(units)).any():
        raise ModelFormatError(f"{field}: a unit of the trie points outside of its {len(units)}")
    starts = units[targets[(nodes & _LEAF_BIT) != 0]] & ~_VALUE_BIT
    if (starts > len(texts)).any() or ((texts[starts[starts < len(texts)]] & 0xC0) == 0x80).any():
        raise ModelFormatError(f"{field}: a leaf of the trie points into no text")
