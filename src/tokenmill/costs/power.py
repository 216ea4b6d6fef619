"""Reads the energy counters of this machine: processors (RAPL) and NVIDIA boards (NVML).

Energy is the difference of counters over a whole window, never sampled power. Packages are summed, with
their DRAM where it has a counter; `core` and `uncore` lie inside a package and `psys` contains it, so they
are not added. Counters wrap: whoever measures longer than about half a minute calls `poll` in between.
Where there is no counter, or no right to read it, that is said with the remedy, and nothing is made up.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

__all__ = [
    "EnergyMeter",
    "NvmlCounters",
    "PowerCounters",
    "RaplCounters",
    "Unmeasured",
    "find_counters",
    "open_nvml",
]

_POWERCAP: Final = Path("/sys/class/powercap")
_ROOT_ONLY: Final = (
    "the energy counters of the processors may be read by root only: run as root, or "
    "`sudo chmod -R a+r /sys/class/powercap/intel-rapl*` until the next start"
)


@dataclass(frozen=True, kw_only=True)
class Unmeasured:
    """Why nothing is measured here, and what would help."""

    why: str


class PowerCounters(Protocol):
    """Counters that only grow until they wrap."""

    def read(self) -> dict[str, int]:
        """Microjoules by domain."""
        ...

    def ranges(self) -> dict[str, int]:
        """By domain the microjoules at which a counter starts again; 0: never."""
        ...


@dataclass(frozen=True, kw_only=True)
class RaplCounters:
    """The packages and their DRAM under a powercap folder: counter file and range by domain."""

    domains: dict[str, tuple[Path, int]]

    def read(self) -> dict[str, int]:
        """Microjoules by domain."""
        return {name: int(path.read_text(encoding="ascii")) for name, (path, _) in self.domains.items()}

    def ranges(self) -> dict[str, int]:
        """The largest value of each counter, and one."""
        return {name: limit for name, (_, limit) in self.domains.items()}


@dataclass(frozen=True, kw_only=True)
class NvmlCounters:
    """The total energy counters of NVIDIA boards; `library` is pynvml or has its functions."""

    library: Any
    handles: tuple[Any, ...]

    def read(self) -> dict[str, int]:
        """Microjoules by board; the library counts millijoules."""
        energy = self.library.nvmlDeviceGetTotalEnergyConsumption
        return {f"gpu-{at}": 1000 * int(energy(handle)) for at, handle in enumerate(self.handles)}

    def ranges(self) -> dict[str, int]:
        """64-bit counters do not wrap."""
        return {f"gpu-{at}": 0 for at in range(len(self.handles))}


class EnergyMeter:
    """Joules since it was made. Not for several threads."""

    def __init__(self, counters: PowerCounters) -> None:
        self._counters = counters
        self._ranges = counters.ranges()
        self._last = counters.read()
        self._microjoules = dict.fromkeys(self._last, 0)

    def poll(self) -> float:
        """Joules so far, over all domains; call it before a counter can wrap twice."""
        return sum(self.by_domain().values())

    def by_domain(self) -> dict[str, float]:
        """Joules so far by domain."""
        now = self._counters.read()
        for name, value in now.items():
            grown = value - self._last[name]
            if grown < 0 and self._ranges[name]:
                grown += self._ranges[name]
            self._microjoules[name] += max(0, grown)
        self._last = now
        return {name: total / 1e6 for name, total in self._microjoules.items()}


def find_counters(root: Path = _POWERCAP) -> "RaplCounters | Unmeasured":
    """The counters of the processors. A domain that is exposed twice (MMIO) counts once."""
    domains: dict[str, tuple[Path, int]] = {}
    is_denied = False
    for name, folder in _domains(root):
        if name in domains:
            continue
        try:
            int((folder / "energy_uj").read_text(encoding="ascii"))
            limit = int((folder / "max_energy_range_uj").read_text(encoding="ascii")) + 1
        except PermissionError:
            is_denied = True
            continue
        except (OSError, ValueError):
            continue
        domains[name] = (folder / "energy_uj", limit)
    if domains and not is_denied:
        return RaplCounters(domains=domains)
    if is_denied:
        return Unmeasured(why=_ROOT_ONLY)
    return Unmeasured(why="this system shows no energy counters (usual in virtual machines and containers)")


def open_nvml() -> "NvmlCounters | Unmeasured":
    """The counters of all NVIDIA boards; needs the package nvidia-ml-py, which is not installed with us."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return Unmeasured(why="no NVIDIA boards are read: the package nvidia-ml-py is not installed")
    try:
        library.nvmlInit()
        count = int(library.nvmlDeviceGetCount())
        handles = tuple(library.nvmlDeviceGetHandleByIndex(at) for at in range(count))
        counters = NvmlCounters(library=library, handles=handles)
        counters.read()
    except library.NVMLError as error:
        return Unmeasured(why=f"the energy of NVIDIA boards cannot be read: {error}")
    return counters if handles else Unmeasured(why="there are no NVIDIA boards")


def _domains(root: Path) -> Iterator[tuple[str, Path]]:
    """Names such as `package-0` and `package-0/dram`, with their folders; nothing inside a package else."""
    # Machine registers first: the copy over MMIO may lack the memory.
    for folder in sorted(root.glob("intel-rapl*:*"), key=lambda folder: ("mmio" in folder.name, folder.name)):
        if folder.name.count(":") != 1:
            continue
        package = _name(folder)
        if not package.startswith("package-"):
            continue
        yield package, folder
        for inner in sorted([*folder.glob("intel-rapl*:*:*"), *root.glob(f"{folder.name}:*")]):
            if _name(inner) == "dram":
                yield f"{package}/dram", inner


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
