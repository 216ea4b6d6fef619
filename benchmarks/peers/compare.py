"""Measures systems in turns: each run of each round is made by every system before the next one begins.

So a machine that gets slower or faster does so for all. A system that cannot be prepared, or whose runner
fails, is out from there on, with the reason; what it had measured in full stays.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.peers.child import Child, ChildFault
from benchmarks.peers.environments import NotPrepared
from benchmarks.peers.quality import Kept, perplexity
from benchmarks.peers.systems import Row, Run, System, runs
from tokenmill.costs import DecoderCost

__all__ = ["AS_GOOD", "Measured", "Plan", "Speed", "Stage", "compare", "num_pieces", "ratio", "speed"]

AS_GOOD = 1.01
"""A peer counts in a ratio if its perplexity is at most this factor above ours."""

_LOAD_S = 300.0
_GENERATE_S = 300.0
_SCORE_S = 120.0
_WARM_UP_PROMPT, _WARM_UP_OUTPUT = 16, 2
_SEED = 20_240_229


class Speed(NamedTuple):
    """Tokens a second over the rounds."""

    median: float
    low: float
    high: float


@dataclass(kw_only=True)
class Measured:
    """What became of one system. `values` are tokens a second, one a round, by the key of the row.

    `cost` is what a token costs, for tokenmill alone. `reason` says why it stopped; empty if it did not.
    """

    system: System
    version: str = ""
    perplexity: float | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    cost: DecoderCost | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. `windows` are token ids to score; prompts are drawn from the range `vocabulary`."""

    rows: Sequence[Row]
    rounds: int
    threads: int
    windows: Sequence[Sequence[int]]
    vocabulary: range


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the systems run on.

    `model` gives the path that a system reads, `open` its runner; both may raise NotPrepared. `kept` has the
    perplexities that are known; `context` is what they depend on beside the system. `say` is told what is
    done now, `num_pieces` times.
    """

    model: Callable[[System], str]
    open: Callable[[System], Child]
    kept: Kept
    context: Sequence[str]
    say: Callable[[str], None]


def compare(systems: Sequence[System], plan: Plan, stage: Stage) -> list[Measured]:
    """Measure all; one result a system, in order."""
    results = [Measured(system=system) for system in systems]
    with ExitStack() as stack:
        seats: list[tuple[Measured, Child]] = []
        for result in results:
            stage.say(f"{result.system.key}: load")
            with _noting(result):
                model = stage.model(result.system)
                child = stack.enter_context(stage.open(result.system))
                _load(result, child, model, plan, stage)
                seats.append((result, child))
        for run in runs(plan.rows):
            for number in range(plan.rounds + 1):
                prompts = _prompts(plan, run, number)
                for result, child in seats:
                    part = f"round {number} of {plan.rounds}" if number else "warm-up"
                    stage.say(f"{result.system.key}: {run.batch} x {run.prompt}, {part}")
                    if not result.reason:
                        with _noting(result):
                            _measure(result, child, run, prompts, plan.rows, is_warm_up=number == 0)
    return results


def num_pieces(systems: Sequence[System], plan: Plan) -> int:
    """How often `say` is called when nothing fails."""
    return len(systems) * (1 + len(runs(plan.rows)) * (plan.rounds + 1))


def speed(values: Sequence[float]) -> Speed:
    """The median and the range."""
    return Speed(statistics.median(values), min(values), max(values))


def ratio(own: Measured, results: Sequence[Measured], row: str, rounds: int) -> float | None:
    """How many times faster than the fastest peer that is as good; None if there is none.

    A figure counts if all its rounds are there. A perplexity that is not known counts as good.
    """
    if len(own.values.get(row, ())) != rounds:
        return None
    peers = [
        speed(other.values[row]).median
        for other in results
        if not other.system.is_own
        and len(other.values.get(row, ())) == rounds
        and _is_as_good(other.perplexity, own.perplexity)
    ]
    return speed(own.values[row]).median / max(peers) if peers else None


def _is_as_good(peer: float | None, own: float | None) -> bool:
    return peer is None or own is None or peer <= AS_GOOD * own


@contextmanager
def _noting(result: Measured) -> Iterator[None]:
    """Put a system out that fails."""
    try:
        yield
    except (ChildFault, NotPrepared) as fault:
        result.reason = str(fault)


def _load(result: Measured, child: Child, model: str, plan: Plan, stage: Stage) -> None:
    """Load the model, and know its perplexity."""
    system = result.system
    answer = child.call(
        "load", patience_s=_LOAD_S, model=model, threads=plan.threads, options=dict(system.options)
    )
    result.version, build = _text(answer, "version"), _text(answer, "build")
    if answer.get("cost"):
        result.cost = DecoderCost(**answer["cost"])
    if not plan.windows:
        return
    depends_on = (
        result.version,
        build,
        system.source,
        dict(system.options),
        list(stage.context),
        [list(window) for window in plan.windows],
    )
    result.perplexity = stage.kept.get(depends_on)
    if result.perplexity is None:
        scored = [_scored(child, window) for window in plan.windows]
        result.perplexity = perplexity(scored)
        stage.kept.put(result.perplexity, depends_on)


def _scored(child: Child, window: Sequence[int]) -> tuple[float, int]:
    answer = child.call("score", patience_s=_SCORE_S, tokens=list(window))
    num_tokens = int(_number(answer, "num_tokens"))
    if num_tokens != len(window) - 1:
        raise ChildFault(f"score: {num_tokens} tokens of a window of {len(window)}")
    return _number(answer, "logprob"), num_tokens


def _measure(
    result: Measured,
    child: Child,
    run: Run,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    *,
    is_warm_up: bool,
) -> None:
    """One run; a warm-up is a short one with as many sequences, and is not kept."""
    output = run.output
    if is_warm_up:
        prompts = [prompt[:_WARM_UP_PROMPT] for prompt in prompts]
        output = min(output, _WARM_UP_OUTPUT)
    answer = child.call("generate", patience_s=_GENERATE_S, prompts=prompts, output=output)
    if is_warm_up:
        return
    num_tokens = {"prefill": run.batch * run.prompt, "decode": _number(answer, "decode_tokens")}
    for row in rows:
        if row.run == run:
            seconds = _number(answer, f"{row.phase}_s")
            if seconds <= 0 or num_tokens[row.phase] <= 0:
                raise ChildFault(f"generate: {num_tokens[row.phase]} tokens in {seconds} s")
            result.values.setdefault(row.key, []).append(num_tokens[row.phase] / seconds)


def _number(answer: dict[str, Any], name: str) -> float:
    value = answer.get(name)
    if not isinstance(value, int | float):
        raise ChildFault(f"the answer has no number {name}")
    return value


def _text(answer: dict[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise ChildFault(f"the answer has no text {name}")
    return value


def _prompts(plan: Plan, run: Run, number: int) -> list[list[int]]:
    """Drawn anew for every round, the same for every system: nothing is found in a cache."""
    drawn = random.Random(f"{_SEED} {run} {number}")
    return [drawn.choices(plan.vocabulary, k=run.prompt) for _ in range(run.batch)]
