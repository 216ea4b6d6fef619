"""What `bench` and `doctor` both say of the machine: its limits, measured now, and the versions in use."""

import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from tokenmill import __version__
from tokenmill.cli.output import Output

if TYPE_CHECKING:
    from tokenmill.kernels.probe import Hardware, MachineLimits

__all__ = ["BUSY", "Machine", "busy_warning", "limits_line", "machine_fields", "measure", "version_fields"]

BUSY: Final = 0.1
"""Above this share of the processors in other hands, figures are too low to keep."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Limits as measured, what they were measured on, and the share of it that others used just before."""

    limits: "MachineLimits"
    hardware: "Hardware"
    busy: float


def measure(out: Output, *, num_threads: int | None = None, quick: bool = False) -> Machine:
    """Measure the machine; warns if others are using it."""
    from tokenmill.kernels.probe import (
        QUICK_WORKING_SETS_MB,
        WORKING_SETS_MB,
        busy_share,
        measure_machine,
        read_hardware,
    )

    hardware, busy = read_hardware(), busy_share()
    if busy > BUSY:
        out.warn(f"{busy_warning(busy, hardware.load_average)}; measure when nothing else runs")
    limits = measure_machine(
        num_threads=num_threads,
        working_sets_mb=QUICK_WORKING_SETS_MB if quick else WORKING_SETS_MB,
        num_runs=1 if quick else 3,
    )
    return Machine(limits=limits, hardware=hardware, busy=busy)


def busy_warning(busy: float, load_average: float) -> str:
    """How busy the machine is."""
    return (
        f"others use {busy:.0%} of the processors (load average {load_average:.1f}): "
        "figures and limits are lower than they could be"
    )


def limits_line(limits: "MachineLimits") -> str:
    """The limits in one line."""
    reads = ", ".join(f"{_rate(rate)} in {mb} MB" for mb, rate in limits.read_gb_s.items())
    return (
        f"measured limits of this machine ({limits.isa}, {_plural(limits.num_threads, 'thread')}): "
        f"{_rate(limits.int8_tops)} TOPS int8, {_rate(limits.bf16_tops)} TOPS bf16; GB/s read: {reads}"
    )


def machine_fields(machine: Machine) -> dict[str, Any]:
    """The machine for programs. `read_gb_s` is that of the largest working set, which no cache holds."""
    limits = machine.limits
    rates = {
        "isa": limits.isa,
        "num_threads": limits.num_threads,
        "int8_tops": limits.int8_tops,
        "bf16_tops": limits.bf16_tops,
        "read_gb_s": limits.read_gb_s[max(limits.read_gb_s)],
        "read_gb_s_by_mb": {str(mb): rate for mb, rate in limits.read_gb_s.items()},
    }
    return {**rates, **asdict(machine.hardware), "busy_share": machine.busy}


def version_fields() -> dict[str, str]:
    """Versions that decide speed."""
    import numpy

    return {
        "tokenmill": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.release()}",
    }


def _rate(value: float) -> str:
    """Three digits: `0.171`, `12.2`, `1215`."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
