"""Which memory holds what, and what reading a step's bytes from several memories takes.

A cache that is streamed through in a circle keeps nothing unless everything fits: 0.9 of its size is read
at its speed, 1.1 at that of the next level. So bytes are placed whole, never in proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenmill.core import ResourceError

__all__ = ["Level", "Placed", "Resident", "memory_seconds", "place", "sram_devices", "sram_token_seconds"]

_USABLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Level:
    """One memory: bytes, bytes a second, and the share of that speed which is reached."""

    name: str
    capacity: float
    bytes_per_s: float
    efficiency: float = 1.0
    is_cache: bool = False


@dataclass(frozen=True, kw_only=True)
class Resident:
    """Something that stays in memory: its bytes, and how many of them a step reads."""

    name: str
    num_bytes: float
    read_bytes: float


class Placed(NamedTuple):
    """Where one resident went."""

    resident: Resident
    level: Level


def place(residents: Sequence[Resident], levels: Sequence[Level]) -> tuple[Placed, ...]:
    """Put what is read most for each stored byte into the fastest level that still has room for all of it.

    Raises ResourceError if something fits nowhere.
    """
    by_speed = sorted(levels, key=lambda level: level.bytes_per_s, reverse=True)
    free = [level.capacity * (_USABLE if level.is_cache else 1.0) for level in by_speed]
    placed = []
    for resident in sorted(residents, key=_reads_per_byte, reverse=True):
        fits = [at for at, room in enumerate(free) if room >= resident.num_bytes]
        if not fits:
            raise ResourceError(
                f"{resident.name} ({resident.num_bytes / 1e9:.1f} GB) fits in no memory",
                hint="use fewer bits, more devices or a shorter context",
            )
        free[fits[0]] -= resident.num_bytes
        placed.append(Placed(resident, by_speed[fits[0]]))
    return tuple(placed)


def memory_seconds(placed: Sequence[Placed], *, parallel: bool = False) -> float:
    """Time to read a step's bytes: summed, or the longest level where different engines read at once."""
    by_level: dict[str, float] = {}
    for resident, level in placed:
        seconds = resident.read_bytes / (level.bytes_per_s * level.efficiency)
        by_level[level.name] = by_level.get(level.name, 0.0) + seconds
    return max(by_level.values(), default=0.0) if parallel else sum(by_level.values())


def sram_devices(weight_bytes: float, sram_bytes: float) -> int:
    """Devices that hold all weights where on-chip memory is all there is."""
    return -int(-weight_bytes // sram_bytes)


def sram_token_seconds(num_layers: int, layer_s: float, weight_bytes: float, bytes_per_s: float) -> float:
    """A token on a machine whose weights lie in SRAM: the time of its layers, hardly that of its bytes."""
    return num_layers * layer_s + weight_bytes / bytes_per_s


def _reads_per_byte(resident: Resident) -> float:
    return resident.read_bytes / resident.num_bytes if resident.num_bytes else 0.0
