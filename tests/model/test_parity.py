"""A first look at native = twin on the real model; tests/slow has it on 200 prompts."""

from pathlib import Path

import pytest

from tests.model.parity import check_parity
from tokenmill.models.packing.pack import WeightFormat


@pytest.mark.parametrize(("weights", "num_tokens"), [("w8a8", 6), ("w4a8", 3), ("bf16", 1)])
def test_native_equals_twin(model_dir: Path, weights: WeightFormat, num_tokens: int) -> None:
    check_parity(model_dir, weights, num_prompts=50, num_tokens=num_tokens)
