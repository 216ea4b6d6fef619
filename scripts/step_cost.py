"""Measures what a decode step costs beside the model, and prints a table for docs/log.md.

The engine is the real one, with an executor that does nothing: its logits stay what they were. So all
that is left is planning, the flat batch, sampling, text, and the account of blocks. Processor time of the
whole process is counted, of all its threads. Every batch is run several times in turn with the others, and
the median is given; a second pass, not counted in the first, times the parts, where a part's time holds that
of its own parts.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from tokenmill.core import SamplingParams
from tokenmill.engine import LLM, LLMConfig
from tokenmill.engine.llm import Progress
from tokenmill.engine.mock import MockModel, mock_plan
from tokenmill.kernels import BufferName, F32Array, KvDtype, PackedAdapter, StepBatch
from tokenmill.models.packing.compile import ExecutorConfig
from tokenmill.models.store.directory import ModelDirectory

PARAMS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "stop": {"stop": ("\n\n",)},
    "logprobs": {"logprobs": 0},
}
PARTS: Final = (
    "speculation.speculator.Speculator.guess",
    "scheduler.Scheduler.schedule",
    "runner.Runner.run",
    "core.take_logits",
    "outputs.sample",
    "sampler.choose_tokens",
    "scheduler.Scheduler.commit",
    "step_time.StepTimeModel.observe",
    "core.EngineCore._collect",
    "steady.SteadyRun.step",
    "steady.SteadyRun._choose",
    "steady.SteadyRun._take",
)
"""What is timed, below `tokenmill.engine`. A generator counts while it runs."""


class NullExecutor:
    """An `Executor` that computes nothing. The likely tokens of its logits are letters."""

    def __init__(self, config: ExecutorConfig, vocab_size: int) -> None:
        self.plan = mock_plan(vocab_size)
        self.kv_dtype: KvDtype = "bf16"
        self.max_rows = config.max_rows
        self.max_out_rows = config.max_out_rows
        drawn = np.random.default_rng(0)
        self._logits = drawn.normal(0.0, 2.0, (config.max_out_rows, vocab_size)).astype(np.float32)
        self._logits[:, 97:123] += 12.0
        self._logits[:, 250:260] = -30.0

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        """Nothing."""

    def buffer(self, name: BufferName) -> F32Array:
        """The logits [max_out_rows, V], always the same."""
        assert name == "logits"
        return self._logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Nothing."""

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """An empty block."""
        return np.zeros(0, np.uint8)

    def set_adapter(self, slot: int, adapter: PackedAdapter | None) -> None:
        """Raises ValueError: there are no slots."""
        raise ValueError("adapter slot out of range")


def null_llm(batch: int, vocab_size: int) -> LLM:
    """An engine that computes nothing, for this many sequences."""

    def create(_model: ModelDirectory, config: ExecutorConfig) -> NullExecutor:
        return NullExecutor(config, vocab_size)

    return LLM(MockModel(), LLMConfig(max_batch=batch, kv_tokens=batch * 1024), create=create)


def run(llm: LLM, params: SamplingParams, batch: int, steps: int, prompt: int) -> list[float]:
    """Generate one batch; milliseconds of processor time of each whole decode step."""
    times = [time.process_time()]

    def note(progress: Progress) -> None:
        if progress.step.num_rows == batch == progress.step.num_out_rows:
            times.append(time.process_time())

    prompts = [[97 + (i + j) % 26 for j in range(prompt)] for i in range(batch)]
    llm.generate_tokens(prompts, [params] * batch, on_progress=note)
    return [1e3 * (after - before) for before, after in pairwise(times[1:])][:steps]


@contextmanager
def timed_parts(spent: dict[str, float]) -> Iterator[None]:
    """Add up the processor time of the parts, in milliseconds, while this is open."""
    with ExitStack() as stack:
        for part in PARTS:
            module, _, name = part.rpartition(".")
            try:
                original = _resolve(part)
            except (AttributeError, ImportError):
                continue  # a part of another version
            timed = _timed(original, part, spent)
            stack.enter_context(patch(f"tokenmill.engine.{module}.{name}", timed))
        yield


def _resolve(part: str) -> Callable[..., Any]:
    """The function of this name. Raises AttributeError or ImportError if there is none."""
    original: Callable[..., Any] = resolve_name(f"tokenmill.engine.{part}")
    return original


def _timed(original: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    @wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = original(*args, **kwargs)
        spent[part] += 1e3 * (time.perf_counter() - began)
        return _timed_items(result, part, spent) if hasattr(result, "__next__") else result

    return timed


def _timed_items(items: Iterator[Any], part: str, spent: dict[str, float]) -> Iterator[Any]:
    while True:
        began = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            spent[part] += 1e3 * (time.perf_counter() - began)
        yield item


def main() -> None:
    """Measure every batch and every kind of parameters, and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--kind", nargs="+", choices=PARAMS, default=["greedy"])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", action="store_true", help="time the parts of a step, too")
    args = parser.parse_args()
    llms = {batch: null_llm(batch, args.vocab) for batch in args.batch}
    cases = [(kind, batch) for kind in args.kind for batch in args.batch]
    medians: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        for kind, batch in cases:
            params = SamplingParams(max_tokens=args.steps + 2, ignore_eos=True, seed=1, **PARAMS[kind])
            times = run(llms[batch], params, batch, args.steps, args.prompt)
            medians[kind, batch].append(statistics.median(times))
    print("| parameters | sequences | ms a step | spread |\n|---|---:|---:|---|")
    for (kind, batch), values in medians.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"| {kind} | {batch} | {middle:.3f} | {low:.3f}-{high:.3f} |")
    for kind, batch in cases if args.parts else ():
        params = SamplingParams(max_tokens=args.steps + 2, ignore_eos=True, seed=1, **PARAMS[kind])
        spent: dict[str, float] = defaultdict(float)
        with timed_parts(spent):
            num = len(run(llms[batch], params, batch, args.steps, args.prompt))
        print(f"\n{kind}, {batch} sequences, ms a step:")
        for part, total in spent.items():
            print(f"    {total / num:8.3f}  {part}")


if __name__ == "__main__":
    main()
