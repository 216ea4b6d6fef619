"""Real steps of a model on this machine, as observations for the calibration of a plan."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tokenmill.cli.plan_target import architecture_shape
from tokenmill.cli.show import weight_bytes
from tokenmill.costs import (
    MachinePeak,
    MachineRates,
    ModelShape,
    Observation,
    StepLoad,
    bandwidth_at,
    decode_load,
    prefill_load,
)
from tokenmill.engine.bench import BenchConfig, BenchRow, bench, machine_rates
from tokenmill.kernels.probe import MachineLimits
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["POINTS", "MeasuredPoint", "PointSource", "measure_points"]

POINTS: Final = ((1, 64), (8, 64), (1, 1024), (32, 64), (8, 1024), (4, 256), (16, 512), (64, 64), (2, 1536))
"""Batch and prompt of the points, what tells most first."""

_OUTPUT: Final = 24


@dataclass(frozen=True, kw_only=True)
class PointSource:
    """What is measured: a model in a format on a measured machine."""

    model: ModelDirectory
    weights: WeightFormat
    limits: MachineLimits
    num_threads: int | None = None

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        return architecture_shape(self.model.name, self.model.architecture)

    @property
    def bits(self) -> float:
        """Bits of a weight that a step reads, as packed."""
        architecture = self.model.architecture
        read = architecture.block_macs_per_token + architecture.head_macs_per_token
        return 8 * weight_bytes(self.model)[self.weights] / read

    @property
    def rates(self) -> MachineRates:
        """The machine's. What a larger working set reaches a smaller one does too, so noise is taken out."""
        rates = machine_rates(self.limits)
        best = 0.0
        reads = []
        for read in reversed(rates.reads):
            best = max(best, read.bytes_per_s)
            reads.append(replace(read, bytes_per_s=best))
        return replace(rates, reads=tuple(reversed(reads)))

    @property
    def flops(self) -> float:
        """Operations a second of these weights."""
        return self.rates.float_ops_per_s if self.weights == "bf16" else self.rates.int8_ops_per_s

    def peak(self, load: StepLoad) -> MachinePeak:
        """The rates for one step."""
        reads = self.rates.reads
        return MachinePeak(
            flops=self.flops, bytes_per_s=bandwidth_at(reads, load.weight_bytes + load.kv_bytes)
        )


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """One batch and prompt: a step of decode and the whole of prefill, with the row that they come from."""

    batch: int
    prompt: int
    decode: Observation
    prefill: Observation
    row: BenchRow


def measure_points(
    source: PointSource,
    points: Sequence[tuple[int, int]],
    *,
    budget_s: float,
    num_runs: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[MeasuredPoint]:
    """Measure the points in order until the budget would be passed; the first three in any case.

    Points that do not fit in the model's context are left out.
    """
    end = clock() + budget_s
    prefill_tokens_per_s = 0.0
    num_done = 0
    for batch, prompt in points:
        if prompt + _OUTPUT > source.model.architecture.max_positions:
            continue
        # Every run computes all prompts, and so does the warm-up.
        expected = (num_runs + 1) * batch * prompt / prefill_tokens_per_s if prefill_tokens_per_s else 0.0
        if num_done >= 3 and clock() + expected > end:
            continue
        point = _measure(source, batch, prompt, num_runs)
        prefill_tokens_per_s = batch * prompt / point.prefill.seconds
        num_done += 1
        yield point


def _measure(source: PointSource, batch: int, prompt: int, num_runs: int) -> MeasuredPoint:
    config = BenchConfig(
        weights=(source.weights,),
        batches=(batch,),
        prompt=prompt,
        output=_OUTPUT,
        num_runs=num_runs,
        num_threads=source.num_threads,
    )
    prefill, decode = bench(source.model, config, source.limits)
    # The steps that count see from `prompt` + 1 to `prompt` + output - 1 positions.
    context = prompt + _OUTPUT / 2
    shape, bits = source.shape, source.bits
    load = decode_load(shape, bits=bits, batch=decode.step_batch, context=context)
    whole = prefill_load(shape, bits=bits, num_tokens=prompt, batch=batch)
    return MeasuredPoint(
        batch=batch,
        prompt=prompt,
        decode=Observation(
            load=load,
            peak=source.peak(load),
            # The median step, for a machine that others interrupt has a few long ones.
            seconds=decode.step_batch / decode.tokens_per_s
            if decode.tpot_p50_ms is None
            else decode.tpot_p50_ms / 1e3,
            group=source.model.name,
        ),
        prefill=Observation(
            load=whole,
            peak=source.peak(whole),
            seconds=batch * prompt / prefill.tokens_per_s,
            group=source.model.name,
        ),
        row=decode,
    )
