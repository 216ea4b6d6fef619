"""The targets of the engine that need neither a server nor another engine: measured, and met or missed.

    python -m scripts.targets [NAME ...] [--model NAME] [--folder DIR] [--write]

Without names everything is measured; with `--write` the measured rows of the table in docs/performance.md are
replaced and the others stay. Each round of a speed row measures the machine's limits first, so that a share
is of the same second or two. Random models are made in `--folder` when they are first asked for (12 GB for
all shapes) and stay there. Memory and cold start are those of child processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from scripts.performance_page import PAGE, fill, limits_now, markdown_table, merge_rows, section, today
from scripts.targets_models import SHAPES, STUDENT, create, random_directory, sparse_cost
from tokenmill.core import SamplingParams
from tokenmill.costs import ceiling, decode_work, prefill_work
from tokenmill.engine import LLM, LLMConfig
from tokenmill.engine.bench import BenchConfig, BenchRow, bench, machine_rates
from tokenmill.models.packing.compile import ExecutorFactory, create_executor
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library

__all__ = ["HEADER", "Measured", "Target", "main", "row_cells", "targets"]

HEADER: Final = ("what", "measured", "lowest-highest (runs)", "limit", "reached", "target", "met", "day")
_FOLDER: Final = Path(tempfile.gettempdir()) / "tokenmill_targets"
_PROMPT: Final = "Why is the sky blue?"
_LONG: Final = 8000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row's runs, in `unit`; `reached` is the share of the limit in each run, if there is a limit."""

    values: tuple[float, ...]
    unit: str
    limit: str = "-"
    reached: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row: what is measured, and the bound that its median is held to.

    `bound` is of the value, or of the share reached where `of_limit`; the value must not be below it, or
    where `most` not above. None: no target of its own.
    """

    name: str
    title: str
    measure: Callable[[], Measured]
    bound: float | None = None
    of_limit: bool = False
    most: bool = False


def row_cells(target: Target, measured: Measured) -> list[str]:
    """A row of the table."""
    median = statistics.median(measured.values)
    reached = statistics.median(measured.reached) if measured.reached else None
    bound, met = "-", "-"
    if target.bound is not None:
        value = reached if target.of_limit else median
        assert value is not None, "a share of a limit that was not measured"
        number = f"{target.bound:.0%} of the limit" if target.of_limit else _number(target.bound, measured)
        bound = f"{'at most' if target.most else 'at least'} {number}"
        met = "yes" if (value <= target.bound if target.most else value >= target.bound) else "**no**"
    spread = f"{_figure(min(measured.values))}-{_figure(max(measured.values))} ({len(measured.values)})"
    share = "-" if reached is None else f"{reached:.0%}"
    value_text = _number(median, measured) + (f" ({measured.note})" if measured.note else "")
    return [target.title, value_text, spread, measured.limit, share, bound, met, today()]


def _number(value: float, measured: Measured) -> str:
    return f"{_figure(value)} {measured.unit}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class _Speed:
    """A speed row: one phase of the benchmark on one model, in rounds."""

    model: Callable[[], ModelDirectory]
    config: BenchConfig
    phase: str
    rounds: int = 5
    create: ExecutorFactory = create_executor

    def __call__(self) -> Measured:
        model = self.model()
        plans: list[Any] = []

        def remember(directory: ModelDirectory, config: Any) -> Any:
            executor = self.create(directory, config)
            plans[:] = [executor.plan]
            return executor

        speeds, shares, tops = [], [], []
        for _ in range(self.rounds):
            limits = limits_now()
            rows = {row.phase: row for row in bench(model, self.config, limits, create=remember)}
            row = rows["prefill" if self.phase == "prefill" else "decode"]
            tops.append(self._limit(model, row, plans[0], limits))
            speeds.append(row.tokens_per_s)
            shares.append(row.tokens_per_s / tops[-1])
        limit = f"{_figure(statistics.median(tops))} tok/s, {row.limit}"
        return Measured(values=tuple(speeds), unit="tok/s", limit=limit, reached=tuple(shares))

    def _limit(self, model: ModelDirectory, row: BenchRow, plan: Any, limits: Any) -> float:
        """Tokens a second at most; of experts only those count that the rows of a step use."""
        num_rows = row.prompt if self.phase == "prefill" else row.step_batch
        cost = sparse_cost(model.architecture, plan, self.config.kv_dtype, num_rows)
        if self.phase == "prefill":
            work = prefill_work(cost, batch=row.batch, prompt=row.prompt, rows_per_step=512)
        else:
            work = decode_work(cost, batch=row.step_batch, prompt=row.prompt, output=row.output)
        return ceiling(work, machine_rates(limits)).tokens_per_s


def targets(model: str, folder: Path) -> list[Target]:
    """Every row, in the order of the table."""
    real = partial(_find, model)
    decode = {"prompt": 128, "output": 64, "num_runs": 1}

    def speed(weights: Any, batch: int, kv_dtype: Any = "bf16") -> _Speed:
        config = BenchConfig(weights=(weights,), batches=(batch,), kv_dtype=kv_dtype, **decode)
        return _Speed(model=real, config=config, phase="decode", rounds=5 if batch == 1 else 3)

    prompt = BenchConfig(weights=("w8a8",), batches=(1,), prompt=512, output=2, num_runs=1)
    prefill = _Speed(model=real, config=prompt, phase="prefill", rounds=7)
    student_config = BenchConfig(weights=("w8a8",), batches=(1,), prompt=128, output=512, num_runs=1)
    student = _Speed(
        model=partial(random_directory, folder / "student", STUDENT),
        config=student_config,
        phase="decode",
        create=create,
    )
    rows = [
        Target(name="prefill", title="prefill of 512 tokens, w8a8", measure=prefill, bound=12_000),
        Target(
            name="decode-1",
            title="decode, batch 1, w8a8",
            measure=speed("w8a8", 1),
            bound=0.75,
            of_limit=True,
        ),
        Target(name="decode-1-w4a8", title="decode, batch 1, w4a8", measure=speed("w4a8", 1)),
        Target(name="decode-64", title="decode, batch 64, w8a8", measure=speed("w8a8", 64), bound=5_000),
        Target(
            name="decode-64-int8",
            title="decode, batch 64, w8a8, int8 cache",
            measure=speed("w8a8", 64, "int8"),
            bound=5_000,
        ),
        Target(
            name="student",
            title="a student of 3.9 M multiply-adds, one stream",
            measure=student,
            bound=5_000,
        ),
    ]
    return rows + _process_targets(model) + _shape_targets(folder)


def _process_targets(model: str) -> list[Target]:
    """Memory and cold start."""
    rows = [
        Target(
            name=f"rss-{kv_dtype}",
            title=f"peak memory, w8a8, one stream of 8K tokens, {kv_dtype} cache",
            measure=partial(_memory, model, kv_dtype),
            bound=400,
            most=True,
        )
        for kv_dtype in ("bf16", "int8")
    ]
    rows.append(
        Target(
            name="cold",
            title="cold start to the first token",
            measure=partial(_cold_start, model, 9, keep=True),
            bound=2.0,
            most=True,
        )
    )
    rows.append(
        Target(
            name="cold-unpacked",
            title="the same, weights not packed yet",
            measure=partial(_cold_start, model, 3, keep=False),
        )
    )
    return rows


def _shape_targets(folder: Path) -> list[Target]:
    """Larger shapes: decode at batch 1 and a prefill of 512 tokens."""
    rows = []
    for name, config in SHAPES.items():
        model = partial(random_directory, folder / name, config)
        # One token after another for a while; longer runs only make the measurement longer.
        decode = BenchConfig(weights=("w8a8",), batches=(1,), prompt=128, output=24, num_runs=1)
        prompt = BenchConfig(weights=("w8a8",), batches=(1,), prompt=512, output=2, num_runs=1)
        for phase, bench_config, bound in (("decode", decode, 0.75), ("prefill", prompt, 0.25)):
            speed = _Speed(model=model, config=bench_config, phase=phase, rounds=3, create=create)
            title = f"{name}, {'decode, batch 1' if phase == 'decode' else 'prefill of 512 tokens'}"
            rows.append(
                Target(name=f"{name}-{phase}", title=title, measure=speed, bound=bound, of_limit=True)
            )
    return rows


def _find(model: str) -> ModelDirectory:
    return Library().find(model)


def _memory(model: str, kv_dtype: str, num_runs: int = 2) -> Measured:
    """Peaks of children that read 8,000 tokens and write 64; the note says what the last one was made of."""
    command = [sys.executable, "-m", "scripts.targets", "--model", model, "--child", kv_dtype]
    found = []
    for _ in range(num_runs):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    last = found[-1]
    note = f"{last['RssAnon'] / 1e6:.0f} MB its own, {last['RssFile'] / 1e6:.0f} MB of mapped files"
    return Measured(values=tuple(each["VmHWM"] / 1e6 for each in found), unit="MB", note=note)


def _child(model: str, kv_dtype: Any) -> dict[str, int]:
    """In a process of its own: a long stream, and what the system says of our memory after it."""
    directory = _find(model)
    llm = LLM(directory, LLMConfig(kv_dtype=kv_dtype))
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(PAGE.parent.glob("*.md")))
    ids = llm.encode(text[: 5 * _LONG])[:_LONG]
    assert len(ids) == _LONG, "the pages of docs/ are the text"
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    [completion] = llm.generate_tokens([ids], params)
    assert len(completion.token_ids) == params.max_tokens
    return _status("VmHWM", "RssAnon", "RssFile")


def _status(*names: str) -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0][:-1] in names}


def _cold_start(model: str, num_runs: int, *, keep: bool) -> Measured:
    """Seconds from the start of `tokenmill run` to the first byte of its answer.

    All files are in the system's cache after a run that does not count. Without `keep` each run has an empty
    cache of packed weights.
    """
    path = str(_find(model).path)
    seconds = []
    with tempfile.TemporaryDirectory() as home:
        # An installed package has its bytecode; without it Python would compile everything in each run.
        environment = {**os.environ, "TOKENMILL_HOME": home, "PYTHONPYCACHEPREFIX": f"{home}/bytecode"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for number in range(1 + num_runs):
            if not keep:
                _empty(Path(home))
            command = [sys.executable, "-m", "tokenmill", "run", path, _PROMPT, "--max-tokens", "1"]
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
                assert process.stdout is not None
                process.stdout.read(1)
                elapsed = time.perf_counter() - began
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} failed")
            if number:
                seconds.append(elapsed)
    return Measured(values=tuple(seconds), unit="s")


def _empty(folder: Path) -> None:
    for path in folder.rglob("*.packed"):
        path.unlink()


def _write(cells: Sequence[str], order: Sequence[str]) -> None:
    """Replace one row of the page."""
    page = PAGE.read_text(encoding="utf-8")
    table = merge_rows(section(page, "targets"), HEADER, [cells], order)
    PAGE.write_text(fill(page, "targets", table), encoding="utf-8")


def main() -> None:
    """Measure, print, and with `--write` put the rows into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--folder", type=Path, default=_FOLDER)
    parser.add_argument("--prepare", action="store_true", help="make the random models only")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_child(args.model, args.child)))
        return
    every = targets(args.model, args.folder)
    if unknown := set(args.names) - {each.name for each in every}:
        parser.error(f"no {', '.join(sorted(unknown))}; there are: {' '.join(each.name for each in every)}")
    chosen = [each for each in every if not args.names or each.name in args.names]
    for target in chosen:
        if args.prepare:
            if isinstance(target.measure, _Speed):
                target.measure.model()
            continue
        cells = row_cells(target, target.measure())
        print(markdown_table(HEADER, [cells]).splitlines()[-1], flush=True)
        if args.write:
            _write(cells, [each.title for each in every])


if __name__ == "__main__":
    main()
