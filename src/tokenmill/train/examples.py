"""What a model learns from: a sequence of tokens, and which of them it should have written."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.core import UsageError

__all__ = ["Example", "fitting"]


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model should have predicted it from those before.

    The first token cannot be a target, for nothing stands before it.
    """

    tokens: Sequence[int]
    is_target: Sequence[bool]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.is_target):
            raise UsageError(f"{len(self.tokens)} tokens and {len(self.is_target)} marks in one example")
        if not any(self.is_target[1:]):
            raise UsageError("an example has no target", hint="mark a token after the first")

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: what stands before the last target."""
        return max(i for i, is_target in enumerate(self.is_target) if is_target)

    @property
    def num_targets(self) -> int:
        """Tokens that it should have predicted."""
        return sum(map(bool, self.is_target[1:]))


def fitting(examples: Sequence[Example], max_tokens: int) -> list[int]:
    """Which of the examples a model of this context can read, by index."""
    return [i for i, example in enumerate(examples) if example.num_inputs <= max_tokens]
