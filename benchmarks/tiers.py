"""The three tiers on one loaded engine: how fast each user is, and what each tier's tokens cost.

    python -m benchmarks.tiers MODEL [--users 32] [--fast 2] [--batch 16] [--seconds 20] [--mock]

Callers in closed loops, each with its next request as soon as one ends, on one `AsyncEngine`: first as many
as fit (the peak), then `--users` of the standard tier alone, the same with fast users beside them, and with
batch work. Speed is that of a user's tokens after the first; cost is what the engine metered, in nanoseconds
a token of a tier, and for batch work also what it adds: busy time of the engine beyond that of the same
standard tokens alone. `--mock` runs a model of the given costs instead: the prediction.

It says nothing of HTTP. Exit code 1 if a target is missed.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any
from uuid import uuid4

from tokenmill.core import Completion, Request, SamplingParams, Tier
from tokenmill.engine import LLMConfig
from tokenmill.engine.mock import MockScript
from tokenmill.engine.serving import AsyncEngine, EngineSpec
from tokenmill.engine.serving.handle import StreamDelta

__all__ = ["Phase", "TierFigures", "main", "run_phase"]

_PROMPT_TOKENS = 128
_OUTPUT_TOKENS = 128
_VOCABULARY = 250
_WARM_SHARE = 0.3
_FAST_TARGET = 2.5
_STANDARD_TARGET = 0.8
_BATCH_TARGET = 0.5


@dataclass(frozen=True, kw_only=True)
class TierFigures:
    """Of one tier in a phase: tokens a second of a user (median) and of all, and metered cost.

    `ms_per_token` is the time between a user's tokens (median of its requests), `engine_us` the metered
    microseconds of the engine for each output token, with the prompt's.
    """

    users: int
    user_tokens_per_s: float
    tokens_per_s: float
    ms_per_token: float
    engine_us: float


@dataclass
class Phase:
    """What happened in one phase, for each tier: tokens in the time that counts, and the speeds of users.

    Metered are all requests of the phase, those too that were broken off at its end, with their tokens.
    """

    seconds: float = 0.0
    busy_s: float = 0.0
    tokens: defaultdict[Tier, int] = field(default_factory=lambda: defaultdict(int))
    metered_ns: defaultdict[Tier, int] = field(default_factory=lambda: defaultdict(int))
    metered_tokens: defaultdict[Tier, int] = field(default_factory=lambda: defaultdict(int))
    speeds: defaultdict[Tier, list[float]] = field(default_factory=lambda: defaultdict(list))

    def figures(self, users: Mapping[Tier, int]) -> dict[str, TierFigures]:
        """By tier, of those that have users."""
        found = {}
        for tier, count in users.items():
            if not count:
                continue
            speed = statistics.median(self.speeds[tier]) if self.speeds[tier] else 0.0
            found[str(tier)] = TierFigures(
                users=count,
                user_tokens_per_s=speed,
                tokens_per_s=self.tokens[tier] / self.seconds,
                ms_per_token=1000 / speed if speed else 0.0,
                engine_us=self.metered_ns[tier] / 1000 / max(1, self.metered_tokens[tier]),
            )
        return found


async def run_phase(engine: AsyncEngine, users: Mapping[Tier, int], seconds: float, seed: int) -> Phase:
    """Callers in closed loops for so long; the first part of it warms up and is not counted."""
    phase, stop = Phase(), asyncio.Event()
    counting = asyncio.Event()
    callers = [
        asyncio.create_task(_call(engine, tier, Random(f"{seed}{tier}{i}"), phase, counting, stop))
        for tier, count in users.items()
        for i in range(count)
    ]
    await asyncio.sleep(_WARM_SHARE * seconds)
    counting.set()
    began, busy_ns = time.perf_counter(), engine.stats.busy_ns
    await asyncio.sleep(seconds)
    phase.seconds = time.perf_counter() - began
    phase.busy_s = (engine.stats.busy_ns - busy_ns) / 1e9
    counting.clear()
    stop.set()
    await asyncio.gather(*callers)
    while engine.stats.num_in_flight:
        await asyncio.sleep(0.01)
    return phase


async def _call(
    engine: AsyncEngine,
    tier: Tier,
    random: Random,
    phase: Phase,
    counting: asyncio.Event,
    stop: asyncio.Event,
) -> None:
    """One user: request after request."""
    while not stop.is_set():
        prompt = tuple(random.randrange(_VOCABULARY) for _ in range(_PROMPT_TOKENS))
        # Of different lengths, so that users do not stay in step.
        num_tokens = random.randrange(_OUTPUT_TOKENS // 2, 3 * _OUTPUT_TOKENS // 2)
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        name = f"{tier}-{uuid4().hex}"
        handle = engine.submit(Request(request_id=name, prompt=prompt, params=params, tier=tier))
        num_counted, first_s, last_s = 0, 0.0, 0.0
        async for news in handle:
            if stop.is_set():
                handle.cancel()
            if isinstance(news, StreamDelta) and counting.is_set():
                last_s = time.perf_counter()
                first_s = first_s or last_s
                num_counted += len(news.token_ids)
                phase.tokens[tier] += len(news.token_ids)
            elif isinstance(news, Completion):
                phase.metered_ns[tier] += handle.charge.total()[0]
                phase.metered_tokens[tier] += len(news.token_ids)
        if num_counted > _OUTPUT_TOKENS // 4 and last_s > first_s:
            phase.speeds[tier].append((num_counted - 1) / (last_s - first_s))


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    config = LLMConfig(
        weights=options.weights,
        max_batch=options.peak_users,
        kv_tokens=options.peak_users * 512,
        speculation="lookup" if options.guess else "off",
        guesses_for="fast",
    )
    mock = MockScript(step_s=options.step_ms / 1000, row_s=options.row_ms / 1000) if options.mock else None
    spec = EngineSpec(model="" if options.mock else options.model, mock=mock, config=config)
    phases: dict[str, dict[Tier, int]] = {
        "peak": {"standard": options.peak_users},
        "standard": {"standard": options.users},
        "fast": {"standard": options.users, "fast": options.fast},
        "batch": {"standard": options.users, "batch": options.batch},
    }
    async with await AsyncEngine.start(spec) as engine:
        ran = {
            name: await run_phase(engine, users, options.seconds, options.seed)
            for name, users in phases.items()
        }
    figures = {name: phase.figures(phases[name]) for name, phase in ran.items()}
    alone, beside = ran["standard"], ran["batch"]
    alone_s = alone.busy_s / max(1, alone.tokens["standard"])
    added_s = (beside.busy_s - alone_s * beside.tokens["standard"]) / max(1, beside.tokens["batch"])
    fast, standard = figures["fast"]["fast"], figures["fast"]["standard"]
    return {
        "phases": {n: {t: vars(f) for t, f in each.items()} for n, each in figures.items()},
        "standard_share_of_peak": figures["standard"]["standard"].tokens_per_s
        / figures["peak"]["standard"].tokens_per_s,
        "fast_ratio": fast.user_tokens_per_s / standard.user_tokens_per_s,
        "batch_metered_ratio": figures["batch"]["batch"].engine_us / figures["batch"]["standard"].engine_us,
        "batch_added_ratio": added_s / alone_s,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print JSON, and say whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="a model folder")
    parser.add_argument("--weights", default="w8a8")
    parser.add_argument("--peak-users", type=int, default=64)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--fast", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guess", action="store_true", help="guess tokens of fast requests")
    parser.add_argument("--mock", action="store_true", help="predict with a mock of these costs")
    parser.add_argument("--step-ms", type=float, default=7.0)
    parser.add_argument("--row-ms", type=float, default=0.65)
    options = parser.parse_args(arguments)
    if bool(options.model) == options.mock:
        parser.error("give a model folder, or --mock")
    found = asyncio.run(_measure(options))
    print(json.dumps(found, indent=1))
    targets = {
        "standard_share_of_peak": found["standard_share_of_peak"] >= _STANDARD_TARGET,
        "fast_ratio": found["fast_ratio"] >= _FAST_TARGET,
        "batch_added_ratio": found["batch_added_ratio"] <= _BATCH_TARGET,
    }
    print(json.dumps({"targets met": targets}))
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
