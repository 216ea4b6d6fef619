"""The loop of a training run: epochs, validation, early stopping, checkpoints, the log.

A run with a folder that is killed goes on from its last checkpoint and comes to the same weights, to the
last bit, on the same machine with the same number of threads. The log (`train.jsonl`) has a line for each
step and each validation; a step that was done again after a kill has one more, equal but for its seconds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from tokenmill.core import UsageError
from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.runs import RunFolder
from tokenmill.train.checkpoint import load_tensors, read_checkpoint, save_best, save_checkpoint
from tokenmill.train.config import TrainConfig
from tokenmill.train.examples import Example
from tokenmill.train.flops import row_flops
from tokenmill.train.losses import Loss, target_loss
from tokenmill.train.packing import TrainRow, make_row, num_steps_of, plan_epoch, plan_rows
from tokenmill.train.trainer import StepFigures, Trainer

__all__ = ["Progress", "TrainResult", "train"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage, what is done, and how much there is."""

_LOG: Final = "train"
_LOG_SECONDS: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to. The model has the best weights of the validation, or the last ones without one.

    `loss` is the mean over the last tenth of the steps; `validation_losses` by step. Speeds are of this
    process: input tokens a second of the steps alone, and the share of `peak_flops` that they used (None
    if that is not known, or no step was left to do).
    """

    num_steps: int
    num_tokens: int
    loss: float
    validation_losses: tuple[tuple[int, float], ...]
    best_step: int
    stopped_early: bool
    tokens_per_second: float | None
    utilisation: float | None


@dataclass
class _State:
    """What a checkpoint holds besides tensors."""

    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    num_tokens: int = 0
    best_step: int = 0
    best: str = ""

    @property
    def best_loss(self) -> float:
        return min((loss for _, loss in self.validations), default=float("inf"))

    def is_over(self, patience: int | None) -> bool:
        """Whether the last `patience` looks have all been worse than the best before them."""
        since = [step for step, _ in self.validations if step > self.best_step]
        return patience is not None and len(since) >= patience


def train(
    model: TorchDecoder,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    loss: Loss = target_loss,
    validation: Sequence[Example] = (),
    validation_loss: Loss | None = None,
    run_folder: RunFolder | None = None,
    progress: Progress | None = None,
    peak_flops: float | None = None,
) -> TrainResult:
    """Train the model in place, on all examples `num_epochs` times.

    `loss` sees rows of `examples` by index; on the validation set it is `validation_loss`, or cross entropy
    with the targets. `run_folder` keeps log and checkpoints: its header must name what decides the result
    (model, examples, `config.decisive()`), and a run that is there is gone on with. Raises UsageError for no
    examples, for one longer than the model's context, or when the loss is no longer a number.
    """
    run = _Run(model, examples, config, validation, run_folder)
    run.loss, run.validation_loss = loss, validation_loss or target_loss
    run.progress, run.peak_flops = progress, peak_flops
    run.resume()
    return run.finish()


class _Run:
    """One call of `train`."""

    loss: Loss
    validation_loss: Loss
    progress: Progress | None
    peak_flops: float | None

    def __init__(
        self,
        model: TorchDecoder,
        examples: Sequence[Example],
        config: TrainConfig,
        validation: Sequence[Example],
        folder: RunFolder | None,
    ) -> None:
        _check(examples, model, "training")
        _check(validation, model, "validation") if validation else None
        self._examples, self._config, self._folder = examples, config, folder
        self._lengths = [each.num_inputs for each in examples]
        self._per_epoch = num_steps_of(self._lengths, config.tokens_per_step)
        self._trainer = Trainer(model, config, self._per_epoch * config.num_epochs)
        self._validation = _validation_rows(validation, config.tokens_per_row)
        self._state = _State()
        self._best: Tensor | None = None
        self._lines: list[dict[str, Any]] = []
        self._seconds, self._done_tokens, self._done_flops = 0.0, 0, 0.0
        self._saved_at = self._logged_at = time.monotonic()

    def resume(self) -> None:
        """Take over the last checkpoint, if there is one."""
        found = None if self._folder is None else read_checkpoint(self._folder)
        if self._folder is None or found is None:
            return
        step = found.pop("step")
        load_tensors(self._folder, found.pop("weights"), self._trainer.tensors())
        self._trainer.restored(step)
        found["validations"] = [(at, value) for at, value in found["validations"]]
        self._state = _State(**found)
        if self._state.best:
            self._best = torch.empty_like(self._trainer.current())
            load_tensors(self._folder, self._state.best, {"weights": self._best})

    def finish(self) -> TrainResult:
        """Do the steps that are left."""
        trainer, state = self._trainer, self._state
        for rows in self._steps():
            self._step(rows)
            if self._is_time_to_validate():
                self._validate()
                if state.is_over(self._config.patience):
                    break
            self._save_if_due()
        is_early = trainer.step_number < trainer.num_steps
        if self._folder is not None:
            self._save()
        if self._best is not None:
            trainer.finish(self._best)
        else:
            trainer.finish(trainer.current())
        return self._result(is_early)

    def _steps(self) -> Iterator[list[TrainRow]]:
        """The rows of every step from the trainer's on."""
        config = self._config
        if self._state.is_over(config.patience):
            return
        while self._trainer.step_number < self._trainer.num_steps:
            epoch, first = divmod(self._trainer.step_number, self._per_epoch)
            plan = plan_epoch(
                self._lengths,
                tokens_per_step=config.tokens_per_step,
                tokens_per_row=config.tokens_per_row,
                seed=config.seed,
                epoch=epoch,
            )
            for step in plan[first:]:
                yield [make_row(self._examples, indices) for indices in step]

    def _step(self, rows: list[TrainRow]) -> None:
        start = time.perf_counter()
        figures = self._trainer.step(rows, self.loss)
        seconds = time.perf_counter() - start
        if not abs(figures.loss) < float("inf") or not figures.gradient_norm < float("inf"):
            raise UsageError(
                f"the loss of step {self._trainer.step_number} is {figures.loss}, its gradient's norm "
                f"{figures.gradient_norm}",
                hint="try a smaller learning rate",
            )
        architecture = self._trainer.model.architecture
        is_frozen = not self._trainer.model.lm_head.weight.requires_grad
        flops = sum(
            row_flops(architecture, row.packed.lengths, len(row.rows_R), is_frozen=is_frozen) for row in rows
        )
        self._seconds += seconds
        self._done_tokens += figures.num_tokens
        self._done_flops += flops
        self._state.losses.append(figures.loss)
        self._state.num_tokens += figures.num_tokens
        self._log(figures, seconds, flops)
        self._report()

    def _log(self, figures: StepFigures, seconds: float, flops: float) -> None:
        number = self._trainer.step_number
        line = {"step": number, "epoch": (number - 1) // self._per_epoch, **figures._asdict()}
        line |= {"seconds": round(seconds, 4), "tokens_per_second": round(figures.num_tokens / seconds, 1)}
        if self.peak_flops:
            line["utilisation"] = round(flops / seconds / self.peak_flops, 4)
        self._lines.append(line)
        if time.monotonic() - self._logged_at > _LOG_SECONDS:
            self._flush()

    def _is_time_to_validate(self) -> bool:
        step, trainer = self._trainer.step_number, self._trainer
        every = self._config.validate_every or self._per_epoch
        return bool(self._validation) and (step % every == 0 or step == trainer.num_steps)

    def _validate(self) -> None:
        state, step = self._state, self._trainer.step_number
        value = self._trainer.evaluate(self._validation, self.validation_loss)
        is_best = value < state.best_loss
        state.validations.append((step, value))
        self._lines.append({"step": step, "validation_loss": value})
        if is_best:
            state.best_step = step
            self._best = self._trainer.current().clone()
            if self._folder is not None:
                state.best = save_best(self._folder, step, self._best)

    def _save_if_due(self) -> None:
        is_due = time.monotonic() - self._saved_at >= self._config.checkpoint_seconds
        if self._folder is not None and is_due:
            self._save()

    def _save(self) -> None:
        assert self._folder is not None
        self._flush()
        save_checkpoint(self._folder, self._trainer.step_number, self._trainer.tensors(), asdict(self._state))
        self._saved_at = time.monotonic()

    def _flush(self) -> None:
        if self._folder is not None and self._lines:
            self._folder.append(_LOG, self._lines)
        self._lines.clear()
        self._logged_at = time.monotonic()

    def _report(self) -> None:
        if self.progress is not None:
            self.progress("train", self._trainer.step_number, self._trainer.num_steps)

    def _result(self, is_early: bool) -> TrainResult:
        state, last = self._state, max(1, len(self._state.losses) // 10)
        speed = self._done_tokens / self._seconds if self._seconds else None
        used = (
            self._done_flops / self._seconds / self.peak_flops if self.peak_flops and self._seconds else None
        )
        return TrainResult(
            num_steps=self._trainer.step_number,
            num_tokens=state.num_tokens,
            loss=sum(state.losses[-last:]) / last,
            validation_losses=tuple(state.validations),
            best_step=state.best_step or self._trainer.step_number,
            stopped_early=is_early,
            tokens_per_second=speed,
            utilisation=used,
        )


def _check(examples: Sequence[Example], model: TorchDecoder, what: str) -> None:
    architecture = model.architecture
    if not examples:
        raise UsageError(f"there are no {what} examples")
    for number, example in enumerate(examples, start=1):
        if example.num_inputs > architecture.max_positions:
            raise UsageError(
                f"{what} example {number} has {example.num_inputs} tokens; this model takes at most "
                f"{architecture.max_positions}",
                hint="leave it out (train.fitting)",
            )
        if not 0 <= min(example.tokens) <= max(example.tokens) < architecture.vocab_size:
            raise UsageError(f"{what} example {number} has a token outside the model's vocabulary")


def _validation_rows(examples: Sequence[Example], tokens_per_row: int) -> list[TrainRow]:
    if not examples:
        return []
    lengths = [each.num_inputs for each in examples]
    return [make_row(examples, each) for each in plan_rows(lengths, range(len(examples)), tokens_per_row)]
