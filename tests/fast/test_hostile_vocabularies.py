"""Vocabularies on which the `tokenizers` library fails, late or without an error: refused before it does."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from scripts.scorecard.hostile_gguf_kinds import damaged_charsmaps, small_charsmap
from scripts.scorecard.vocabularies import description
from tokenmill.core import ModelFormatError
from tokenmill.models.text import pipeline as tokenizer_pipeline
from tokenmill.models.text.charsmap import check_charsmap
from tokenmill.models.text.tokenizer import Tokenizer

DAMAGED = damaged_charsmaps()


def written(folder: Path, value: dict[str, Any]) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(value))
    return path


def with_table(table: bytes) -> dict[str, Any]:
    text = base64.b64encode(table).decode()
    return {**description("unigram"), "normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


def test_a_sound_table_is_used(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(written(tmp_path, with_table(small_charsmap())))
    assert tokenizer.encode("ABA") == tokenizer.encode("aBa")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_refused(name: str, tmp_path: Path) -> None:
    if name != "of no UTF-8":  # the library sees that itself, when it reads the table
        with pytest.raises(ModelFormatError, match=r"^x: "):
            check_charsmap(DAMAGED[name], "x")
    path = written(tmp_path, with_table(DAMAGED[name]))
    with pytest.raises(
        ModelFormatError, match=r"tokenizer\.json.*(precompiled_charsmap|no usable tokenizer)"
    ):
        Tokenizer.from_file(path)
    path.write_text(path.read_text().replace("precompiled_charsmap", r"prec\u006Fmpiled_charsmap"))
    with pytest.raises(
        ModelFormatError, match=r"tokenizer\.json.*(precompiled_charsmap|no usable tokenizer)"
    ):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("name", ["whose letter points outside", "whose value points outside"])
def test_the_library_believes_a_damaged_table(name: str) -> None:
    table = normalizers.Precompiled(DAMAGED[name])
    with pytest.raises(BaseException, match="index") as caught:
        table.normalize_str("A\u0301Z")
    assert not isinstance(caught.value, Exception)


def test_a_far_id_is_refused_before_the_holes_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = json.loads(json.dumps(description("byte level")))
    value["model"]["vocab"]["far"] = 1 << 20
    monkeypatch.setattr(tokenizer_pipeline, "_without_controls", pytest.fail)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json: the vocabulary is .* has holes"):
        Tokenizer.from_file(written(tmp_path, value))


def test_unigram_needs_an_unknown_token(tmp_path: Path) -> None:
    model = {**description("unigram")["model"], "unk_id": None}
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json: .*unk_id"):
        Tokenizer.from_file(written(tmp_path, {**description("unigram"), "model": model}))
