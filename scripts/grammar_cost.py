"""Measures what structured output costs a decode step, and prints a table for docs/log.md.

Answers to the same questions, which name the schema, are generated under no grammar, one of free text and
a JSON schema in turn, several rounds, so that a busy machine disturbs all of them. Counted are decode steps
of a full batch. The cost is the time of a step outside the model (planning, masks, sampling, following the
grammar) less that without a grammar: as wall time, and as processor time of the thread, which a busy machine
disturbs less. Percentages are of a whole step without a grammar. Whole steps are not compared: on a busy
machine they differ by more than this cost.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Final, NamedTuple, TypeVar
from unittest.mock import patch

from tokenmill.core import Grammar, Message, SamplingParams
from tokenmill.engine import LLM, LLMConfig
from tokenmill.engine.core import EngineCore
from tokenmill.engine.llm import Progress
from tokenmill.kernels.executor import NativeExecutor
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library

_T = TypeVar("_T")

SCHEMA: Final = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "story": {"type": "string"},
        "kind": {"enum": ["fable", "fairy tale", "report"]},
        "people": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 4},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
    },
    "required": ["title", "story", "kind", "people", "year"],
    "additionalProperties": False,
}
GRAMMARS: Final = {
    "none": None,
    "free text": Grammar(kind="regex", source=r"[\s\S]*"),
    "JSON schema": Grammar(kind="json_schema", source=json.dumps(SCHEMA)),
}


class Cost(NamedTuple):
    """Medians of the decode steps of one run, in milliseconds: outside the model, and the whole step."""

    wall_ms: float
    cpu_ms: float
    step_ms: float


def measure(llm: LLM, params: SamplingParams, batch: int) -> Cost:
    """Generate three batches of answers, the next begun where one ends, and time the steps that are full."""
    task = f"Answer with a JSON object of this schema: {json.dumps(SCHEMA)}"
    chats = [[Message(role="user", content=f"Tell me of town {i}. {task}")] for i in range(3 * batch)]
    step, model, steps = [0.0, 0.0], [0.0, 0.0], list[Cost]()

    def note(progress: Progress) -> None:
        if progress.step.num_rows == progress.step.num_sequences == batch:
            steps.append(Cost(step[0] - model[0], step[1] - model[1], progress.step.seconds * 1e3))
        step[:] = model[:] = [0.0, 0.0]

    with (
        patch.object(EngineCore, "step", _timed(EngineCore.step, step)),
        patch.object(NativeExecutor, "run", _timed(NativeExecutor.run, model)),
    ):
        llm.chat(chats, params, on_progress=note)
    return Cost(*map(statistics.median, zip(*steps, strict=True)))


def lines(runs: dict[str, list[Cost]]) -> list[str]:
    """A row for each grammar: the extra time a step, against the run without a grammar of the same round."""
    plain = runs["none"]
    step_ms = statistics.median(cost.step_ms for cost in plain)
    table = ["| grammar | wall ms | of a step | processor ms | of a step |", "|---|---:|---:|---:|---:|"]
    for name, costs in runs.items():
        if name != "none":
            wall = [cost.wall_ms - base.wall_ms for cost, base in zip(costs, plain, strict=True)]
            cpu = [cost.cpu_ms - base.cpu_ms for cost, base in zip(costs, plain, strict=True)]
            table.append(f"| {name} | {_cells(wall, step_ms)} | {_cells(cpu, step_ms)} |")
    return [f"A step without a grammar takes {step_ms:.1f} ms (median of {len(plain)} rounds).", "", *table]


def _cells(extra_ms: Sequence[float], step_ms: float) -> str:
    middle = statistics.median(extra_ms)
    return f"{middle:.2f} ({min(extra_ms):.2f}-{max(extra_ms):.2f}) | {middle / step_ms:.1%}"


def _timed(function: Callable[..., _T], total: list[float]) -> Callable[..., _T]:
    """The function, its wall and processor milliseconds added to `total`."""

    @wraps(function)
    def timed(*args: object) -> _T:
        began = time.perf_counter(), time.thread_time()
        result = function(*args)
        total[0] += (time.perf_counter() - began[0]) * 1e3
        total[1] += (time.thread_time() - began[1]) * 1e3
        return result

    return timed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What structured output costs a decode step.")
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="name of a pulled model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a text")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    model = ModelDirectory.open(Library().find(args.model).path)
    llm = LLM(model, LLMConfig(max_batch=args.batch, prefix_cache=False))
    runs: dict[str, list[Cost]] = defaultdict(list)
    for _ in range(args.rounds):
        for name, grammar in GRAMMARS.items():
            params = SamplingParams(
                max_tokens=args.tokens, ignore_eos=True, temperature=args.temperature, seed=1, grammar=grammar
            )
            runs[name].append(measure(llm, params, args.batch))
    llm.close()
    print("\n".join(lines(runs)))


if __name__ == "__main__":
    main()
