"""What a model looks like from outside: something that generates, something that scores.

Evaluation, alignment and routing see models only through these two protocols, so the local engine,
a remote endpoint and a mock are interchangeable.
"""

from collections.abc import Sequence
from typing import Protocol

from tokenmill.core.request import Completion, Message, Score
from tokenmill.core.sampling import SamplingParams

__all__ = ["Generator", "Scorer"]


class Generator(Protocol):
    """Turns prompts into completions."""

    def generate(
        self, prompts: Sequence[str], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Continue each prompt; one completion a prompt, in order."""
        ...

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Answer each conversation with the model's chat template; one completion each, in order."""
        ...


class Scorer(Protocol):
    """Gives the log-probability of given text."""

    def score(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """Log-probability of each continuation after its context (which may be empty)."""
        ...
