"""One update of the weights, and the state between two updates; the loop over them is in `loop.py`."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenmill.models.torch_twin import TorchDecoder
from tokenmill.train.config import TrainConfig, learning_rate_at
from tokenmill.train.head import backward, total_loss
from tokenmill.train.losses import Loss
from tokenmill.train.packing import TrainRow
from tokenmill.train.weights import FlatWeights

__all__ = ["StepFigures", "Trainer"]

_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


class StepFigures(NamedTuple):
    """One update: mean loss of its targets, norm of the gradient before clipping, counts."""

    loss: float
    gradient_norm: float
    learning_rate: float
    num_tokens: int
    num_targets: int


class Trainer:
    """A model in training. Its parameters are changed in place, and are `config.dtype` from now on.

    Only parameters that require a gradient are trained. `num_steps` is the length of the schedule.
    """

    def __init__(self, model: TorchDecoder, config: TrainConfig, num_steps: int) -> None:
        self.model = model
        self.config = config
        self.num_steps = num_steps
        self.step_number = 0
        self.weights = FlatWeights(model, _DTYPES[config.dtype])
        self._ema = self.weights.master.clone() if config.ema_decay else None
        self._optimizer = self._make_optimizer()

    def step(self, rows: Sequence[TrainRow], loss: Loss) -> StepFigures:
        """Update the weights once, by the mean loss over all targets of the rows."""
        num_targets = sum(len(row.rows_R) for row in rows)
        total = 0.0
        for row in rows:
            total += backward(self.model, row, loss, 1 / num_targets)
            self.weights.collect()
        norm = self.weights.clip(self.config.clip)
        rate = learning_rate_at(self.config, self.step_number, self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        if self._ema is not None:
            self._ema.lerp_(self.weights.master, 1 - self.config.ema_decay)
        self.weights.publish()
        self.step_number += 1
        num_tokens = sum(row.packed.num_tokens for row in rows)
        return StepFigures(total / num_targets, norm, rate, num_tokens, num_targets)

    def evaluate(self, rows: Iterable[TrainRow], loss: Loss) -> float:
        """The mean loss over all targets, of the moving average of the weights if there is one."""
        with self._averaged():
            total, num_targets = 0.0, 0
            for row in rows:
                total += total_loss(self.model, row, loss)
                num_targets += len(row.rows_R)
        return total / num_targets

    def current(self) -> Tensor:
        """What would be kept now, flat and float32: the weights or their moving average. Do not change it."""
        return self.weights.master if self._ema is None else self._ema

    def finish(self, weights: Tensor) -> None:
        """Give the model these weights, flat as `current` returned them."""
        self.weights.work.copy_(weights)

    def tensors(self) -> dict[str, Tensor]:
        """The state as flat float32 tensors, to be read or written; with `step_number` it is all there is."""
        tensors = {"master": self.weights.master}
        if self._ema is not None:
            tensors["average"] = self._ema
        for part, group in zip(("matrices", "vectors"), self._optimizer.param_groups, strict=True):
            state = self._optimizer.state[group["params"][0]]
            tensors |= {f"{part}.{name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
        return tensors

    def restored(self, step_number: int) -> None:
        """Take over what was written to `tensors()`, as the state after so many steps."""
        self.step_number = step_number
        for state in self._optimizer.state.values():
            state["step"].fill_(step_number)
        self.weights.publish()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with the moving average of its weights, if there is one."""
        if self._ema is None:
            yield
            return
        before = self.weights.work.clone()
        self.weights.work.copy_(self._ema)
        try:
            yield
        finally:
            self.weights.work.copy_(before)

    def _make_optimizer(self) -> torch.optim.AdamW:
        """AdamW over two flat tensors (Loshchilov and Hutter 2019), its state there from the beginning."""
        config, split = self.config, self.weights.num_decayed
        groups = []
        for part, decay in ((slice(0, split), config.weight_decay), (slice(split, None), 0.0)):
            flat = nn.Parameter(self.weights.master[part])
            flat.grad = self.weights.gradient[part]
            groups.append({"params": [flat], "weight_decay": decay})
        optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
        )
        for group in groups:
            (flat,) = group["params"]  # type: ignore[misc]
            optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        return optimizer
