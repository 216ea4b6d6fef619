"""A mixture of experts that is larger than the memory it may use: does it run, and as fast as bytes say?

    python -m scripts.expert_memory --size-gb 3 --share 0.5

Writes a random model of Mixtral's shape (8 experts, 2 for a token; deleted afterwards), and decodes random
tokens in a child process that may have `share` of the file in memory, with everything else that it needs. Two
predictions are compared with what is measured:

- short of memory: a step's time is what it reads from memory over the memory's bandwidth, plus what was
  missing over the disk's rate (in order, past the system's cache), both measured between the steps;
- in memory: a step's time at 1 to 16 tokens is the bytes of the distinct experts that these touch, and of all
  else, over the bandwidth.

Where a memory control group can be made the child is held to the share by the system itself; elsewhere the
executor's own budget does that. What of the file the system keeps at the end is looked up. The load of the
machine is printed beside the figures: other work slows both the disk and the step.
"""

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.memory_group import forget_pages, limiter, memory_group
from tokenmill.kernels import (
    KV_BLOCK,
    EmbedTable,
    Executor,
    ExpertCacheStats,
    ExpertLinear,
    PackedExperts,
    PackedLinear,
    StepBatch,
    StepPlan,
    choose_isa,
    create_executor,
    default_threads,
    expert_cache,
)
from tokenmill.kernels.isa import load_native
from tokenmill.kernels.packing import pack_i8c
from tokenmill.kernels.twin import bf16_bits
from tokenmill.models.architecture import Architecture, Experts, Layer
from tokenmill.models.packing.layout import compile_plan
from tokenmill.models.packing.packed import PackedModel, read_packed, write_packed

__all__ = ["Step", "main", "mixtral_shaped", "random_model"]

