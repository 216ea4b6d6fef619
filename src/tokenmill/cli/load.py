"""`tokenmill load`: how fast a system is under load, from the raw times of every piece of every answer."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.load_arguments import (
    DEFAULT_CONCURRENCY,
    add_bound_flags,
    add_level_flags,
    add_slo_flags,
    add_target_flags,
    add_workload_flags,
    number,
    slo,
)
from tokenmill.cli.output import Output
from tokenmill.core import UsageError

if TYPE_CHECKING:
    from tokenmill.evals.load import LevelResult, Summary
    from tokenmill.evals.load.quantiles import Distribution

__all__ = ["add_parser"]

_SIGNALLED: Final = 128

_DESCRIPTION = """\
Measure an endpoint (OpenAI- or Anthropic-compatible) or a local model under load. With --rate requests come
at times fixed in advance, whatever the system does, and count from the time they were due; with
--concurrency one is sent when one has ended; a trace without either is replayed. Several levels with
commas; `max` searches for the highest that keeps the service level.

Figures are of raw samples; errors are never among them. With a service level the exit code is 1 if no level
kept it. Ctrl-C and SIGTERM end the run with what was measured.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `load`."""
    parser = add_command(
        subparsers, "load", _load, summary="measure a system under load", description=_DESCRIPTION
    )
    parser.add_argument("target", metavar="TARGET", help="URL of an endpoint, or a local model")
    parser.add_argument(
        "--endpoint-model",
        default="",
        metavar="NAME",
        help="what the endpoint calls its model (default: the only one)",
    )
    parser.add_argument("--key-env", default="", metavar="VAR", help="variable with the endpoint's key")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument(
        "--rate", type=_levels, metavar="LIST", help="requests a second, with commas; or `max` (open loop)"
    )
    levels.add_argument(
        "--concurrency",
        type=_levels,
        metavar="LIST",
        help=f"requests at a time, with commas; or `max` (closed loop; default: {DEFAULT_CONCURRENCY})",
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write figures and raw samples there")
    add_workload_flags(parser)
    add_level_flags(parser)
    add_bound_flags(parser)
    add_slo_flags(parser)
    add_target_flags(parser)


def _load(args: argparse.Namespace, out: Output) -> int:
    for values in (args.rate, args.concurrency):
        if values == () and slo(args) is None:
            raise UsageError("`max` needs a service level", hint="give --ttft, --tpot or --e2e")
    import asyncio

    from tokenmill.cli.load_run import measure
    from tokenmill.evals.load.results import make_folder, save

    if args.save is not None:
        make_folder(args.save)

    results, highest, fields, stopped_by = asyncio.run(measure(args, out))
    if not results:
        raise UsageError("nothing was measured", hint="give it more time")
    _show(out, results)
    document = {
        **fields,
        "levels": [_level_document(result) for result in results],
        "highest": highest,
        "was_stopped": bool(stopped_by),
    }
    if slo(args) is not None:
        shown = "none" if highest is None else highest["text"]
        out.text(f"highest level that keeps the service level: {shown}")
    if args.save is not None:
        save(args.save, document, results)
        out.note(f"written: {args.save}")
    out.document(document)
    if stopped_by:
        return _SIGNALLED + stopped_by
    failed = all(result.summary.num_ok == 0 for result in results)
    return 1 if failed or (slo(args) is not None and highest is None) else 0


def _show(out: Output, results: "list[LevelResult]") -> None:
    out.table(_LEVEL_HEADER, [_level_cells(result) for result in results])
    if times := [row for result in results for row in _time_rows(result)]:
        out.text("")
        out.table(_TIME_HEADER, times)
    for result in results:
        summary = result.summary
        for reason, count in summary.errors.items():
            out.warn(f"{result.level}: {count} failed: {reason}")
        if summary.client.is_saturated:
            client = summary.client
            out.warn(
                f"{result.level}: this client was the bottleneck: "
                f"{client.cpu_s / client.wall_s:.0%} of a core, its event loop up to "
                f"{1e3 * client.max_delay_s:.0f} ms late; latencies are partly its own"
            )
        if summary.counted_by == "pieces" and summary.num_ok:
            out.warn(f"{result.level}: the endpoint counts no tokens; one piece of text is taken as one")


_LEVEL_HEADER = (
    "load",
    "ok",
    "failed",
    "cancelled",
    "seconds",
    "req/s",
    "in tok/s",
    "out tok/s",
    "cached",
    "in flight",
    "goodput",
    "req/s good",
)
_TIME_HEADER = ("load", "ms", "n", "mean", "p50", "p90", "p99", "p99 between")


def _level_cells(result: "LevelResult") -> list[str]:
    summary, good = result.summary, result.summary.goodput
    cached = summary.num_cached_tokens / summary.num_input_tokens if summary.num_input_tokens else 0.0
    return [
        str(result.level),
        str(summary.num_ok),
        str(summary.num_errors),
        str(summary.num_cancelled),
        f"{summary.duration_s:.1f}",
        f"{summary.requests_per_s:.2f}",
        f"{summary.input_tokens_per_s:,.0f}",
        f"{summary.output_tokens_per_s:,.0f}",
        f"{cached:.0%}",
        f"{summary.mean_concurrency:.1f}",
        "-" if good is None else f"{good.share:.1%} ({good.low:.1%}-{good.high:.1%})",
        "-" if good is None else f"{good.requests_per_s:.2f}",
    ]


def _time_rows(result: "LevelResult") -> list[list[str]]:
    return [[str(result.level), name, *_time_cells(times)] for name, times in _times(result.summary) if times]


def _times(summary: "Summary") -> "list[tuple[str, Distribution | None]]":
    rows = [("TTFT", summary.ttft_ms)]
    if summary.max_late_ms > 1.0:
        rows.append(("TTFT from sending", summary.ttft_from_send_ms))
    return [*rows, ("TPOT", summary.tpot_ms), ("ITL", summary.itl_ms), ("end to end", summary.e2e_ms)]


def _time_cells(times: "Distribution") -> list[str]:
    low, high = times.p99.low, times.p99.high
    bounds = [" ?" if bound is None else f"{bound:,.1f}" for bound in (low, high)]
    values = (times.mean, times.p50.value, times.p90.value, times.p99.value)
    return [str(times.n), *(f"{value:,.1f}" for value in values), "-".join(bounds).strip()]


def _level_document(result: "LevelResult") -> dict[str, Any]:
    from tokenmill.evals.load.results import level_document

    return level_document(result)


def _levels(text: str) -> tuple[float, ...]:
    """An argument such as `1,2,4`; `max` is an empty list."""
    if text == "max":
        return ()
    return tuple(number(part) for part in text.split(","))
