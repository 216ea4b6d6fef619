"""What `tokenmill load` does between its flags and its tables: levels one after the other, or a search."""

import argparse
import asyncio
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tokenmill.cli.load_arguments import DEFAULT_CONCURRENCY, drive_config, slo, workload_config
from tokenmill.cli.load_target import OpenTarget, opened_target, stops_at_signals
from tokenmill.cli.output import Output
from tokenmill.evals.load import Level, LevelResult, LoadProgress, find_highest, run_level
from tokenmill.evals.load.results import SCHEMA
from tokenmill.evals.load.workload import Workload, read_workload

__all__ = ["measure"]

_SEARCH_FROM: Final = 1.0


async def measure(
    args: argparse.Namespace, out: Output
) -> tuple[list[LevelResult], dict[str, Any] | None, dict[str, Any], int]:
    """Run all levels; the results, the highest level that is kept, fields of the document, and the number
    of the signal that stopped it, else 0.
    """
    stop = asyncio.Event()
    async with opened_target(args.target, args, model=args.endpoint_model, key_env=args.key_env) as opened:
        workload = read_workload(workload_config(args), context_length=opened.context_length)
        _note_workload(out, args, workload)
        run = _Run(args, out, opened, workload, stop)
        with stops_at_signals(stop, lambda: out.note("stopping")) as came:
            await run.all_levels()
    service = slo(args)
    fields = {
        "schema": SCHEMA,
        "target": opened.fields(),
        "workload": {key: _plain(value) for key, value in asdict(workload.config).items()},
        "num_left_out": workload.num_left_out,
        "bounds": asdict(drive_config(args)),
        "slo": None if service is None else asdict(service),
    }
    return run.results, run.highest(), fields, came[0] if came else 0


class _Run:
    """The levels of one command."""

    def __init__(
        self,
        args: argparse.Namespace,
        out: Output,
        opened: OpenTarget,
        workload: Workload,
        stop: asyncio.Event,
    ) -> None:
        self.results: list[LevelResult] = []
        self._args = args
        self._out = out
        self._opened = opened
        self._workload = workload
        self._stop = stop

    async def all_levels(self) -> None:
        """Run what the flags say."""
        args = self._args
        if () in (args.rate, args.concurrency):
            is_whole = args.rate is None
            keeps = self._keeps_concurrency if is_whole else self._keeps_rate
            await find_highest(keeps, _SEARCH_FROM, whole=is_whole, is_stopped=self._stop.is_set)
            return
        for level in self._levels():
            if not self._stop.is_set():
                await self._level(level)

    def highest(self) -> dict[str, Any] | None:
        """The highest level that kept the service level."""
        kept = [result.level for result in self.results if _is_kept(result)]
        if not kept:
            return None
        best = max(kept, key=lambda level: level.value)
        if any(r.level.value < best.value and not _is_kept(r) for r in self.results):
            self._out.warn(f"a level below {best} did not keep the service level: the runs are noisy")
        return {"kind": best.kind, "value": best.value, "text": str(best)}

    def _levels(self) -> list[Level]:
        args = self._args
        if args.rate:
            return [Level(kind="rate", value=value, arrivals=args.arrivals) for value in args.rate]
        if args.concurrency or not self._workload.has_times:
            values = args.concurrency or (float(DEFAULT_CONCURRENCY),)
            return [Level(kind="concurrency", value=value) for value in values]
        return [Level(kind="trace", value=args.speed, calls=self._workload.calls)]

    async def _keeps_rate(self, value: float) -> bool:
        return _is_kept(await self._level(Level(kind="rate", value=value, arrivals=self._args.arrivals)))

    async def _keeps_concurrency(self, value: float) -> bool:
        return _is_kept(await self._level(Level(kind="concurrency", value=value)))

    async def _level(self, level: Level) -> LevelResult:
        args, opened = self._args, self._opened
        requests = self._workload.requests(len(self.results), opened.tokenizer, ignore_eos=opened.ignore_eos)
        with self._out.progress("req") as bar:

            def show(news: LoadProgress) -> None:
                bar(f"{level}, {news.num_in_flight} in flight", news.num_ended, news.num_requests)

            result = await run_level(
                opened.target,
                requests,
                level,
                drive_config(args),
                slo=slo(args),
                seed=args.seed + len(self.results),
                stop=self._stop,
                on_progress=show,
            )
        self._warn_of_rest(result, len(requests))
        self.results.append(result)
        return result

    def _warn_of_rest(self, result: LevelResult, num_planned: int) -> None:
        num_sent = result.summary.num_requests + result.summary.num_warmup
        if num_sent < num_planned and not self._stop.is_set():
            limit = f"--max-seconds {self._args.max_seconds:g}"
            self._out.warn(
                f"{result.level}: {num_planned - num_sent} of {num_planned} were not sent: {limit}"
            )


def _is_kept(result: LevelResult) -> bool:
    return result.summary.goodput is not None and result.summary.goodput.is_met


def _note_workload(out: Output, args: argparse.Namespace, workload: Workload) -> None:
    if workload.num_left_out:
        out.warn(f"{workload.num_left_out} requests of the trace do not fit into the context: left out")
    if workload.calls and len(workload.calls) < workload.config.num_requests:
        out.warn(f"the trace has {len(workload.calls)} requests, fewer than asked for")
    if workload.has_times and workload.calls[-1].at_s:
        per_s = len(workload.calls) / workload.calls[-1].at_s
        out.note(f"trace: {len(workload.calls)} requests, {per_s:.3g}/s as recorded")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
