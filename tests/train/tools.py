"""Tiny random models and examples to train them on."""

import random

import torch

from tests.fast.random_weights import RandomWeights, tiny_architecture
from tokenmill.train import Example, TorchDecoder, TrainConfig

__all__ = ["config", "examples", "flat", "model"]


def model(*, tied: bool = True) -> TorchDecoder:
    architecture = tiny_architecture(tied=tied)
    return TorchDecoder.load(architecture, RandomWeights(architecture))


def examples(count: int, *, seed: int = 0, longest: int = 30) -> list[Example]:
    """Random tokens of different lengths; what is learnt lies in one or two runs behind a prompt."""
    random_ = random.Random(seed)
    made = []
    for _ in range(count):
        length = random_.randint(3, longest)
        tokens = [random_.randrange(100) for _ in range(length)]
        start = random_.randint(1, length - 1)
        is_target = [at >= start and at != start + 2 for at in range(length)]
        made.append(Example(tokens, is_target))
    return made


def config(**changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "learning_rate": 5e-3,
        "num_epochs": 2,
        "tokens_per_step": 150,
        "tokens_per_row": 60,
        "dtype": "float32",
    }
    return TrainConfig(**(settings | changes))  # type: ignore[arg-type]


def flat(decoder: TorchDecoder) -> torch.Tensor:
    return torch.cat([weight.detach().float().flatten() for weight in decoder.parameters()])
