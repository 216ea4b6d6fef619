"""Flags that `load` and `versus` share: what is sent, within which bounds, to what, at which service
level.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tokenmill.cli.arguments import Parser, add_engine_flags, positive
from tokenmill.cli.remote import APIS

if TYPE_CHECKING:
    from tokenmill.evals.load import DriveConfig, Slo
    from tokenmill.evals.load.workload import WorkloadConfig

__all__ = [
    "ARRIVALS",
    "DEFAULT_CONCURRENCY",
    "add_bound_flags",
    "add_level_flags",
    "add_slo_flags",
    "add_target_flags",
    "add_workload_flags",
    "drive_config",
    "number",
    "slo",
    "workload_config",
]

ARRIVALS: Final = ("poisson", "constant")
DEFAULT_CONCURRENCY: Final = 8

_DEFAULT_REQUESTS: Final = 100
_DEFAULT_WARMUP: Final = 8
_DEFAULT_INPUT: Final = 128
_DEFAULT_OUTPUT: Final = 64
_DEFAULT_SECONDS: Final = 60.0
_DEFAULT_TIMEOUT: Final = 120.0
_DEFAULT_PERCENTILE: Final = 99.0


def number(text: str) -> float:
    """An argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def add_workload_flags(parser: Parser) -> None:
    """What is sent."""
    group = parser.add_argument_group("what is sent")
    for flag, default, what in (
        ("--input", _DEFAULT_INPUT, "tokens of each prompt"),
        ("--output", _DEFAULT_OUTPUT, "tokens of each answer"),
    ):
        group.add_argument(
            flag, type=positive, metavar="N", default=default, help=f"{what} (default: {default})"
        )
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--trace",
        type=Path,
        metavar="PATH",
        help="lengths, times and shared beginnings of recorded traffic: an Azure CSV file, Mooncake's JSON "
        "lines, a table of lengths, a folder of ServeGen's clients; may be .gz",
    )
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts of your own: JSON lines, or a JSON list"
    )
    group.add_argument(
        "--length-scale",
        type=number,
        metavar="F",
        default=1.0,
        help="multiply a trace's lengths (default: 1)",
    )
    group.add_argument(
        "--start", type=float, metavar="S", default=0.0, help="second of ServeGen's statistics (default: 0)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of arrivals and words (default: 0)")


def add_level_flags(parser: Parser) -> None:
    """How arrivals are made, beside the levels themselves."""
    group = parser.add_argument_group("when it is sent")
    group.add_argument(
        "--arrivals", choices=ARRIVALS, default=ARRIVALS[0], help=f"of --rate (default: {ARRIVALS[0]})"
    )
    group.add_argument(
        "--speed", type=number, metavar="F", default=1.0, help="replay a trace F times as fast (default: 1)"
    )


def add_bound_flags(parser: Parser) -> None:
    """Bounds of each run."""
    group = parser.add_argument_group("bounds of each run")
    group.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        default=_DEFAULT_REQUESTS,
        help=f"measured requests (default: {_DEFAULT_REQUESTS})",
    )
    group.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        default=_DEFAULT_WARMUP,
        help=f"requests before them, in no figure (default: {_DEFAULT_WARMUP})",
    )
    for flag, default, what in (
        ("--max-seconds", _DEFAULT_SECONDS, "send nothing after this many seconds"),
        ("--timeout", _DEFAULT_TIMEOUT, "seconds after which a request has failed"),
    ):
        group.add_argument(
            flag, type=number, metavar="S", default=default, help=f"{what} (default: {default:g})"
        )


def add_target_flags(parser: Parser) -> None:
    """How an endpoint is asked, and a local model run."""
    group = parser.add_argument_group("endpoint")
    group.add_argument("--api", choices=APIS, help="what the endpoint speaks (default: by the URL)")
    group.add_argument(
        "--no-sampling", action="store_true", help="send no temperature: some models refuse it"
    )
    group.add_argument(
        "--completions", action="store_true", help="plain prompts instead of conversations (OpenAI only)"
    )
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="the local model that has its tokenizer: exact lengths"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="answers of full length, where the endpoint can (vLLM)"
    )
    group.add_argument(
        "--context", type=positive, metavar="N", help="leave out requests of a trace longer than this"
    )
    add_engine_flags(parser)


def add_slo_flags(parser: Parser) -> None:
    """A service level."""
    group = parser.add_argument_group("service level")
    for flag, what in (
        ("--ttft", "time to the first token"),
        ("--tpot", "time per output token after it, the mean of a request"),
        ("--e2e", "time to the end of the answer"),
    ):
        group.add_argument(flag, type=number, metavar="MS", help=f"limit of the {what}, in milliseconds")
    group.add_argument(
        "--percentile",
        type=number,
        metavar="P",
        default=_DEFAULT_PERCENTILE,
        help=f"%% of requests that must keep all limits (default: {_DEFAULT_PERCENTILE:g})",
    )


def workload_config(args: argparse.Namespace) -> "WorkloadConfig":
    """What the flags say is sent; imports the load generator."""
    from tokenmill.evals.load.workload import WorkloadConfig

    return WorkloadConfig(
        num_requests=args.requests + args.warmup,
        num_input=args.input,
        num_output=args.output,
        trace=args.trace,
        prompts=args.prompts,
        length_scale=args.length_scale,
        start_s=args.start,
        seed=args.seed,
    )


def drive_config(args: argparse.Namespace) -> "DriveConfig":
    """The bounds of a run."""
    from tokenmill.evals.load import DriveConfig

    return DriveConfig(num_warmup=args.warmup, max_seconds=args.max_seconds, timeout_s=args.timeout)


def slo(args: argparse.Namespace) -> "Slo | None":
    """The service level, if a limit is given."""
    from tokenmill.evals.load import Slo

    if args.ttft is None and args.tpot is None and args.e2e is None:
        return None
    return Slo(ttft_ms=args.ttft, tpot_ms=args.tpot, e2e_ms=args.e2e, percentile=args.percentile)
