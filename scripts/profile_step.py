"""Where each microsecond of a step goes: the plan's operations, the native call, the phases in Python.

    python -m scripts.profile_step [--model NAME] [--steps prefill-512 decode-1 decode-64] [--write]

A decode step is one after 128 prompt tokens and some 32 generated ones; the prefill is one step. Operations
are timed by the native executor itself (thread 0, waiting for the others included), phases of the engine by
wrapping a few of its functions, each phase without those inside it; what is wrapped is in `_PHASES`. Figures
are medians over steps. A part's limit is the time of its bytes or of its operations, the longer one, at rates
that were measured before and after; parts that only move activations are held to the bandwidth of a nearby
cache. With `--write` the tables and the plot of docs/performance.md are made again.
"""

import argparse
import importlib
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from scripts.performance_page import PAGE, PLOT, fill, limits_now, machine_line, markdown_table
from scripts.performance_plot import plot
from tokenmill.core import SamplingParams
from tokenmill.costs import MachineRates, bandwidth_at
from tokenmill.engine import LLM, LLMConfig
from tokenmill.engine.bench import machine_rates
from tokenmill.engine.llm import Progress
from tokenmill.kernels import (
    AddNorm,
    Attend,
    Embed,
    Linear,
    NativeExecutor,
    Norm,
    Quantize,
    RopeKv,
    Select,
    StepPlan,
)
from tokenmill.kernels.probe import MachineLimits
from tokenmill.models.packing.compile import create_executor
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library

__all__ = ["STEPS", "Case", "Cost", "Part", "main", "part_costs", "part_names", "table"]

_PHASES: Final = (
    ("schedule", "tokenmill.engine.scheduler", "Scheduler.schedule"),
    ("schedule", "tokenmill.engine.scheduler", "Scheduler.commit"),
    ("schedule", "tokenmill.engine.core", "EngineCore._steady_run"),
    ("flat batch", "tokenmill.engine.runner", "_step_batch"),
    ("flat batch", "tokenmill.engine.runner", "_groups"),
    ("flat batch", "tokenmill.engine.steady", "SteadyRun._advance"),
    ("sampling", "tokenmill.engine.outputs", "sample"),
    ("sampling", "tokenmill.engine.steady", "ChoiceTable.choose"),
    ("tokens and text", "tokenmill.engine.core", "take_logits"),
    ("tokens and text", "tokenmill.engine.steady", "SteadyRun._append"),
    ("step-time model", "tokenmill.engine.step_time", "StepTimeModel.observe"),
    ("engine, the rest", "tokenmill.engine.core", "EngineCore.step"),
)
_CALL: Final = "native call, threads"
_LOOP: Final = "loop around the step"
_TOTAL: Final = "**step**"
_NUM_BEFORE, _NUM_DECODES, _MAX_ROWS = 16, 32, 512


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to be profiled: `batch` sequences with `prompt` tokens each; decode steps, or prefills."""

    name: str
    batch: int
    prompt: int
    decodes: bool

    @property
    def num_prompt_steps(self) -> int:
        """Steps that the prompts take; the first sequence is so far ahead of the last."""
        return -(-self.batch * self.prompt // _MAX_ROWS)

    @property
    def seen(self) -> int:
        """Positions that all rows of the (middle) step see, added up."""
        if self.decodes:
            generated = _NUM_BEFORE + _NUM_DECODES // 2 + self.num_prompt_steps // 2
            return self.batch * (self.prompt + generated)
        return self.batch * self.prompt * (self.prompt + 1) // 2

    @property
    def kv_tokens(self) -> int:
        """Positions that the step has to read once."""
        return self.seen if self.decodes else self.batch * self.prompt

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return self.batch if self.decodes else self.batch * self.prompt


STEPS: Final = {
    case.name: case
    for case in (
        Case(name="prefill-512", batch=1, prompt=512, decodes=False),
        Case(name="decode-1", batch=1, prompt=128, decodes=True),
        Case(name="decode-64", batch=64, prompt=128, decodes=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part needs at least in one step. `near_bytes` are activations, which a near cache holds."""

    int8_ops: float = 0.0
    float_ops: float = 0.0
    far_bytes: float = 0.0
    near_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: vars(self)[name] + vars(other)[name] for name in vars(self)})


@dataclass(frozen=True, kw_only=True)
class Part:
    """One row of a table, in seconds: median, lowest and highest over the steps."""

    name: str
    median: float
    low: float
    high: float


@dataclass
class _Clocks:
    """Seconds by phase of the step that runs; a phase's own time, without the phases inside it."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    inside: list[float] = field(default_factory=list)

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its own time added to a phase."""

        def call(*args: Any, **named: Any) -> Any:
            self.inside.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                seconds = time.perf_counter() - began
                self.seconds[phase] += seconds - self.inside.pop()
                if self.inside:
                    self.inside[-1] += seconds

        return call


