"""Measures a model on this machine: tokens a second of prefill and of decode, as a share of the limit.

Every run submits `batch` new prompts at once and generates a fixed number of tokens, greedily, through
the offline `LLM`. Steps are timed from outside, between the moments at which a caller sees their
results, so scheduling, sampling and text are included. A step that computes any token of a prompt
counts as prefill. The others are decode; where prompts took several steps, sequences end one after the
other, and only the steps with the most sequences count. Prompts are drawn token ids, the same whenever it
is run, different in every sequence and run, so that nothing is found in a cache. Latency under load is
not measured here: nobody arrives later.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tokenmill.core import SamplingParams, UsageError
from tokenmill.costs import (
    Ceiling,
    DecoderCost,
    LimitName,
    MachineRates,
    ReadRate,
    ceiling,
    decode_work,
    prefill_work,
)
from tokenmill.engine.config import LLMConfig
from tokenmill.engine.llm import LLM, Progress
from tokenmill.kernels import KV_BLOCK, KvDtype, StepPlan
from tokenmill.kernels.probe import MachineLimits
from tokenmill.models.architecture import Architecture
from tokenmill.models.packing.compile import ExecutorFactory, create_executor
from tokenmill.models.packing.pack import WEIGHT_FORMATS, WeightFormat
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["BenchConfig", "BenchRow", "PhaseName", "bench", "decoder_cost", "machine_rates", "peak_rss_bytes"]

PhaseName: TypeAlias = Literal["prefill", "decode"]

_WARM_UP_TOKENS = 8
_SEED = 20_240_229


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured: every weight format with every batch size, `num_runs` times after a warm-up.

    `prompt` and `output` are tokens of each sequence; `output` is at least 2, for the first token
    belongs to prefill.
    """

    weights: tuple[WeightFormat, ...] = WEIGHT_FORMATS
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 128
    output: int = 64
    num_runs: int = 3
    num_threads: int | None = None
    kv_dtype: KvDtype = "bf16"

    def __post_init__(self) -> None:
        if not self.weights or not self.batches:
            raise UsageError("nothing to measure", hint="give at least one weight format and one batch size")
        bounds = {"prompt": (1, 1 << 20), "output": (2, 1 << 20), "num_runs": (1, 1000)}
        values = {name: [getattr(self, name)] for name in bounds} | {"batch": list(self.batches)}
        for name, (low, high) in (bounds | {"batch": (1, 4096)}).items():
            for value in values[name]:
                if not low <= value <= high:
                    raise UsageError(f"{name} is {value}", hint=f"use a value from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One phase at one batch size. Rates are medians over the runs, `spread` their lowest and highest.

    `of_limit` is the share of `limit_tokens_per_s`, which `limit` binds. `step_batch` is the number of
    sequences in the decode steps that count: `batch`, unless `output` is so short that the first ended
    before the last began. `ttft_ms` is the median over all requests of the time to the first token.
    `tpot_p50_ms` and `tpot_p99_ms` are over the decode steps of all runs, None for prefill. `peak_rss_mb`
    (10^6 bytes) is the process's highest resident memory since the model was loaded at this batch size;
    None where the system does not tell.
    """

    phase: PhaseName
    weights: WeightFormat
    batch: int
    step_batch: int
    prompt: int
    output: int
    tokens_per_s: float
    spread: tuple[float, float]
    of_limit: float
    limit: LimitName
    limit_tokens_per_s: float
    ttft_ms: float
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    peak_rss_mb: float | None
    num_runs: int


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run, in seconds. `ttft_s` is one value a request, `decode_s` one a decode step that counts."""

    prefill_s: float
    ttft_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    step_batch: int


def bench(
    model: ModelDirectory,
    config: BenchConfig,
    limits: MachineLimits,
    *,
    create: ExecutorFactory = create_executor,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[BenchRow]:
    """Measure, and yield the two rows of each format and batch size as they are done.

    Raises UsageError if prompt and output do not fit in the model's context, and as `LLM` does.
    """
    context = model.architecture.max_positions
    if config.prompt + config.output > context:
        raise UsageError(
            f"prompt {config.prompt} and output {config.output} exceed the model's context, {context} tokens",
            hint="lower --prompt or --output",
        )
    setup = _Setup(model=model, config=config, rates=machine_rates(limits), create=create, clock=clock)
    for weights, batch in itertools.product(config.weights, config.batches):
        yield from _measure(setup, weights, batch)


def machine_rates(limits: MachineLimits) -> MachineRates:
    """Measured limits as the roofline takes them."""
    return MachineRates(
        int8_ops_per_s=limits.int8_tops * 1e12,
        float_ops_per_s=limits.bf16_tops * 1e12,
        reads=tuple(
            ReadRate(working_set=mb * 1e6, bytes_per_s=gb_s * 1e9) for mb, gb_s in limits.read_gb_s.items()
        ),
    )


def decoder_cost(architecture: Architecture, plan: StepPlan, kv_dtype: KvDtype = "bf16") -> DecoderCost:
    """What a token costs in the plan's own weights; the last matrix of a plan is the head."""
    *blocks, head = plan.linears
    return DecoderCost(
        block_macs=architecture.block_macs_per_token,
        head_macs=architecture.head_macs_per_token,
        attention_ops=architecture.attention_flops(1),
        block_bytes=sum(linear.num_bytes for linear in blocks),
        head_bytes=head.num_bytes,
        kv_bytes=architecture.kv_bytes_per_token(1 if kv_dtype == "int8" else 2),
        integer=head.act_format != "bf16",
    )


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """The process's highest resident memory since the last reset; None where the system does not tell."""
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else None


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What stays the same from row to row."""

    model: ModelDirectory
    config: BenchConfig
    rates: MachineRates
    create: ExecutorFactory
    clock: Callable[[], float]


def _measure(setup: _Setup, weights: WeightFormat, batch: int) -> Iterator[BenchRow]:
    config = setup.config
    llm = LLM(setup.model, _llm_config(config, weights, batch), create=setup.create)
    _reset_peak_rss()
    _run(llm, _prompts(setup, batch, run=0), min(config.output, _WARM_UP_TOKENS), setup.clock)
    numbers = range(1, config.num_runs + 1)
    runs = [_run(llm, _prompts(setup, batch, number), config.output, setup.clock) for number in numbers]
    cost = decoder_cost(setup.model.architecture, llm.plan, config.kv_dtype)
    step_batch = runs[0].step_batch
    work = prefill_work(cost, batch=batch, prompt=config.prompt, rows_per_step=llm.config.max_rows)
    speeds = [work.num_tokens / run.prefill_s for run in runs]
    yield _row("prefill", config, weights, (batch, step_batch), runs, speeds, ceiling(work, setup.rates))
    work = decode_work(cost, batch=step_batch, prompt=config.prompt, output=config.output)
    speeds = [step_batch * len(run.decode_s) / sum(run.decode_s) for run in runs]
    yield _row("decode", config, weights, (batch, step_batch), runs, speeds, ceiling(work, setup.rates))


def _llm_config(config: BenchConfig, weights: WeightFormat, batch: int) -> LLMConfig:
    """Room for the whole batch in every step, and a free block a sequence so that none has to wait."""
    default = LLMConfig()
    blocks_each = -(-(config.prompt + config.output) // KV_BLOCK) + 1
    return LLMConfig(
        weights=weights,
        max_rows=max(batch, default.max_rows),
        max_batch=batch,
        num_threads=config.num_threads,
        kv_dtype=config.kv_dtype,
        kv_tokens=batch * blocks_each * KV_BLOCK,
        # No prompt comes twice, so a cache would only keep memory.
        prefix_cache=False,
    )


def _run(llm: LLM, prompts: Sequence[Sequence[int]], output: int, clock: Callable[[], float]) -> _Run:
    """Generate, and attribute the time of each step."""
    steps: list[tuple[float, Progress]] = []
    start = clock()
    completions = llm.generate_tokens(
        prompts,
        SamplingParams(max_tokens=output, ignore_eos=True),
        on_progress=lambda progress: steps.append((clock(), progress)),
    )
    assert all(len(each.token_ids) == output for each in completions), "a sequence ended early"
    return _attribute(start, steps, len(prompts), tuple(each.ttft_s for each in completions))


def _attribute(
    start: float, steps: Sequence[tuple[float, Progress]], batch: int, ttft_s: tuple[float, ...]
) -> _Run:
    """Split the time into steps that compute prompts and steps that only decode."""
    prefill_s = 0.0
    decode: list[tuple[int, float]] = []
    num_started, num_done = 0, 0
    for at, progress in steps:
        if num_started == batch:
            decode.append((progress.step.num_out_rows, at - start))
        else:
            prefill_s += at - start
            # Each sequence that runs has one row with logits; what is above that is a prompt's last row.
            num_started += progress.step.num_out_rows - (num_started - num_done)
        start, num_done = at, progress.num_done
    step_batch = max(rows for rows, _ in decode)
    decode_s = tuple(seconds for rows, seconds in decode if rows == step_batch)
    return _Run(prefill_s=prefill_s, ttft_s=ttft_s, decode_s=decode_s, step_batch=step_batch)


def _row(
    phase: PhaseName,
    config: BenchConfig,
    weights: WeightFormat,
    batches: tuple[int, int],
    runs: Sequence[_Run],
    speeds: Sequence[float],
    top: Ceiling,
) -> BenchRow:
    steps_ms = [1e3 * seconds for run in runs for seconds in run.decode_s] if phase == "decode" else []
    median, peak = statistics.median(speeds), peak_rss_bytes()
    return BenchRow(
        phase=phase,
        weights=weights,
        batch=batches[0],
        step_batch=batches[1],
        prompt=config.prompt,
        output=config.output,
        tokens_per_s=median,
        spread=(min(speeds), max(speeds)),
        of_limit=median / top.tokens_per_s,
        limit=top.limit,
        limit_tokens_per_s=top.tokens_per_s,
        ttft_ms=1e3 * statistics.median(ttft for run in runs for ttft in run.ttft_s),
        tpot_p50_ms=_quantile(steps_ms, 0.5),
        tpot_p99_ms=_quantile(steps_ms, 0.99),
        peak_rss_mb=None if peak is None else peak / 1e6,
        num_runs=len(runs),
    )


def _quantile(values: Sequence[float], share: float) -> float | None:
    """The nearest rank: a value that was measured."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def _prompts(setup: _Setup, batch: int, run: int) -> list[list[int]]:
    """Token ids from the second quarter of the vocabulary: no control tokens, no bytes of a character."""
    size = setup.model.architecture.vocab_size
    ids = range(size // 4, max(size // 2, size // 4 + 1))
    drawn = random.Random(_SEED + run)
    return [drawn.choices(ids, k=setup.config.prompt) for _ in range(batch)]


def _reset_peak_rss(clear_refs: Path = Path("/proc/self/clear_refs")) -> None:
    """Start `peak_rss_bytes` again from what is resident now; without the right to, it keeps growing."""
    try:
        clear_refs.write_text("5", encoding="ascii")
    except OSError:
        return
