"""Speculation on 200 real prompts of 128 tokens: the tokens of plain decoding; takes minutes."""

from pathlib import Path

import pytest

from tests.model.identity import check_lookup
from tokenmill.models.directory import ModelDirectory


@pytest.mark.parametrize("max_batch", [1, 8])
def test_guessing_changes_no_token_of_200_prompts(model_dir: Path, max_batch: int) -> None:
    model = ModelDirectory.open(model_dir)
    check_lookup(model, num_prompts=200, num_tokens=128, max_batch=max_batch)
