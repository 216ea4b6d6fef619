"""The engine alone against the same engine behind HTTP, in turns, in one run.

    python -m benchmarks.serving.http_cost smollm2-135m --rounds 3

The engine alone is `AsyncEngine` in this process, so its tokens cross the process boundary as the server's.
Of many streams: tokens a second of both; the client's own processor time is measured, and what the server
would have had of it is taken off. First token: one call after another, the
prompt different each time; what HTTP and admission add is the median of the differences.
"""

import argparse
import asyncio
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reliability.client import stream
from benchmarks.reliability.server import Server, running
from tokenmill.core import Request, SamplingParams
from tokenmill.engine.serving.async_engine import AsyncEngine
from tokenmill.engine.serving.handle import StreamDelta
from tokenmill.engine.serving.messages import EngineSpec
from tokenmill.kernels import default_threads
from tokenmill.models.store.library import Library

_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "far", "away")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="words of a prompt")
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--calls", type=int, default=40, help="calls one after the other, of each kind")
    args = parser.parse_args()
    config = {"models": [{"name": "m", "model": args.model}]}
    with tempfile.TemporaryDirectory() as folder, running(config, Path(folder)) as server:
        asyncio.run(_measure(server, args))
    return 0


async def _measure(server: Server, args: argparse.Namespace) -> None:
    model = Library().find(args.model)
    tokenizer = model.tokenizer()
    async with await AsyncEngine.start(EngineSpec(model=str(model.path))) as engine:
        alone, http, corrected = [], [], []
        for number in range(args.rounds + 1):
            texts = [_text(args.prompt, number, at) for at in range(args.streams)]
            prompts = [tuple(tokenizer.encode_prompt(text)) for text in texts]
            begun_s = time.perf_counter()
            await asyncio.gather(*(_alone(engine, prompt, args.output) for prompt in prompts))
            first = args.streams * args.output / (time.perf_counter() - begun_s)
            begun_s, cpu_s = time.perf_counter(), _cpu_s()
            await asyncio.gather(*(_http(server.port, text, args.output) for text in texts))
            total_s = time.perf_counter() - begun_s
            client_s = (_cpu_s() - cpu_s) / default_threads()
            if number:  # the first round fills caches
                alone.append(first)
                http.append(args.streams * args.output / total_s)
                corrected.append(args.streams * args.output / (total_s - client_s))
        print(
            f"{args.streams} streams, {args.prompt} words in, {args.output} tokens out, {args.rounds} rounds"
        )
        print(f"engine alone   {_spread(alone)} tokens/s")
        print(f"over HTTP      {_spread(http)} tokens/s, {_ratio(http, alone):.0%}")
        print(f"less client    {_spread(corrected)} tokens/s, {_ratio(corrected, alone):.0%}")
        engine_ms, http_ms = [], []
        for at in range(args.calls + 5):
            text = _text(args.prompt, 1000, at)
            prompt = tuple(tokenizer.encode_prompt(text))
            one, other = await _alone(engine, prompt, 4), await _http(server.port, text, 4)
            if at >= 5:
                engine_ms.append(1e3 * one)
                http_ms.append(1e3 * other)
        print(f"first token, {args.calls} calls one after the other:")
        print(f"engine alone   {_spread(engine_ms)} ms")
        print(f"over HTTP      {_spread(http_ms)} ms")
        added = statistics.median(b - a for a, b in zip(engine_ms, http_ms, strict=True))
        print(f"added          {added:.2f} ms (median of the pairs' differences)")


async def _alone(engine: AsyncEngine, prompt: tuple[int, ...], num_tokens: int) -> float:
    """One request at the engine; seconds to its first token."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    begun_s, first_s = time.perf_counter(), 0.0
    async for news in engine.submit(Request(request_id=f"r{id(params)}", prompt=prompt, params=params)):
        if not first_s and isinstance(news, StreamDelta):
            first_s = time.perf_counter() - begun_s
    return first_s


async def _http(port: int, text: str, num_tokens: int) -> float:
    """The same over HTTP; seconds to its first event with text."""
    call = {"model": "m", "prompt": text, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
    begun_s, first_s = time.perf_counter(), 0.0
    async for at_s, _ in stream(port, call):
        first_s = first_s or at_s - begun_s
    return first_s


def _text(num_words: int, number: int, at: int) -> str:
    """A prompt that shares no beginning with another."""
    words = [_WORDS[(at * 7 + number * 3 + place * (1 + at % 5)) % len(_WORDS)] for place in range(num_words)]
    return f"{number} {at} {' '.join(words)}"


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):8.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    raise SystemExit(main())
