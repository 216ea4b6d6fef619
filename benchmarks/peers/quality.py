"""Perplexity of every system on the same tokens, in the same windows; kept, since it does not change.

The text is cut by tokenmill's tokenizer into windows that do not overlap, with nothing put in front, and
each system is given token ids: what a peer makes of the text itself is not part of this (transformers'
conversion of this model's GGUF tokenizer is wrong). A kept value belongs to the versions, the model, the
settings and the tokens that it was measured with.
"""

import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Kept", "perplexity", "read_text", "windows"]


class Kept:
    """Values by a digest of all they depend on, in a JSON file. An unreadable file counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, float] = {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(values, dict):
            self._values = {key: float(value) for key, value in values.items()}

    def get(self, *depends_on: Any) -> float | None:
        """The value, if it was kept."""
        return self._values.get(_digest(depends_on))

    def put(self, value: float, *depends_on: Any) -> None:
        """Keep a value, at once."""
        self._values[_digest(depends_on)] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(self._values, indent=1), encoding="utf-8")
        partial.replace(self._path)


def read_text(path: Path) -> str:
    """A text in UTF-8, plain or as `.gz`."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def windows(tokens: Sequence[int], size: int, most: int) -> list[list[int]]:
    """The first `most` whole windows."""
    whole = range(0, len(tokens) - size + 1, size)
    return [list(tokens[first : first + size]) for first in whole[:most]]


def perplexity(scored: Sequence[tuple[float, int]]) -> float:
    """Of pairs of (sum of log-probabilities, number of tokens), one a window."""
    return math.exp(-math.fsum(logprob for logprob, _ in scored) / sum(num for _, num in scored))


def _digest(depends_on: Any) -> str:
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:24]
