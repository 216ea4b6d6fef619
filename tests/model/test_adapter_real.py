"""An adapter beside the weights of the real model against the model that it is merged into.

Rank 16 on every matrix, random and strong: it moves the logits by about 4 on the mean.
The yardstick is the merged model in bf16. The bounds lie between what was measured and what the adapter
misses without one kind of matrix, which is computed, too.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fast.adapter_files import (
    MATRICES,
    MergedWeights,
    adapter_tensors,
    only,
    plain_config,
    write_adapter,
)
from tests.fast.random_plan import make_batch
from tokenmill.kernels import F32Array, StepPlan, create_executor, log_sum_exp_rows
from tokenmill.models.adapter import Adapter, pack_adapter, read_adapter
from tokenmill.models.packing.compile import load_packed
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WeightFormat, pack_model
from tokenmill.models.store.directory import ModelDirectory

TEXT = (
    "The mill stood where the two streams met, and for most of the year the water was high enough to turn "
    "both wheels. In dry summers the miller ground by night, when the fields upstream drew nothing, and "
    "slept through the heat of the day. People said that he knew the price of flour before the merchants did."
)


class Answers:
    """Logits of a text under a plan, with an adapter or without."""

    def __init__(self, model: ModelDirectory, plan: StepPlan) -> None:
        ids = model.tokenizer().encode(TEXT)[:64]
        self._plan = plan
        self._count = len(ids)
        self._batch = make_batch([(ids, 0, [0, 1]), (ids, 0, [2, 3])], list(range(len(ids), 2 * len(ids))))
        rows = self._batch.num_rows
        self._executor = create_executor(plan, max_rows=rows, max_out_rows=rows, num_blocks=4, max_adapters=1)

    def __call__(self, adapter: Adapter | None = None) -> F32Array:
        """The adapter's rows share the step with those of the same text without it."""
        batch = self._batch
        if adapter is not None:
            self._executor.set_adapter(0, pack_adapter(adapter, self._plan))
            batch = replace(batch, adapters=np.array([-1, 0], np.int32))
        self._executor.run(batch)
        return self._executor.buffer("logits")[: self._count].copy()


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelDirectory:
    return ModelDirectory.open(model_dir)


@pytest.fixture(scope="module")
def adapter(model: ModelDirectory, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    tensors = adapter_tensors(model.architecture, 16, strength=0.3)
    folder = write_adapter(tmp_path_factory.mktemp("adapter"), tensors, plain_config(16, lora_alpha=32))
    return read_adapter(folder, model.architecture)


@pytest.fixture(scope="module")
def merged(model: ModelDirectory, adapter: Adapter) -> F32Array:
    source = MergedWeights(model.weights(), adapter)
    packed = pack_model(model.architecture, source, "bf16")
    return Answers(model, compile_plan(model.architecture, packed))()


def divergence(got: F32Array, wanted: F32Array) -> float:
    """Mean KL(wanted || got) a position, in nats."""
    logs = [rows - log_sum_exp_rows(rows)[:, None] for rows in (got, wanted)]
    return float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(axis=1).mean())


@pytest.mark.parametrize(("weights", "bound"), [("bf16", 0.003), ("w4a8", 0.02), ("w8a8", 0.08)])
def test_equals_the_merged_model(
    model: ModelDirectory, adapter: Adapter, merged: F32Array, weights: WeightFormat, bound: float
) -> None:
    answers = Answers(model, compile_plan(model.architecture, load_packed(model, weights)))
    got = answers(adapter)
    gap, kl = np.abs(got - merged), divergence(got, merged)
    print(f"{weights}: logits differ by {gap.mean():.3f} on the mean, {gap.max():.2f} at most; KL {kl:.5f}")
    assert kl < bound
    wrong = {
        f"without {matrix}": only(adapter, *(name for name in adapter.pairs if not name.endswith(matrix)))
        for matrix in MATRICES
    }
    wrong["at 1.1 times its scale"] = replace(adapter, scale=adapter.scale * 1.1)
    for name, other in wrong.items():
        kl = divergence(answers(other), merged)
        print(f"{weights} {name}: KL {kl:.5f}")
        assert kl > bound, name