@contextmanager
def _wrapped(clocks: _Clocks) -> Iterator[None]:
    """The functions of `_PHASES` are timed inside."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for phase, module, path in _PHASES:
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            original = getattr(owner, name)
            undo.append((owner, name, original))
            setattr(owner, name, clocks.timed(phase, original))
        yield
    finally:
        for owner, name, original in undo:
            setattr(owner, name, original)


def part_names(plan: StepPlan) -> list[str]:
    """The part that each operation of a plan belongs to."""
    names: list[str] = []
    into_x = ""
    for op in plan.ops:
        match op:
            case Linear(dst="qkv"):
                names.append("q, k, v")
            case Linear(dst="logits"):
                names.append("head")
            case Linear(gated=str()):
                into_x = "down"
                names.append("gate and up")
            case Linear():
                names.append(into_x)
            case Attend():
                into_x = "output"
                names.append("attention")
            case RopeKv():
                names.append("rotation, KV write")
            case Norm() | AddNorm():
                names.append("norms")
            case Quantize():
                names.append("quantising")
            case Embed() | Select():
                names.append("embedding, selection")
            case _:
                raise SystemExit(f"no part of the table for {type(op).__name__}: add it to part_names")
    return names


def part_costs(plan: StepPlan, case: Case, kv_bytes: float) -> dict[str, Cost]:
    """What each part needs at least; `kv_bytes` are those of one position in all layers."""
    costs: dict[str, Cost] = {}
    shape = plan.shape
    widths = {"x": shape.hidden_size, "y": shape.hidden_size, "z": shape.num_heads * shape.head_dim}
    widths |= {"h": shape.intermediate_size}
    for op, name in zip(plan.ops, part_names(plan), strict=True):
        rows, width = case.num_rows, shape.hidden_size
        match op:
            case Linear():
                rows = case.batch if op.rows == "L" else rows
                ops = 2.0 * rows * op.weight.num_out * op.weight.num_in
                kind = "float_ops" if op.weight.act_format == "bf16" else "int8_ops"
                cost = Cost(**{kind: ops}, far_bytes=op.weight.num_bytes)
            case Attend():
                ops = 4.0 * shape.num_heads * shape.head_dim * case.seen
                cost = Cost(float_ops=ops, far_bytes=kv_bytes / shape.num_layers * case.kv_tokens)
            case _:
                src = getattr(op, "src", "x")
                rows = case.batch if src == "y" or isinstance(op, Select) else rows
                width = shape.qkv_size if isinstance(op, RopeKv) else widths[src]
                cost = Cost(near_bytes=4.0 * rows * width)
        costs[name] = costs.get(name, Cost()) + cost
    return costs


def limit_of(cost: Cost, rates: MachineRates, working_set: float) -> tuple[float, str]:
    """Seconds that a part needs at least, and what binds it."""
    compute = cost.int8_ops / rates.int8_ops_per_s + cost.float_ops / rates.float_ops_per_s
    reads = cost.far_bytes / bandwidth_at(rates.reads, working_set)
    near = cost.near_bytes / rates.reads[0].bytes_per_s
    return max((compute, "compute"), (reads, "bandwidth"), (near, "near cache"))


def table(parts: Sequence[Part], costs: Mapping[str, Cost], limits: MachineLimits) -> str:
    """One step as a table under the line that names the machine; the last part is the whole step."""
    rates, total = machine_rates(limits), parts[-1]
    whole = Cost()
    for cost in costs.values():
        whole += cost
    whole = Cost(int8_ops=whole.int8_ops, float_ops=whole.float_ops, far_bytes=whole.far_bytes)
    working_set = whole.far_bytes
    rows = []
    for part in parts:
        cells = [part.name, f"{part.median * 1e6:,.0f}", f"{part.low * 1e6:,.0f}-{part.high * 1e6:,.0f}"]
        cells.append(f"{part.median / total.median:.1%}")
        needed = whole if part is total else costs.get(part.name)
        if needed is None:
            cells += ["-", "-", "-"]
        else:
            least, binds = limit_of(needed, rates, working_set)
            cells += [f"{least * 1e6:,.0f}", binds, f"{least / part.median:.0%}"]
        rows.append(cells)
    header = ["part", "µs", "lowest-highest", "of the step", "limit, µs", "bound by", "reached"]
    return f"{machine_line(limits, working_set)}\n\n{markdown_table(header, rows)}"


class _Profiler:
    """A model whose steps are taken apart, for cases of one batch size."""

    def __init__(self, model: ModelDirectory, case: Case) -> None:
        made: list[NativeExecutor] = []

        def create(directory: Any, config: Any) -> NativeExecutor:
            executor = create_executor(directory, config)
            if not isinstance(executor, NativeExecutor):
                raise SystemExit("the numpy twin is not profiled: build the extension")
            made.append(executor)
            return executor

        kv_tokens = case.batch * (case.prompt + 128)
        config = LLMConfig(max_batch=case.batch, max_rows=_MAX_ROWS, kv_tokens=kv_tokens, prefix_cache=False)
        self.llm = LLM(model, config, create=create)
        [self.executor] = made
        self.case = case
        self.clocks = _Clocks()
        setattr(self.executor, "run", self.clocks.timed(_CALL, self.executor.run))  # noqa: B010
        self.samples: list[dict[str, float]] = []
        self._names = part_names(self.executor.plan)
        self._rng = random.Random(5)

    def run(self, keep: bool) -> None:
        """One call of the offline engine; its steps of this case are kept, or only warm everything up."""
        case, vocab = self.case, self.executor.plan.shape.vocab_size
        prompts = [self._rng.choices(range(vocab // 4, vocab // 2), k=case.prompt) for _ in range(case.batch)]
        num_tokens = _NUM_BEFORE + _NUM_DECODES + case.num_prompt_steps if case.decodes else 1
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self._num_decodes, self._began = 0, time.perf_counter()
        self._reset()
        with _wrapped(self.clocks):
            self.llm.generate_tokens(prompts, params, on_progress=partial(self._take, keep))

    def parts(self) -> list[Part]:
        """Medians over all steps that were kept, the whole step last."""
        names = dict.fromkeys([*self._names, _CALL, *(phase for phase, *_ in _PHASES), _LOOP, _TOTAL])
        parts = []
        for name in names:
            values = [sample.get(name, 0.0) for sample in self.samples]
            median = statistics.median(values)
            parts.append(Part(name=name, median=median, low=min(values), high=max(values)))
        return parts

    def _take(self, keep: bool, progress: Progress) -> None:
        """A step has ended: what it took, by part."""
        total = time.perf_counter() - self._began
        step = progress.step
        is_decode = step.num_rows == step.num_out_rows == self.case.batch and self.case.decodes
        self._num_decodes += is_decode
        is_late = is_decode and self._num_decodes > _NUM_BEFORE
        wanted = is_late if self.case.decodes else step.num_rows == self.case.num_rows
        if keep and wanted:
            sample: dict[str, float] = defaultdict(float)
            for name, seconds in zip(self._names, self.executor.operation_seconds(), strict=True):
                sample[name] += seconds
            operations = sum(sample.values())
            sample |= self.clocks.seconds
            sample[_CALL] -= operations
            sample[_LOOP] = total - operations - sum(sample[p] for p in {_CALL, *(p for p, *_ in _PHASES)})
            sample[_TOTAL] = total
            self.samples.append(dict(sample))
        self._reset()
        self._began = time.perf_counter()

    def _reset(self) -> None:
        self.executor.time_operations()
        self.clocks.seconds.clear()


def profile(model: ModelDirectory, case: Case, num_runs: int) -> str:
    """Measure a case, the machine's limits before and after it."""
    profiler = _Profiler(model, case)
    profiler.run(keep=False)
    before = limits_now()
    for _ in range(num_runs):
        profiler.run(keep=True)
    limits = _middle(before, limits_now())
    kv_bytes = model.architecture.kv_bytes_per_token(2)
    text = table(profiler.parts(), part_costs(profiler.executor.plan, case, kv_bytes), limits)
    return f"{len(profiler.samples)} steps. {text}"


def _middle(before: MachineLimits, after: MachineLimits) -> MachineLimits:
    return MachineLimits(
        isa=before.isa,
        num_threads=before.num_threads,
        int8_tops=(before.int8_tops + after.int8_tops) / 2,
        bf16_tops=(before.bf16_tops + after.bf16_tops) / 2,
        read_gb_s={mb: (before.read_gb_s[mb] + after.read_gb_s[mb]) / 2 for mb in before.read_gb_s},
    )


def main() -> None:
    """Profile, print, and with `--write` put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--runs", type=int, help="calls of the engine; 32 decode steps, or one prefill, each")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    model = Library().find(args.model)
    for name in args.steps:
        case = STEPS[name]
        text = profile(model, case, args.runs or (5 if case.decodes else 25))
        print(f"{name}: {text}\n", flush=True)
        if args.write:
            page = fill(PAGE.read_text(encoding="utf-8"), f"profile-{name}", text)
            PAGE.write_text(page, encoding="utf-8")
            PLOT.write_text(plot(page, list(STEPS)), encoding="utf-8")
            print(f"wrote {PAGE} and {PLOT}", file=sys.stderr)


if __name__ == "__main__":
    main()
