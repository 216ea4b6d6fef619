"""S14: nothing that the engine does to a request changes its tokens.

On the mock model, whose logits are a hash of what a row finds in the KV cache, prompts go through engines
that are drawn at random: guesses that are right, wrong, sometimes right, or from what was seen before; with
and without a prefix cache; caches too small for the batch, with and without a swap file; small and large
steps; tiers, forks, and neighbours that fail or are cancelled. Every answer must be the oracle's, which
knows no cache, no batch and no native code.

The control breaks one rule at a time: block names that forget what came before, guesses that nobody checks,
forks and swaps that copy nothing, a failed step that fails all who were in it. Each must be seen. The real
model is asked the same in tests/model/test_identity_real.py.
"""

import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from scripts.scorecard import Line
from tokenmill.core import Request, SamplingParams, Tier
from tokenmill.engine import outputs
from tokenmill.engine.core import CoreConfig, EngineCore
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.mock import (
    MockClock,
    MockExecutor,
    MockFault,
    MockScript,
    mock_logits,
    reference_tokens,
)
from tokenmill.engine.sampler import Sampled, SamplingRow, sample
from tokenmill.engine.schedule import Schedule
from tokenmill.engine.sequence import GenerationState
from tokenmill.engine.speculation.history import SuffixProposer
from tokenmill.engine.speculation.ngram import NgramProposer
from tokenmill.engine.speculation.proposers import (
    NO_DRAFT,
    CombinedProposer,
    Draft,
    DraftRow,
    Proposer,
    SequenceKey,
)
from tokenmill.engine.swap import SwapFile
from tokenmill.kernels import KV_BLOCK, F32Array
from tokenmill.kernels.sampling_twin import Choice, choose_tokens
from tokenmill.kvcache import PrefixChain
from tokenmill.models.text.byte_tokenizer import END_TOKEN, ByteTokenizer

__all__ = ["CONTROLS", "run"]

_WHAT = "requests whose tokens are those of the cache-free oracle, whatever the engine does to them"
_PER_ENGINE = 25
_NAN, _RAISE = END_TOKEN + 1, END_TOKEN + 2
_FAULTS = (MockFault(kind="nan", marker=(_NAN,)), MockFault(kind="raise", marker=(_RAISE,)))
_TIERS: tuple[Tier, ...] = ("fast", "standard", "batch")
_TOKENIZER = ByteTokenizer()
_Answer = tuple[int, ...]


class _Case(NamedTuple):
    """A request, the seed of each of its completions, and what these must be."""

    request: Request
    seeds: tuple[int, ...]
    answers: tuple[_Answer, ...]


class _Scripted:
    """Knows the answers, and guesses each token right with probability `share`. Now and then it raises.

    A wrong guess is any token, also one at which the model fails.
    """

    def __init__(self, cases: Sequence[_Case], share: float, rng: random.Random) -> None:
        self._answers = {
            (case.request.prompt, seed): answer
            for case in cases
            for seed, answer in zip(case.seeds, case.answers, strict=True)
        }
        self._share = share
        self._rng = rng

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """The next tokens of those requests that are cases."""
        if self._rng.random() < 0.01:
            raise RuntimeError("a proposer's own mistake")
        return [self._draft(row) for row in rows]

    def observe(self, key: SequenceKey, draft: Draft, num_accepted: int) -> None:
        """Learns nothing."""

    def forget(self, key: SequenceKey) -> None:
        """Keeps nothing."""

    def _draft(self, row: DraftRow) -> Draft:
        answer = self._answers.get((tuple(row.tokens[: row.num_prompt]), row.seed))
        if answer is None:
            return NO_DRAFT
        rest = answer[len(row.tokens) - row.num_prompt :][: row.max_tokens]
        tokens = tuple(t if self._rng.random() < self._share else self._wrong(t) for t in rest)
        return Draft(tokens, (0.9,) * len(tokens))

    def _wrong(self, token: int) -> int:
        return (token + self._rng.randint(1, _RAISE)) % (_RAISE + 1)


def run(*, cases: int, seed: int, guard: bool) -> Line:
    """Put `cases` prompts through random engines. Without the guard each control gets its share of them."""
    began = time.perf_counter()
    rng = random.Random(seed)
    tally: Counter[str] = Counter()
    controls: Sequence[str] = ("",) if guard else tuple(CONTROLS)
    for index, first in enumerate(range(0, cases, _PER_ENGINE)):
        control = controls[index % len(controls)]
        with CONTROLS[control]() if control else nullcontext():
            found = _try_engine(rng, min(_PER_ENGINE, cases - first))
        tally.update(found)
        if control:
            tally[f"violations, {control}"] += found["violations"]
    violations = tally.pop("violations")
    return Line(
        name="S14",
        what=_WHAT,
        cases=cases,
        violations=violations,
        seconds=time.perf_counter() - began,
        figures=dict(sorted(tally.items())),
    )


