"""`tokenmill bench`: the limit of the machine first, then what a model reaches of it."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import (
    KV_DTYPES,
    WEIGHTS,
    Subparsers,
    add_command,
    add_model_argument,
    open_model,
    positive,
)
from tokenmill.cli.machine import limits_line, machine_fields, measure, version_fields
from tokenmill.cli.output import Output

if TYPE_CHECKING:
    from tokenmill.engine.bench import BenchConfig, BenchRow
    from tokenmill.models.store.directory import ModelDirectory

__all__ = ["DEFAULT_BATCHES", "DEFAULT_OUTPUT", "DEFAULT_PROMPT", "DEFAULT_RUNS", "add_parser"]

# The engine's own, known here without importing it; a test compares.
DEFAULT_BATCHES: Final = (1, 8, 64)
DEFAULT_PROMPT: Final = 128
DEFAULT_OUTPUT: Final = 64
DEFAULT_RUNS: Final = 3

_DESCRIPTION = """\
Measure prefill and decode, as tokens a second and as a share of what this machine could do at most: its
arithmetic or its memory bandwidth, whichever binds, measured just before. Medians of several runs after a
warm-up, with the lowest and highest; TTFT is the time to the first token with the whole batch submitted at
once, TPOT the time of a decode step, peak the highest resident memory.
"""
_HEADER = (
    "phase",
    "weights",
    "batch",
    "prompt",
    "output",
    "tokens/s",
    "lowest-highest",
    "of limit",
    "limit",
    "TTFT ms",
    "TPOT p50 ms",
    "p99 ms",
    "peak MB",
)


def add_parser(subparsers: Subparsers) -> None:
    """Add `bench`."""
    parser = add_command(
        subparsers,
        "bench",
        _bench,
        summary="measure a model against the limits of this machine",
        description=_DESCRIPTION,
    )
    add_model_argument(parser)
    parser.add_argument(
        "--weights",
        type=_weights,
        metavar="LIST",
        help=f"formats of the weights, with commas (default: {_listed(WEIGHTS)})",
    )
    parser.add_argument(
        "--batch",
        type=_batches,
        metavar="LIST",
        help=f"sequences at once, with commas (default: {_listed(DEFAULT_BATCHES)})",
    )
    for flag, default, what in (
        ("--prompt", DEFAULT_PROMPT, "tokens of each prompt"),
        ("--output", DEFAULT_OUTPUT, "tokens of each answer, at least 2"),
        ("--runs", DEFAULT_RUNS, "measured runs of each row"),
    ):
        parser.add_argument(flag, type=positive, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--kv", choices=KV_DTYPES, help=f"format of the KV cache (default: {KV_DTYPES[0]})")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (default: one a processor)")


def _bench(args: argparse.Namespace, out: Output) -> int:
    model = open_model(args.model)

    from tokenmill.engine.bench import bench

    config = _config(args)
    machine = measure(out, num_threads=config.num_threads)
    out.text(limits_line(machine.limits))
    num_rows = 2 * len(config.weights) * len(config.batches)
    rows: list[BenchRow] = []
    with out.progress("row") as bar:
        bar("bench", 0, num_rows)
        for row in bench(model, config, machine.limits):
            rows.append(row)
            bar("bench", len(rows), num_rows)
    out.table(_HEADER, [_cells(row) for row in rows])
    _warn_of_doubt(out, rows)
    out.document(
        {
            "machine": machine_fields(machine),
            "model": _model_fields(model),
            "versions": version_fields(),
            "kv": config.kv_dtype,
            "rows": [asdict(row) for row in rows],
        }
    )
    return 0


def _config(args: argparse.Namespace) -> "BenchConfig":
    """What the flags say; not given, the engine's own defaults hold."""
    from tokenmill.engine.bench import BenchConfig

    given = {
        "weights": args.weights,
        "batches": args.batch,
        "prompt": args.prompt,
        "output": args.output,
        "num_runs": args.runs,
        "num_threads": args.threads,
        "kv_dtype": args.kv,
    }
    return BenchConfig(**{name: value for name, value in given.items() if value is not None})


def _warn_of_doubt(out: Output, rows: "list[BenchRow]") -> None:
    if any(row.of_limit > 1 for row in rows):
        out.warn("a row is above its limit: the machine was busier when the limit was measured; run it again")
    for row in rows:
        if row.step_batch < row.batch:
            out.warn(
                f"batch {row.batch}: decode was measured at {row.step_batch} sequences, because the first "
                "ended before the last began; raise --output"
            )


def _model_fields(model: "ModelDirectory") -> dict[str, Any]:
    architecture = model.architecture
    return {
        "name": model.name,
        "digest": model.digest,
        "num_params": architecture.num_params,
        "macs_per_token": architecture.macs_per_token,
        "kv_bytes_per_token": architecture.kv_bytes_per_token(),
    }


def _cells(row: "BenchRow") -> list[str]:
    low, high = row.spread
    return [
        row.phase,
        row.weights,
        str(row.batch),
        str(row.prompt),
        str(row.output),
        f"{row.tokens_per_s:,.0f}",
        f"{low:,.0f}-{high:,.0f}",
        f"{row.of_limit:.0%}",
        row.limit,
        f"{row.ttft_ms:,.1f}",
        _cell(row.tpot_p50_ms, 2),
        _cell(row.tpot_p99_ms, 2),
        _cell(row.peak_rss_mb, 0),
    ]


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _weights(text: str) -> tuple[str, ...]:
    """An argument such as `w8a8,bf16`."""
    names = tuple(text.split(","))
    for name in names:
        if name not in WEIGHTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {_listed(WEIGHTS)}")
    return names


def _batches(text: str) -> tuple[int, ...]:
    """An argument such as `1,8,64`."""
    return tuple(positive(part) for part in text.split(","))


def _listed(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))
