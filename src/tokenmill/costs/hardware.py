"""Machines by their data sheets, and what an hour of them costs, with date and source.

Peaks are dense figures. Those of processors are derived from operations a cycle at the base clock, so
measure (`tokenmill plan calibrate`) where it matters. `verified` says how far a row was checked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenmill.core import NotFoundError, UsageError
from tokenmill.costs.defaults import MachineClass
from tokenmill.costs.step import MachinePeak
from tokenmill.costs.tables import Row, optional_number, parse_rows, read_table, required, valid_date

__all__ = ["HARDWARE_FILE", "Hardware", "HourPrice", "find_hardware", "load_hardware"]

HARDWARE_FILE: Final = "hardware.csv"

_COLUMNS: Final = (
    "name",
    "vendor",
    "kind",
    "peak_bf16_tflops_dense",
    "peak_fp8_tflops_dense",
    "peak_int8_tops_dense",
    "mem_gb",
    "mem_bw_gbs",
    "sram_mb",
    "sram_bw_tbs",
    "link_gbs_per_direction",
    "tdp_w",
    "allin_kw_per_device",
    "price_usd_per_hour",
    "price_kind",
    "price_date",
    "price_source",
    "source",
    "verified",
    "note",
)
_CLASSES: Final[dict[str, MachineClass]] = {
    "GPU": "gpu",
    "TPU": "gpu",
    "ASIC": "gpu",
    "wafer": "gpu",
    "SoC": "unified",
    "edge": "unified",
    "NPU": "unified",
    "CPU": "cpu",
}


@dataclass(frozen=True, kw_only=True)
class HourPrice:
    """Dollars of one device and hour: what kind of offer, when, according to whom."""

    usd: float
    kind: str
    date: str
    source: str

    def __str__(self) -> str:
        return f"${self.usd:g} an hour ({self.kind}, {self.date}, {self.source})"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device. Tera operations a second, GB (10^9), GB a second, watts; None where nobody says.

    `mem_gb` 0: all memory is SRAM on the chip, of `sram_mb` and `sram_tb_s`. `allin_w` is the device's
    share of the power at the wall.
    """

    name: str
    vendor: str
    kind: str
    bf16_tflops: float
    fp8_tflops: float | None
    int8_tops: float | None
    mem_gb: float
    mem_gb_s: float
    sram_mb: float | None
    sram_tb_s: float | None
    link_gb_s: float | None
    tdp_w: float | None
    allin_w: float | None
    price: HourPrice | None
    source: str
    verified: str
    note: str

    @property
    def machine_class(self) -> MachineClass:
        """The class of its constants."""
        return _CLASSES[self.kind]

    @property
    def is_sram(self) -> bool:
        """Whether weights can lie in on-chip memory only."""
        return self.mem_gb == 0

    @property
    def link_bytes_per_s(self) -> float:
        """Bytes a second to another device, one direction; endless where nobody says."""
        return math.inf if self.link_gb_s is None else 1e9 * self.link_gb_s

    def peak(self, *, low_precision: bool = False) -> MachinePeak:
        """Its rates; with `low_precision` products run in 8 bits. Raises UsageError for a machine of SRAM."""
        flops = self.bf16_tflops
        if low_precision:
            flops = self.fp8_tflops or self.int8_tops or flops
        if self.is_sram:
            raise UsageError(
                f"{self.name} keeps weights in SRAM, so bandwidth does not tell its speed",
                hint="see docs/economics.md, machines of SRAM",
            )
        return MachinePeak(flops=flops * 1e12, bytes_per_s=self.mem_gb_s * 1e9)


def load_hardware(home: Path | None = None) -> tuple[Hardware, ...]:
    """All machines: the user's table if there is one, else that of the package."""
    return parse_rows(read_table(HARDWARE_FILE, home), _COLUMNS, _hardware)


def find_hardware(machines: Sequence[Hardware], name: str) -> Hardware:
    """The machine of this name, or the only one whose name contains it; case does not count.

    Raises NotFoundError with what is near.
    """
    wanted = name.strip().lower()
    exact = [machine for machine in machines if machine.name.lower() == wanted]
    near = exact or [machine for machine in machines if wanted in machine.name.lower()]
    if len(near) == 1:
        return near[0]
    if near:
        names = ", ".join(machine.name for machine in near)
        raise NotFoundError(f"{name!r} could be {names}", hint="give the whole name")
    raise NotFoundError(f"no hardware is called {name!r}", hint="`tokenmill prices --hardware` lists all")


def _hardware(row: Row) -> Hardware:
    kind = required(row, "kind")
    if kind not in _CLASSES:
        raise row.bad(f"kind is {kind!r}, none of {', '.join(_CLASSES)}")
    bf16 = optional_number(row, "peak_bf16_tflops_dense", 0.01, 1e6)
    mem_gb, mem_gb_s = (
        optional_number(row, "mem_gb", 0, 1e5),
        optional_number(row, "mem_bw_gbs", 0, 1e6),
    )
    if bf16 is None or mem_gb is None or mem_gb_s is None:
        raise row.bad("peak_bf16_tflops_dense, mem_gb and mem_bw_gbs are needed")
    allin_kw = optional_number(row, "allin_kw_per_device", 0.001, 100)
    return Hardware(
        name=required(row, "name"),
        vendor=required(row, "vendor"),
        kind=kind,
        bf16_tflops=bf16,
        fp8_tflops=optional_number(row, "peak_fp8_tflops_dense", 0.01, 1e6),
        int8_tops=optional_number(row, "peak_int8_tops_dense", 0.01, 1e6),
        mem_gb=mem_gb,
        mem_gb_s=mem_gb_s,
        sram_mb=optional_number(row, "sram_mb", 0, 1e6),
        sram_tb_s=optional_number(row, "sram_bw_tbs", 0, 1e6),
        link_gb_s=optional_number(row, "link_gbs_per_direction", 0.1, 1e5),
        tdp_w=optional_number(row, "tdp_w", 1, 1e5),
        allin_w=None if allin_kw is None else 1000 * allin_kw,
        price=_hour_price(row),
        source=required(row, "source"),
        verified=required(row, "verified"),
        note=row.fields["note"],
    )


def _hour_price(row: Row) -> HourPrice | None:
    usd = optional_number(row, "price_usd_per_hour", 0.001, 1000)
    if usd is None:
        return None
    return HourPrice(
        usd=usd,
        kind=required(row, "price_kind"),
        date=valid_date(row, "price_date"),
        source=required(row, "price_source"),
    )