def _try_engine(rng: random.Random, num_cases: int) -> Counter[str]:
    """One engine and its requests; what happened, and how many were answered wrongly."""
    clock = MockClock()
    script = MockScript(seed=rng.randrange(1 << 32), step_s=1e-2, row_s=1e-4, faults=_FAULTS)
    cases = _cases(rng, num_cases, script)
    with ExitStack() as stack:
        core = _engine(rng, script, cases, clock, stack)
        driven = _Driven(core, rng)
        states = driven.run(cases)
    tally = driven.tally
    tally["violations"] = sum(
        any(state.finish_reason != _reason(answer) or _tokens(state) != answer for state, answer in pairs)
        for pairs in (
            zip(family, case.answers, strict=True) for family, case in zip(states, cases, strict=True)
        )
    )
    every = [state for family in states for state in family]
    tally["completions"] = len(every)
    tally["tokens"] = sum(state.num_output for state in every)
    tally["prefix hits"] = sum(state.num_cached > 0 for state in every)
    tally["guesses"] = sum(state.num_drafted for state in every)
    tally["guesses accepted"] = sum(state.num_accepted for state in every)
    tally["forked requests"] = sum(len(family) > 1 for family in states)
    return tally


class _Driven:
    """Submits requests a few at a time, with neighbours between them, and counts what was done."""

    def __init__(self, core: EngineCore, rng: random.Random) -> None:
        self.tally: Counter[str] = Counter()
        self._core = core
        self._rng = rng
        self._failing = list[GenerationState]()
        self._cancelled = list[GenerationState]()

    def run(self, cases: Sequence[_Case]) -> list[list[GenerationState]]:
        """The states of each case, all finished."""
        states = []
        has_neighbours = self._rng.random() < 0.5
        for case in cases:
            states.append(self._submit(case))
            if has_neighbours and self._rng.random() < 0.3:
                self._add_neighbour(case)
            while self._rng.random() < 0.4:
                self._step()
        while self._core.has_work:
            self._step()
        assert all(state.finish_reason == "failed" for state in self._failing), "a fault was not noticed"
        self.tally["failed neighbours"] = len(self._failing)
        self.tally["cancelled neighbours"] = sum(s.finish_reason == "cancelled" for s in self._cancelled)
        return states

    def _submit(self, case: _Case) -> list[GenerationState]:
        states = [_state(case, index, self._core.clock()) for index in range(len(case.seeds))]
        states[0].branch(states[1:])
        self._core.submit(states[0])
        return states

    def _add_neighbour(self, case: _Case) -> None:
        """One that begins as the case does, and fails or is cancelled."""
        prompt, request_id = case.request.prompt, f"beside {case.request.request_id}"
        if self._rng.random() < 0.5:
            at, marker = self._rng.randint(0, len(prompt)), self._rng.choice((_NAN, _RAISE))
            request = replace(
                case.request, prompt=(*prompt[:at], marker, *prompt[at:]), request_id=request_id
            )
            self._failing += self._submit(case._replace(request=request))
        else:
            self._cancelled += self._submit(
                case._replace(request=replace(case.request, request_id=request_id))
            )

    def _step(self) -> None:
        stats = self._core.step().stats
        self.tally["steps"] += 1
        self.tally["preemptions"] += stats.num_preempted
        self.tally["swaps"] += stats.num_swapped
        if self._cancelled and self._rng.random() < 0.2:
            self._core.abort(self._rng.choice(self._cancelled))


def _engine(
    rng: random.Random, script: MockScript, cases: Sequence[_Case], clock: MockClock, stack: ExitStack
) -> EngineCore:
    num_blocks = rng.choice((rng.randint(6, 10), rng.randint(6, 10), 200))
    max_batch = rng.choice((2, 8, 16))
    executor = MockExecutor(
        script,
        num_blocks=num_blocks,
        max_rows=rng.choice((24, 64, 256)),
        max_out_rows=max(16, max_batch),
        sleep=clock.sleep,
    )
    config = CoreConfig(
        num_blocks=num_blocks,
        max_sequences=max_batch,
        model=rng.choice((None, "")),
        fast_step_s=rng.choice((0.012, 1.0)),
    )
    num_slots = rng.choice((0, 6, 100))
    swap = SwapFile(None, num_slots, executor.block(0).nbytes) if num_slots else None
    if swap is not None:
        stack.enter_context(swap)
    return EngineCore(executor, config, swap=swap, proposer=_proposer(rng, cases), clock=clock)


