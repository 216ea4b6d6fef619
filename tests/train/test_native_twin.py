"""The engine's executor on a tiny random model against the torch decoder with the same weights."""

import numpy as np
import pytest
import torch

from tests.fast.random_plan import make_batch
from tests.fast.random_weights import RandomWeights, tiny_architecture
from tokenmill.kernels import available_isas, create_executor
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WeightFormat, pack_model
from tokenmill.models.torch_twin import TorchDecoder

TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 100, 90)]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("weights", "bound"), [("bf16", 0.02), ("w8a8", 0.05), ("w4a8", 0.05)])
def test_logits_are_near_float32(weights: WeightFormat, bound: float, tied: bool, isa: str) -> None:
    architecture = tiny_architecture(tied=tied)
    source = RandomWeights(architecture, bits=4)
    with torch.inference_mode():
        wanted = TorchDecoder.load(architecture, source)(torch.tensor([TOKENS]))[0].numpy()
    plan = compile_plan(architecture, pack_model(architecture, source, weights))
    executor = create_executor(plan, max_rows=90, max_out_rows=90, num_blocks=4, isa=isa)
    executor.run(make_batch([(TOKENS[:50], 0, [2, 0])]))
    executor.run(make_batch([(TOKENS[50:], 50, [2, 0, 3])]))
    got = executor.buffer("logits")[:40]
    error = np.linalg.norm(got - wanted[50:]) / np.linalg.norm(wanted[50:])
    assert error < bound, f"relative error {error:.4f}"
