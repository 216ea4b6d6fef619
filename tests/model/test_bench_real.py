"""The benchmark on the default model: its bytes are the file's, its rates those of a machine."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tokenmill.cli.main import main
from tokenmill.costs import decode_work
from tokenmill.engine.bench import BenchConfig, BenchRow, bench, decoder_cost, peak_rss_bytes
from tokenmill.kernels.probe import MachineLimits, measure_machine
from tokenmill.models.packing.compile import load_packed
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.pack import WeightFormat
from tokenmill.models.store.directory import ModelDirectory


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelDirectory:
    return ModelDirectory.open(model_dir)


@pytest.fixture(scope="module")
def limits() -> MachineLimits:
    return measure_machine(working_sets_mb=(8, 32, 135))


# 106.2 M weights in blocks, 28.3 M in the head: in 8 bits, in the file's own groups of 32, in 16 bits.
@pytest.mark.parametrize(
    ("weights", "megabytes"), [("w8a8", (134.4, 136.0)), ("w4a8", (96.0, 97.0)), ("bf16", (268.9, 269.1))]
)
def test_a_decode_step_reads_the_weights_of_its_format(
    model: ModelDirectory, weights: WeightFormat, megabytes: tuple[float, float]
) -> None:
    cost = decoder_cost(model.architecture, compile_plan(model.architecture, load_packed(model, weights)))
    assert megabytes[0] < (cost.block_bytes + cost.head_bytes) / 1e6 < megabytes[1]
    assert (cost.block_macs, cost.head_macs, cost.kv_bytes) == (106_168_320, 28_311_552, 23_040)
    work = decode_work(cost, batch=1, prompt=128, output=2)
    assert work.bytes_read == cost.block_bytes + cost.head_bytes + 129 * 23_040


def bench_rows(path: Path, limits: MachineLimits) -> list[BenchRow]:
    config = BenchConfig(weights=("w8a8",), batches=(1, 4), prompt=64, output=8, num_runs=2)
    return list(bench(ModelDirectory.open(path), config, limits))


def test_measured_rows_are_plausible(model_dir: Path, limits: MachineLimits) -> None:
    # In a process of its own, for what other tests have mapped would count as its memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = {
            (row.phase, row.batch): row for row in pool.submit(bench_rows, model_dir, limits).result(300.0)
        }
    assert set(rows) == {("prefill", 1), ("decode", 1), ("prefill", 4), ("decode", 4)}
    for row in rows.values():
        # A generous margin for a machine that is busier in one moment than in the next.
        assert 0 < row.of_limit < 4, row
        assert row.spread[0] <= row.tokens_per_s <= row.spread[1]
        assert row.peak_rss_mb is None or 130 < row.peak_rss_mb < 2000
    decode = rows["decode", 4]
    assert decode.tpot_p50_ms is not None and decode.tpot_p99_ms is not None
    assert decode.tpot_p50_ms <= decode.tpot_p99_ms
    assert 4000 / decode.tpot_p50_ms == pytest.approx(decode.tokens_per_s, rel=0.5)
    assert decode.tokens_per_s > 1.2 * rows["decode", 1].tokens_per_s, "a batch shares the weights"
    assert rows["prefill", 4].ttft_ms > rows["prefill", 1].ttft_ms


def test_peak_memory_is_that_of_the_row(model: ModelDirectory, limits: MachineLimits) -> None:
    ballast = bytearray(600_000_000)
    ballast[::4096] = bytes(len(ballast[::4096]))
    before = peak_rss_bytes()
    if before is None or before < 600_000_000 or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell the peak of resident memory, or does not let it be reset")
    del ballast
    config = BenchConfig(weights=("w8a8",), batches=(1,), prompt=8, output=2, num_runs=1)
    row = next(bench(model, config, limits))
    assert row.peak_rss_mb is not None and row.peak_rss_mb < before / 1e6 - 300


def test_the_command_on_the_default_model(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--weights w8a8 --batch 2 --prompt 32 --output 4 --runs 1 --json"
    assert main(["bench", str(model_dir), *flags.split()]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"]["num_params"] == 134_515_008
    assert [row["phase"] for row in document["rows"]] == ["prefill", "decode"]
    assert len(document["machine"]["read_gb_s_by_mb"]) >= 5
