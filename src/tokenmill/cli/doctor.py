"""`tokenmill doctor`: what this machine can do, and what is missing for speed, with the remedy."""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tokenmill.cli.arguments import Subparsers, add_command
from tokenmill.cli.machine import (
    BUSY,
    Machine,
    busy_warning,
    limits_line,
    machine_fields,
    measure,
    version_fields,
)
from tokenmill.cli.output import Output, format_bytes

if TYPE_CHECKING:
    from tokenmill.kernels.probe import Hardware

__all__ = ["Finding", "add_parser", "findings"]

_LOW_MEMORY: Final = 1 << 30
_LOW_DISK: Final = 2 << 30
_X86: Final = ("x86_64", "AMD64")

_DESCRIPTION = """\
Measure what this machine can do (read bandwidth for working sets from cache to memory, multiply-add rates),
and say what is missing for speed and how to get it. Nothing is changed.
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that costs speed or will fail, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class _Store:
    """The disk under the folder of models."""

    home: str
    disk_total: int
    disk_free: int


def add_parser(subparsers: Subparsers) -> None:
    """Add `doctor`."""
    parser = add_command(
        subparsers,
        "doctor",
        _doctor,
        summary="what this machine can do, and what is missing for speed",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure once, with fewer working sets (under a second)"
    )


def _doctor(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.kernels import available_isas
    from tokenmill.models.store.library import Library

    isas = available_isas()
    store = _store(Library().home)
    machine = measure(out, quick=args.quick)
    found = [*findings(machine, isas), *_disk_findings(store)]
    out.table([], _description(machine, isas, store))
    out.text(limits_line(machine.limits))
    for each in found:
        out.text(f"- {each.what}\n  {each.remedy}")
    if not found:
        out.text("nothing is missing for speed")
    out.document(
        {
            "machine": machine_fields(machine),
            "isas": list(isas),
            "store": asdict(store),
            "findings": [asdict(each) for each in found],
            "versions": version_fields(),
        }
    )
    return 0


def findings(machine: Machine, isas: Sequence[str]) -> list[Finding]:
    """What is missing for speed; `isas` are the instruction sets that run here, best first."""
    return [
        *_isa_findings(machine, isas),
        *_processor_findings(machine.hardware, machine.limits.num_threads),
        *_state_findings(machine),
    ]


def _isa_findings(machine: Machine, isas: Sequence[str]) -> Iterator[Finding]:
    hardware, used = machine.hardware, machine.limits.isa
    if tuple(isas) == ("numpy",):
        yield Finding(
            what="no native kernels: everything runs on numpy, slowly",
            remedy="install a C++ compiler (Debian: apt install g++), then: "
            "pip install --force-reinstall tokenmill",
        )
        return
    if used != isas[0]:
        yield Finding(
            what=f"TOKENMILL_ISA forces {used}, although {isas[0]} runs here", remedy="unset TOKENMILL_ISA"
        )
    if "amx" not in isas and "amx_int8" in hardware.cpu_flags:
        yield Finding(
            what="the processor has AMX, but this process does not get it",
            remedy="use Linux 5.16 or newer, outside of sandboxes that filter arch_prctl",
        )
    elif "amx" not in isas and hardware.architecture in _X86:
        yield Finding(
            what="the processor has no AMX, which multiplies 8-bit and bf16 matrices many times faster",
            remedy="use a machine with Intel Xeon of the 4th generation (Sapphire Rapids) or newer; "
            "most cloud providers rent them by the hour",
        )
    if isas[0] == "portable":
        yield Finding(
            what=f"only portable kernels run on this processor ({hardware.architecture})",
            remedy="use an x86-64 machine with AVX2 at least; AVX-512 VNNI or AMX is better",
        )


def _processor_findings(hardware: "Hardware", num_threads: int) -> Iterator[Finding]:
    quota = hardware.cpu_quota
    if quota is not None and quota < num_threads:
        yield Finding(
            what=f"a control group allows {quota:g} processors to {num_threads} threads and stops them often",
            remedy=f"raise its CPU limit, or use --threads {max(1, int(quota))}",
        )
    if hardware.num_usable_cpus < hardware.num_cpus:
        yield Finding(
            what=f"this process may use {hardware.num_usable_cpus} of {hardware.num_cpus} processors",
            remedy="widen its affinity (taskset, the container's cpuset) if it may have them all",
        )


def _state_findings(machine: Machine) -> Iterator[Finding]:
    hardware = machine.hardware
    if machine.busy > BUSY:
        yield Finding(
            what=busy_warning(machine.busy, hardware.load_average),
            remedy="measure again when nothing else runs",
        )
    if hardware.huge_pages == "never":
        yield Finding(
            what="transparent huge pages are off, so the KV cache is read with more page walks",
            remedy="as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if hardware.memory_available is not None and hardware.memory_available < _LOW_MEMORY:
        yield Finding(
            what=f"only {format_bytes(hardware.memory_available)} of memory are available",
            remedy="end what else runs, or use a smaller model, --weights w4a8",
        )


def _disk_findings(store: _Store) -> Iterator[Finding]:
    if store.disk_free < _LOW_DISK:
        yield Finding(
            what=f"only {format_bytes(store.disk_free)} are free for models in {store.home}",
            remedy="remove models (tokenmill rm), or set TOKENMILL_HOME to a larger disk",
        )


def _store(home: Path) -> _Store:
    """The disk that models go to; the folder itself need not exist yet."""
    existing = next(folder for folder in (home, *home.parents) if folder.is_dir())
    usage = shutil.disk_usage(existing)
    return _Store(home=str(home), disk_total=usage.total, disk_free=usage.free)


def _description(machine: Machine, isas: Sequence[str], store: _Store) -> list[list[str]]:
    hardware = machine.hardware
    caches = [
        f"L{cache.level} {format_bytes(cache.num_bytes)} a {cache.num_cpus} cpu" for cache in hardware.caches
    ]
    quota = "" if hardware.cpu_quota is None else f", limited to {hardware.cpu_quota:g}"
    lines = {
        "processor": f"{hardware.cpu_model or 'unknown'} ({hardware.architecture})",
        "processors": f"{hardware.num_usable_cpus} of {hardware.num_cpus} usable{quota}",
        "threads": str(machine.limits.num_threads),
        "instruction sets": f"{machine.limits.isa} in use; available: {', '.join(isas)}",
        "caches": ", ".join(caches) or "unknown",
        "memory": f"{_size(hardware.memory_available)} available of {_size(hardware.memory_total)}",
        "huge pages": hardware.huge_pages or "unknown",
        "load": f"{machine.busy:.0%} used by others now, load average {hardware.load_average:.2f}",
        "store": f"{format_bytes(store.disk_free)} free of {format_bytes(store.disk_total)} in {store.home}",
        "versions": ", ".join(f"{name} {version}" for name, version in version_fields().items()),
    }
    return [[name, text] for name, text in lines.items()]


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else format_bytes(num_bytes)
