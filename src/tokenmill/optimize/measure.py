"""A candidate under load: the batch that serves it best, and every figure of the certifying part at that
batch.

The load is what `tokenmill load` sends, closed loops of so many calls at a time; the answers that are
scored are those that were timed. Money is the machine's price an hour for the time of the run, shared among
its calls by what each of them used.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from tokenmill.costs import EnergyMeter, HourlyCost, usd_per_million
from tokenmill.costs.energy import EnergyModel
from tokenmill.costs.power import PowerCounters
from tokenmill.evals.load import ClosedLoop, DriveConfig, LoadRun, Sample, Slo, Summary, drive, summarize
from tokenmill.evals.statistics import cost_per_pass, mean_interval, quantile_interval
from tokenmill.optimize.candidate import Opened
from tokenmill.optimize.cases import Case, PassRule
from tokenmill.optimize.quality import Scorer
from tokenmill.optimize.records import EnergyLabel, Figures, Item, Level, Range
from tokenmill.optimize.target import BackendTarget, Given, request_of

__all__ = ["Machine", "Measured", "Rules", "answer", "figures_of", "items_of", "measure"]

_LEVELS: Final = (1, 4, 16, 64)
_MOST_A_LEVEL: Final = 128
_FEWEST_A_LEVEL: Final = 8
_LEVEL_S: Final = 20.0
_CALL_TIMEOUT_S: Final = 120.0
_DAY_S: Final = 86_400.0
_POLL_S: Final = 10.0
_ANSWER_CHARS: Final = 4000


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What an hour of it costs, and how its energy is known: counters, or an assumed model, or not at all."""

    usd_per_hour: float
    counters: PowerCounters | None = None
    energy: EnergyModel | None = None
    energy_note: str = ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How answers become figures."""

    score: Scorer
    passes: PassRule
    slo: Slo | None
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A candidate's lines and figures."""

    items: tuple[Item, ...]
    figures: Figures


