"""A row of many sequences computes what each computes alone; plans of epochs lose and repeat nothing."""

from dataclasses import replace

import pytest
import torch

from tests.fast.random_weights import RandomWeights, tiny_architecture
from tests.train import tools
from tokenmill.core import UsageError
from tokenmill.models.architecture import Layer
from tokenmill.models.packed_row import SHORT
from tokenmill.train import Example, PackedRow, TorchDecoder, make_row, plan_epoch, plan_rows

LENGTHS = {
    "one": [7],
    "equal": [5, 5, 5],
    "mixed": [3, 40, 1, 38, 9, 9, 2, 40],
    "beyond the short form": [SHORT + 40, 12, SHORT + 8],
}


def worst(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().max())


def decoder(window: int | None = None) -> TorchDecoder:
    layers = (Layer(window=window), Layer())
    architecture = replace(tiny_architecture(), layers=layers, max_positions=1024)
    return TorchDecoder.load(architecture, RandomWeights(architecture), torch.float64)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_equals_one_at_a_time_with_gradients(name: str, window: int | None) -> None:
    lengths, model = LENGTHS[name], decoder(window)
    tokens = torch.randint(100, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    parts = tokens.split(lengths, dim=1)
    packed = model(tokens, row=PackedRow(lengths))[0]
    alone = torch.cat([model(each)[0] for each in parts])
    assert worst(packed - alone) < 1e-9
    weigh = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = list(model.parameters())
    got, wanted = (torch.autograd.grad((each * weigh).sum(), weights) for each in (packed, alone))
    for left, right in zip(got, wanted, strict=True):
        assert worst(right) > 1e-6
        assert worst(left - right) < 1e-9 * max(1.0, worst(right))


def test_a_control_without_packing_sequences_see_each_other() -> None:
    model, tokens = decoder(), torch.arange(20)[None]
    apart = model(tokens, row=PackedRow([10, 10]))
    assert worst((model(tokens) - apart)[0, :10]) < 1e-9
    assert worst((model(tokens) - apart)[0, 10:]) > 1e-2


def test_nothing_of_one_example_reaches_another() -> None:
    model, tokens = decoder(), torch.arange(30)[None]
    changed = tokens.clone()
    changed[0, 10:20] += 40
    row = PackedRow([10, 10, 10])
    with torch.inference_mode():
        difference = (model(tokens, row=row) - model(changed, row=row)).abs().amax(-1)[0]
    assert float(difference[:10].max()) == float(difference[20:].max()) == 0
    assert float(difference[10:20].min()) > 0


def test_an_epoch_has_every_example_once_in_steps_of_about_equal_tokens() -> None:
    lengths = [each.num_inputs for each in tools.examples(500)]
    plan = plan_epoch(lengths, tokens_per_step=400, tokens_per_row=130, seed=3, epoch=0)
    assert sorted(i for step in plan for row in step for i in row) == list(range(500))
    assert len(plan) == round(sum(lengths) / 400)
    for step in plan:
        assert abs(sum(lengths[i] for row in step for i in row) - 400) < 60
        rows = [[lengths[i] for i in row] for row in step]
        assert all(sum(row) <= 130 + max(row) for row in rows)
        assert [n for row in rows for n in row] == sorted((n for row in rows for n in row), reverse=True)


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    lengths = [5] * 50

    def plan(seed: int, epoch: int) -> list[list[list[int]]]:
        return plan_epoch(lengths, tokens_per_step=25, tokens_per_row=25, seed=seed, epoch=epoch)

    assert plan(1, 2) == plan(1, 2)
    assert plan(1, 2) != plan(1, 3) != plan(2, 3)


def test_an_example_longer_than_a_row_has_its_own() -> None:
    assert plan_rows([10, 900, 12], [0, 1, 2], 100) == [[1], [2, 0]]
    assert plan_epoch([900], tokens_per_step=10, tokens_per_row=10, seed=0, epoch=0) == [[[0]]]


def test_a_row_feeds_what_is_before_a_target_and_asks_for_targets_only() -> None:
    made = [
        Example([1, 2, 3, 4, 5], [False, False, True, True, False]),
        Example([6, 7, 8], [True, False, True]),
    ]
    row = make_row(made, [1, 0])
    assert row.tokens_BT.tolist() == [[6, 7, 1, 2, 3]]
    assert row.packed.lengths == (2, 3)
    assert row.packed.positions_T.tolist() == [0, 1, 0, 1, 2]
    assert row.rows_R.tolist() == [1, 3, 4]
    assert [each.tolist() for each in row.targets] == [[8, 3, 4], [1, 0, 0], [2, 2, 3]]


def test_an_example_without_a_target_is_refused() -> None:
    with pytest.raises(UsageError, match="no target"):
        Example([1, 2], [True, False])
    with pytest.raises(UsageError, match="2 tokens and 1 marks"):
        Example([1, 2], [True])
