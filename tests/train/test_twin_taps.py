"""The same taps on the native engine and on the torch decoder: bf16 weights, bound as in test_native_twin."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fast.random_weights import RandomWeights, tiny_architecture
from tests.fast.tap_tools import drive, engine, scoring
from tokenmill.core import UsageError
from tokenmill.engine.taps.points import FINAL_NORM, tap_points
from tokenmill.engine.taps.tap import Recording, Tap, ablate, replace_values, steer, twin_hooks
from tokenmill.kernels import F32Array, StepPlan, available_isas, create_executor
from tokenmill.models.packing.compile import load_packed
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import pack_model
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder

BOUND = 0.02
ARCHITECTURE = tiny_architecture()
SOURCE = RandomWeights(ARCHITECTURE)
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 100, 50)]


@pytest.fixture(scope="module")
def twin() -> TorchDecoder:
    return TorchDecoder.load(ARCHITECTURE, SOURCE)


@pytest.fixture(scope="module")
def plan() -> StepPlan:
    return compile_plan(ARCHITECTURE, pack_model(ARCHITECTURE, SOURCE, "bf16"))


def on_engine(plan: StepPlan, isa: str, ids: Sequence[int], taps: Sequence[Tap]) -> list[float]:
    """Log-probabilities of all tokens but the first, computed in chunks."""
    executor = create_executor(plan, max_rows=30, max_out_rows=16, num_blocks=8, num_threads=1, isa=isa)
    core = engine(executor, num_blocks=8)
    state = scoring("0", ids, *taps)
    drive(core, [state])
    return list(state.score().logprobs)


def on_twin(twin: TorchDecoder, ids: Sequence[int], taps: Sequence[Tap]) -> list[float]:
    with torch.inference_mode():
        # The engine computes nothing from the last token.
        return [float(p) for p in twin.logprobs(torch.tensor([ids]), twin_hooks(taps))[0]]


def relative(got: F32Array, want: F32Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_every_point_of_a_plan_is_a_point_of_the_twin(twin: TorchDecoder, plan: StepPlan) -> None:
    names = [name for name in twin.hook_names if not name.endswith("resid_pre")]
    assert list(tap_points(plan)) == names


@pytest.mark.parametrize("isa", available_isas())
def test_what_is_read_agrees(twin: TorchDecoder, plan: StepPlan, isa: str) -> None:
    native, torch_side = Recording(), Recording()
    points = list(tap_points(plan))
    for point in points:
        on_twin(twin, TOKENS[:-1], [Tap(point=point, handler=torch_side)])
    on_engine(plan, isa, TOKENS, [Tap(point=point, handler=native) for point in points])
    for point in points:
        got, want = (each.rows("0", point) for each in (native, torch_side))
        assert got.positions_T.tolist() == want.positions_T.tolist()
        assert relative(got.values_TD, want.values_TD) < BOUND, point


@pytest.mark.parametrize(
    "point", ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post", FINAL_NORM]
)
def test_what_is_edited_means_the_same(twin: TorchDecoder, plan: StepPlan, point: str) -> None:
    plain = np.array(on_twin(twin, TOKENS, ()))
    width = 160 if "mlp" in point else 96
    vector_D = np.random.default_rng(2).normal(0, 2, width).astype(np.float32)
    rows_TD = np.random.default_rng(3).normal(0, 2, (3, width)).astype(np.float32)
    edits = [
        steer(point, vector_D, positions=range(10, 50, 2)),
        ablate(point, positions=(3, 4)),
        replace_values(point, rows_TD, (7, 20, 6)),
    ]
    got = np.array(on_engine(plan, available_isas()[0], TOKENS, edits))
    want = np.array(on_twin(twin, TOKENS, edits))
    assert relative(want, plain) > 5 * BOUND
    assert relative(got, want) < BOUND


def test_a_fault_on_the_twin_is_raised_and_batches_are_tapped_row_by_row(twin: TorchDecoder) -> None:
    recording = Recording()
    tokens_BT = torch.tensor([TOKENS[:8], TOKENS[8:16]])
    point = "blocks.0.attn.hook_z"
    with torch.inference_mode():
        hooks = twin_hooks([Tap(point=point, handler=recording, positions=range(2, 4))])
        assert torch.equal(twin(tokens_BT, hooks), twin(tokens_BT))
        assert recording.rows("1", point).values_TD.shape == (2, 96)
        with pytest.raises(UsageError, match="returned shape"):
            twin(
                tokens_BT, twin_hooks([Tap(point=point, handler=lambda r: r.values_TD[1:], intervention="x")])
            )


def test_the_real_model_s_points_agree(model_dir: Path) -> None:
    model = ModelDirectory.open(model_dir)
    ids = model.tokenizer().encode("The mill stood where the two streams met, and the water was high enough.")
    plan = compile_plan(model.architecture, load_packed(model, "bf16"))
    layers = (0, 14, 29)
    points = [FINAL_NORM]
    for layer in layers:
        names = ("hook_resid_post", "attn.hook_z", "mlp.hook_post", "ln2.hook_normalized")
        points += [f"blocks.{layer}.{name}" for name in names]
    native, torch_side = Recording(), Recording()
    on_engine(plan, available_isas()[0], ids, [Tap(point=point, handler=native) for point in points])
    twin = TorchDecoder.load(model.architecture, model.weights())
    on_twin(twin, ids[:-1], [Tap(point=point, handler=torch_side) for point in points])
    errors = {
        point: relative(native.rows("0", point).values_TD, torch_side.rows("0", point).values_TD)
        for point in points
    }
    print(errors)
    assert max(errors.values()) < BOUND, errors
