"""The side of the child: takes calls as lines of JSON on its input, answers each with one line.

    {"call": "load", "model": PATH, "threads": 2, "options": {}}     {"version": "...", "build": "..."}
    {"call": "generate", "prompts": [[1, 2], [3, 4]], "output": 64}  {"prefill_s": ..., "decode_s": ...}
    {"call": "score", "tokens": [1, 2, 3]}                           {"logprob": ..., "num_tokens": 2}

A call that fails is answered with {"error": "..."}. What libraries print goes to the error output, so that
it cannot be taken for an answer. Only the standard library: it runs beside every peer.
"""

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

__all__ = ["Generated", "Scored", "Steps", "System", "serve"]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """How long prompts took until each sequence had its first token, and how fast the rest came.

    `decode_tokens` are those made in `decode_s`; both are 0 if one token a sequence was asked for.
    """

    prefill_s: float
    decode_s: float
    decode_tokens: int


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The sum of the natural log-probabilities of all tokens but the first, and how many these are."""

    logprob: float
    num_tokens: int


class Steps:
    """Splits the steps of an engine into the two phases.

    Steps until every sequence has its first token are prefill. Those after it that compute all sequences
    are decode; steps in which some sequences are finished already count for neither.
    """

    def __init__(self, batch: int, start: float) -> None:
        self._batch, self._last = batch, start
        self._is_started = False
        self._prefill_s = self._decode_s = 0.0
        self._num_full = 0

    def add(self, now: float, num_sequences: int) -> None:
        """A step ended at `now` and gave a token to so many sequences."""
        seconds, self._last = now - self._last, now
        if not self._is_started:
            self._prefill_s += seconds
            self._is_started = num_sequences == self._batch
        elif num_sequences == self._batch:
            self._decode_s += seconds
            self._num_full += 1

    def generated(self) -> Generated:
        """What the steps came to."""
        num_tokens = self._num_full * self._batch
        return Generated(prefill_s=self._prefill_s, decode_s=self._decode_s, decode_tokens=num_tokens)


class System(ABC):
    """A loaded model.

    `version` names the system, `build` whatever else its results depend on; `cost` is what a token costs, for
    tokenmill alone (the fields of `DecoderCost`).
    """

    version: str
    build: str = ""
    cost: Mapping[str, Any] | None = None

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Generated:
        """Compute prompts of equal length at once, then `output` tokens of each, greedily, without an end."""

    @abstractmethod
    def score(self, tokens: Sequence[int]) -> Scored:
        """The log-probability of a text in which nothing is put in front."""


Load = Callable[[str, int, Mapping[str, Any]], System]


def serve(load: Load) -> None:
    """Answer calls until the input ends. `load` gets the model's path, the threads and the options."""
    answers = _private_output()
    system: System | None = None
    for line in sys.stdin:
        answer: Mapping[str, Any]
        try:
            call = json.loads(line)
            if call["call"] == "load":
                system = load(call["model"], call["threads"], call["options"])
                answer = {"version": system.version, "build": system.build, "cost": system.cost}
            else:
                assert system is not None, "nothing is loaded"
                answer = _answer(system, call)
        except Exception as error:  # whatever a peer raises is its answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(system: System, call: Mapping[str, Any]) -> Mapping[str, Any]:
    if call["call"] == "generate":
        return asdict(system.generate(call["prompts"], call["output"]))
    return asdict(system.score(call["tokens"]))


def _private_output() -> IO[str]:
    """The output as it was; from now on, what anything prints goes to the error output."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