_HIDDEN, _INNER, _VOCAB = 2048, 7168, 8192
_LAYER_BYTES = 8 * 3 * _HIDDEN * _INNER
_DATA_BYTES = 2 << 30  # of the child, where no control group can be made
_BLOCK_BYTES, _SAMPLE_BYTES = 4 << 20, 256 << 20
_RESERVE_BYTES = 256 << 20  # of the child's share: the interpreter, buffers, and pages on their way


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measured step: seconds, bytes of weights that it used, and of those what came from disk.

    The rates are what the machine gave, in bytes a second, when nobody else but its other work asked.
    """

    num_rows: int
    experts_a_layer: float
    seconds: float
    used_bytes: int
    missed_bytes: int
    num_hits: int
    num_misses: int
    read_seconds: float
    disk_rate: float = 0.0
    memory_rate: float = 0.0


def mixtral_shaped(num_layers: int) -> Architecture:
    """Mixtral 8x7B at half the width."""
    return Architecture(
        family="mixtral",
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=_INNER,
        norm_eps=1e-5,
        rope_theta=1e6,
        max_positions=4096,
        tied_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
        layers=(Layer(routed=True),) * num_layers,
        experts=Experts(num_experts=8, num_active=2, intermediate_size=_INNER, renormalise=True),
    )


def random_model(architecture: Architecture) -> PackedModel:
    """8-bit weights; the experts are views of one matrix each, so that only the file is large."""
    rng = np.random.default_rng(1)
    hidden = architecture.hidden_size

    def matrix(num_out: int, num_in: int) -> PackedLinear:
        return pack_i8c(rng.standard_normal((num_out, num_in), np.float32) / np.float32(num_in**0.5))

    def experts(linear: PackedLinear) -> PackedExperts:
        views: dict[str, Any] = {
            part: np.broadcast_to(getattr(linear, part), (8, *getattr(linear, part).shape))
            for part in ("data", "scales")
        }
        return PackedExperts(num_experts=8, linear=PackedLinear(**{**vars(linear), **views}))

    qkv, out = matrix(architecture.query_size + 2 * architecture.kv_size, hidden), matrix(hidden, hidden)
    gate_up, down = experts(matrix(2 * _INNER, hidden)), experts(matrix(hidden, _INNER))
    ones = np.ones(hidden, np.float32)
    linears, floats = {"head": matrix(_VOCAB, hidden)}, {"ln_final": ones}
    routed: dict[str, PackedExperts] = {}
    for layer in range(architecture.num_layers):
        name = f"blocks.{layer}"
        linears |= {f"{name}.qkv": qkv, f"{name}.out": out}
        routed |= {f"{name}.gate_up": gate_up, f"{name}.down": down}
        router = rng.standard_normal((8, hidden), np.float32)
        floats |= {f"{name}.ln1": ones, f"{name}.ln2": ones, f"{name}.router.norm": ones}
        floats[f"{name}.router"] = router / np.float32(hidden**0.5)
    table = EmbedTable(
        data=bf16_bits(rng.standard_normal((_VOCAB, hidden), np.float32)), scales=np.zeros(0, np.float16)
    )
    return PackedModel(embed=table, linears=linears, experts=routed, floats=floats)


class _Child:
    """Decodes random tokens, one step after the other, with whatever memory it has."""

    def __init__(self, path: Path, num_layers: int, expert_cache_bytes: int | None) -> None:
        packed = read_packed(path)
        assert packed is not None
        self._plan: StepPlan = compile_plan(mixtral_shaped(num_layers), packed)
        self._executor: Executor = create_executor(
            self._plan, max_rows=16, max_out_rows=16, num_blocks=32, expert_cache_bytes=expert_cache_bytes
        )
        self._dense_bytes = packed.num_linear_bytes
        self._rng = np.random.default_rng(2)

    def step(self, num_rows: int) -> Step:
        """One token of each of `num_rows` sequences."""
        batch = _first_tokens(self._rng.integers(0, _VOCAB, num_rows))
        before, seconds, used_bytes, num_experts = self._stats(), 0.0, self._dense_bytes, 0
        first = 0
        for index, op in enumerate(self._plan.ops):
            if isinstance(op, ExpertLinear) and op.dst == "eh":
                seconds += self._run(batch, first, index)
                used = int((self._executor.buffer("route")[:num_rows] != 0).any(axis=0).sum())
                down = self._plan.ops[index + 2]
                assert isinstance(down, ExpertLinear)
                used_bytes += used * (op.weight.expert(0).num_bytes + down.weight.expert(0).num_bytes)
                first, num_experts = index, num_experts + used
        seconds += self._run(batch, first, len(self._plan.ops))
        after = self._stats().since(before)
        return Step(
            num_rows=num_rows,
            experts_a_layer=num_experts / self._plan.shape.num_layers,
            seconds=seconds,
            used_bytes=used_bytes,
            missed_bytes=after.bytes_read,
            num_hits=after.num_hits,
            num_misses=after.num_misses,
            read_seconds=after.read_seconds,
        )

    def _run(self, batch: Any, first: int, last: int) -> float:
        began = time.perf_counter()
        self._executor.run(batch, first, last)
        return time.perf_counter() - began

    def _stats(self) -> ExpertCacheStats:
        return expert_cache(self._executor) or ExpertCacheStats(0, 0, 0, 0, 0.0)


def _first_tokens(tokens: npt.NDArray[np.int64]) -> StepBatch:
    """A step of sequences that begin, with a KV block each."""
    rows, zeros = np.arange(len(tokens) + 1, dtype=np.int32), np.zeros(len(tokens), np.int32)
    return StepBatch(
        tokens=tokens.astype(np.int32),
        positions=zeros,
        kv_slots=rows[:-1] * KV_BLOCK,
        row_starts=rows,
        block_starts=rows,
        blocks=np.stack([rows[:-1], zeros, zeros + 1], axis=1),
        out_rows=rows[:-1],
    )


def _child_main(arguments: argparse.Namespace) -> None:
    """Prints one line of JSON, then one a step."""
    path = arguments.child
    if arguments.budget:
        in_memory, steps = _steps_short(path, arguments)
    else:
        in_memory, steps = 0, _steps_resident(path, arguments)
    print(json.dumps({"file_in_memory": in_memory}))
    for step in steps:
        print(json.dumps(asdict(step)))


def _steps_short(path: Path, arguments: argparse.Namespace) -> tuple[int, list[Step]]:
    """Also what of the file the system keeps at the end. The disk is measured after every step."""
    memory = _memory_rate()
    child, steps = _Child(path, arguments.layers, arguments.budget), []
    for index in range(arguments.steps):
        step = child.step(1)
        steps.append(replace(step, disk_rate=_disk_rate(path, index)))
    in_memory = _bytes_in_memory(path)
    del child  # its memory is needed to measure the rate
    memory = (memory + _memory_rate()) / 2
    return in_memory, [replace(step, memory_rate=memory) for step in steps]


def _steps_resident(path: Path, arguments: argparse.Namespace) -> list[Step]:
    """The memory is measured between the numbers of tokens."""
    child, steps = _Child(path, arguments.layers, None), []
    for _ in range(3):
        child.step(16)
    before = _memory_rate()
    for rows in (1, 2, 4, 8, 16):
        some, after = [child.step(rows) for _ in range(arguments.steps)], _memory_rate()
        steps += [replace(step, memory_rate=(before + after) / 2) for step in some]
        before = after
    return steps


def _memory_rate() -> float:
    native: Any = load_native()
    rate: float = native.read_bandwidth(choose_isa(), default_threads(), 512 << 20, 0.5)
    return rate


def _disk_rate(path: Path, part: int) -> float:
    """Of 256 MB of the file that are read past the system's cache, in order.

    As the executor reads: in blocks of its largest size, into large pages, by as many threads as it has.
    """
    num_threads, num_parts = default_threads(), path.stat().st_size // _SAMPLE_BYTES
    first = part % num_parts * _SAMPLE_BYTES
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, num_threads * _BLOCK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with memory as buffers, ThreadPoolExecutor(num_threads) as pool:
        buffers.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(buffers, np.uint8)[:] = 1  # so that all of it is there
        views = [memoryview(buffers)[i * _BLOCK_BYTES :][:_BLOCK_BYTES] for i in range(num_threads)]

        def read(thread: int) -> int:
            step = num_threads * _BLOCK_BYTES
            places = range(first + thread * _BLOCK_BYTES, first + _SAMPLE_BYTES, step)
            return sum(os.preadv(handle, [views[thread]], place) for place in places)

        began = time.perf_counter()
        num_bytes = sum(pool.map(read, range(num_threads)))
        seconds = time.perf_counter() - began
        for view in views:
            view.release()
    os.close(handle)
    return num_bytes / seconds


def _bytes_in_memory(path: Path) -> int:
    """What of a file is in the page cache now."""
    libc = ctypes.CDLL(None)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), ctypes.c_void_p(pages.ctypes.data)
        )
        del view
        return int((pages & 1).sum()) * mmap.PAGESIZE


def _run_child(path: Path, arguments: argparse.Namespace, num_layers: int, budget: int) -> list[Any]:
    command = [sys.executable, "-m", "scripts.expert_memory", "--child", str(path)]
    command += ["--layers", str(num_layers), "--budget", str(budget), "--steps", str(arguments.steps)]
    limit = int(path.stat().st_size * arguments.share)
    forget_pages(path.parent)
    with memory_group(limit) if budget else nullcontext() as group:
        held = limiter(group, _DATA_BYTES) if budget else None
        print("limit:", "none" if not budget else "control group" if group else "the executor's budget")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=held)
    lines = done.stdout.splitlines()
    return [json.loads(line) for line in lines]


def _report_short(lines: list[Any], size: int) -> None:
    about, *steps = lines
    steps = steps[len(steps) // 4 :]  # the cache is filled first
    seconds = [step["seconds"] for step in steps]
    predicted = [_predict(step) for step in steps]
    hits, misses = (sum(step[name] for step in steps) for name in ("num_hits", "num_misses"))
    disk, memory = (
        statistics.mean(step[name] for step in steps) / 1e9 for name in ("disk_rate", "memory_rate")
    )
    print(f"disk {disk:.2f} GB/s, memory {memory:.1f} GB/s; of the file of {size / 1e9:.2f} GB ", end="")
    print(f"{about['file_in_memory'] / 1e9:.2f} are in the system's cache at the end")
    print(f"short of memory, {len(steps)} steps of 1 token: hits {hits / (hits + misses):.0%}, ", end="")
    print(f"{statistics.mean(step['missed_bytes'] for step in steps) / 1e6:.0f} MB read a step")
    mean, expected = statistics.mean(seconds), statistics.mean(predicted)
    print(f"step: measured {mean * 1e3:.0f} ms (median {statistics.median(seconds) * 1e3:.0f})", end="")
    print(f", predicted {expected * 1e3:.0f} ms, measured / predicted {mean / expected:.2f}")
    reading = statistics.mean(step["read_seconds"] for step in steps)
    print(
        f"of which waiting for experts: {reading * 1e3:.0f} ms; load of the machine {os.getloadavg()[0]:.1f}"
    )


def _report_resident(lines: list[Any]) -> None:
    _, *steps = lines
    print(f"in memory, load of the machine {os.getloadavg()[0]:.1f}:\n")
    print("| tokens | experts a layer | MB a step | measured ms | predicted ms | ratio |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rows in sorted({step["num_rows"] for step in steps}):
        mine = [step for step in steps if step["num_rows"] == rows]
        seconds, predicted = (
            statistics.median(values)
            for values in ([s["seconds"] for s in mine], [_predict(s) for s in mine])
        )
        experts, used = (
            statistics.mean(step[name] for step in mine) for name in ("experts_a_layer", "used_bytes")
        )
        print(f"| {rows} | {experts:.1f} | {used / 1e6:.0f} | {seconds * 1e3:.1f} ", end="")
        print(f"| {predicted * 1e3:.1f} | {seconds / predicted:.2f} |")


def _predict(step: Mapping[str, float]) -> float:
    missing = step["missed_bytes"] / step["disk_rate"] if step["disk_rate"] else 0.0
    return step["used_bytes"] / step["memory_rate"] + missing


def main() -> None:
    """Write the model, run both, print, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=3.0)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk that is meant (default: /tmp)")
    for name, kind in (("--child", Path), ("--layers", int), ("--budget", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return _child_main(arguments)
    num_layers = max(1, round(arguments.size_gb * 1e9 / _LAYER_BYTES))
    model = random_model(mixtral_shaped(num_layers))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "model.packed"
        write_packed(path, model.pieces())
        size, dense = path.stat().st_size, model.num_linear_bytes + model.embed.data.nbytes
        del model
        budget = int(size * arguments.share) - dense - _RESERVE_BYTES
        if budget <= 0:
            parser.error("the share is too small for what every token reads")
        _report_short(_run_child(path, arguments, num_layers, budget), size)
        _report_resident(_run_child(path, arguments, num_layers, 0))


if __name__ == "__main__":
    main()