def _proposer(rng: random.Random, cases: Sequence[_Case]) -> Proposer | None:
    kind = rng.choice(("none", "lookup", "right", "wrong", "sometimes"))
    if kind == "none":
        return None
    if kind == "lookup":
        return CombinedProposer([NgramProposer(), SuffixProposer()])
    return _Scripted(cases, {"right": 1.0, "wrong": 0.0, "sometimes": 0.7}[kind], rng)


def _cases(rng: random.Random, num_cases: int, script: MockScript) -> list[_Case]:
    """Prompts that begin alike, or have equal blocks after different beginnings; some come twice."""
    stems = [tuple(rng.randrange(256) for _ in range(KV_BLOCK)) for _ in range(3)]
    cases: list[_Case] = []
    for index in range(num_cases):
        tier, name = rng.choice(_TIERS), f"r{index}"
        if cases and rng.random() < 0.3:
            before = rng.choice(cases)
            cases.append(before._replace(request=replace(before.request, request_id=name, tier=tier)))
            continue
        tail = tuple(rng.randrange(256) for _ in range(rng.randint(1, KV_BLOCK)))
        prompt = (*(token for _ in range(rng.randint(0, 3)) for token in rng.choice(stems)), *tail)
        params = _params(rng)
        seeds = tuple(rng.randrange(1 << 62) for _ in range(params.n))
        request = Request(request_id=name, prompt=prompt, params=params, tier=tier)
        cases.append(_Case(request, seeds, tuple(_oracle(prompt, params, seed, script) for seed in seeds)))
    return cases


def _params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.choice((1, 8, 20, 48))
    if rng.random() < 0.65:
        return SamplingParams(max_tokens=max_tokens)
    penalty = rng.choice((0.0, 1.5))
    n = rng.choice((1, 1, 3))
    return SamplingParams(max_tokens=max_tokens, temperature=0.8, presence_penalty=penalty, n=n)


def _oracle(prompt: Sequence[int], params: SamplingParams, seed: int, script: MockScript) -> _Answer:
    """The answer, every token from scratch by the numpy twin of the sampler."""
    if params.greedy:
        return tuple(reference_tokens(prompt, params.max_tokens, script))
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        choice = Choice(
            logits_row=0,
            tokens=np.array(tokens if params.penalises else [], np.int32),
            num_prompt=len(prompt),
            presence=params.presence_penalty,
            inverse_temperature=1.0 / params.temperature,
            seed=seed,
            position=len(tokens),
        )
        tokens.append(int(choose_tokens(mock_logits(tokens, script)[None], [choice])[0]))
        if tokens[-1] == END_TOKEN:
            break
    return tuple(tokens[len(prompt) :])


def _state(case: _Case, index: int, now_s: float) -> GenerationState:
    return GenerationState(
        case.request,
        index=index,
        seed=case.seeds[index],
        max_total=len(case.request.prompt) + case.request.params.max_tokens,
        detokenizer=Detokenizer(_TOKENIZER.token_bytes),
        end_token_ids=frozenset({END_TOKEN}),
        submitted_s=now_s,
    )


def _tokens(state: GenerationState) -> _Answer:
    return tuple(state.tokens[state.num_prompt :])


def _reason(answer: _Answer) -> str:
    return "completed" if answer[-1] == END_TOKEN else "length"


def _forget_the_past(self: PrefixChain, index: int, tokens: "array[int]") -> bytes:
    return self.tokens_of(index, tokens)


def _believe(logits_LV: F32Array, rows: Sequence[SamplingRow]) -> Sampled:
    """Take the guess, where there is one, for the token drawn."""
    sampled = sample(logits_LV, rows)
    guessed = (
        row.tokens[row.position] if row.position < len(row.tokens) else token
        for row, token in zip(rows, sampled.token_ids.tolist(), strict=True)
    )
    return replace(sampled, token_ids=np.fromiter(guessed, np.int32, len(rows)))


def _do_nothing(*_: object) -> None:
    pass


def _fail_all(self: EngineCore, schedule: Schedule, error: Exception) -> None:
    for chunk in schedule.chunks:
        chunk.sequence.fail(str(error), now_s=self.clock())


CONTROLS: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    "block names without their past": lambda: patch.object(PrefixChain, "key", _forget_the_past),
    "guesses unchecked": lambda: patch.object(outputs, "sample", _believe),
    "forks that copy nothing": lambda: patch.object(MockExecutor, "copy_blocks", _do_nothing),
    "swaps that read nothing": lambda: patch.object(SwapFile, "get", _do_nothing),
    "a failed step fails all": lambda: patch.object(EngineCore, "_suspect", _fail_all),
}
"""What the guard is, each rule broken for itself."""
