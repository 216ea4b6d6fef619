"""The machine probe: figures that can be checked, and files of the system that cannot be relied on."""

from pathlib import Path

import pytest

from tokenmill.core import UsageError
from tokenmill.kernels.isa import available_isas
from tokenmill.kernels.probe import (
    WORKING_SETS_MB,
    Cache,
    busy_share,
    measure_machine,
    read_hardware,
)

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu amx_int8 avx2\n"
MEMINFO = "MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    500 kB\nHugePages_Total:       0\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def cache_files(index: int, level: int, kind: str, size: str, shared: str) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu0/cache/index{index}"
    values = {"level": str(level), "type": kind, "size": size, "shared_cpu_list": shared}
    return {f"{folder}/{name}": f"{value}\n" for name, value in values.items()}


@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set_is_measured(isa: str) -> None:
    limits = measure_machine(isa=isa, num_threads=1, working_sets_mb=(2, 1), num_runs=1, seconds=0.005)
    assert (limits.isa, limits.num_threads, list(limits.read_gb_s)) == (isa, 1, [1, 2])
    assert 1e-5 < limits.bf16_tops < 1e3 and 1e-5 < limits.int8_tops < 1e3
    assert all(0.1 < rate < 1e4 for rate in limits.read_gb_s.values())


def test_amx_multiplies_8_bits_faster_than_the_portable_kernels() -> None:
    if "amx" not in available_isas():
        pytest.skip("this machine has no AMX")
    best = {"amx": 0.0, "portable": 0.0}
    for _ in range(20):  # whoever else runs takes rate away, so only the best of several says something
        for isa in best:
            limits = measure_machine(isa=isa, num_threads=1, working_sets_mb=(1,), seconds=0.02)
            best[isa] = max(best[isa], limits.int8_tops)
        if best["amx"] > 3 * best["portable"]:
            return
    pytest.fail(f"best of 20, int8 TOPS: {best}")


def test_the_defaults_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_ISA", available_isas()[-1])
    limits = measure_machine(working_sets_mb=(1,), num_runs=1, seconds=0.001)
    assert limits.isa == available_isas()[-1]
    assert limits.num_threads == read_hardware().num_usable_cpus


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match="no instruction set 'z80'"):
        measure_machine(isa="z80")


def test_working_sets_grow_past_the_caches() -> None:
    assert sorted(WORKING_SETS_MB) == list(WORKING_SETS_MB) and WORKING_SETS_MB[-1] >= 256


def test_hardware_is_read(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": CPUINFO,
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        **cache_files(0, 1, "Data", "48K", "0"),
        **cache_files(1, 1, "Instruction", "32K", "0"),
        **cache_files(2, 3, "Unified", "1024K", "0-2,5"),
    }
    hardware = read_hardware(write(tmp_path, files))
    assert (hardware.cpu_model, hardware.cpu_flags) == ("Some CPU @ 2 GHz", ("avx2", "amx_int8"))
    assert (hardware.memory_total, hardware.memory_available) == (1000 * 1024, 500 * 1024)
    assert hardware.caches == (
        Cache(level=1, num_bytes=48 << 10, num_cpus=1),
        Cache(level=3, num_bytes=1 << 20, num_cpus=4),
    )
    assert hardware.cpu_quota == 1.5, "the parent's limit holds"
    assert hardware.huge_pages == "madvise"


def test_the_first_version_of_control_groups_is_read(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "3:cpuacct:/x\n2:cpu:/x\n",
        "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
    }
    assert read_hardware(write(tmp_path, files)).cpu_quota == 0.5
    write(tmp_path, {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n"})
    assert read_hardware(tmp_path).cpu_quota is None


def test_a_system_that_says_nothing_is_no_error(tmp_path: Path) -> None:
    hardware = read_hardware(tmp_path)
    assert hardware.memory_total is None and hardware.memory_available is None
    assert (hardware.caches, hardware.cpu_quota, hardware.huge_pages) == ((), None, "")
    assert hardware.num_cpus >= hardware.num_usable_cpus >= 1
    assert busy_share(0.0, tmp_path) == 0.0


def test_this_machine_describes_itself() -> None:
    hardware = read_hardware()
    assert hardware.architecture
    assert hardware.memory_total is None or hardware.memory_total > 1 << 28


def test_busy_share_counts_what_others_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "proc" / "stat"
    write(tmp_path, {"proc/stat": "cpu  100 0 0 1000 0 0 0 0 0 0\n"})

    def later(_: float) -> None:
        stat.write_text("cpu  120 5 10 1150 0 0 5 10 0 0\n", encoding="utf-8")

    monkeypatch.setattr("time.sleep", later)
    assert busy_share(1.0, tmp_path) == pytest.approx(50 / 200, abs=0.02)
