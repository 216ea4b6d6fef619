"""What this machine is, and what it can do: the limits that every speed is a share of.

Rates are measured with the same instructions that the kernels use: the native extension's own loops, and
on the numpy twin what numpy itself reaches. Medians of short runs, so a busy machine shows a lower limit;
`busy_share` says how busy it is. What a model needs of these limits is not here (`costs.roofline`).
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.core import UsageError
from tokenmill.kernels.isa import NUMPY, available_isas, choose_isa, default_threads, load_native

__all__ = [
    "QUICK_WORKING_SETS_MB",
    "WORKING_SETS_MB",
    "Cache",
    "Hardware",
    "MachineLimits",
    "busy_share",
    "measure_machine",
    "read_hardware",
]

WORKING_SETS_MB = (1, 2, 8, 32, 100, 135, 270)
QUICK_WORKING_SETS_MB = (1, 32, 135)

_ROOT = Path("/")
_FLAGS = ("avx2", "avx512_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")
_GEMM_SIZE = 768


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One data cache. `num_cpus` processors share it."""

    level: int
    num_bytes: int
    num_cpus: int


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the operating system says of the machine and of what this process may use of it.

    `cpu_quota` is the control group's limit in processors, None without one. `huge_pages` is the setting
    of transparent huge pages (`always`, `madvise`, `never`), empty if the system has none. An unknown
    size is None, an unknown name empty. `cpu_flags` are those instruction sets of the processor that the
    kernels use or could use, by the system's names, whether or not this process may use them.
    """

    cpu_model: str
    cpu_flags: tuple[str, ...]
    architecture: str
    num_cpus: int
    num_usable_cpus: int
    cpu_quota: float | None
    caches: tuple[Cache, ...]
    memory_total: int | None
    memory_available: int | None
    huge_pages: str
    load_average: float


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """Measured rates, all threads together. TOPS are 10^12 operations a second, a multiply-add is two.

    `read_gb_s` is 10^9 bytes a second by working set in 10^6 bytes, growing. `bf16_tops` is the rate of
    what the instruction set multiplies bf16 weights with: float32 where there is nothing narrower.
    """

    isa: str
    num_threads: int
    int8_tops: float
    bf16_tops: float
    read_gb_s: Mapping[int, float]


def measure_machine(
    *,
    isa: str | None = None,
    num_threads: int | None = None,
    working_sets_mb: Sequence[int] = WORKING_SETS_MB,
    num_runs: int = 3,
    seconds: float = 0.05,
) -> MachineLimits:
    """Measure the limits: about `num_runs` x `seconds` for each rate and each working set.

    `isa` and `num_threads` default to what the engine would use. A working set above a quarter of the
    available memory is left out. Raises UsageError for an instruction set that is not available.
    """
    isa = isa or choose_isa()
    if isa not in available_isas():
        raise UsageError(f"no instruction set {isa!r} here", hint=f"available: {', '.join(available_isas())}")
    threads = num_threads or default_threads()
    available = read_hardware().memory_available
    sizes = [mb for mb in sorted(set(working_sets_mb)) if available is None or mb * 4e6 <= available]
    sizes = sizes or [min(working_sets_mb)]
    read, operate = _probes(isa, threads, seconds)
    passes = [
        ([operate(True), operate(False)], [read(mb * 1_000_000) for mb in sizes]) for _ in range(num_runs)
    ]
    int8, bf16 = (statistics.median(ops[kind] for ops, _ in passes) for kind in (0, 1))
    rates = [statistics.median(reads[i] for _, reads in passes) for i in range(len(sizes))]
    return MachineLimits(
        isa=isa,
        num_threads=threads,
        int8_tops=int8 / 1e12,
        bf16_tops=bf16 / 1e12,
        read_gb_s={mb: rate / 1e9 for mb, rate in zip(sizes, rates, strict=True)},
    )


def read_hardware(root: Path = _ROOT) -> Hardware:
    """Read the machine's description; `root` is where `proc` and `sys` are."""
    memory = _memory(root / "proc/meminfo")
    cpu = _cpu_fields(root / "proc/cpuinfo")
    flags = (cpu.get("flags") or cpu.get("Features", "")).split()
    return Hardware(
        cpu_model=cpu.get("model name") or cpu.get("Model") or platform.processor(),
        cpu_flags=tuple(flag for flag in _FLAGS if flag in flags),
        architecture=platform.machine(),
        num_cpus=os.cpu_count() or 1,
        num_usable_cpus=default_threads(),
        cpu_quota=_cpu_quota(root),
        caches=_caches(root / "sys/devices/system/cpu/cpu0/cache"),
        memory_total=memory.get("MemTotal"),
        memory_available=memory.get("MemAvailable"),
        huge_pages=_chosen(_read(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        load_average=os.getloadavg()[0],
    )


def busy_share(seconds: float = 0.25, root: Path = _ROOT) -> float:
    """The share of all processors that others use now, from 0 to 1; watches for `seconds`, asleep.

    0 where the system does not tell. Time that a hypervisor gave to other machines counts as used.
    """
    before, own = _cpu_times(root), time.process_time()
    time.sleep(seconds)
    after, own = _cpu_times(root), time.process_time() - own
    if before is None or after is None or after[1] <= before[1]:
        return 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    used, total = after[0] - before[0] - own * ticks, after[1] - before[1]
    return min(1.0, max(0.0, used / total))


def _probes(isa: str, threads: int, seconds: float) -> tuple[Callable[[int], float], Callable[[bool], float]]:
    """Two measurements: bytes a second for a size, and operations a second for int8 or not."""
    if isa == NUMPY:
        return (lambda size: _numpy_read(size, seconds)), (lambda _int8: _numpy_operate(seconds))
    native: Any = load_native()
    return (
        lambda size: float(native.read_bandwidth(isa, threads, size, seconds)),
        lambda int8: float(native.op_rate(isa, threads, int8, seconds)),
    )


def _numpy_read(num_bytes: int, seconds: float) -> float:
    values = np.ones(max(1, num_bytes // 4), np.float32)
    return values.nbytes * _rate(lambda: values.dot(values), seconds)


def _numpy_operate(seconds: float) -> float:
    """The twin multiplies integers through float32 too, so there is one rate."""
    matrix = np.ones((_GEMM_SIZE, _GEMM_SIZE), np.float32)
    return 2.0 * _GEMM_SIZE**3 * _rate(lambda: matrix @ matrix, seconds)


def _rate(work: Callable[[], object], seconds: float) -> float:
    """Calls a second, after one that is not counted."""
    work()
    start = time.perf_counter()
    count, elapsed = 0, 0.0
    while elapsed < seconds:
        work()
        count += 1
        elapsed = time.perf_counter() - start
    return count / elapsed


def _read(path: Path) -> str:
    """The text of a file of the system; empty if there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_fields(path: Path) -> dict[str, str]:
    """The fields of `/proc/cpuinfo`, of the last processor listed."""
    fields = (line.partition(":") for line in _read(path).splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


def _memory(path: Path) -> dict[str, int]:
    """Bytes by the field names of `/proc/meminfo`."""
    lines = (line.split() for line in _read(path).splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def _caches(folder: Path) -> tuple[Cache, ...]:
    caches = [_cache(index) for index in sorted(folder.glob("index*"))]
    return tuple(cache for cache in caches if cache is not None)


def _cache(index: Path) -> Cache | None:
    """A data or unified cache; None for one of instructions, or one that the system does not describe."""
    size, level = _read(index / "size").strip(), _read(index / "level").strip()
    kind = _read(index / "type").strip()
    if kind not in ("Data", "Unified") or not size.endswith("K") or not size[:-1].isdigit():
        return None
    cpus = _num_listed(_read(index / "shared_cpu_list"))
    return Cache(level=int(level), num_bytes=int(size[:-1]) * 1024, num_cpus=cpus)


def _num_listed(text: str) -> int:
    """How many processors a list such as `0-1,4` names."""
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1 if first.isdigit() else 0
    return max(1, count)


def _cpu_quota(root: Path) -> float | None:
    """The tightest limit of the control groups of this process (version 2, then version 1)."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        parents = [Path(group.strip("/")), *Path(group.strip("/")).parents]
        for folder in parents:
            if number == "0":
                limits.append(_quota(_read(root / "sys/fs/cgroup" / folder / "cpu.max").split()))
            elif "cpu" in controllers.split(","):
                base = root / "sys/fs/cgroup/cpu" / folder
                words = [_read(base / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
                limits.append(_quota(words))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(words: Sequence[str]) -> float | None:
    """Quota and period as processors; `max` and -1 mean no limit."""
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _chosen(text: str) -> str:
    """`madvise` of `always [madvise] never`."""
    return text.partition("[")[2].partition("]")[0]


def _cpu_times(root: Path) -> tuple[int, int] | None:
    """Ticks that all processors were used, and ticks in all, since the start."""
    words = _read(root / "proc/stat").partition("\n")[0].split()
    if len(words) < 6 or words[0] != "cpu":
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guest time is part of user time.
    ticks = [int(word) for word in words[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
