"""Compares the measured limits of this machine with independent tools, and prints a table for docs/log.md.

Read bandwidth: `likwid-bench` (Debian: apt install likwid). Multiply-add rates: torch's own matrix products
(oneDNN), which are whole products with all their loads and stores, so they stay below the rate of registers.
A tool that is not installed is left out and named. Ours and theirs are measured in turn, several times, so
that a busy machine disturbs both; the medians are compared.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tokenmill.kernels.isa import default_threads
from tokenmill.kernels.probe import busy_share, measure_machine, read_hardware

WORKING_SETS_MB = (2, 32, 135)
SHAPE = (2048, 2048, 2048)
LOOPS = {"amx": "load_avx512", "avx512": "load_avx512", "avx2": "load_avx"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One limit: `ours` and `theirs` are measured in turn, in `unit`."""

    name: str
    unit: str
    tool: str
    ours: Callable[[], float]
    theirs: Callable[[], float]


def likwid_read(megabytes: int, threads: int, loop: str) -> float:
    """GB/s that `likwid-bench` reads."""
    command = ["likwid-bench", "-t", loop, "-w", f"N:{megabytes}MB:{threads}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r"^MByte/s:\s+([\d.]+)", done.stdout, flags=re.MULTILINE)
    if match is None:
        raise SystemExit(f"{' '.join(command)} printed no bandwidth")
    return float(match[1]) / 1e3


def own_read(megabytes: int) -> float:
    """GB/s that the probe reads."""
    limits = measure_machine(working_sets_mb=(megabytes,), num_runs=1, seconds=0.3)
    return limits.read_gb_s[megabytes]


def own_tops(kind: str) -> float:
    """TOPS of the probe's loop, `int8` or `bf16`."""
    limits = measure_machine(working_sets_mb=(1,), num_runs=1, seconds=0.3)
    return limits.int8_tops if kind == "int8" else limits.bf16_tops


def torch_products(threads: int) -> dict[str, Callable[[], float]]:
    """What times one matrix product of torch, in TOPS, for int8 and bf16; empty without torch."""
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = "onednn"
    m, n, k = SHAPE
    x = torch.randint(0, 255, (m, k), dtype=torch.uint8)
    w = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (n, k), dtype=torch.int8), [m, k])
    scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
    a = torch.randn(m, k).bfloat16()
    b = torch.ops.mkldnn._reorder_linear_weight(torch.randn(n, k).bfloat16(), m)

    def int8() -> object:
        return torch.ops.onednn.qlinear_pointwise(
            x, 0.01, 0, w, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    def bf16() -> object:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    return {"int8": partial(fastest, int8), "bf16": partial(fastest, bf16)}


def fastest(work: Callable[[], object], count: int = 8) -> float:
    """TOPS of the fastest of some calls after a first one."""
    work()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    m, n, k = SHAPE
    return 2.0 * m * n * k / min(seconds) / 1e12


def comparisons(isa: str, threads: int) -> list[Comparison]:
    """Everything that the installed tools can be compared on."""
    found: list[Comparison] = []
    if shutil.which("likwid-bench") and isa in LOOPS:
        found += [
            Comparison(
                name=f"read {megabytes} MB",
                unit="GB/s",
                tool=f"likwid-bench {LOOPS[isa]}",
                ours=partial(own_read, megabytes),
                theirs=partial(likwid_read, megabytes, threads, LOOPS[isa]),
            )
            for megabytes in WORKING_SETS_MB
        ]
    for kind, product in torch_products(threads).items():
        name = f"{kind} multiply-adds"
        tool = f"torch (oneDNN) product of {' x '.join(map(str, SHAPE))}"
        ours = partial(own_tops, kind)
        found.append(Comparison(name=name, unit="TOPS", tool=tool, ours=ours, theirs=product))
    return found


def table_row(comparison: Comparison, num_rounds: int) -> str:
    """Measure in turn; medians with lowest and highest, and the ratio of the medians."""
    pairs = [(comparison.ours(), comparison.theirs()) for _ in range(num_rounds)]
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    cells = [comparison.name, comparison.unit]
    for values in (ours, theirs):
        cells.append(f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})")
    ratio = statistics.median(ours) / statistics.median(theirs)
    return f"| {' | '.join([*cells, f'{ratio:.2f}', comparison.tool])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    threads, hardware, busy = default_threads(), read_hardware(), busy_share()
    isa = measure_machine(working_sets_mb=(1,), num_runs=1, seconds=0.01).isa
    print(f"{hardware.cpu_model}, {isa}, {threads} threads, {busy:.0%} used by others, {rounds} rounds:\n")
    print("| limit | unit | tokenmill | independent | ratio | tool |")
    print("|---|---|---:|---:|---:|---|")
    found = comparisons(isa, threads)
    for comparison in found:
        print(table_row(comparison, rounds), flush=True)
    if not any("likwid" in each.tool for each in found):
        print("no likwid-bench here (Debian: apt install likwid)", file=sys.stderr)
    if not any("torch" in each.tool for each in found):
        print("no torch here (pip install tokenmill[train])", file=sys.stderr)


if __name__ == "__main__":
    main()
