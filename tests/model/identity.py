"""Requests through engines on the real model: what they answered, and what was done to them meanwhile."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from tests.fast.proposer_fakes import eager_guesses
from tokenmill.core import Request, SamplingParams, Tier
from tokenmill.engine import core
from tokenmill.engine.config import LLMConfig
from tokenmill.engine.local import LocalEngine
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.taps.tap import Tap
from tokenmill.kernels import Executor
from tokenmill.models.packing.compile import ExecutorConfig, create_executor
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["Ask", "Driven", "Guesses", "check_lookup", "drafting_in", "real_prompts"]

_DATA = Path(__file__).parents[3] / "shared" / "data"


class Ask(NamedTuple):
    """A prompt and how its answer is chosen."""

    prompt: Sequence[int]
    params: SamplingParams


class Guesses(NamedTuple):
    """What speculation did to some requests."""

    num_tokens: int
    num_drafted: int
    num_accepted: int
    num_different: int


class Driven:
    """An engine, driven step by step; counts preemptions and swaps, and checks its blocks as it goes.

    Where there is a swap file it is used as long as it has room, whatever the machine's speed.
    """

    def __init__(
        self,
        model: ModelDirectory,
        config: LLMConfig | None = None,
        *,
        create: Callable[[ModelDirectory, ExecutorConfig], Executor] = create_executor,
        draft: ModelDirectory | None = None,
    ) -> None:
        with patch.object(core, "measure_swap", lambda file: 0.0):
            self.engine = LocalEngine(model, config, create=create, draft=draft)
        self.num_preempted = self.num_swapped = self.num_steps = 0
        self._num_requests = 0

    def submit(
        self,
        ask: Ask,
        *taps: Tap,
        tier: Tier = "standard",
        timeout_s: float | None = None,
    ) -> tuple[GenerationState, ...]:
        self._num_requests += 1
        request = Request(
            request_id=f"r{self._num_requests}",
            prompt=tuple(ask.prompt),
            params=ask.params,
            tier=tier,
            timeout_s=timeout_s,
        )
        return self.engine.submit(request, taps)

    def step(self) -> None:
        stats = self.engine.step().stats
        self.num_steps += 1
        self.num_preempted += stats.num_preempted
        self.num_swapped += stats.num_swapped
        self.engine.check_integrity()

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def finish(self, asks: Sequence[Ask]) -> list[GenerationState]:
        """All in one go; the state of each, one completion a request."""
        states = [self.submit(ask)[0] for ask in asks]
        self.run()
        return states

    def answers(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        return [answer(state) for state in self.finish(asks)]

    def alone(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """One after the other."""
        return [self.answers([ask])[0] for ask in asks]


def answer(state: GenerationState) -> tuple[int, ...]:
    """The tokens of a request that ended well."""
    completion = state.completion()
    assert not completion.error, completion.error
    return completion.token_ids


def drafting_in(weights: WeightFormat) -> Callable[[ModelDirectory, ExecutorConfig], Executor]:
    """A factory that gives the target its own weight format and the draft model, made second, another."""
    made: list[Executor] = []

    def create(model: ModelDirectory, config: ExecutorConfig) -> Executor:
        made.append(create_executor(model, replace(config, weights=weights) if made else config))
        return made[-1]

    return create


def real_prompts(model: ModelDirectory, count: int) -> list[list[int]]:
    """Prompts of chats, instructions, questions on a text, and code, in turn. Skips if they are not here."""
    sources = [_koala(), _alpaca(), _dolly(), _human_eval()]
    texts = list(_in_turn(sources, count))
    tokenizer = model.tokenizer()
    longest = model.architecture.max_positions - 256
    return [tokenizer.encode(text)[:longest] for text in texts]


def check_lookup(model: ModelDirectory, *, num_prompts: int, num_tokens: int, max_batch: int) -> Guesses:
    """Assert that guessing from what was seen before changes no token of greedy answers."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    asks = [Ask(prompt, params) for prompt in real_prompts(model, num_prompts)]
    assert len(asks) == num_prompts
    plain = Driven(model, LLMConfig(prefix_cache=False)).answers(asks)
    with eager_guesses():
        states = Driven(model, LLMConfig(max_batch=max_batch, speculation="lookup")).finish(asks)
    guessed = [answer(state) for state in states]
    made = Guesses(
        num_tokens=sum(map(len, guessed)),
        num_drafted=sum(state.num_drafted for state in states),
        num_accepted=sum(state.num_accepted for state in states),
        num_different=sum(a != b for a, b in zip(plain, guessed, strict=True)),
    )
    print(f"batch {max_batch}: {num_prompts} prompts, {made}")
    assert made.num_tokens == num_prompts * num_tokens
    assert made.num_different == 0
    assert 0 < made.num_accepted < made.num_drafted, "some guesses must be right, some wrong"
    return made


def _in_turn(sources: Sequence[Iterator[str]], count: int) -> Iterator[str]:
    for _ in range(-(-count // len(sources))):
        for source in sources:
            if count > 0:
                yield next(source)
            count -= 1


def _read(path: str) -> str:
    file = _DATA / path
    if not file.is_file():
        pytest.skip(f"the collected prompts are not at hand: {path}")
    return gzip.decompress(file.read_bytes()).decode() if path.endswith(".gz") else file.read_text()


def _lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _read(path).splitlines()]


def _koala() -> Iterator[str]:
    return (row["prompt"] for row in _lines("chat_prompts/koala_test_set.jsonl"))


def _alpaca() -> Iterator[str]:
    rows = json.loads(_read("instruct_samples/alpaca_en_demo.json.gz"))
    return (f"{row['instruction']}\n{row['input']}\n\nAnswer:" for row in rows)


def _dolly() -> Iterator[str]:
    return (row["prompt"] for row in _lines("dolly_sample/dolly.jsonl"))


def _human_eval() -> Iterator[str]:
    return (row["prompt"] for row in _lines("humaneval/HumanEval.jsonl.gz"))
