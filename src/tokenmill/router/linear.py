"""A linear classifier of texts: word and character n-grams, tf-idf, one weight a label and n-gram.

For a closed set of labels it is the cheapest thing that may answer, and the control for everything that costs
more. It is trained elsewhere (scikit-learn); reading it and answering need numpy only. On disk it is data,
never code: a folder with `classifier.json` (labels, n-grams, SHA-256 of the numbers) and `classifier.npz`.
"""

import hashlib
import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.core import ModelFormatError, NotFoundError, StorageError

__all__ = ["CONFIG_NAME", "NUMBERS_NAME", "LabelGuess", "LinearClassifier", "ngrams"]

CONFIG_NAME: Final = "classifier.json"
NUMBERS_NAME: Final = "classifier.npz"

_FORMAT: Final = 1
_MAX_CHARS: Final = 20_000
_MAX_BYTES: Final = 2 << 30
_WORD: Final = re.compile(r"\w+")
_CHAR_SIZES: Final = (2, 3, 4)


class LabelGuess(NamedTuple):
    """A label, and the probability that the classifier itself gives it (a softmax of its scores)."""

    label: str
    probability: float


def ngrams(text: str) -> list[str]:
    """Words and pairs of words, and the pieces of each word with its borders; at most 20,000 characters
    count.

    They are what the classifier was trained on, so this function may not change within a format.
    """
    words = _WORD.findall(text[:_MAX_CHARS].lower())
    found = [f"w {word}" for word in words]
    found += [f"w {one} {two}" for one, two in pairwise(words)]
    for word in words:
        bordered = f" {word} "
        for size in _CHAR_SIZES:
            found += [f"c{bordered[at : at + size]}" for at in range(len(bordered) - size + 1)]
    return found


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """`weights_FC` has a row for each of the `terms`, a column for each of the `labels`."""

    labels: tuple[str, ...]
    terms: tuple[str, ...]
    idf_F: NDArray[np.float32]
    weights_FC: NDArray[np.float32]
    bias_C: NDArray[np.float32]
    _places: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        num, classes = len(self.terms), len(self.labels)
        shapes = (self.idf_F.shape, self.weights_FC.shape, self.bias_C.shape)
        if shapes != ((num,), (num, classes), (classes,)) or classes < 2:
            raise ModelFormatError(
                f"a classifier of {num} n-grams and {classes} labels has numbers of {shapes}"
            )
        object.__setattr__(self, "_places", {term: at for at, term in enumerate(self.terms)})

    def scores(self, text: str) -> NDArray[np.float32]:
        """A score for each label, higher is likelier."""
        counts = Counter(at for each in ngrams(text) if (at := self._places.get(each)) is not None)
        if not counts:
            return self.bias_C
        rows = np.fromiter(counts.keys(), np.intp, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        values = (1 + np.log(times)) * self.idf_F[rows]
        values /= math.sqrt(float(values @ values))
        scores: NDArray[np.float32] = values @ self.weights_FC[rows] + self.bias_C
        return scores

    def guess(self, text: str) -> LabelGuess:
        """The likeliest label; of equals the first."""
        scores_C = self.scores(text)
        best = int(scores_C.argmax())
        shares_C = np.exp(scores_C - scores_C[best])
        return LabelGuess(self.labels[best], float(1 / shares_C.sum()))

    def guesses(self, texts: Sequence[str]) -> list[LabelGuess]:
        """One for each text."""
        return [self.guess(text) for text in texts]

    @property
    def num_bytes(self) -> int:
        """Of the numbers in memory."""
        return int(self.idf_F.nbytes + self.weights_FC.nbytes + self.bias_C.nbytes)

    def save(self, folder: Path) -> None:
        """Write both files. Raises StorageError."""
        numbers = io.BytesIO()
        np.savez_compressed(numbers, idf=self.idf_F, weights=self.weights_FC, bias=self.bias_C)
        data = numbers.getvalue()
        config = {
            "format": _FORMAT,
            "labels": self.labels,
            "terms": self.terms,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / NUMBERS_NAME).write_bytes(data)
            (folder / CONFIG_NAME).write_text(json.dumps(config, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror or error}", hint="check the disk") from error

    @staticmethod
    def load(folder: Path) -> "LinearClassifier":
        """Read it back. Raises NotFoundError, StorageError, ModelFormatError for what is none."""
        config_path, numbers_path = folder / CONFIG_NAME, folder / NUMBERS_NAME
        try:
            if max(config_path.stat().st_size, numbers_path.stat().st_size) > _MAX_BYTES:
                raise ModelFormatError(f"{folder}: files of over {_MAX_BYTES} bytes")
            text, data = config_path.read_text(encoding="utf-8"), numbers_path.read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{folder} is no classifier (it has no {Path(error.filename).name})"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"{folder} cannot be read ({error})", hint="check it") from error
        labels, terms, digest = _read_config(text, config_path)
        if hashlib.sha256(data).hexdigest() != digest:
            raise StorageError(
                f"{numbers_path} is not the file that {CONFIG_NAME} names", hint="make it anew"
            )
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                idf_F, weights_FC, bias_C = (arrays[name] for name in ("idf", "weights", "bias"))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ModelFormatError(f"{numbers_path}: no numbers of a classifier ({error})") from error
        if any(
            each.dtype != np.float32 or not np.isfinite(each).all() for each in (idf_F, weights_FC, bias_C)
        ):
            raise ModelFormatError(f"{numbers_path}: numbers that are not finite float32")
        return LinearClassifier(labels=labels, terms=terms, idf_F=idf_F, weights_FC=weights_FC, bias_C=bias_C)


def _read_config(text: str, path: Path) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Labels, n-grams and the digest of the numbers."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: no JSON ({error})") from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ModelFormatError(f"{path}: not a classifier of format {_FORMAT}")
    lists = [value.get("labels"), value.get("terms")]
    if not all(isinstance(each, list) and all(isinstance(x, str) for x in each) for each in lists):
        raise ModelFormatError(f"{path}: labels and terms are no lists of texts")
    labels, terms = (tuple(each) for each in lists if each is not None)
    if len(set(labels)) < len(labels) or len(set(terms)) < len(terms):
        raise ModelFormatError(f"{path}: a label or an n-gram occurs twice")
    return labels, terms, str(value.get("sha256", ""))
