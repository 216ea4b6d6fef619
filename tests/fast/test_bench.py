"""The benchmark on a model without weights and with a clock that ticks once a step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fast.engine_fakes import VOCAB, FakeExecutor, FakeModel, fake_model
from tokenmill.core import UsageError
from tokenmill.costs import ceiling, decode_work, prefill_work
from tokenmill.engine.bench import (
    BenchConfig,
    BenchRow,
    bench,
    decoder_cost,
    machine_rates,
    peak_rss_bytes,
)
from tokenmill.kernels import Linear, PackedLinear, Select, StepPlan
from tokenmill.kernels.plan import LinearKind
from tokenmill.kernels.probe import MachineLimits
from tokenmill.models.packing.compile import ExecutorConfig
from tokenmill.models.store.directory import ModelDirectory

LIMITS = MachineLimits(
    isa="portable", num_threads=2, int8_tops=1e-6, bf16_tops=5e-7, read_gb_s={1: 2e-6, 100: 1e-6}
)
SMALL = BenchConfig(weights=("w8a8",), batches=(2,), prompt=5, output=4, num_runs=2)


def matrix(kind: LinearKind, num_out: int, num_in: int) -> PackedLinear:
    return PackedLinear(
        kind=kind,
        num_out=num_out,
        num_in=num_in,
        group=0,
        symmetric=True,
        data=np.zeros(num_out * num_in, np.uint8),
        scales=np.zeros(num_out, np.float32),
    )


class Bench:
    """A fake model whose executors are kept, with matrices in their plans."""

    def __init__(self, context: int = 2048, kind: LinearKind = "i8c") -> None:
        self.model = FakeModel(context)
        self.kind: LinearKind = kind
        self.executors: list[FakeExecutor] = []
        self._ticks = 0

    def create(self, directory: ModelDirectory, config: ExecutorConfig) -> FakeExecutor:
        executor = self.model.create(directory, config)
        body = Linear(weight=matrix(self.kind, 8, 8), dst="x")
        head = Linear(weight=matrix(self.kind, VOCAB, 8), dst="logits", rows="L")
        executor.plan = StepPlan(shape=executor.plan.shape, ops=(body, Select(), head))
        self.executors.append(executor)
        return executor

    def clock(self) -> float:
        self._ticks += 1
        return float(self._ticks)

    def rows(self, config: BenchConfig, limits: MachineLimits = LIMITS) -> list[BenchRow]:
        return list(bench(fake_model(self.model), config, limits, create=self.create, clock=self.clock))

    def prompts(self, executor: int = 0) -> list[list[int]]:
        """Tokens of every step that computes whole prompts of 5."""
        steps = self.executors[executor].steps
        return [step.tokens.tolist() for step in steps if step.num_rows == 10]


def speeds(rows: Sequence[BenchRow]) -> list[tuple[str, float]]:
    return [(row.phase, row.tokens_per_s) for row in rows]


def test_prompts_and_decoding_are_told_apart() -> None:
    prefill, decode = Bench().rows(SMALL)
    # Two prompts of 5 tokens in one step of one second; then three steps of two tokens.
    assert speeds([prefill, decode]) == [("prefill", 10.0), ("decode", 2.0)]
    assert decode.spread == (2.0, 2.0) and decode.num_runs == 2
    assert (decode.tpot_p50_ms, decode.tpot_p99_ms) == (1000.0, 1000.0)
    assert (prefill.tpot_p50_ms, prefill.tpot_p99_ms) == (None, None)
    assert prefill.ttft_ms == decode.ttft_ms > 0


def test_prompts_that_take_several_steps() -> None:
    config = BenchConfig(weights=("w8a8",), batches=(4,), prompt=300, output=8, num_runs=1)
    prefill, decode = Bench().rows(config)
    # 1,200 rows and three decoded on the way: three steps of at most 512 rows.
    assert prefill.tokens_per_s == 1200 / 3
    assert (decode.tokens_per_s, decode.step_batch) == (4.0, 4)


def test_an_output_too_short_for_full_steps_is_shown_as_such() -> None:
    config = BenchConfig(weights=("w8a8",), batches=(4,), prompt=300, output=2, num_runs=1)
    decode = Bench().rows(config)[1]
    assert (decode.batch, decode.step_batch, decode.tokens_per_s) == (4, 1, 1.0)


def test_a_batch_above_the_usual_rows_of_a_step_decodes_in_one_step() -> None:
    config = BenchConfig(weights=("w8a8",), batches=(600,), prompt=1, output=2, num_runs=1)
    decode = Bench().rows(config)[1]
    assert (decode.step_batch, decode.tokens_per_s) == (600, 600.0)


def test_median_and_spread_over_uneven_runs() -> None:
    harness = Bench()
    config = replace(SMALL, batches=(1,), output=2, num_runs=3)
    # Clock readings: start, prefill and decode step of a warm-up and three runs.
    readings = iter([0, 1, 2, 10, 11, 12, 20, 21, 23, 30, 31, 35])
    rows = bench(
        fake_model(harness.model),
        config,
        LIMITS,
        create=harness.create,
        clock=lambda: float(next(readings)),
    )
    decode = list(rows)[1]
    assert (decode.tokens_per_s, decode.spread) == (0.5, (0.25, 1.0))
    assert (decode.tpot_p50_ms, decode.tpot_p99_ms) == (2000.0, 4000.0)


def test_a_row_for_every_format_batch_and_phase() -> None:
    harness = Bench()
    rows = harness.rows(replace(SMALL, weights=("w8a8", "bf16"), batches=(1, 3), num_threads=7))
    assert [(row.weights, row.batch, row.phase) for row in rows] == [
        (weights, batch, phase)
        for weights in ("w8a8", "bf16")
        for batch in (1, 3)
        for phase in ("prefill", "decode")
    ]
    assert [executor.num_threads for executor in harness.executors] == [7] * 4


def test_the_share_of_the_limit_is_that_of_the_roofline() -> None:
    harness = Bench()
    rows = harness.rows(SMALL)
    cost = decoder_cost(harness.model.architecture, harness.executors[0].plan)
    works = [
        prefill_work(cost, batch=2, prompt=5, rows_per_step=512),
        decode_work(cost, batch=2, prompt=5, output=4),
    ]
    for row, work in zip(rows, works, strict=True):
        top = ceiling(work, machine_rates(LIMITS))
        assert (row.limit, row.limit_tokens_per_s) == (top.limit, top.tokens_per_s)
        assert row.of_limit == row.tokens_per_s / top.tokens_per_s
    # Reads at 2 kB a second: 8 x 8 + 260 x 8 weights and 268 scales, and 2 x 7 positions of 32 bytes.
    assert rows[1].limit == "bandwidth"
    assert rows[1].limit_tokens_per_s == pytest.approx(2 * 2000 / (64 + 2080 + 4 * 268 + 14 * 32))


def test_costs_come_from_the_plan_and_the_architecture() -> None:
    harness = Bench(kind="bf16")
    harness.rows(SMALL)
    architecture = harness.model.architecture
    cost = decoder_cost(architecture, harness.executors[0].plan)
    assert (cost.block_bytes, cost.head_bytes) == (8 * 8 + 4 * 8, 8 * VOCAB + 4 * VOCAB)
    assert (cost.block_macs, cost.head_macs) == (architecture.block_macs_per_token, 8 * VOCAB)
    assert (cost.attention_ops, cost.kv_bytes, cost.integer) == (32, 32, False)


def test_limits_become_rates() -> None:
    rates = machine_rates(LIMITS)
    assert (rates.int8_ops_per_s, rates.float_ops_per_s) == (1e6, 5e5)
    assert [(r.working_set, r.bytes_per_s) for r in rates.reads] == [(1e6, 2e3), (1e8, 1e3)]


def test_prompts_are_new_in_every_run_and_the_same_in_every_benchmark() -> None:
    first, second = Bench(), Bench()
    first.rows(SMALL)
    second.rows(SMALL)
    assert first.prompts() == second.prompts()
    sequences = [tuple(tokens[half]) for tokens in first.prompts() for half in (slice(5), slice(5, 10))]
    assert len(set(sequences)) == len(sequences) == 2 * 3


def test_nobody_waits_for_blocks() -> None:
    harness = Bench()
    harness.rows(replace(SMALL, batches=(8,), prompt=33, output=32))
    assert [len(step.row_starts) - 1 for step in harness.executors[0].steps] == [8] * (8 + 2 * 32)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="prompt is 0"):
        replace(SMALL, prompt=0)
    with pytest.raises(UsageError, match="output is 1"):
        replace(SMALL, output=1)
    with pytest.raises(UsageError, match="num_runs is 0"):
        replace(SMALL, num_runs=0)
    with pytest.raises(UsageError, match="batch is 5000"):
        replace(SMALL, batches=(1, 5000))
    with pytest.raises(UsageError, match="nothing to measure"):
        replace(SMALL, batches=())
    with pytest.raises(UsageError, match="context, 8 tokens"):
        Bench(context=8).rows(SMALL)


def test_peak_memory_is_read(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 99 kB\nVmHWM:\t    2000 kB\n", encoding="ascii")
    assert peak_rss_bytes(status) == 2000 * 1024
    status.write_text("Name: x\n", encoding="ascii")
    assert peak_rss_bytes(status) is None
    assert peak_rss_bytes(tmp_path / "none") is None
