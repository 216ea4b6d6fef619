"""Native = twin on the real model, teacher-forced on 200 prompts in every weight format; takes minutes."""

from pathlib import Path

import pytest

from tests.model.parity import check_parity
from tokenmill.models.packing.pack import WeightFormat


@pytest.mark.parametrize(("weights", "num_tokens"), [("w8a8", 12), ("w4a8", 4), ("bf16", 2)])
def test_native_equals_twin_on_200_prompts(model_dir: Path, weights: WeightFormat, num_tokens: int) -> None:
    check_parity(model_dir, weights, num_prompts=200, num_tokens=num_tokens)
