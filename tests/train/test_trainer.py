"""The trainer against a plain loop, and killed against not killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.train import tools
from tokenmill.core import UsageError
from tokenmill.runs import RunFolder
from tokenmill.train import (
    Example,
    TorchDecoder,
    TrainConfig,
    Trainer,
    discard_checkpoint,
    make_row,
    plan_epoch,
    row_flops,
    train,
)
from tokenmill.train.config import learning_rate_at
from tokenmill.train.losses import target_loss

HEADER = {"what": "a test"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain_loop(model: TorchDecoder, examples: list[Example], config: TrainConfig) -> None:
    """What the trainer should do, the slow way: one example at a time, torch's own AdamW."""
    matrices = [each for each in model.parameters() if each.ndim > 1]
    vectors = [each for each in model.parameters() if each.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2))
    lengths = [each.num_inputs for each in examples]
    plans = [
        step
        for epoch in range(config.num_epochs)
        for step in plan_epoch(
            lengths,
            tokens_per_step=config.tokens_per_step,
            tokens_per_row=config.tokens_per_row,
            seed=config.seed,
            epoch=epoch,
        )
    ]
    for number, step in enumerate(plans):
        chosen = [examples[i] for row in step for i in row]
        num_targets = sum(each.num_targets for each in chosen)
        for each in chosen:
            logits = model(torch.tensor([each.tokens]))[0, :-1]
            losses = functional.cross_entropy(logits, torch.tensor(each.tokens)[1:], reduction="none")
            torch.autograd.backward((losses * torch.tensor(each.is_target)[1:]).sum() / num_targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(config, number, len(plans))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_the_trainer_equals_a_plain_loop(tied: bool) -> None:
    examples, config = tools.examples(40), tools.config(clip=0.5, weight_decay=0.1)
    fast, slow = tools.model(tied=tied), tools.model(tied=tied)
    before = tools.flat(slow)
    result = train(fast, examples, config)
    plain_loop(slow, examples, config)
    moved = float((tools.flat(slow) - before).norm())
    assert result.num_steps > 6 and moved > 0.5
    # Where a gradient is nearly nothing, AdamW makes its rounding a whole step.
    assert float((tools.flat(fast) - tools.flat(slow)).norm()) < moved / 1000


def test_bf16_learns_as_float32_does() -> None:
    examples = tools.examples(30)
    losses = {}
    for dtype in ("float32", "bf16"):
        model = tools.model()
        result = train(model, examples, tools.config(num_epochs=25, dtype=dtype))
        losses[dtype] = result.loss
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert {each.dtype for each in model.parameters()} == {
            torch.bfloat16 if dtype == "bf16" else torch.float32
        }
    assert losses["float32"] < 0.3 and losses["bf16"] < 0.3


def test_tokens_that_are_no_targets_are_not_learnt() -> None:
    """A change of what is learnt changes the weights; one of a target mark's absence does not."""
    examples = [Example([1, 2, 3, 4, 5], [False, False, False, True, True])]
    same = [Example([1, 2, 3, 4, 5, 9, 9], [False, False, False, True, True, False, False])]
    other = [Example([1, 2, 3, 4, 6], [False, False, False, True, True])]
    flats = []
    for each in (examples, same, other):
        model = tools.model()
        train(model, each, tools.config())
        flats.append(tools.flat(model))
    assert torch.equal(flats[0], flats[1])
    assert not torch.equal(flats[0], flats[2])


class _KilledError(Exception):
    pass


def run(path: Path, config: TrainConfig, *, stop_after: int | None = None, **changes: Any) -> torch.Tensor:
    """The weights after training with a folder, stopped or gone on with."""

    def progress(_: str, done: int, __: int) -> None:
        if done == stop_after:
            raise _KilledError

    model = tools.model()
    with RunFolder(path, HEADER, resume=True) as folder:
        options = {"validation": tools.examples(6, seed=9), **changes}
        train(model, tools.examples(40), config, run_folder=folder, progress=progress, **options)
    return tools.flat(model)


@pytest.mark.parametrize(
    "changes", [{"dtype": "bf16"}, {"ema_decay": 0.9}, {"validate_every": 2, "patience": 2}]
)
def test_stopped_at_any_step_and_run_again_gives_the_same_bits(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = tools.config(checkpoint_seconds=0.0, **changes)
    wanted = run(tmp_path / "whole", config)
    for step in (1, 2, 5):
        with pytest.raises(_KilledError):
            run(tmp_path / "cut", config, stop_after=step)
        assert torch.equal(run(tmp_path / "cut", config), wanted)
        assert torch.equal(run(tmp_path / "cut", config), wanted)  # nothing is left to do
        for each in (tmp_path / "cut").iterdir():
            each.unlink()


def test_a_control_without_the_optimiser_s_state_the_bits_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tools.config(checkpoint_seconds=0.0)
    wanted = run(tmp_path / "whole", config)
    with pytest.raises(_KilledError):
        run(tmp_path / "cut", config, stop_after=4)
    whole = Trainer.tensors
    monkeypatch.setattr(Trainer, "tensors", lambda self: {"master": whole(self)["master"]})
    assert not torch.equal(run(tmp_path / "cut", config), wanted)


_CHILD = """
import os, signal, sys
from pathlib import Path
from tests.train import test_trainer, tools

test_trainer.torch.set_num_threads(1)
step = int(sys.argv[2])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if step < 0:  # while a checkpoint is being written
    from tokenmill.models.formats import safetensors
    whole, count = safetensors.atomic_file, [0]
    def cut(path):
        count[0] += 1
        return kill() if count[0] == -step else whole(path)
    safetensors.atomic_file = cut
config = tools.config(checkpoint_seconds=0.0)
def progress(_, done, __):
    if done == step:
        kill()
test_trainer.train(
    tools.model(), tools.examples(40), config, progress=progress,
    run_folder=test_trainer.RunFolder(Path(sys.argv[1]), test_trainer.HEADER),
)
"""


@pytest.mark.parametrize("step", [3, -2])
def test_killed_by_the_system_and_run_again_gives_the_same_bits(tmp_path: Path, step: int) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "cut"), str(step)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    config = tools.config(checkpoint_seconds=0.0)
    got = run(tmp_path / "cut", config, validation=())
    assert torch.equal(got, run(tmp_path / "whole", config, validation=()))


def test_the_log_has_a_line_a_step_and_the_checkpoint_can_be_discarded(tmp_path: Path) -> None:
    config = tools.config()
    model = tools.model()
    with RunFolder(tmp_path, HEADER) as folder:
        result = train(model, tools.examples(40), config, run_folder=folder, peak_flops=1e12)
        lines = list(folder.lines("train"))
        assert [line["step"] for line in lines] == list(range(1, result.num_steps + 1))
        assert all(line["utilisation"] >= 0 and line["loss"] > 0 for line in lines)
        assert sum(line["num_tokens"] for line in lines) == result.num_tokens
        assert list(tmp_path.glob("*.safetensors"))
        discard_checkpoint(folder)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.json", "run.lock", "train.jsonl"]


def test_the_best_weights_are_kept_and_it_ends_early() -> None:
    """What is learnt has nothing to do with the validation set, so that soon only gets worse."""
    validation = tools.examples(20, seed=5)
    model = tools.model()
    config = tools.config(num_epochs=40, validate_every=2, patience=3)
    result = train(model, tools.examples(20), config, validation=validation)
    assert result.stopped_early and result.num_steps == result.best_step + 6
    rows = [make_row(validation, range(20))]
    again = Trainer(model, config, 1).evaluate(rows, target_loss)
    assert again == pytest.approx(min(loss for _, loss in result.validation_losses), rel=1e-6)
    assert again < result.validation_losses[-1][1] - 1e-3


def test_the_moving_average_is_validated_and_kept() -> None:
    model = tools.model()
    trainer = Trainer(model, tools.config(ema_decay=0.5), 10)
    rows = [make_row(tools.examples(10), range(10))]
    before = tools.flat(model).clone()
    expected = trainer.weights.master.clone()
    for _ in range(3):
        trainer.step(rows, target_loss)
        expected = expected + 0.5 * (trainer.weights.master - expected)
    assert torch.allclose(trainer.current(), expected, atol=1e-6)
    now = tools.flat(model).clone()
    trainer.evaluate(rows, target_loss)
    assert torch.equal(tools.flat(model), now)
    trainer.finish(trainer.current())
    assert not torch.equal(tools.flat(model), now) and not torch.equal(tools.flat(model), before)


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(learning_rate=2.0 / 2, warmup=0.1, final_rate=0.1)
    rates = [learning_rate_at(config, step, 100) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate_at(TrainConfig(warmup=0.0), 0, 1) == TrainConfig().learning_rate


def test_operations_are_counted_by_hand() -> None:
    architecture = tools.model().architecture
    block = 2 * (96 * 96 * 2 + 96 * 32 * 2 + 3 * 96 * 160)
    pairs = 3 * 4 // 2 + 5 * 6 // 2
    expected = 6 * (8 * block + 4 * 96 * 100) + 3 * 4 * 96 * pairs * 2
    assert row_flops(architecture, [3, 5], 4) == expected
    assert row_flops(architecture, [3, 5], 4, is_frozen=True) < expected * 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"patience": 0}, "patience is 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)


def test_wrong_examples_and_a_loss_that_explodes_are_refused() -> None:
    model = tools.model()
    with pytest.raises(UsageError, match="no training examples"):
        train(model, [], tools.config())
    with pytest.raises(UsageError, match="training example 2 has 129 tokens; this model takes at most 128"):
        train(model, [*tools.examples(1), Example([1] * 130, [True] * 130)], tools.config())
    with pytest.raises(UsageError, match="outside the model's vocabulary"):
        train(model, [Example([1, 100], [False, True])], tools.config())
    with pytest.raises(UsageError, match="try a smaller learning rate"):
        train(
            model,
            tools.examples(40),
            tools.config(),
            loss=lambda logits_RV, targets: target_loss(logits_RV, targets) * float("nan"),
        )
