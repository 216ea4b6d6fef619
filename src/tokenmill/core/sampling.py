"""How the next token is chosen and when generation ends: the sampling parameters of a request.

The names and meanings are those of the OpenAI API and, where that has none, of vLLM. Every value has a
bound at both ends, checked when the object is made; what depends on a model (token ids within its
vocabulary) is checked where the model is known.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from tokenmill.core.errors import UsageError

__all__ = [
    "MAX_COMPLETIONS",
    "MAX_LOGPROBS",
    "MAX_STOP_STRINGS",
    "Grammar",
    "GrammarKind",
    "SamplingParams",
]

MAX_STOP_STRINGS = 16
_MAX_STOP_CHARS = 256
_MAX_STOP_TOKENS = 256
MAX_COMPLETIONS = 8
MAX_LOGPROBS = 20
_MAX_LOGIT_BIAS = 1024
_MAX_BAD_WORDS = 256
_MAX_GRAMMAR_CHARS = 64 << 10

GrammarKind = Literal["json_schema", "json_object", "regex", "lark"]


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What the text must match: a JSON schema (as JSON text), any JSON object, a regular expression, or
    a context-free grammar in Lark's notation.
    """

    kind: GrammarKind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "json_object", "regex", "lark"):
            raise UsageError(
                f"grammar kind is {self.kind!r}", hint="use json_schema, json_object, regex or lark"
            )
        _check_text("grammar", self.source, _MAX_GRAMMAR_CHARS)
        if not self.source and self.kind != "json_object":
            raise UsageError(f"the {self.kind} of a grammar is empty", hint="give its text")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    Order: `logit_bias` is added; `min_tokens` and `bad_words` forbid tokens; repetition, frequency and
    presence penalties; the grammar's mask; `temperature` (0 is greedy), `top_k` (0: no limit), `top_p`
    and `min_p` (share of the most likely token's probability).

    `seed` makes a request reproducible whatever else is in the batch; without it one is drawn. `n`
    completions are made of one prompt. `stop` strings end the text before they appear, but for those that
    are complete within the first `min_tokens` tokens; `stop_token_ids` end it like the model's end tokens,
    also where `ignore_eos` is set. `logprobs` asks for the log-probability of each token and of that many
    most likely ones, before any of the above; the same for `prompt_logprobs` and the prompt.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_distribution()
        self._check_stops()

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        """True if the tokens so far change the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def _check_lengths(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, 1 << 20)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_int("n", self.n, 1, MAX_COMPLETIONS)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _check_int(name, value, 0, MAX_LOGPROBS)

    def _check_distribution(self) -> None:
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise UsageError("top_p is 0", hint="use a value above 0, up to 1")
        _check_int("top_k", self.top_k, 0, 1 << 20)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**63 - 1)
        _check_count("logit_bias", self.logit_bias, _MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias:
            _check_int("a token of logit_bias", token_id, 0, 1 << 31)
            _check_float("a logit_bias", bias, -100.0, 100.0)

    def _check_stops(self) -> None:
        _check_count("stop", self.stop, MAX_STOP_STRINGS)
        _check_count("stop_token_ids", self.stop_token_ids, _MAX_STOP_TOKENS)
        _check_count("bad_words", self.bad_words, _MAX_BAD_WORDS)
        for text in self.stop:
            _check_text("a stop string", text, _MAX_STOP_CHARS, empty=False)
        for text in self.bad_words:
            _check_text("a bad word", text, _MAX_STOP_CHARS, empty=False)
        for token_id in self.stop_token_ids:
            _check_int("a stop token", token_id, 0, 1 << 31)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} is {value!r}", hint="use a whole number")
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}", hint=f"use a value from {low} to {high}")


def _check_float(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} is {value!r}", hint="use a number")
    if not low <= value <= high or not math.isfinite(value):
        raise UsageError(f"{name} is {value}", hint=f"use a value from {low} to {high}")


def _check_count(name: str, values: Any, most: int) -> None:
    if isinstance(values, str):
        raise UsageError(f"{name} is one string", hint="give a tuple of strings")
    if len(values) > most:
        raise UsageError(f"{name} has {len(values)} entries", hint=f"use at most {most}")


def _check_text(name: str, text: Any, most: int, *, empty: bool = True) -> None:
    if not isinstance(text, str):
        raise UsageError(f"{name} is {text!r}", hint="use text")
    if not text and not empty:
        raise UsageError(f"{name} is empty", hint="remove it")
    if len(text) > most:
        raise UsageError(f"{name} has {len(text)} characters", hint=f"use at most {most}")
