"""`tokenmill bench` from the command line, on a tiny model with short measurements."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fast.model_files import tiny_gguf
from tokenmill.cli import bench as bench_command
from tokenmill.cli.machine import limits_line
from tokenmill.cli.main import build_parser, main
from tokenmill.engine import bench as engine_bench
from tokenmill.engine.bench import BenchConfig, BenchRow
from tokenmill.kernels import probe
from tokenmill.models.store.library import Library
from tokenmill.models.store.pull import import_model

SHORT = ["--weights", "w8a8,w4a8", "--batch", "1,2", "--prompt", "8", "--output", "4", "--runs", "1"]
ROW = BenchRow(
    phase="decode",
    weights="w8a8",
    batch=4,
    step_batch=4,
    prompt=8,
    output=4,
    tokens_per_s=1234.5,
    spread=(1000.0, 1500.0),
    of_limit=0.5,
    limit="bandwidth",
    limit_tokens_per_s=2469.0,
    ttft_ms=12.0,
    tpot_p50_ms=3.0,
    tpot_p99_ms=None,
    peak_rss_mb=None,
    num_runs=3,
)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a tiny model in a store of its own; the machine is quiet and quickly measured."""
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "store"))
    source = tmp_path / "tiny.gguf"
    source.write_bytes(tiny_gguf())
    import_model(source, Library(), "tiny")
    measure = partial(probe.measure_machine, seconds=0.001)
    monkeypatch.setattr(
        probe, "measure_machine", lambda **wanted: measure(**{**wanted, "working_sets_mb": (1, 2)})
    )
    monkeypatch.setattr(probe, "busy_share", lambda: 0.0)
    return "tiny"


def measured(row: BenchRow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine measure exactly this."""

    def rows(*_: object) -> Iterator[BenchRow]:
        yield row

    monkeypatch.setattr(engine_bench, "bench", rows)


def test_json_is_one_document_with_every_row(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SHORT, "--threads", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    document: dict[str, Any] = json.loads(out)
    assert set(document) == {"machine", "model", "versions", "kv", "rows"}
    machine = document["machine"]
    assert machine["num_threads"] == 1 and machine["int8_tops"] > 0 and machine["read_gb_s"] > 0
    assert machine["read_gb_s"] == machine["read_gb_s_by_mb"]["2"], "the largest working set"
    assert document["model"]["name"] == "tiny" and document["versions"]["tokenmill"]
    names = [(row["phase"], row["weights"], row["batch"]) for row in document["rows"]]
    assert names == [(p, w, b) for w in ("w8a8", "w4a8") for b in (1, 2) for p in ("prefill", "decode")]
    for row in document["rows"]:
        assert row["tokens_per_s"] > 0 and row["of_limit"] > 0 and row["limit"] in ("compute", "bandwidth")
        assert (row["prompt"], row["output"]) == (8, 4)
    assert "lowest-highest" in err


def test_the_limit_comes_first_and_then_the_table(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SHORT]) == 0
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("measured limits of this machine") and "TOPS int8" in first
    assert header.startswith("phase") and len(rows) == 8


def test_a_busy_machine_is_warned_about(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(ROW, monkeypatch)
    assert main(["bench", tiny]) == 0
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(probe, "busy_share", lambda: 0.5)
    assert main(["bench", tiny]) == 0
    assert "warning: others use 50% of the processors" in capsys.readouterr().err


def test_doubtful_rows_are_warned_about(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(replace(ROW, of_limit=1.1, step_batch=3), monkeypatch)
    assert main(["bench", tiny]) == 0
    err = capsys.readouterr().err
    assert "above its limit" in err and "measured at 3 sequences" in err


def test_what_is_unknown_is_a_dash(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(ROW, monkeypatch)
    assert main(["bench", tiny]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split()
    assert cells[5:] == ["1,234", "1,000-1,500", "50%", "bandwidth", "12.0", "3.00", "-", "-"]


def test_the_defaults_are_those_of_the_engine() -> None:
    default = BenchConfig()
    assert default.batches == bench_command.DEFAULT_BATCHES
    assert (default.prompt, default.output, default.num_runs) == (
        bench_command.DEFAULT_PROMPT,
        bench_command.DEFAULT_OUTPUT,
        bench_command.DEFAULT_RUNS,
    )
    args = build_parser().parse_args(["bench", "m"])
    flags = (args.weights, args.batch, args.prompt, args.output, args.runs, args.threads, args.kv)
    assert flags == (None,) * 7


def test_the_format_of_the_cache_is_the_engine_s(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SHORT, "--kv", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv"] == "int8"


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--weights", "w8a8,w2"], "'w2' is none of w8a8,w4a8,bf16"),
        (["--batch", "1,,8"], "'' is no whole number"),
        (["--batch", "0"], "'0' is no whole number"),
        (["--output", "1"], "output is 1"),
        (["--prompt", "1000"], "exceed the model's context"),
    ],
)
def test_bad_flags_are_one_line(
    tiny: str, capsys: pytest.CaptureFixture[str], flags: list[str], what: str
) -> None:
    assert main(["bench", tiny, *flags]) == 2
    captured = capsys.readouterr()
    assert what in captured.err.splitlines()[-1]


def test_limits_are_shown_with_three_digits() -> None:
    limits = probe.MachineLimits(
        isa="amx", num_threads=2, int8_tops=12.24, bf16_tops=0.171, read_gb_s={1: 215.4, 270: 28.0}
    )
    assert limits_line(limits) == (
        "measured limits of this machine (amx, 2 threads): 12.2 TOPS int8, 0.171 TOPS bf16; "
        "GB/s read: 215 in 1 MB, 28 in 270 MB"
    )
