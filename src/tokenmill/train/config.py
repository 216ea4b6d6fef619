"""How to train: everything that decides the weights which come out, and how often they are saved."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from tokenmill.core import UsageError

__all__ = ["TrainConfig", "TrainDtype", "learning_rate_at"]

TrainDtype = Literal["bf16", "float32"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run.

    `tokens_per_step`: about so many input tokens between two updates of the weights; `tokens_per_row`: about
    so many at a time, which bounds memory. `warmup`: share of all steps in which the learning rate rises;
    it then falls to `final_rate` of its peak along a cosine. `clip`: largest norm of all gradients together.
    `weight_decay` is for matrices only. `dtype`: what is multiplied; the weights that the optimiser moves
    are float32 always. `validate_every`: steps between two looks at the validation set (None: once an
    epoch). `patience`: looks without a better loss until it ends (None: never). `ema_decay`: what is
    validated and kept is this moving average of the weights (0: the weights themselves).
    """

    learning_rate: float = 1e-4
    num_epochs: int = 3
    tokens_per_step: int = 4096
    tokens_per_row: int = 2048
    warmup: float = 0.05
    final_rate: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    ema_decay: float = 0.0
    seed: int = 0
    dtype: TrainDtype = "bf16"
    validate_every: int | None = None
    patience: int | None = None
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also true for NaN
                raise UsageError(f"{name} is {value}", hint=f"give a number from {low:g} to {high:g}")
        if self.dtype not in get_args(TrainDtype):
            raise UsageError(
                f"dtype is {self.dtype!r}", hint=f"give one of {', '.join(get_args(TrainDtype))}"
            )

    def decisive(self) -> dict[str, object]:
        """What decides the weights, without how often they are saved: for a run's header."""
        return {
            each.name: getattr(self, each.name) for each in fields(self) if each.name != "checkpoint_seconds"
        }


_BOUNDS = (
    ("learning_rate", 0.0, 1.0),
    ("num_epochs", 1, 100_000),
    ("tokens_per_step", 1, 1 << 24),
    ("tokens_per_row", 1, 1 << 20),
    ("warmup", 0.0, 1.0),
    ("final_rate", 0.0, 1.0),
    ("weight_decay", 0.0, 10.0),
    ("beta1", 0.0, 0.9999),
    ("beta2", 0.0, 0.999999),
    ("clip", 1e-6, 1e9),
    ("ema_decay", 0.0, 0.999999),
    ("seed", 0, (1 << 63) - 1),
    ("validate_every", 1, 1 << 40),
    ("patience", 1, 1 << 40),
    ("checkpoint_seconds", 0.0, 1e9),
)


def learning_rate_at(config: TrainConfig, step: int, num_steps: int) -> float:
    """The rate of a step, counted from 0: a line up, then a cosine down (Loshchilov and Hutter 2017)."""
    num_warm = math.ceil(config.warmup * num_steps)
    if step < num_warm:
        return config.learning_rate * (step + 1) / num_warm
    share = (step - num_warm) / max(1, num_steps - num_warm)
    height = 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * height)
