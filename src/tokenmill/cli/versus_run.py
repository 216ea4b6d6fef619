"""What `tokenmill versus` does between its flags and its table: both systems opened, turns taken, joules
read.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack
from typing import Any, Final

from tokenmill.cli.load_arguments import DEFAULT_CONCURRENCY, drive_config, workload_config
from tokenmill.cli.load_target import OpenTarget, opened_target, stops_at_signals
from tokenmill.cli.output import Output, ProgressBar
from tokenmill.costs.power import EnergyMeter, Unmeasured, find_counters
from tokenmill.evals.load import Level, LevelResult, Side, run_level
from tokenmill.evals.load.driver import LoadProgress
from tokenmill.evals.load.workload import Workload, read_workload

__all__ = ["SIDES", "measure"]

SIDES: Final = ("a", "b")


async def measure(args: argparse.Namespace, out: Output) -> tuple[Side, Side, int]:
    """All turns; both sides, and the number of the signal that stopped them, else 0."""
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(
                opened_target(
                    vars(args)[side],
                    args,
                    model=vars(args)[f"endpoint_model_{side}"],
                    key_env=vars(args)[f"key_env_{side}"],
                )
            )
            for side in SIDES
        ]
        known = [each.context_length for each in opened if each.context_length is not None]
        workload = read_workload(workload_config(args), context_length=min(known, default=None))
        if workload.num_left_out:
            out.warn(f"{workload.num_left_out} requests of the trace do not fit into a context: left out")
        turns = [_Turns(args, each, workload) for each in opened]
        with stops_at_signals(stop, lambda: out.note("stopping")) as came, out.progress("req") as bar:
            for turn in range(2 * args.rounds):
                if not stop.is_set():
                    await turns[turn % 2].run(stop, f"{'AB'[turn % 2]}, round {turn // 2 + 1}", bar)
    a, b = (
        Side(
            name=turn.opened.name,
            rounds=turn.results,
            context_length=turn.opened.context_length,
            price=vars(args)[f"price_{side}"],
            **turn.energy(vars(args)[f"watts_{side}"]),
        )
        for side, turn in zip(SIDES, turns, strict=True)
    )
    return a, b, came[0] if came else 0


class _Turns:
    """The turns of one system, and what they took. Rounds of both have the same prompts and arrivals."""

    def __init__(self, args: argparse.Namespace, opened: OpenTarget, workload: Workload) -> None:
        self.opened = opened
        self.results: list[LevelResult] = []
        self._args = args
        self._workload = workload
        self._joules: float | None = 0.0
        self._seconds = 0.0

    async def run(self, stop: asyncio.Event, name: str, bar: ProgressBar) -> None:
        """One turn."""
        number_of_round, opened = len(self.results), self.opened
        requests = self._workload.requests(number_of_round, opened.tokenizer, ignore_eos=opened.ignore_eos)
        counters = find_counters()
        meter = EnergyMeter(counters) if opened.is_here and not isinstance(counters, Unmeasured) else None
        begin_s = asyncio.get_running_loop().time()

        def show(news: LoadProgress) -> None:
            bar(name, news.num_ended, news.num_requests)
            if meter is not None:
                meter.poll()  # the counters wrap within minutes

        result = await run_level(
            opened.target,
            requests,
            self._level(),
            drive_config(self._args),
            seed=self._args.seed + number_of_round,
            stop=stop,
            on_progress=show,
        )
        self._seconds += asyncio.get_running_loop().time() - begin_s
        joules = None if meter is None else meter.poll()
        self._joules = None if self._joules is None or joules is None else self._joules + joules
        self.results.append(result)

    def energy(self, watts: float | None) -> dict[str, Any]:
        """Joules of all turns, warm-up included, and how they came about."""
        if self._joules is not None and self.results:
            return {"joules": self._joules, "energy_label": "measured"}
        if watts is not None:
            return {"joules": watts * self._seconds, "energy_label": "estimated"}
        return {}

    def _level(self) -> Level:
        args = self._args
        if args.rate:
            return Level(kind="rate", value=args.rate, arrivals=args.arrivals)
        if args.concurrency or not self._workload.has_times:
            return Level(kind="concurrency", value=float(args.concurrency or DEFAULT_CONCURRENCY))
        return Level(kind="trace", value=args.speed, calls=self._workload.calls)
