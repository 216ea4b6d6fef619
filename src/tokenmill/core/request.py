"""The nouns of a generation: message, sampling parameters, request, completion, usage.

Plain frozen values. They know their own bounds and nothing about models, so that an engine, a remote
endpoint and a mock all take and return the same objects.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from tokenmill.core.errors import UsageError

__all__ = [
    "MAX_STOP_STRINGS",
    "Completion",
    "FinishReason",
    "Message",
    "Request",
    "SamplingParams",
    "Score",
    "Usage",
]

FinishReason = Literal["stop", "length", "cancelled", "failed", "expired"]

MAX_STOP_STRINGS = 16


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation, in the OpenAI shape."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    `temperature` 0 is greedy. `top_k` 0 means no limit. `seed` makes a request reproducible whatever
    else is in the batch; without it one is drawn. `stop` strings end the text before they appear.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, 1, 1 << 20)
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise UsageError("top_p is 0", hint="use a value above 0, up to 1")
        _check("top_k", self.top_k, 0, 1 << 20)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**63 - 1)
        if isinstance(self.stop, str):
            raise UsageError("stop is one string", hint="give a tuple of strings")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise UsageError(f"stop has {len(self.stop)} strings", hint=f"use at most {MAX_STOP_STRINGS}")
        if any(not text for text in self.stop):
            raise UsageError("stop has an empty string", hint="remove it")

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, as token ids, with its sampling parameters. `request_id` is unique in an engine."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Exact token counts of one request."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @property
    def num_total_tokens(self) -> int:
        """Tokens in and out."""
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a request ended with: text, token ids, the reason, and the seconds it took.

    `ttft_s` is the time from submission to the first token, `total_s` to the last, in seconds.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    ttft_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities (natural logarithm) of a given text, one a scored token.

    `token_ids[i]` was scored as the continuation of everything before it; the first token of a text
    without a prefix has no log-probability and is not in the list.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        if not self.logprobs:
            raise UsageError("nothing was scored", hint="give a text of at least two tokens")
        return math.exp(-self.total / len(self.logprobs))


def _check(name: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside [low, high]; NaN is outside."""
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}", hint=f"use a value from {low} to {high}")