async def measure(
    name: str,
    opened: Opened,
    select: Sequence[Case],
    certify: Sequence[Case],
    rules: Rules,
    machine: Machine,
    *,
    artefact_bytes: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Find the best batch on select, then answer all of certify at it, once."""
    levels = await _levels(opened, select, rules)
    best = _best(levels)
    target = BackendTarget(opened.backend, {case.id: case for case in certify})
    meter = None if machine.counters is None else EnergyMeter(machine.counters)
    async with _Polled(meter):
        run = await _run(target, certify, best, on_progress=on_progress)
    joules = None if meter is None else meter.poll()
    memory_bytes = opened.memory_bytes()
    items = items_of(name, certify, target.given, run, rules, machine)
    found = figures_of(items, run, rules, machine, joules=joules)
    found = replace(
        found,
        concurrency=best,
        levels=tuple(levels),
        memory_bytes=memory_bytes,
        artefact_bytes=artefact_bytes,
    )
    return Measured(items=items, figures=found)


async def answer(
    name: str, opened: Opened, cases: Sequence[Case], rules: Rules, machine: Machine, *, concurrency: int = 16
) -> tuple[Item, ...]:
    """The lines of some cases at one load: for exploring."""
    target = BackendTarget(opened.backend, {case.id: case for case in cases})
    run = await _run(target, cases, concurrency)
    return items_of(name, cases, target.given, run, rules, machine)


def items_of(
    name: str,
    cases: Sequence[Case],
    given: Mapping[str, Given],
    run: LoadRun,
    rules: Rules,
    machine: Machine,
) -> tuple[Item, ...]:
    """A line for each case; one that was not answered is one that failed, and costs its share."""
    samples = {sample.id: sample for sample in run.samples if not sample.is_warmup}
    summary = summarize(run)
    total_usd = machine.usd_per_hour * summary.duration_s / 3600
    used = {case.id: float(given[case.id].spent.nanoseconds) if case.id in given else 0.0 for case in cases}
    mean = (math.fsum(used.values()) / max(1, sum(each > 0 for each in used.values()))) or 1.0
    weights = {id: each or mean for id, each in used.items()}
    whole = math.fsum(weights.values())
    return tuple(
        _item(name, case, given.get(case.id), samples[case.id], total_usd * weights[case.id] / whole, rules)
        for case in cases
    )


def _item(name: str, case: Case, given: Given | None, sample: Sample, usd: float, rules: Rules) -> Item:
    is_answer = given is not None and sample.status == "ok"
    text = given.text if given is not None else ""
    score = rules.score(case.wanted, text) if is_answer else 0.0
    return Item(
        candidate=name,
        id=case.id,
        slice=case.slice,
        cluster=case.cluster,
        score=score,
        passed=is_answer and rules.passes(score, case.score),
        incumbent_score=case.score,
        incumbent_passed=case.passed,
        usd=usd,
        incumbent_usd=case.usd,
        e2e_s=sample.e2e_s(),
        ttft_s=sample.ttft_s(),
        num_input_tokens=sample.num_input_tokens,
        num_output_tokens=sample.num_output_tokens,
        probability=given.probability if given is not None else None,
        answer=text[:_ANSWER_CHARS],
        error="" if is_answer else sample.error or sample.status,
    )


def figures_of(
    items: Sequence[Item], run: LoadRun, rules: Rules, machine: Machine, *, joules: float | None
) -> Figures:
    """The figures of one run over its items; batch, sizes and levels are filled in by who knows them."""
    summary = summarize(run, rules.slo)
    passed = [float(each.passed) for each in items]
    costs = [each.usd for each in items]
    num_tokens = sum(each.num_output_tokens for each in items)
    energy_label: EnergyLabel = "not measured" if joules is None else "measured"
    if joules is None and machine.energy is not None:
        joules, energy_label = machine.energy.watts * summary.duration_s, "estimated"
    waits = [each.ttft_s for each in items if each.ttft_s is not None]
    kept = summary.goodput
    rate = summary.output_tokens_per_s
    return Figures(
        num_items=len(items),
        num_errors=sum(bool(each.error) for each in items),
        concurrency=0,
        quality=_mean([each.score for each in items], rules),
        pass_share=_mean(passed, rules),
        p50_ms=_quantile([each.e2e_s for each in items], 0.5, rules),
        p99_ms=_quantile([each.e2e_s for each in items], 0.99, rules),
        ttft_p50_ms=_quantile(waits, 0.5, rules) if waits else None,
        ttft_p99_ms=_quantile(waits, 0.99, rules) if waits else None,
        requests_per_s=summary.requests_per_s,
        output_tokens_per_s=rate,
        joules_per_token=joules / num_tokens if joules is not None and num_tokens else None,
        joules_per_pass=joules / sum(passed) if joules is not None and any(passed) else None,
        energy_label=energy_label,
        energy_note=machine.energy_note,
        usd_per_request=Range.of(mean_interval(costs, confidence=rules.confidence, bounds=(0.0, math.inf))),
        usd_per_pass=Range.of(cost_per_pass(costs, passed, confidence=rules.confidence)),
        usd_per_million_out=usd_per_million(HourlyCost(usd=machine.usd_per_hour), rate) if rate else None,
        memory_bytes=0,
        artefact_bytes=0,
        slo_share=None if kept is None else Range(estimate=kept.share, low=kept.low, high=kept.high),
        slo_kept=None if kept is None else kept.is_met,
        levels=(),
        client_limited=summary.client.is_saturated,
    )


async def _levels(opened: Opened, select: Sequence[Case], rules: Rules) -> list[Level]:
    """Each load in turn, until a larger one serves hardly more. The first calls warm up."""
    usable = [case for case in select if case.call is not None]
    levels: list[Level] = []
    place = 0
    for concurrency in _LEVELS:
        num = min(max(_FEWEST_A_LEVEL, 3 * concurrency), _MOST_A_LEVEL, len(usable))
        chosen = [usable[(place + at) % len(usable)] for at in range(num)]
        place += num
        if not chosen or (levels and concurrency > len(chosen)):
            break
        target = BackendTarget(opened.backend, {case.id: case for case in chosen})
        run = await _run(target, chosen, concurrency, num_warmup=min(2, num - 1), max_seconds=_LEVEL_S)
        levels.append(_level(concurrency, summarize(run, rules.slo)))
        if len(levels) > 1 and levels[-1].requests_per_s < 1.02 * levels[-2].requests_per_s:
            break
    return levels


def _level(concurrency: int, summary: Summary) -> Level:
    e2e, ttft = summary.e2e_ms, summary.ttft_ms
    return Level(
        concurrency=concurrency,
        requests_per_s=summary.requests_per_s,
        output_tokens_per_s=summary.output_tokens_per_s,
        p50_ms=None if e2e is None else e2e.p50.value,
        p99_ms=None if e2e is None else e2e.p99.value,
        ttft_p99_ms=None if ttft is None else ttft.p99.value,
        num_errors=summary.num_errors,
        keeps_slo=None if summary.goodput is None else summary.goodput.is_met,
    )


def _best(levels: Sequence[Level]) -> int:
    """The batch that serves most, of those that keep the limits, or of all if none does."""
    keeping = [each for each in levels if each.keeps_slo is not False]
    return max(keeping or levels, key=lambda each: each.requests_per_s).concurrency if levels else 1


async def _run(
    target: BackendTarget,
    cases: Sequence[Case],
    concurrency: int,
    *,
    num_warmup: int = 0,
    max_seconds: float = _DAY_S,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadRun:
    return await drive(
        target,
        [request_of(case) for case in cases],
        ClosedLoop(concurrency=concurrency),
        DriveConfig(num_warmup=num_warmup, max_seconds=max_seconds, timeout_s=_CALL_TIMEOUT_S),
        on_progress=lambda each: on_progress(each.num_ended, each.num_requests),
    )


class _Polled:
    """Polls an energy meter while the block runs, before its counters can wrap twice."""

    def __init__(self, meter: EnergyMeter | None) -> None:
        self._meter = meter
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._meter is not None:
            self._task = asyncio.create_task(self._poll(self._meter))

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _poll(self, meter: EnergyMeter) -> None:
        while True:
            meter.poll()
            await asyncio.sleep(_POLL_S)


def _mean(values: Sequence[float], rules: Rules) -> Range:
    return Range.of(mean_interval(values, confidence=rules.confidence, bounds=(0.0, 1.0)))


def _quantile(values_s: Sequence[float], quantile: float, rules: Rules) -> Range:
    found = quantile_interval(np.asarray(values_s), quantile, confidence=rules.confidence)
    return Range.of(found.map(1e3, 0.0))
